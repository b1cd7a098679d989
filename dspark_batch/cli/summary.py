"""What stdout says when a run is over."""

from collections.abc import Iterator

import click

from dspark_batch.output.plan import plan_text
from dspark_batch.output.report import Report
from dspark_batch.types import OF_THE_RECORD
from dspark_batch.wording import count, duration, one_line, speed

_LABEL_WIDTH = 14
_MOST_NOTES = 5


def summary(report: Report) -> str:
    """Describe a finished run in a few lines; styled, for `click.echo` to strip if need be."""
    lines = [click.style(_headline(report), bold=True), ""]
    return "\n".join([*lines, *(fact(*each) for each in _facts(report))])


def fact(label: str, text: str) -> str:
    """Write one line of a summary; without a label it belongs to the line above."""
    return click.style(f"  {label:<{_LABEL_WIDTH if label else 2}}", dim=True) + text


def _headline(report: Report) -> str:
    if not report.total:
        return "The input has no records; the output has no rows."
    if report.resumed == report.total:
        return f"Nothing to do: all {count(report.total)} rows were there already."
    if report.succeeded == report.total:
        return f"All {count(report.total)} items have an answer."
    return f"{count(report.succeeded)} of {count(report.total)} items have an answer."


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    """Yield label and text of each line; one without a label belongs to the line above."""
    yield "output", f"{report.out}   (dspark-batch show {report.out})"
    yield "rows", _rows(report)
    yield from _failures(report)
    yield from _notes(report)
    tokens = f"{count(report.prompt_tokens)} prompt, {count(report.completion_tokens)} completion"
    yield "tokens", tokens
    if report.new_tokens and report.decode_s:
        yield "speed", _speed(report)
    if report.mean_acceptance_length is not None:
        yield "speculation", _speculation(report)
    if report.verified or report.mismatched:
        yield "verified", _verified(report)
    if report.finish_s:
        yield "time", _times(report)
    if report.plan and report.new_tokens:
        yield "plan", plan_text(report.plan)
    yield from (("workers" * (not place), text) for place, text in enumerate(_workers(report)))


def _rows(report: Report) -> str:
    counts = {"succeeded": report.succeeded, "failed": report.errored, "skipped": report.skipped}
    rows = ", ".join(f"{count(n)} {status}" for status, n in counts.items() if n) or "none"
    return rows + (f"; {count(report.resumed)} of them by earlier starts" if report.resumed else "")


def _failures(report: Report) -> Iterator[tuple[str, str]]:
    if not report.errored:
        return
    codes = ", ".join(f"{count(n)} {code}" for code, n in report.errors_by_code.items())
    to_correct = sum(report.errors_by_code.get(code, 0) for code in OF_THE_RECORD)
    to_retry = report.errored - to_correct
    ways = [
        *([f"--retry-failed runs {count(to_retry)} again"] if to_retry else []),
        *([f"for {count(to_correct)} the record or an option must change"] if to_correct else []),
    ]
    yield "failures", f"{codes}   ({'; '.join(ways)})"
    for message in report.first_errors:
        yield "", one_line(message)
    more = report.errored - len(report.first_errors)
    if more:
        yield "", f"and {count(more)} more"


def _notes(report: Report) -> Iterator[tuple[str, str]]:
    """Say what rows note about their records, the most frequent first."""
    notes = [f"{note}, rows: {count(rows)}" for note, rows in report.input_notes.items()]
    yield from (("noted", one_line(note)) for note in notes[:_MOST_NOTES])
    if notes[_MOST_NOTES:]:
        yield "", f"and {count(len(notes) - _MOST_NOTES)} more"


def _speed(report: Report) -> str:
    said = f"{speed(report.new_tokens / report.decode_s)} tokens/s while decoding"
    if report.idle_share is None:
        return said
    return f"{said}; the device waited at most {report.idle_share:.0%} of its time"


def _speculation(report: Report) -> str:
    if not report.drafted:
        return "none: plain decoding"
    said = (
        f"accept length {report.mean_acceptance_length:.2f} tokens per round, "
        f"{report.accepted / report.drafted:.0%} of drafts accepted"
    )
    if not report.looked_up:
        return said
    return f"{said}, {report.looked_up / report.accepted:.0%} of these looked up"


def _verified(report: Report) -> str:
    looked_at = report.verified + report.mismatched
    took = "" if report.audit_s is None else f"; the audit took {duration(report.audit_s)}"
    return f"{count(report.verified)} of {count(looked_at)} are what plain decoding gives{took}"


def _times(report: Report) -> str:
    decoding = duration(report.decode_s) + _parts(report)
    loading, writing = duration(report.load_s), duration(report.finish_s)
    return f"loading {loading}, decoding {decoding}, writing {writing}"


def _workers(report: Report) -> Iterator[str]:
    """Say what each worker of a fleet did in this start."""
    for worker in report.workers:
        said = (
            f"{worker['name']}: {count(worker['rows'])} answers, {count(worker['tokens'])} tokens"
        )
        if report.decode_s:
            said += f", {speed(worker['tokens'] / report.decode_s)} tokens/s"
        yield said + (f"; died {count(worker['deaths'])} times" if worker["deaths"] else "")


def _parts(report: Report) -> str:
    """Say what took the time of decoding, if that was measured."""
    if report.round_s is None or not report.decode_s:
        return ""
    parts = {name: part / report.decode_s for name, part in report.decode_parts().items()}
    return f" ({', '.join(f'{name} {part:.0%}' for name, part in parts.items() if part > 0)})"
