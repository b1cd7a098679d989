from dataclasses import fields

from fakes import fake_answer
from small_jobs import start, write_lines

from dspark_batch.output.report import Report
from dspark_batch.record.formats import ReportJson
from dspark_batch.record.rows import row_of
from dspark_batch.types import Failure, Item, Request


def test_counts_what_the_rows_say():
    items = [Item(n, str(n), "d", f"in.jsonl:{n + 1}") for n in range(3)]
    answers = [fake_answer(Request(item, (1, 2, item.index), 10)) for item in items[:2]]
    rows = [row_of(outcome) for outcome in (*answers, Failure(items[2], "engine", "why"))]
    report = Report.of_rows(rows, out="o.jsonl", resumed=1, new_tokens=10)
    assert (report.total, report.succeeded, report.errored, report.skipped) == (3, 2, 1, 0)
    assert (report.prompt_tokens, report.completion_tokens) == (6, 20)
    # 9 tokens after prefill's, in rounds of 3 with 2 accepted of 4 drafts
    assert (report.rounds, report.accepted, report.drafted) == (6, 12, 24)
    assert report.mean_acceptance_length == 3.0
    assert report.exit_code == 1


def test_a_report_of_answers_alone_is_a_success(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    report = start(tmp_path)
    assert report.exit_code == 0
    assert report.load_s >= 0
    assert report.out == f"{tmp_path}/out.jsonl"


def test_a_report_in_a_file_has_the_fields_of_a_report():
    assert list(ReportJson.__annotations__) == [field.name for field in fields(Report)]
