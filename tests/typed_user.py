"""A user's program, for the type checker in its strict mode; nobody runs it."""

from collections.abc import Iterator
from pathlib import Path

from dspark_batch import (
    Audit,
    Comparison,
    Completion,
    Diff,
    DsparkBatchError,
    Engine,
    Failure,
    Generation,
    Item,
    Pair,
    RegisteredPair,
    Report,
    Request,
    Sampling,
    Spec,
    Tick,
    bench,
    check,
    diff,
    generate,
    list_pairs,
    load_pair,
    run,
    speculative_generate,
    verify,
    write_report,
)


def job(prompts: Path, out: Path) -> Report:
    spec = Spec(inputs=(str(prompts),), out=str(out), max_tokens=64, temperature=0.5)

    def observe(tick: Tick) -> None:
        print(tick.stage, tick.done, tick.gauge.busy_slots if tick.gauge else None)

    try:
        report = run(spec, observe=observe)
    except DsparkBatchError as error:
        raise SystemExit(error.exit_code) from error
    slots: int | None = report.plan["slots"] if report.plan else None
    print(report.succeeded / report.total, report.mean_acceptance_length, slots)
    return report


def answers() -> Iterator[str]:
    for row in generate(["Name a sea.", {"prompt": "Name a lake."}], family="tiny"):
        if isinstance(row, Failure):
            yield f"{row.code}: {row.message}"
        else:
            yield row.text
            completion: Completion = row
            print(completion.is_drafted, completion.finish_reason)


def one(text: str) -> Generation:
    pair: Pair = load_pair("tiny", dtype="float32")
    target, tokenizer, drafter, config = pair
    print(config.stop_ids, target.facts.vocab_size, drafter.block_size)
    return speculative_generate(target, tokenizer, drafter, text, max_new_tokens=8, stop=["."])


def own_loop(pair: Pair, ids: tuple[int, ...]) -> list[int]:
    engine = Engine(pair, slots=2)
    item = Item(0, "a", "digest", "here")
    engine.add(Request(item, ids, max_tokens=4, sampling=Sampling(temperature=0.0)), urgent=True)
    while not engine.is_idle:
        for outcome in engine.step():
            if isinstance(outcome, Completion):
                return list(outcome.token_ids)
    engine.cancel(item)
    return []


def looked_at(a: str, b: str) -> int:
    audit: Audit = verify(a, sample=3)
    found: Diff = diff(a, b)
    said = audit.to_json()
    print(said["verdict"], said["differences"][0]["says"], write_report(a).name)
    return max(audit.exit_code, found.exit_code)


def before(spec: Spec) -> tuple[int, Comparison, list[RegisteredPair]]:
    return check(spec).records, bench(spec), list_pairs()
