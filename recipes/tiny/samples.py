"""Write held-out tasks as sample inputs: `python -m recipes.tiny.samples DIR`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from recipes.tiny.corpus import Turn, held_out_turns

SEED = "samples"


def record(number: int, turn: Turn) -> dict[str, str | None]:
    """Turn a task into a record; `answer` is None where there is no single right one."""
    answer = turn.task.answer if turn.task.exact else None
    name = f"{turn.kind}-{number}"
    return {"id": name, "kind": turn.kind, "prompt": turn.task.prompt, "answer": answer}


def write_samples(directory: Path, per_kind: int = 7) -> None:
    """Write prompts.jsonl, one task of each kind, and heldout.jsonl, with answers."""
    records = [record(i, turn) for i, turn in enumerate(held_out_turns(SEED, per_kind))]
    prompts = [{key: r[key] for key in ("id", "kind", "prompt")} for r in records]
    _write(prompts[: len(prompts) // per_kind], directory / "prompts.jsonl")
    _write(records, directory / "heldout.jsonl")


def _write(records: Sequence[dict[str, str | None]], path: Path) -> None:
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in records]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Write both files into the directory named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    write_samples(parser.parse_args().directory)


if __name__ == "__main__":
    main()
