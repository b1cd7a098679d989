"""The Python interface that users of this method know."""

import orjson
import pytest
from golden_cases import GOLDEN, load_case
from small_jobs import rows_in, write_lines

import dspark_batch
from dspark_batch import load_pair, speculative_generate
from dspark_batch.errors import UsageError
from dspark_batch.generate import OnePrompt
from dspark_batch.run import run
from dspark_batch.spec.spec import Spec


@pytest.fixture(scope="module")
def case():
    return load_case("qwen3_vanilla")


def generate(case, run="greedy0", limit=20, tokenizer=None, prompt=None, **choices):
    target, _, drafter, _ = case.pair
    prompt = case.prompt(run) if prompt is None else prompt
    return speculative_generate(target, tokenizer, drafter, prompt, max_new_tokens=limit, **choices)


def test_a_pair_of_directories_without_a_tokenizer_answers_token_ids():
    target, tok, drafter, cfg = load_pair(
        target=str(GOLDEN / "targets" / "qwen3_tiny"),
        drafter=str(GOLDEN / "qwen3_vanilla" / "drafter"),
        dtype="float32",
    )
    case = load_case("qwen3_vanilla")
    prompt = list(case.prompt("greedy1"))
    res = speculative_generate(target, tok, drafter, prompt, max_new_tokens=40)
    assert (tok, cfg.dtype, res.text) == (None, "float32", "")
    assert res.token_ids == case.answer("greedy1")
    assert 1 + sum(res.accept_lengths) == len(res.token_ids)
    assert res.finish_reason == "length"


def test_the_counts_are_those_of_the_rounds(case):
    res = generate(case)
    assert res.rounds == len(res.accept_lengths) > 0
    assert res.mean_accept_len == sum(res.accept_lengths) / res.rounds
    assert res.tokens_per_sec > 0
    assert generate(case, limit=1).rounds == 0
    assert generate(case, limit=1).mean_accept_len == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_max_draft_changes_rounds_and_no_token(case, temperature):
    answers = [
        generate(case, temperature=temperature, seed=3, max_draft=drafts)
        for drafts in (0, 3, 7, None)
    ]
    assert len({tuple(res.token_ids) for res in answers}) == 1
    assert answers[0].accept_lengths == [1] * 19
    assert answers[2].accept_lengths == answers[3].accept_lengths != answers[0].accept_lengths


def test_seed_and_prompt_name_the_noise(case):
    def sampled(**choices):
        return generate(case, temperature=1.5, **choices).token_ids

    assert sampled(seed=1) == sampled(seed=1) != sampled(seed=2)
    assert sampled(seed=1, sampling="rejection") == sampled(seed=1, sampling="rejection")
    assert sampled(seed=1, top_k=1) == generate(case).token_ids


class Words:
    """A tokenizer that shows what it was asked."""

    stop_ids = frozenset([1])

    def __init__(self):
        self.rendered = []

    def render(self, messages):
        self.rendered.append(messages)
        return [5, 6, 7]

    def decode(self, token_ids):
        return "".join(f" {i}" for i in token_ids)


def test_text_is_rendered_with_the_system_prompt_and_comes_back_as_text(case):
    words = Words()
    res = generate(case, tokenizer=words, prompt="Why?", system="Be brief.")
    assert words.rendered == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    ]
    assert res.text == words.decode(res.token_ids)
    assert res.token_ids == generate(case, prompt=[5, 6, 7]).token_ids


