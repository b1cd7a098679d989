"""The summary tells the whole story of a run in a few lines."""

import click
import pytest

from dspark_batch.cli.summary import summary
from dspark_batch.output.report import Report


@pytest.fixture
def say():
    def say(**fields):
        return click.unstyle(summary(Report(**(WHOLE | fields)))).splitlines()

    return say


WHOLE = {
    "out": "out.parquet",
    "total": 1200,
    "succeeded": 1200,
    "errored": 0,
    "skipped": 0,
    "resumed": 0,
    "prompt_tokens": 81_204,
    "completion_tokens": 312_000,
    "new_tokens": 312_000,
    "rounds": 100_000,
    "accepted": 210_000,
    "drafted": 300_000,
    "mean_acceptance_length": 3.11,
    "errors_by_code": {},
    "first_errors": (),
    "load_s": 2.14,
    "decode_s": 390.0,
    "finish_s": 0.4,
}


def test_a_run_in_which_all_went_well(say):
    assert say() == [
        "All 1,200 items have an answer.",
        "",
        "  output        out.parquet   (dspark-batch show out.parquet)",
        "  rows          1,200 succeeded",
        "  tokens        81,204 prompt, 312,000 completion",
        "  speed         800 tokens/s while decoding",
        "  speculation   accept length 3.11 tokens per round, 70% of drafts accepted",
        "  time          loading 2.1 s, decoding 6 min 30 s, writing 0.4 s",
    ]


def test_failures_are_counted_by_code_and_the_first_are_shown(say):
    lines = say(
        succeeded=1193,
        errored=7,
        errors_by_code={"bad_record": 5, "prompt_too_long": 2},
        first_errors=("in.jsonl:3: not JSON", "in.jsonl:9: a\nb", "in.jsonl:12: empty"),
    )
    assert lines[0] == "1,193 of 1,200 items have an answer."
    assert lines[3:9] == [
        "  rows          1,193 succeeded, 7 failed",
        "  failures      5 bad_record, 2 prompt_too_long   "
        "(for 7 the record or an option must change)",
        "    in.jsonl:3: not JSON",
        "    in.jsonl:9: a b",
        "    in.jsonl:12: empty",
        "    and 4 more",
    ]


@pytest.mark.parametrize(
    ("codes", "ways"),
    [
        ({"engine": 2, "poison": 1}, "--retry-failed runs 3 again"),
        (
            {"engine": 2, "bad_record": 1},
            "--retry-failed runs 2 again; for 1 the record or an option must change",
        ),
    ],
)
def test_only_what_can_change_is_worth_a_retry(say, codes, ways):
    lines = say(succeeded=1197, errored=3, errors_by_code=codes)
    assert lines[4].endswith(f"   ({ways})")


def test_what_rows_note_is_counted(say):
    notes = {"ignored `tools`": 1200} | {f"`c{i}` holds NaN or Infinity": 3 for i in range(6)}
    lines = say(input_notes=notes)
    assert lines[4:6] == [
        "  noted         ignored `tools`, rows: 1,200",
        "  noted         `c0` holds NaN or Infinity, rows: 3",
    ]
    assert lines[9] == "    and 2 more"


def test_the_speed_of_a_resumed_run_counts_only_its_own_tokens(say):
    lines = say(resumed=1000, new_tokens=3900)
    assert "  rows          1,200 succeeded; 1,000 of them by earlier starts" in lines
    assert "  speed         10 tokens/s while decoding" in lines


def test_a_run_with_nothing_to_do_claims_no_speed(say):
    lines = say(resumed=1200, new_tokens=0, load_s=0, decode_s=0, finish_s=0)
    assert lines[0] == "Nothing to do: all 1,200 rows were there already."
    assert not [line for line in lines if "tokens/s" in line or " 0.0 s" in line]


def test_plain_decoding_claims_no_acceptance(say):
    lines = say(accepted=0, drafted=0, mean_acceptance_length=1.0)
    assert "  speculation   none: plain decoding" in lines


def test_looked_up_drafts_are_told_as_a_share_of_the_accepted_ones(say):
    lines = say(looked_up=52_500)
    (said,) = [line for line in lines if "accept length" in line]
    assert said.endswith("70% of drafts accepted, 25% of these looked up")


def test_an_audit_is_counted_with_what_it_took(say):
    lines = say(verified=11, mismatched=1, audit_s=2.0)
    assert "  verified      11 of 12 are what plain decoding gives; the audit took 2.0 s" in lines


PLAN = {
    "slots": 8,
    "draft_length": 7,
    "why": "slots by memory; rounds choose how many drafts",
    "dtype": "float32",
    "step_shape": "any",
}


def test_the_plan_is_told_with_its_reason(say):
    lines = say(plan=PLAN)
    assert lines[-1] == (f"  plan          float32, slots 8, draft length 7 at most; {PLAN['why']}")
    assert "plan" not in "".join(say(plan=PLAN, new_tokens=0))  # this start decoded nothing


def test_the_time_in_which_the_device_waited_is_told(say):
    lines = say(prefill_s=100.0, round_s=300.0, idle_s=8.0)
    said = "800 tokens/s while decoding; the device waited at most 2% of its time"
    assert f"  speed         {said}" in lines


def test_what_took_the_time_of_decoding_is_told(say):
    lines = say(prefill_s=39.0, round_s=312.0, draft_s=78.0, verify_s=234.0)
    parts = "prefill 10%, draft 20%, verify 60%, host 10%"
    assert f"  time          loading 2.1 s, decoding 6 min 30 s ({parts}), writing 0.4 s" in lines


def test_an_empty_input_divides_by_nothing(say):
    zeros = {name: 0 for name in WHOLE if name not in ("out", "errors_by_code", "first_errors")}
    lines = say(**zeros | {"mean_acceptance_length": None})
    assert lines[0] == "The input has no records; the output has no rows."
    assert "  rows          none" in lines
