"""The audit that rides along: who is looked at, what a mismatch does, and what it costs."""

import logging

import pytest
from fakes import FakeEngine, OtherEngine, fake_baseline, fake_opener, refuse_to_open
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.errors import EqualityError, UsageError
from dspark_batch.spec.share import draw, is_in_share, share_of
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Item, Said


def job_that_parts(*ids, spread=1.0):
    """An `open_engine` whose baseline has another answer to these items."""
    return fake_opener(baseline=fake_baseline(OtherEngine(others=frozenset(ids)), spread))


def verified(folder):
    return {row["custom_id"]: row["verified"] for row in rows_in(folder / "out.jsonl")}


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b", "c", "d"))
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "share"),
    [(None, 0), (False, 0), (True, 1), ("all", 1), ("1%", 0.01), ("2.5 %", 0.025), (0.5, 0.5)],
)
def test_a_share_has_many_spellings(asked, share):
    assert share_of(asked) == share


@pytest.mark.parametrize("asked", ["0%", "101%", "0", "1.5", "some", "nan", "-1%", 0.0])
def test_what_is_no_share_is_refused(asked):
    with pytest.raises(UsageError, match="expected all, or a share such as 1%"):
        Spec(inputs=("in.jsonl",), out="o.jsonl", verify_greedy=asked)


def item(n, sample=0):
    return Item(n, f"id-{n}", f"digest-{n}", f"in.jsonl:{n + 1}", sample_index=sample)


def test_a_share_is_of_that_size_and_holds_the_smaller_ones():
    small, large = ({n for n in range(4000) if is_in_share(item(n), share)} for share in (0.1, 0.3))
    assert small < large
    assert (360 < len(small) < 440, 1120 < len(large) < 1280) == (True, True)


def test_who_is_drawn_depends_on_the_identity_of_an_item_alone():
    moved = Item(99, "id-1", "digest-1", "other.jsonl:7")
    assert draw(moved) == draw(item(1))
    assert len({draw(item(1)), draw(item(2)), draw(item(1, sample=1))}) == 3


def test_without_the_option_nobody_looks(folder):
    start(folder)
    assert set(verified(folder).values()) == {None}


@pytest.mark.parametrize("slots", [1, 3, 50])
def test_all_answers_are_verified_and_counted(folder, slots):
    write_lines(folder / "in.jsonl", *prompts("a", "b", "c"), b"nope", *prompts("d"))
    report = start(folder, verify_greedy="all", slots=slots)
    assert list(verified(folder).values()) == [True, True, True, None, True]
    assert (report.verified, report.mismatched, report.exit_code) == (4, 0, 1)
    assert report.audit_s > 0


def test_who_watches_is_told_that_answers_are_compared(folder):
    ticks = []
    start(folder, observe=ticks.append, verify_greedy="all", slots=2)
    decoding = [(tick.done, tick.doing) for tick in ticks if tick.stage == "decode"]
    compares = "comparing with plain decoding"
    assert decoding == [
        *((0, ""), (0, compares), (1, ""), (2, "")),
        *((2, compares), (3, ""), (4, "")),
    ]


def test_the_engine_is_told_of_every_second_that_was_not_its_own(folder):
    told = []
    opener = fake_opener()

    def opens(spec, manifest):
        return opener(spec, manifest)._replace(leave_out=told.append)

    report = start(folder, opener=opens, verify_greedy="all", slots=2)
    assert sum(told) == pytest.approx(report.audit_s) != 0


def test_a_share_is_the_same_after_a_resume(folder):
    write_lines(folder / "in.jsonl", *prompts(*map(str, range(40))))
    start(folder, verify_greedy="40%")
    whole = verified(folder)
    with pytest.raises(KeyboardInterrupt):
        start(folder, verify_greedy="40%", overwrite=True, engine=FakeEngine(dies_after=17))
    start(folder, verify_greedy="40%")
    assert verified(folder) == whole
    assert set(whole.values()) == {True, None}


def test_a_mismatch_stops_the_run_with_its_story(folder):
    with pytest.raises(EqualityError) as error:
        start(folder, opener=job_that_parts("id-b"), verify_greedy=True)
    assert error.value.exit_code == 3
    assert str(error.value).startswith(
        f"not what plain decoding gives: {folder}/in.jsonl:2 (custom_id id-b, sample 0): defect at "
        "answer token 2: "
    )
    assert "top-2 margin there 0.5" in str(error.value)
    assert not (folder / "out.jsonl").exists()


