import pyarrow as pa
import pytest
from fakes import fake_answer

from dspark_batch.record.rows import ROW_SCHEMA, Layout, row_of
from dspark_batch.types import Completion, Failure, Item, Request

ITEM = Item(3, "three", "d", "in.jsonl:4", {"prompt": "hi"})


def completion(**fields):
    known = {"text": "hi", "token_ids": (1, 2, 3, 4, 5, 6), "finish_reason": "stop"}
    return Completion(**{"item": ITEM, "prompt_tokens": 9} | known | fields)


def speculation(**fields):
    return row_of(completion(**fields))["metrics"]["speculative_decoding"]


def test_an_answer_fills_its_columns():
    row = row_of(completion(cached_tokens=2, prefill_s=0.5, decode_s=2.0))
    metrics = row.pop("metrics")
    assert row == {
        "custom_id": "three",
        "sample_index": 0,
        "status": "succeeded",
        "completion": "hi",
        "reasoning": None,
        "earlier_answers": None,
        "finish_reason": "stop",
        "error": None,
        "usage": {"prompt_tokens": 9, "completion_tokens": 6},
        "token_ids": [1, 2, 3, 4, 5, 6],
        "logprobs": None,
        "prompt_logprobs": None,
        "structure": None,
        "verified": None,
        "input_notes": None,
    }
    del metrics["speculative_decoding"]
    assert metrics == {
        **{"cached_tokens": 2, "prefill_s": 0.5, "decode_s": 2.0, "tokens_per_s": 2.5},
        "fallback": None,
        "worker": None,
    }


def test_a_failure_fills_the_error_and_leaves_the_rest_null():
    row = row_of(Failure(ITEM, "bad_record", "in.jsonl:4: why"))
    filled = {name: value for name, value in row.items() if value is not None}
    assert filled == {
        "custom_id": "three",
        "sample_index": 0,
        "status": "errored",
        "error": {"code": "bad_record", "message": "in.jsonl:4: why"},
    }


def test_acceptance_is_counted_as_vllm_counts_it():
    assert speculation(accept_lengths=(3, 1, 1), num_accepted=(2, 0, 0), num_drafted=(4, 4, 2)) == {
        "mean_acceptance_length": 5 / 3,
        "draft_acceptance_rate": 2 / 10,
        "acceptance_histogram": [2, 0, 1],
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 2,
        "num_draft_tokens": 10,
        "num_accepted_lookup_tokens": 0,
        "num_lookup_tokens": 0,
        "per_step_accepted": [2, 0, 0],
        "per_step_drafted": [4, 4, 2],
        "per_step_confidence": None,
    }


def test_nothing_is_divided_by_nothing():
    plain = speculation(accept_lengths=(1,), num_accepted=(0,), num_drafted=(0,))
    assert (plain["mean_acceptance_length"], plain["draft_acceptance_rate"]) == (1.0, None)
    none = speculation(token_ids=(1,))
    assert (none["mean_acceptance_length"], none["acceptance_histogram"]) == (None, [])
    assert row_of(completion(token_ids=(1,)))["metrics"]["tokens_per_s"] is None


@pytest.mark.parametrize(
    "outcome",
    [
        fake_answer(Request(ITEM, (1, 2), 12)),
        completion(),
        completion(confidence=((1.25, -0.5), ())),
        Failure(ITEM, "engine", "why"),
    ],
)
def test_every_row_fits_the_schema_and_comes_in_its_order(outcome):
    row = row_of(outcome)
    assert list(row) == ROW_SCHEMA.names
    assert pa.RecordBatch.from_pylist([row], ROW_SCHEMA).to_pylist() == [row]


def test_a_custom_id_in_the_input_is_ours_and_no_clash():
    assert Layout().clashes({"custom_id": "x", "prompt": "y"}) == set()
    assert Layout().passed_through({"custom_id": "x", "prompt": "y"}) == {"prompt": "y"}


def test_a_prefix_moves_our_names_out_of_the_way():
    record = {"custom_id": "x", "status": "y"}
    assert Layout().clashes(record) == {"status"}
    assert Layout(output_prefix="gen_").clashes(record) == set()
    assert Layout(output_prefix="gen_").passed_through(record) == record
    assert Layout(output_prefix="gen_").clashes({"gen_custom_id": "x"}) == {"gen_custom_id"}


def test_every_row_has_the_columns_of_the_schema_in_their_order():
    for outcome in (completion(), Failure(ITEM, "bad_record", "why")):
        assert list(row_of(outcome)) == ROW_SCHEMA.names
