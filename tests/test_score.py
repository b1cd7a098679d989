"""`--score`: a job that generates nothing, and tells what the target thinks of given answers."""

from math import fsum
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from small_jobs import errors_in, rows_in, write_lines

from dspark_batch.cli.main import main
from dspark_batch.errors import UsageError
from dspark_batch.generate import generate
from dspark_batch.intake.choices import choices_of
from dspark_batch.intake.messages import Unusable
from dspark_batch.opening import open_with
from dspark_batch.pair import load_pair
from dspark_batch.record.rows import Layout
from dspark_batch.run import run
from dspark_batch.spec.spec import Spec
from dspark_batch.verify import verify

ASK = 'Spell "cat" backwards.'
RIGHT = "Letters: c a t\nBackwards: t a c"
RECORDS = [
    {"id": "right", "prompt": ASK, "completion": RIGHT},
    {"id": "wrong", "prompt": ASK, "completion": "Letters: c a t\nBackwards: c a t"},
    {"id": "empty", "prompt": ASK, "completion": ""},
    {"id": "none", "prompt": ASK},
    {"id": "number", "prompt": ASK, "completion": 7},
    {"id": "talk", "turns": [ASK, ASK], "completion": "x"},
    {"id": "long", "prompt": ASK, "completion": "word " * 3000},
    {"id": "marks", "prompt": ASK, "completion": "<|im_end|>é"},
    {"id": "free", "prompt": ASK, "completion": "tac", "sampling_params": {"temperature": 2}},
]
SCORED = ("right", "wrong", "empty", "marks", "free")


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny", dtype="float32")


@pytest.fixture(scope="module")
def opener(pair):
    opened = {}

    def open_engine(spec, manifest):
        key = (spec.score, spec.slots)
        if key not in opened:
            opened[key] = open_with(pair, spec)
        return opened[key]

    return open_engine


@pytest.fixture
def job(tmp_path, monkeypatch, opener):
    """Score records in a folder of their own; rows by id."""
    monkeypatch.chdir(tmp_path)

    def score(out="out.jsonl", records=RECORDS, **options):
        write_lines(Path("in.jsonl"), *records)
        options = {"score": "completion", "slots": 4, "family": "tiny"} | options
        return run(Spec(inputs=("in.jsonl",), out=out, **options), open_engine=opener)

    return score


def rows_by_id(out="out.jsonl"):
    return {row["id"]: row for row in rows_in(Path(out))}


