"""Two runs of one input, item by item: the same, tied, or really different."""

import importlib
import json

import pytest
from fakes import FakeEngine, OtherEngine, fake_baseline, fake_opener, refuse_to_open
from small_jobs import prompts, start, write_lines

from dspark_batch.cli.main import main
from dspark_batch.diff import diff
from dspark_batch.errors import UsageError
from dspark_batch.types import Failure


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b", "c", "d"))
    start(tmp_path)
    return tmp_path


@pytest.fixture
def other(folder):
    """Start a second run, with another engine or other options; return both names."""

    def other(engine=None, **options):
        start(folder, engine=engine, out=f"{folder}/other.parquet", **options)
        return f"{folder}/out.jsonl", f"{folder}/other.parquet"

    return other


def counts(found):
    return dict(found.counts)


def spread_of(spread):
    return fake_opener(baseline=fake_baseline(spread=spread))


def test_two_runs_that_are_the_same_need_no_model(other):
    found = diff(*other(slots=1), open_engine=refuse_to_open)
    assert (found.exit_code, counts(found), found.settings) == (0, {"same": 4}, [])


def test_who_was_audited_is_no_difference(other):
    assert counts(diff(*other(verify_greedy="50%"), open_engine=refuse_to_open)) == {"same": 4}


def test_an_answer_that_parts_where_the_choice_was_clear_is_different(other):
    names = other(OtherEngine(others=frozenset({"id-b"})))
    found = diff(*names, open_engine=spread_of(1.0))
    assert (found.exit_code, counts(found)) == (3, {"same": 3, "different": 1})
    [item] = found.items
    assert (item.custom_id, item.position, item.margin, item.spread) == ("id-b", 2, 0.5, 1.0)


def test_an_answer_that_parts_at_a_tie_is_tied(other):
    names = other(OtherEngine(others=frozenset({"id-b"})))
    found = diff(*names, open_engine=spread_of(0.0))
    assert (found.exit_code, counts(found)) == (0, {"same": 3, "tied": 1})


def test_what_the_check_of_a_target_found_says_how_near_a_tie_may_be(other, monkeypatch):
    names = other(OtherEngine(others=frozenset({"id-b"})))
    module = importlib.import_module("dspark_batch.diff")
    monkeypatch.setattr(module, "divergence_of", lambda manifest: 0.5)
    assert diff(*names, open_engine=spread_of(1.0)).exit_code == 0
    assert diff(*names, open_engine=spread_of(1.01)).exit_code == 3


def test_an_answer_that_goes_on_where_the_other_ends_is_different(other):
    class EndsEarly(FakeEngine):
        def _outcome(self, request):
            answer = super()._outcome(request)
            return answer._replace(token_ids=answer.token_ids[:3], text=answer.text[:3])

    found = diff(*other(EndsEarly()), open_engine=spread_of(0.0))
    assert counts(found) == {"different": 4}
    assert {(item.position, item.b) for item in found.items} == {(3, "the end")}


def test_a_failure_is_different_from_an_answer_and_the_same_as_its_like(other):
    names = other(FakeEngine(fails_on=frozenset({"id-c"})))
    found = diff(*names, open_engine=refuse_to_open)
    assert [(item.a, item.b) for item in found.items] == [("an answer", "errored: engine")]
    assert counts(diff(names[1], names[1])) == {"same": 4}


def test_messages_of_failures_name_files_and_do_not_count(folder):
    class Fails(FakeEngine):
        def _outcome(self, request):
            return Failure(request.item, "engine", f"{id(self)}")

    for name in ("one.jsonl", "two.jsonl"):
        start(folder, engine=Fails(), out=f"{folder}/{name}")
    assert counts(diff(f"{folder}/one.jsonl", f"{folder}/two.jsonl")) == {"same": 4}


def test_items_are_matched_by_what_they_are_not_by_their_place(folder):
    write_lines(folder / "turned.jsonl", *prompts("d", "c", "b", "a"))
    start(folder, inputs=(f"{folder}/turned.jsonl",), out=f"{folder}/turned-out.jsonl")
    names = f"{folder}/out.jsonl", f"{folder}/turned-out.jsonl"
    assert counts(diff(*names, open_engine=refuse_to_open)) == {"same": 4}


def test_an_item_that_only_one_has_fails_if_both_are_finished(folder):
    start(folder, out=f"{folder}/short.jsonl", limit=3)
    names = f"{folder}/out.jsonl.run", f"{folder}/short.jsonl"
    found = diff(*names)
    assert (found.exit_code, counts(found)) == (3, {"same": 3, "only in A": 1})
    assert counts(diff(*reversed(names))) == {"same": 3, "only in B": 1}


def test_an_unfinished_run_is_compared_as_far_as_it_is(folder):
    with pytest.raises(KeyboardInterrupt):
        start(folder, out=f"{folder}/half.jsonl", engine=FakeEngine(slots=1, dies_after=2))
    found = diff(f"{folder}/out.jsonl", f"{folder}/half.jsonl")
    assert (found.exit_code, counts(found)) == (0, {"same": 2, "only in A": 2})


def test_settings_that_differ_are_said(other):
    found = diff(*other(max_tokens=5), open_engine=spread_of(1.0))
    assert found.settings == ["max_tokens is 512 in A and 5 in B"]


def test_what_is_no_run_is_refused(folder):
    with pytest.raises(UsageError, match="no job here"):
        diff(f"{folder}/out.jsonl", f"{folder}/none.jsonl")


def test_the_command_shows_what_is_not_the_same(other, capsys):
    a, b = other(FakeEngine(fails_on=frozenset({"id-c"})))
    assert main(["diff", a, b]) == 3
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "3 same, 1 different"
    assert shown[-1].split() == ["id-c", "different", "an", "answer", "errored:", "engine"]
    assert main(["diff", a, b, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["counts"]["different"] == 1
    assert main(["diff", a, a]) == 0
    assert "only" not in capsys.readouterr().out


def test_the_command_says_why_an_item_is_in_one_run_only(folder, capsys):
    write_lines(folder / "more.jsonl", *prompts("a", "b", "c", "e", "f"))
    start(folder, inputs=(f"{folder}/more.jsonl",), out=f"{folder}/more-out.jsonl")
    assert main(["diff", f"{folder}/out.jsonl", f"{folder}/more-out.jsonl"]) == 3
    assert (
        "items in one run only: 3, because the runs have other records or samples; an item is "
        "known by its id, content and sample"
    ) in capsys.readouterr().out.splitlines()
