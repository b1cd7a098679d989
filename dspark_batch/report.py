"""Write the page of a job: what came out of it, in pictures."""

from pathlib import Path

from dspark_batch.errors import UsageError
from dspark_batch.intake.json_text import sayable
from dspark_batch.output.finish import Rows
from dspark_batch.output.look import Look, look
from dspark_batch.output.measures import Measures
from dspark_batch.output.plan import plan_of
from dspark_batch.output.report import Report
from dspark_batch.record.disk import write_text
from dspark_batch.types import Item


def write_report(out: str, by: str | None = None) -> Path:
    """Write `OUT.run/report.html` for a job, finished or not, and return its path.

    Args:
        out: the output of the job.
        by: an input column whose values are compared; None: what the job's `report_by` says.

    Raises:
        UsageError: there is no such job or column, its input is gone, or matplotlib is missing.
    """
    try:
        from dspark_batch.page.page import page
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the page of a report needs {error.name}: pip install 'dspark-batch[report]', then "
            f"dspark-batch report {out}"
        ) from error
    job = look(out)
    by = by or job.spec.report_by
    with job.rows() as rows:
        measures = _measures(rows, by)
        report = _report(job, rows)
    path = job.run_dir.page
    write_text(path, page(job, report, measures, by))
    return path


def _report(job: Look, rows: Rows) -> Report:
    saved = job.run_dir.report()
    if saved is not None:
        return Report(**saved)
    resumed = job.starts[-1].resumed if job.starts else 0
    setup = job.manifest["setup"]
    plan = plan_of(setup) if setup else None
    return Report.of_rows(rows, out=job.spec.out, resumed=resumed, new_tokens=0, plan=plan)


def _group(item: Item, by: str) -> str:
    value = item.record.get(by)
    return "(none)" if value is None else sayable(str(value))


def _measures(rows: Rows, by: str | None) -> Measures:
    measures = Measures()
    columns: dict[str, None] = {}
    if by is None:
        for entry in rows.entries():
            measures.add(entry.row, entry.finished_at, None)
        return measures
    for item, entry in rows.answered():
        columns |= dict.fromkeys(item.record)
        measures.add(entry.row, entry.finished_at, _group(item, by))
    if columns and by not in columns:
        known = ", ".join(f"`{name}`" for name in columns)
        raise UsageError(f"--report-by {by}: no such input column; columns are {known}.")
    return measures
