"""The page of a report: one HTML file that needs nothing but itself."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from importlib.resources import files
from typing import NamedTuple

import jinja2

from dspark_batch.output.look import Look
from dspark_batch.output.measures import Group, Measures, Pace
from dspark_batch.output.report import Report
from dspark_batch.page import charts
from dspark_batch.record.formats import AuditJson, Manifest, TellingPlan
from dspark_batch.spec.spec import Spec
from dspark_batch.wording import count, duration, size, speed

_MOST_GROUPS = 20
_MOST_FINDINGS = 10


# Of the parts of the time bar; all others are rounds.
_COLOURS = {
    **{"loading": "--four", "writing": "--four"},
    **{"prefill": "--three", "draft": "--five", "host": "--two", "audit": "--six"},
}


class Number(NamedTuple):
    """A fact in large print."""

    name: str
    value: str
    is_bad: bool = False


class Picture(NamedTuple):
    """A chart, and the sentence that explains it."""

    title: str
    says: str
    svg: str
    is_wide: bool = False


class Time(NamedTuple):
    """A part of the time bar."""

    name: str
    seconds: float
    text: str
    colour: str  # a variable of the page


class Table(NamedTuple):
    """Rows whose first cell is a name."""

    title: str
    says: str
    rows: Sequence[Sequence[str]]
    heads: Sequence[str] = ()
    is_wide: bool = False


def page(look: Look, report: Report, measures: Measures, by: str | None) -> str:
    """Write the page.

    Args:
        look: at the job.
        report: the numbers of its rows.
        measures: what the pictures need.
        by: the column that `measures` was grouped by; None: none was chosen.
    """
    pace = measures.pace([start.began for start in look.starts])
    return filled(
        report.out,
        _headline(look, report),
        list(_numbers(report, measures, pace)),
        list(_pictures(measures, pace, by)),
        list(_tables(look, report)),
        list(_times(report)),
    )


def filled(
    title: str,
    headline: str,
    numbers: Sequence[Number],
    pictures: Sequence[Picture],
    tables: Sequence[Table],
    times: Sequence[Time] = (),
) -> str:
    """Lay out a page of these parts."""
    source = (files("dspark_batch.page") / "report.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return template.from_string(source).render(
        title=title,
        headline=headline,
        numbers=numbers,
        pictures=pictures,
        times=times,
        times_whole=duration(sum(time.seconds for time in times)),
        tables=tables,
    )


def _headline(look: Look, report: Report) -> str:
    total = look.starts[-1].total if look.starts else report.total
    began = f"begun {_moment(look.manifest['created'])}"
    if report.total < total:
        return f"Not finished: {count(report.total)} of {count(total)} rows; {began}."
    return f"{count(report.total)} rows, finished; {began}."


def _numbers(report: Report, measures: Measures, pace: Pace | None) -> Iterator[Number]:
    yield Number("answers", count(report.succeeded))
    if report.total > report.succeeded:
        yield Number("without an answer", count(report.total - report.succeeded), is_bad=True)
    yield Number("completion tokens", count(report.completion_tokens))
    if pace:
        yield Number("tokens/s", speed(pace.mean_tokens_per_s))
    if report.mean_acceptance_length is not None:
        yield Number("accept length", f"{report.mean_acceptance_length:.2f}")
    if looked_at := report.verified + report.mismatched:
        equal = f"{count(report.verified)} of {count(looked_at)}"
        yield Number("equal plain decoding", equal, is_bad=report.mismatched > 0)
    yield from _drafts(report)
    if measures.cached_tokens:
        reused = measures.cached_tokens / report.prompt_tokens
        yield Number("of prompt tokens reused", f"{reused:.0%}")
    if report.peak_memory_bytes:
        yield Number("most memory", size(report.peak_memory_bytes))


def _drafts(report: Report) -> Iterator[Number]:
    if report.drafted:
        yield Number("of drafts accepted", f"{report.accepted / report.drafted:.0%}")
    if report.looked_up:
        yield Number("of these looked up", f"{report.looked_up / report.accepted:.0%}")


def _pictures(measures: Measures, pace: Pace | None, by: str | None) -> Iterator[Picture]:
    if pace:
        says = f"Tokens of finished answers, over {duration(pace.worked_s)} of decoding."
        yield Picture("Throughput", says, charts.throughput(pace), is_wide=True)
    if by is not None and measures.groups:
        yield _picture_of_groups(measures.groups, by)
    if measures.reached:
        yield Picture(
            "Tokens per round",
            "How many tokens one pass of the target committed.",
            charts.tokens_per_round(measures.accepted_per_round),
        )
        yield Picture(
            "Accept rate by position",
            "How often the draft at a position of the block stays.",
            charts.accept_rate_by_position(measures.reached, measures.accepted),
        )
    if measures.has_confidence:
        yield Picture(
            "Confidence",
            "How likely the drafter says its drafts are to stay, before calibration, and how "
            "often they do.",
            charts.calibration(measures.confidence_bins),
        )
    if measures.prompt_lengths:
        yield _picture_of_lengths("Prompt length", measures.prompt_lengths, "prompt")
        ends = ", ".join(f"{count(n)} {why}" for why, n in measures.finish_reasons.most_common())
        yield _picture_of_lengths(
            "Completion length", measures.completion_lengths, "completion", f" Ended by: {ends}."
        )


def _picture_of_groups(groups: Mapping[str, Group], by: str) -> Picture:
    largest = sorted(groups.items(), key=lambda pair: -pair[1].answers)[:_MOST_GROUPS]
    # In the order of what is shown, so that the ends stand out.
    shown = dict(sorted(largest, key=lambda pair: -(pair[1].accept_length or 0)))
    says = f"Mean tokens per round for each value of {by}, and how many answers have it."
    if len(groups) > len(shown):
        says += f" The {len(shown)} most frequent of {count(len(groups))} values."
    title = f"Accept length by {by}"
    return Picture(title, says, charts.accept_length_by(shown), is_wide=True)


def _picture_of_lengths(title: str, tokens: Sequence[int], name: str, more: str = "") -> Picture:
    median = sorted(tokens)[len(tokens) // 2]
    says = f"Median {count(median)}, longest {count(max(tokens))} tokens.{more}"
    return Picture(title, says, charts.lengths(tokens, name))


def _times(report: Report) -> Iterator[Time]:
    """Split the last start's time as far as it was measured."""
    parts = {"loading": report.load_s, **report.decode_parts(), "writing": report.finish_s}
    for name, seconds in parts.items():
        if seconds > 0:
            yield Time(name, seconds, duration(seconds), _COLOURS.get(name, "--one"))