def test_a_row_has_the_sum_and_the_mean_of_a_plain_forward_pass(job, pair):
    report = job()
    assert (report.succeeded, report.errored, report.exit_code) == (5, 4, 1)
    rows = rows_by_id()
    prompt = pair.tokenizer.render([{"role": "user", "content": ASK}])
    for name in set(SCORED) - {"empty"}:
        row, told = rows[name], rows[name]["logprobs"]
        ids = row["token_ids"]
        assert pair.tokenizer.decode(ids) == row["completion"]
        assert row["finish_reason"] == "scored"
        assert "".join(told["tokens"]) == row["completion"] or name == "marks"
        logits = pair.target.model(mx.array([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
        logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        own = logprobs[np.arange(len(ids)), ids]
        np.testing.assert_allclose(told["token_logprobs"], own, atol=1e-4)
        assert told["sum"] == pytest.approx(fsum(own), abs=1e-3)
        assert told["sum"] == round(fsum(told["token_logprobs"]), 6)
        assert told["mean"] == pytest.approx(told["sum"] / len(ids), abs=1e-6)
    assert (rows["empty"]["logprobs"]["sum"], rows["empty"]["logprobs"]["mean"]) == (0, None)
    assert rows["right"]["logprobs"]["sum"] > rows["wrong"]["logprobs"]["sum"]
    assert rows["right"]["metrics"]["speculative_decoding"]["num_spec_steps"] == 0


def test_a_record_that_cannot_be_scored_fails_with_one_sentence(job):
    job()
    said = [error["message"] for error in errors_in(Path("out.jsonl")) if error]
    assert said == [
        "in.jsonl:4: `completion` is null, expected the text to score.",
        "in.jsonl:5: `completion` is a number, expected the text to score.",
        "in.jsonl:6: it asks several questions, and `completion` answers one.",
        said[3],
    ]
    assert "of `completion` do not fit into a context of" in said[3]


def test_a_job_that_was_stopped_goes_on_and_the_whole_can_be_verified(job, opener):
    job("whole.parquet", logprobs=2, prompt_logprobs=1)
    job("out.parquet", logprobs=2, prompt_logprobs=1, limit=2)
    report = job("out.parquet", logprobs=2, prompt_logprobs=1)
    assert report.resumed == 2
    one, two = (
        [row | {"metrics": None} for row in rows_in(Path(f"{name}.parquet"))]
        for name in ("whole", "out")
    )
    assert one == two
    found = verify("out.parquet", open_engine=opener)
    assert ([str(each) for each in (*found.findings, *found.differences)], found.replayed) == (
        [],
        5,
    )
    left_out = verify("out.parquet", open_engine=opener, against="mlx-lm").left_out
    assert dict(left_out) == {"scored, which mlx-lm's generation does not do": 5}


def test_another_column_can_be_scored_and_control_tokens_can_be_meant(job, pair):
    records = [{"prompt": ASK, "chosen": "<|im_end|>", "completion": "b"}]
    with pytest.raises(UsageError, match="a column `completion`, which is one of ours"):
        job(records=records, score="chosen")
    job(records=records, score="chosen", output_column="chosen", special_tokens="as-tokens")
    (row,) = rows_in(Path("out.jsonl"))
    assert (row["chosen"], row["completion"], len(row["token_ids"])) == ("<|im_end|>", "b", 1)
    with pytest.raises(UsageError, match="--score names a column `chosne` that no record"):
        job("b.jsonl", records, score="chosne", drop=("completion",))
    assert Layout(score="completion").clashes(["completion", "custom_id"]) == set()


def test_openai_lines_have_vllms_shape_of_a_prompts_log_probabilities(job):
    body = {"messages": [{"role": "user", "content": ASK}], "prompt_logprobs": 2}
    text = {"prompt": "Letters", "prompt_logprobs": 0, "temperature": 1}
    records = [
        {"custom_id": "a", "url": "/v1/chat/completions", "body": body, "completion": "tac"},
        {"custom_id": "b", "url": "/v1/completions", "body": text, "completion": "tac"},
    ]
    job(records=records, format="openai", logprobs=1)
    chat, other = (row["response"]["body"] for row in rows_in(Path("out.jsonl")))
    content = chat["choices"][0]["logprobs"]["content"]
    assert [len(each["top_logprobs"]) for each in content] == [1] * len(content)
    first, *rest = chat["prompt_logprobs"]
    assert first is None
    assert len(rest) == chat["usage"]["prompt_tokens"] - 1
    for entry in rest:
        assert {2, 3} >= {len(entry)}
        ranks = [each["rank"] for each in entry.values()]
        assert sorted(filter(None, ranks)) == [1, 2]
        assert set(next(iter(entry.values()))) == {"logprob", "rank", "decoded_token"}
    assert len(other["choices"][0]["prompt_logprobs"]) == other["usage"]["prompt_tokens"]
    assert other["choices"][0]["logprobs"]["tokens"] != []


def test_scores_come_without_files_too():
    records = [{"prompt": ASK, "completion": text} for text in ("tac", "")]
    told = {each.item.index: each.logprobs for each in generate(records, score="completion")}
    assert len(told[0].token_logprobs) == len(told[0].tokens) > 0
    assert told[1].token_logprobs == ()


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": 0.5}, {"stop": ("a",)}, {"samples": 2}, {"verify_greedy": "all"}),
        *({"regenerate": "all"}, {"draft_length": 3}, {"max_tokens": 9}, {"ignore_eos": True}),
        {"on_overflow": "truncate-left"},
    ],
    ids=str,
)
def test_what_is_about_generating_is_refused_in_one_sentence(options):
    with pytest.raises(UsageError) as error:
        Spec(inputs=("in.jsonl",), out="out.jsonl", score="completion", **options)
    assert next(iter(options)) in str(error.value)
    assert str(error.value).count(". ") == 0


def test_the_flag_alone_names_the_column_completion(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(Path("in.jsonl"), {"prompt": ASK, "answer": "tac"})
    assert main(["run", "-o", "out.jsonl", "in.jsonl", "--score"]) == 2
    assert "--score names a column `completion` that no record" in capsys.readouterr().err
    assert main(["run", "-o", "out.jsonl", "--score", "in.jsonl"]) == 2
    assert "'in.jsonl' is a file; write =COLUMN" in capsys.readouterr().err


def test_more_likeliest_tokens_than_the_limit_are_refused_by_name():
    spec = Spec(inputs=("in.jsonl",), out="out.jsonl")
    own = {"logprobs": True, "top_logprobs": 50}
    with pytest.raises(Unusable, match=r"^`body.top_logprobs` is 50, expected 0 to 20\.$"):
        choices_of(own, spec, "body")
    with pytest.raises(Unusable, match="prompt_logprobs is -1, expected 0 to 20"):
        choices_of({"prompt_logprobs": -1}, spec)
    assert choices_of({"prompt_logprobs": 3.0}, spec)[0].prompt_logprobs == 3
