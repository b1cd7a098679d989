"""The data set card of an output: what made it, and with what settings."""

from collections.abc import Iterator
from dataclasses import fields

import orjson

from dspark_batch.output.look import Look
from dspark_batch.output.report import Report
from dspark_batch.spec.spec import Spec
from dspark_batch.wording import count

# Where files lie on a machine says nothing about the rows.
_NOT_SHOWN = {
    *("inputs", "out", "resume", "overwrite", "retry_failed", "retry_where"),
    *("fsync_every", "grace"),
}
_NOT_SHOWN |= {"deadline", "max_runtime", "report_by"}


def card(job: Look, report: Report, data_file: str, licence: str | None) -> str:
    """Write the README.md of a data set repository.

    Args:
        job: that made the output.
        report: its numbers.
        data_file: where the rows are in the repository.
        licence: an identifier that the Hub knows; None: the card has none, we do not guess.
    """
    title = job.run_dir.out.stem
    parts = [_front_matter(data_file, licence), f"# {title}", _about(report)]
    parts += [f"## {name}\n\n{_table(rows)}" for name, rows in _tables(job, report)]
    return "\n\n".join(parts) + "\n"


def _front_matter(data_file: str, licence: str | None) -> str:
    lines = ["---", *([f"license: {licence}"] if licence else [])]
    lines += ["tags:", "- synthetic", "- dspark-batch", "configs:", "- config_name: default"]
    return "\n".join([*lines, "  data_files:", f"  - {data_file}", "---"])


def _about(report: Report) -> str:
    failed = report.total - report.succeeded
    lacking = f" {count(failed)} rows have no answer; their `error` says why." if failed else ""
    return (
        f"{count(report.total)} rows, generated offline by dspark-batch with speculative decoding: "
        f"the target model verified every token.{lacking}"
    )


def _tables(job: Look, report: Report) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    yield "Models", list(_models(job))
    yield "Settings", list(_settings(job.spec))
    yield "Rows", list(_rows(report))
    if audit := list(_audit(job, report)):
        yield "Audit", audit
    yield "Versions", list(job.manifest["versions"].items())


def _models(job: Look) -> Iterator[tuple[str, str]]:
    identity, family = job.manifest["identity"], job.spec.family
    if family or job.spec.target is None:
        yield "pair", family or "tiny"
    for part in ("target", "drafter"):
        named = getattr(job.spec, part) or identity.get(f"{part}_source")
        # A directory of the machine that ran it is nobody's business.
        if named and not named.startswith(("/", ".", "~")):
            yield part, named
        if digest := identity.get(part):
            yield f"{part} digest", digest
    yield "number type", str(identity.get("dtype"))


def _settings(spec: Spec) -> Iterator[tuple[str, str]]:
    always = ("max_tokens", "temperature", "sampling", "seed")
    for field in fields(Spec):
        value = getattr(spec, field.name)
        is_model = field.name in ("family", "target", "drafter")
        if field.name in _NOT_SHOWN or is_model:
            continue
        if field.name in always or value != field.default:
            yield field.name, orjson.dumps(value).decode()


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    yield "answers", count(report.succeeded)
    for code, number in report.errors_by_code.items():
        yield f"failed: {code}", count(number)
    yield "prompt tokens", count(report.prompt_tokens)
    yield "completion tokens", count(report.completion_tokens)
    if report.mean_acceptance_length is not None:
        yield "accept length", f"{report.mean_acceptance_length:.2f} tokens per round"
    if report.drafted:
        yield "drafts accepted", f"{report.accepted / report.drafted:.1%}"


def _audit(job: Look, report: Report) -> Iterator[tuple[str, str]]:
    """Say what is known of equality with plain decoding; what was found may name files."""
    if looked_at := report.verified + report.mismatched:
        yield "decoded again during the run", f"{count(looked_at)} answers"
        yield "equal to plain decoding", count(report.verified)
    if audit := job.run_dir.last_audit():
        yield "verdict of dspark-batch verify", audit["verdict"]
        yield "against", audit["against"]
        yield "rows checked", count(audit["rows"])
        yield "answers decoded again", count(audit["replayed"])


def _table(rows: list[tuple[str, str]]) -> str:
    cells = (f"| {name} | {_cell(value)} |" for name, value in rows)
    return "\n".join(["| | |", "|---|---|", *cells])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