def _tables(look: Look, report: Report) -> Iterator[Table]:
    if report.errors_by_code:
        rows = [(code, count(number)) for code, number in report.errors_by_code.items()]
        rows += [("for example", message) for message in report.first_errors]
        yield Table("Failures", "Rows without an answer, by error.code.", rows, is_wide=True)
    if report.input_notes:
        rows = [(note, count(number)) for note, number in report.input_notes.items()]
        yield Table("Notes", "What rows note about their records.", rows, is_wide=True)
    if audit := look.run_dir.last_audit():
        yield Table("Audit", "What dspark-batch verify found.", list(_audit(audit)))
    if report.plan:
        says = "How the last start decoded; the draft length may change with every round."
        yield Table("Plan", says, list(_plan(report.plan, report)), is_wide=True)
    yield Table("Settings", "Those that are not the defaults.", list(_settings(look.spec)))
    yield Table("Models and versions", "What ran.", list(_versions(look.manifest)))
    if len(look.starts) > 1:
        rows = [
            (_moment(start.began), f"{count(start.resumed)} of {count(start.total)}")
            for start in look.starts
        ]
        says = "The job was stopped and continued."
        yield Table("Starts", says, rows, ("began to decode", "rows there already"))


def _plan(plan: TellingPlan, report: Report) -> Iterator[tuple[str, str]]:
    yield "number type", plan["dtype"]
    yield "slots", count(plan["slots"])
    yield "first draft length", count(plan["draft_length"])
    yield "why", plan["why"]
    yield "shape of passes", plan["step_shape"]
    if report.idle_share is not None:
        yield "device idle", f"at most {report.idle_share:.0%} of rounds and prefill"


def _audit(audit: AuditJson) -> Iterator[tuple[str, str]]:
    yield "verdict", audit["verdict"]
    yield "against", audit["against"]
    yield "rows checked", count(audit["rows"])
    yield "answers decoded again", count(audit["replayed"])
    for sentence in [*audit["findings"], *audit["differences"]][:_MOST_FINDINGS]:
        yield "found", sentence["says"]


def _settings(spec: Spec) -> Iterator[tuple[str, str]]:
    for field in fields(Spec):
        value = getattr(spec, field.name)
        if value != field.default:
            yield field.name, _said(value)


def _said(value: object) -> str:
    """Write a setting as a job file has it, without quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _versions(manifest: Manifest) -> Iterator[tuple[str, str]]:
    identity, spec = manifest["identity"], manifest["spec"]
    pair = spec["family"] or ("tiny" if spec["target"] is None else None)
    for name, value in (("pair", pair), ("target", spec["target"]), ("drafter", spec["drafter"])):
        if value:
            yield name, value
    for name in ("target", "drafter", "tokenizer"):
        if digest := identity.get(name):
            yield f"{name} digest", digest[:16]
    yield "number type", str(identity.get("dtype"))
    yield from manifest["versions"].items()
    yield "machine", " ".join(manifest["platform"].values())


def _moment(when: float | str) -> str:
    moment = (
        datetime.fromisoformat(when) if isinstance(when, str) else datetime.fromtimestamp(when, UTC)
    )
    return f"{moment:%Y-%m-%d %H:%M} UTC"
