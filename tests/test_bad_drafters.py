"""Whatever a drafter proposes, the output of a run is the baseline's, byte for byte."""

import json

import mlx.core as mx
import pytest
from small_jobs import rows_in, write_lines

from dspark_batch.drafters.drafter import Draft
from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.opening import open_with
from dspark_batch.pair import load_pair
from dspark_batch.run import run
from dspark_batch.spec.spec import Spec

PROMPTS = ['Spell "cat" backwards.', "Write 62 in words.", "Convert 4 euros to cents."]
SETTINGS = {"greedy": {}, "sampled": {"temperature": 0.7, "seed": 4}}


class Garbage(NoDrafter):
    """Always proposes the same tokens, whatever was said."""

    block_size, num_layers, has_confidence = 4, 0, False

    def extend(self, context, features):
        """Take no notice of the features."""

    def propose(self, anchor, context, num_drafts, choose):
        return Draft(mx.full((anchor.shape[0], num_drafts), 7, dtype=anchor.dtype))


class Right(Garbage):
    """Proposes what the answer really goes on with: it has read the baseline's rows."""

    def __init__(self, rows):
        self._known = [(row["usage"]["prompt_tokens"], row["token_ids"]) for row in rows]

    def propose(self, anchor, context, num_drafts, choose):
        places = zip(anchor.tolist(), context.lengths.tolist(), strict=True)
        drafts = [self._behind(token, length, num_drafts) for token, length in places]
        return Draft(mx.array(drafts, dtype=anchor.dtype))

    def _behind(self, token, length, num_drafts):
        """Find the answer that has this token at this place."""
        for prompt_tokens, ids in self._known:
            at = length - prompt_tokens
            if 0 <= at < len(ids) and ids[at] == token:
                return (ids[at + 1 :] + [0] * num_drafts)[:num_drafts]
        return [0] * num_drafts


class Throws(Garbage):
    """Fails for good in the middle of an answer."""

    calm = 9

    def propose(self, *about):
        self.calm -= 1
        if self.calm < 0:
            raise ValueError("no more ideas")
        return super().propose(*about)


class NoContext(Garbage):
    """Cannot take a context, from the start on."""

    tap_ids = (0,)  # it reads the target, so it is given one

    def extend(self, context, features):
        raise ValueError("no context")


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny", dtype="float32")


@pytest.fixture(scope="module", params=SETTINGS)
def job(request, pair, tmp_path_factory):
    """Run a job with a drafter; the result says what all columns but how it went are."""
    folder = tmp_path_factory.mktemp("job")
    write_lines(folder / "in.jsonl", *({"prompt": prompt} for prompt in PROMPTS))

    def job(drafter=None, **options):
        def open_engine(spec, manifest):
            used = pair if drafter is None else pair._replace(drafter=drafter)
            return open_with(used, spec, manifest)

        out = folder / "out.jsonl"
        options = {"max_tokens": 20, "overwrite": True} | SETTINGS[request.param] | options
        spec = Spec(inputs=(f"{folder}/in.jsonl",), out=str(out), **options)
        run(spec, open_engine=open_engine)
        return rows_in(out)

    return job


@pytest.fixture(scope="module")
def plain(job):
    return job(draft_length=0)


def answers(rows):
    said = [{k: v for k, v in row.items() if k not in ("metrics", "verified")} for row in rows]
    return json.dumps(said).encode()


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_garbage_costs_speed_and_no_byte(job, plain, slots):
    rows = job(Garbage(), slots=slots, verify_greedy="all")
    assert answers(rows) == answers(plain)
    assert [row["verified"] for row in rows] == [True] * 3
    accepted = [row["metrics"]["speculative_decoding"]["num_accepted_draft_tokens"] for row in rows]
    assert sum(accepted) <= 1


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_drafts_that_are_always_right_all_stay_and_change_no_byte(job, plain, slots):
    rows = job(Right(plain), slots=slots, draft_length=4, verify_greedy="all")
    assert answers(rows) == answers(plain)
    assert [row["verified"] for row in rows] == [True] * 3
    told = [row["metrics"]["speculative_decoding"] for row in rows]
    assert all(n == 4 for each in told for n in each["per_step_accepted"][:-1])


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_drafter_that_throws_is_given_up_for_its_items_and_changes_no_byte(job, plain, slots):
    rows = job(Throws(), slots=slots, draft_length=4, verify_greedy="all")
    assert answers(rows) == answers(plain)
    assert [row["verified"] for row in rows] == [True] * 3
    assert {row["metrics"]["fallback"] for row in rows} >= {
        "the drafter failed (ValueError: no more ideas)"
    }


def test_a_drafter_that_takes_no_context_stops_no_start_and_changes_no_byte(job, plain):
    rows = job(NoContext(), slots=2)
    assert answers(rows) == answers(plain)
    assert {row["metrics"]["fallback"] for row in rows} == {
        "the drafter failed (ValueError: no context)"
    }
