"""The page of a job: self-contained, honest about what is there, in light and in dark."""

import builtins
import re
from html.parser import HTMLParser

import pytest
from fakes import FakeEngine
from small_jobs import planned, start, write_lines

from dspark_batch import write_report
from dspark_batch.cli.main import main
from dspark_batch.errors import UsageError
from dspark_batch.record.run_dir import RunDir
from dspark_batch.types import Completion, Gauge


class Confident(FakeEngine):
    """Logs confidences, in many rounds."""

    def _outcome(self, request):
        outcome = super()._outcome(request)
        if not isinstance(outcome, Completion):
            return outcome
        logits = tuple((3.0, 1.0, 0.0, -1.0) for _ in outcome.num_drafted)
        return outcome._replace(confidence=logits)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A finished job of 20 answers and a failure, whose topics need escaping."""
    folder = tmp_path_factory.mktemp("job")
    lines = [{"prompt": f"p{n}", "topic": ["<b>&", "$x$ und $y$"][n % 2]} for n in range(20)]
    write_lines(folder / "in.jsonl", *lines, b"nope")
    start(folder, engine=Confident())
    return folder / "out.jsonl"


@pytest.fixture(scope="module")
def page(job):
    """Its page, by topic: drawing takes longer than reading."""
    return page_of(job, by="topic")


def page_of(job, **options):
    return write_report(str(job), **options).read_text(encoding="utf-8")


def heads(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_page_has_a_picture_of_everything_that_was_measured(page):
    assert heads(page) == [
        *("Throughput", "Accept length by topic", "Tokens per round", "Accept rate by position"),
        *("Confidence", "Prompt length", "Completion length", "Where the time went", "Failures"),
        *("Settings", "Models and versions"),
    ]
    assert page.count("<svg") == 7


def test_a_page_tells_the_plan_and_why(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    gauge = Gauge(1.0, 4, 0, 0, prefill_s=1.0, round_s=3.0, idle_s=0.2)
    start(tmp_path, opener=planned(gauge=lambda: gauge))
    page = page_of(tmp_path / "out.jsonl")
    assert "Plan" in heads(page)
    for told in (
        "float32",
        "because",
        "first draft length",
        "at most 5% of rounds",
    ):
        assert told in page


def time_bar(tmp_path, **sampled):
    write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    gauge = Gauge(1.0, 4, 0, 0, prefill_s=1.0, round_s=3.0, **sampled)
    start(tmp_path, opener=planned(gauge=lambda: gauge))
    page = page_of(tmp_path / "out.jsonl")
    return dict(re.findall(r"</i>([a-z ]+) <span>(.*?)</span>", page))


def test_the_time_of_rounds_is_split_as_it_was_in_the_samples(tmp_path):
    parts = time_bar(tmp_path, sampled_rounds=3, sampled_draft_s=0.02, sampled_verify_s=0.04)
    assert (parts["prefill"], parts["draft"], parts["verify"]) == ("1.0 s", "1.0 s", "2.0 s")
    assert "draft and verify" not in parts


def test_the_time_of_rounds_is_one_number_where_none_was_sampled(tmp_path):
    parts = time_bar(tmp_path)
    assert parts["draft and verify"] == "3.0 s"
    assert "draft" not in parts


def test_the_page_of_an_unfinished_job_has_its_plan_too(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, opener=planned(FakeEngine(dies_after=1)))
    assert "because" in page_of(tmp_path / "out.jsonl")


def test_a_page_tells_of_the_audits(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    start(tmp_path, verify_greedy="all")
    job = tmp_path / "out.jsonl"
    audit = {"verdict": "equal", "against": "engine", "rows": 2, "replayed": 2}
    RunDir(str(job)).write_audit(audit | {"findings": [{"says": "<odd>"}], "differences": []})
    page = page_of(job)
    assert "Audit" in heads(page)
    assert "equal plain decoding" in page
    assert "2 of 2" in page
    assert "&lt;odd&gt;" in page


def test_a_page_asks_nothing_of_a_network(page):
    assert "//" not in re.sub(r"<td>.*?</td>", "", page)  # no address of any kind
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", page)


def test_a_page_takes_its_colours_from_the_reader(page):
    assert "prefers-color-scheme: dark" in page
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--one)" in pictures
    assert not re.search(r"#[0-9a-f]{6}", pictures)  # a fixed colour would vanish in one of them


def test_texts_of_the_input_are_texts_on_the_page(page):
    assert "<b>&" not in page
    assert "&lt;b&gt;&amp; (10)" in page
    assert "$x$ und $y$ (10)" in page


def test_records_without_a_value_are_a_group_with_a_name(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"prompt": "a", "kind": "k"}, {"prompt": "b"})
    start(tmp_path)
    assert ">(none) (1)<" in page_of(tmp_path / "out.jsonl", by="kind")


def test_a_switch_reads_as_in_a_job_file(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    start(tmp_path, log_confidence=True)
    assert "<th>log_confidence</th><td>true</td>" in page_of(tmp_path / "out.jsonl")


def test_every_element_of_a_page_is_closed(page):
    class Open(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tags = []

        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "path", "use"):
                self.tags.append(tag)

        def handle_endtag(self, tag):
            if tag not in ("path", "use"):
                assert self.tags.pop() == tag

    parser = Open()
    parser.feed(page)
    assert not parser.tags


def test_a_job_that_is_not_finished_has_a_page_of_its_rows(tmp_path):
    write_lines(tmp_path / "in.jsonl", *({"prompt": f"p{n}"} for n in range(9)))
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, engine=FakeEngine(slots=1, dies_after=4))
    page = page_of(tmp_path / "out.jsonl")
    assert "Not finished: 4 of 9 rows" in page
    assert "Throughput" in heads(page)


def test_a_job_without_an_answer_has_a_page_of_its_failures(tmp_path):
    write_lines(tmp_path / "in.jsonl", b"{nope")
    start(tmp_path)
    page = page_of(tmp_path / "out.jsonl")
    assert heads(page) == [*("Where the time went", "Failures", "Settings", "Models and versions")]
    assert "in.jsonl:1: not JSON" in page


def test_the_job_says_by_which_column_unless_the_report_does(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"prompt": "p", "kind": "k", "topic": "t"})
    start(tmp_path, report_by="kind")
    assert "Accept length by kind" in page_of(tmp_path / "out.jsonl")
    assert "Accept length by topic" in page_of(tmp_path / "out.jsonl", by="topic")


def test_a_column_that_is_not_there_is_named_with_those_that_are(job, capsys):
    assert main(["report", str(job), "--report-by", "kind"]) == 2
    assert "no such input column; columns are `prompt`, `topic`." in capsys.readouterr().err


def test_a_page_of_nothing_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path / "out.jsonl")]) == 2
    assert "no job here" in capsys.readouterr().err


def test_without_matplotlib_one_line_says_how_to_get_the_page(job, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("dspark_batch.page"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"needs matplotlib: pip install 'dspark-batch\[report\]'"):
        write_report(str(job))


def test_the_same_job_gives_the_same_page(job, page):
    assert page_of(job, by="topic") == page