def test_a_mismatch_is_a_row_and_the_same_command_goes_on_behind_it(folder):
    parts = job_that_parts("id-b")
    with pytest.raises(EqualityError):
        start(folder, opener=parts, verify_greedy=True)
    report = start(folder, opener=parts, verify_greedy=True)
    assert verified(folder) == {"id-a": True, "id-b": False, "id-c": True, "id-d": True}
    assert (report.mismatched, report.exit_code) == (1, 3)
    assert start(folder, opener=refuse_to_open, verify_greedy=True).exit_code == 3


def test_as_many_mismatches_as_the_job_allows_are_said_aloud(folder, caplog):
    parts = job_that_parts("id-a", "id-b")
    with caplog.at_level(logging.WARNING), pytest.raises(EqualityError):
        start(folder, opener=parts, verify_greedy="all", max_mismatches=2, slots=9)
    assert len([said for said in caplog.messages if "not what plain decoding gives" in said]) == 1


def test_an_answer_that_waits_for_its_audit_is_no_row_when_the_run_is_killed(folder):
    with pytest.raises(KeyboardInterrupt):
        start(folder, engine=FakeEngine(slots=1, dies_after=2), verify_greedy="all", slots=3)
    assert start(folder, verify_greedy="all").resumed == 0
    assert set(verified(folder).values()) == {True}


def test_every_turn_of_a_conversation_is_compared(folder):
    write_lines(folder / "in.jsonl", {"id": "t", "turns": ["a", "b", "c"]}, *prompts("a"))
    assert start(folder, verify_greedy="all").verified == 2
    with pytest.raises(EqualityError, match=r"the text '.*' in the row, the text"):
        start(folder, opener=job_that_parts("t"), verify_greedy="all", overwrite=True)


def split(text):
    """Take the first three characters of an answer for the thinking."""
    return Said(text[:3], text[3:])


def test_reasoning_is_compared_beside_the_answer_and_a_continued_text_has_none(folder):
    continued = {"url": "/v1/completions", "body": {"prompt": "a"}}
    write_lines(folder / "in.jsonl", {"turns": ["a", "b"]}, continued, *prompts("a"))
    thinks = fake_opener(split=split)
    assert start(folder, opener=thinks, verify_greedy="all").verified == 3
    thinks_less = fake_baseline(split=lambda text: Said(text[:2], text[3:]))
    other = fake_opener(split=split, baseline=thinks_less)
    with pytest.raises(EqualityError, match=r"the reasoning '.*' in the row, the reasoning '"):
        start(folder, opener=other, verify_greedy="all", overwrite=True)


def test_a_difference_below_what_rounding_does_is_a_near_tie_and_stops_all_the_same(folder):
    with pytest.raises(EqualityError, match="near-tie at answer token 2"):
        start(folder, opener=job_that_parts("id-a", spread=0.0), verify_greedy="all")


def test_a_baseline_without_an_answer_is_a_mismatch(folder):
    fails = fake_opener(baseline=fake_baseline(FakeEngine(fails_on=frozenset({"id-c"}))))
    with pytest.raises(EqualityError, match="an answer in the row, a failure"):
        start(folder, opener=fails, verify_greedy="all")


def test_a_job_drawn_by_the_rejection_rule_is_refused(folder):
    with pytest.raises(UsageError, match="by the rejection rule an answer depends on them"):
        start(folder, sampling="rejection", temperature=1.0, verify_greedy="all")


def test_an_item_that_draws_by_the_rejection_rule_is_passed_over(folder):
    sampled = {"id": "s", "prompt": "x", "sampling_params": {"temperature": 1}}
    write_lines(folder / "in.jsonl", sampled, *prompts("a"))
    start(folder, sampling="rejection", verify_greedy="all")
    assert verified(folder) == {"s": None, "id-a": True}


def test_a_coupled_job_is_audited_like_a_greedy_one(folder):
    assert start(folder, temperature=1.0, verify_greedy="all").verified == 4
