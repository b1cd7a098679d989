"""Jobs that look drafts up: the same rows, with drafts counted by source."""

from pathlib import Path

import pytest
from small_jobs import rows_in

from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.opening import open_with
from dspark_batch.pair import load_pair
from dspark_batch.run import run
from dspark_batch.spec.spec import Spec

COPIES = str(Path(__file__).parents[1] / "sample_inputs" / "copies.jsonl")


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny", dtype="float32")


@pytest.fixture
def copied(tmp_path, pair):
    """Run the first copies of a job that writes to one place."""

    def start(name="out", drafts=True, **options):
        used = pair if drafts else pair._replace(drafter=NoDrafter())
        settings = {"limit": 3, "slots": 2, "max_tokens": 32} | options
        spec = Spec(inputs=(COPIES,), out=str(tmp_path / f"{name}.jsonl"), **settings)
        report = run(spec, open_engine=lambda spec, manifest: open_with(used, spec))
        return report, rows_in(tmp_path / f"{name}.jsonl")

    return start


def told(rows):
    return [{k: v for k, v in row.items() if k not in ("metrics", "verified")} for row in rows]


def of_look_ups(row):
    speed = row["metrics"]["speculative_decoding"]
    return speed["num_accepted_lookup_tokens"], speed["num_accepted_draft_tokens"]


@pytest.mark.parametrize("drafts", [True, False])
def test_rows_are_those_of_a_job_without_and_tell_what_was_looked_up(copied, drafts):
    _, plain = copied("plain", drafts, draft_length=0)
    report, rows = copied("looked", drafts, lookup=True, verify_greedy="all")
    assert told(rows) == told(plain)
    assert (report.verified, report.mismatched) == (3, 0)
    looked_up = [of_look_ups(row)[0] for row in rows]
    assert min(looked_up) > 0
    assert report.looked_up == sum(looked_up)
    assert all(some <= accepted for some, accepted in map(of_look_ups, rows))
    assert all(of_look_ups(row)[0] == 0 for row in plain)


def test_a_start_with_look_ups_goes_on_where_one_without_ended(copied):
    copied(limit=1)
    report, rows = copied(lookup=True)
    assert (report.resumed, report.total) == (1, 3)
    assert of_look_ups(rows[0])[0] == 0 < of_look_ups(rows[1])[0]
    assert told(rows) == told(copied("whole")[1])


def test_a_target_without_a_drafter_has_a_block_to_look_up(pair):
    none = pair._replace(drafter=NoDrafter())
    plans = [
        open_with(none, Spec(inputs=(COPIES,), out="o.jsonl", lookup=lookup)).setup["plan"]
        for lookup in (False, True)
    ]
    assert [plan["draft_length"] for plan in plans] == [0, 8]