def test_stop_takes_strings_and_token_ids_alone_or_together(case):
    whole = generate(case).token_ids
    by_id = generate(case, stop=whole[8])
    by_text = generate(case, tokenizer=Words(), stop=f" {whole[8]}")
    both = generate(case, tokenizer=Words(), stop=["no such text", whole[8]])
    assert by_id.token_ids == by_text.token_ids == both.token_ids
    assert by_id.token_ids == whole[: whole.index(whole[8]) + 1]
    assert {by_id.finish_reason, by_text.finish_reason, both.finish_reason} == {"stop"}
    assert by_text.text == both.text == Words().decode(by_id.token_ids[:-1])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": -1}, "temperature is -1, expected 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"stop": ""}, "strings that are not empty"),
        ({"limit": 0}, "max_tokens is 0"),
        ({"max_draft": 8}, "block has 7 positions"),
        ({"sampling": "other"}, "coupled or rejection"),
        ({"prompt": "Why?"}, "no tokenizer"),
        ({"prompt": []}, "at least one prompt token"),
        ({"prompt": [5] * 5000}, "leave no room in a context of"),
        ({"system": "Be brief."}, "system goes with a prompt that is text"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_impossible_is_refused_with_the_reason(case, wrong, says):
    with pytest.raises(UsageError, match=says):
        generate(case, **wrong)


PROMPTS = ["Write 62 in words.", {"messages": [{"role": "user", "content": "Name a sea."}]}]


def test_answers_come_as_they_finish_and_are_those_of_a_job(tmp_path):
    lines = [{"prompt": PROMPTS[0]}, PROMPTS[1], {"x": 1}]
    out = tmp_path / "out.jsonl"
    write_lines(tmp_path / "in.jsonl", *(orjson.dumps(line) for line in lines))
    options = {"max_tokens": 12, "temperature": 0.7, "seed": 3}
    run(Spec(inputs=(str(tmp_path / "in.jsonl"),), out=str(out), **options))
    of_job = {n: row["completion"] for n, row in enumerate(rows_in(out))}
    rows = {
        row.item.index: row
        for row in dspark_batch.generate([*PROMPTS, {"x": 1}], family="tiny", **options)
    }
    assert {n: getattr(row, "text", None) for n, row in rows.items()} == of_job
    assert (rows[2].code, rows[2].item.where) == ("bad_record", "prompts[2]")
    assert rows[1].item.record == PROMPTS[1]


def test_prompts_are_pulled_a_few_ahead_and_whoever_stops_reading_is_done():
    pulled = []

    def prompts():
        for n in range(1000):
            pulled.append(n)
            yield f"Write {n} in words."

    rows = dspark_batch.generate(prompts(), slots=2, max_tokens=3)
    assert pulled == []
    assert next(rows).token_ids
    rows.close()
    assert len(pulled) < 50


def test_several_turns_are_asked_one_behind_the_other():
    said = ["Name a sea.", "Write 5 in words."]
    (row,) = dspark_batch.generate([{"turns": said}], max_tokens=6)
    (first,) = dspark_batch.generate([said[0]], max_tokens=6)
    assert row.turns[0].text == first.text
    assert len(row.turns) == 2


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([5], {}, r"prompts\[0\] is 5, expected a text"),
        ([{"prompt": print}], {}, r"prompts\[0\]: no JSON"),
        (["x"], {"inputs": ("a",)}, "inputs is no option here"),
        (["x"], {"max_tokens": 0}, "max_tokens is 0"),
        (["x"], {"family": "nobody"}, "nobody"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_refused(prompts, options, says):
    with pytest.raises(UsageError, match=says):
        list(dspark_batch.generate(prompts, **options))


@pytest.mark.parametrize(
    "options", [{}, {"stop": ("ty",)}, {"temperature": 1.2, "seed": 5}], ids=str
)
def test_the_pieces_of_one_prompt_are_the_text_of_its_answer(options):
    asked = OnePrompt(PROMPTS[0], max_tokens=24, **options)
    pieces, told = [], []

    def read():
        told.append((yield from asked.pieces()))

    pieces += read()
    (answer,) = told
    assert "".join(piece.text for piece in pieces) == answer.text
    assert len(pieces) > 1
    assert any(piece.is_drafted for piece in pieces) == any(answer.is_drafted)
    assert asked.plainly().token_ids == answer.token_ids
