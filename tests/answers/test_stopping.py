"""Stop strings end an answer where plain decoding would see them, whatever the blocks are."""

import dataclasses
from functools import cache

import pytest
from golden_cases import load_case

from dspark_batch.answers.stopping import StopStrings
from dspark_batch.engine.engine import Engine
from dspark_batch.errors import UsageError
from dspark_batch.types import Item, Request, Sampling


class Bytes:
    """A tokenizer whose tokens are bytes, so that one character can be several tokens."""

    def __init__(self):
        self.num_decoded = 0

    def decode(self, token_ids):
        self.num_decoded += len(token_ids)
        return bytes(token_ids).decode(errors="replace")


def end_of(text, *stops):
    """How many bytes come out, and the text that is left."""
    finder = StopStrings(stops, Bytes().decode)
    tokens = text.encode()
    end = next((n + 1 for n, token in enumerate(tokens) if finder.add(token)), None)
    return end, finder.cut(tokens[:end].decode(errors="replace"))


def test_a_stop_string_is_found_across_tokens_and_cut_off():
    assert end_of("one END two", "END") == (7, "one ")


def test_a_character_of_several_tokens_counts_when_it_is_whole():
    assert end_of("größer", "öß") == (6, "gr")
    assert end_of("größer", "ß") == (6, "grö")


def test_the_earliest_of_all_stop_strings_cuts():
    assert end_of("abcdef", "cdef", "d") == (4, "abc")
    assert end_of("abcd", "bcd", "d") == (4, "a")


def test_an_almost_is_no_stop_string():
    assert end_of("EN EN END", "END") == (9, "EN EN ")
    assert end_of("never", "END") == (None, "never")


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 60, 200, 201])
def test_it_is_found_after_any_number_of_tokens(length):
    assert end_of("ü" * length + "stop here", "stop here")[1] == "ü" * length
    assert end_of("x" * length + "a" * 30, "a" * 30) == (length + 30, "x" * length)


def test_a_token_that_reads_otherwise_at_the_beginning_is_no_hindrance():
    words = {0: " the", 1: " end", 2: "s"}

    def decode(ids):  # as SentencePiece does: no space before the first word
        return "".join(words[i] for i in ids).removeprefix(" ")

    finder = StopStrings([" ends"], decode)
    found = [finder.add(token) for token in [0] * 50 + [1, 2]]
    assert found == [False] * 51 + [True]


def test_long_answers_cost_linear_time():
    costs = []
    for length in (1000, 2000):
        tokenizer = Bytes()
        finder = StopStrings(["END", "a longer stop string"], tokenizer.decode)
        assert not any(finder.add(ord("x")) for _ in range(length))
        costs.append(tokenizer.num_decoded)
    assert costs[1] < 2.1 * costs[0]


class Syllables:
    """Gives every token id a text, such that stop strings begin and end inside tokens."""

    stop_ids = frozenset([1])

    def decode(self, token_ids):
        return "".join(f"{i:x}-" for i in token_ids)


@cache
def decode(stop, limit=24, temperature=0.0, **settings):
    case = load_case("qwen3_vanilla")
    pair = case.pair._replace(tokenizer=Syllables())
    sampling = Sampling(temperature=temperature, stop=stop)
    request = Request(Item(0, "0", "d", "t:1"), case.prompt("greedy0"), limit, sampling)
    (answer,) = Engine(pair, **settings).generate([request])
    return answer


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_string_anywhere_ends_the_answer_there_for_every_draft_length(temperature):
    whole = decode((), temperature=temperature, draft_length=0)
    for last in range(2, 12, 3):
        # From inside one token to inside the next.
        stop = Syllables().decode(whole.token_ids[last - 1 : last + 1])[1:-1]
        plain = decode((stop,), temperature=temperature, draft_length=0)
        assert plain.finish_reason == "stop"
        assert plain.token_ids == whole.token_ids[: len(plain.token_ids)]
        assert plain.text == whole.text[: whole.text.index(stop)]
        assert stop in Syllables().decode(plain.token_ids)
        assert stop not in Syllables().decode(plain.token_ids[:-1])
        drafted = decode((stop,), temperature=temperature, draft_length=7)
        assert drafted.token_ids == plain.token_ids
        assert (drafted.text, drafted.finish_reason) == (plain.text, "stop")
        assert 1 + sum(drafted.accept_lengths) == len(drafted.token_ids)


def test_a_stop_string_in_the_first_token_or_on_the_limit_is_a_stop():
    whole = decode((), draft_length=7)
    first = decode((Syllables().decode(whole.token_ids[:1]),), draft_length=7)
    assert (first.token_ids, first.text) == (whole.token_ids[:1], "")
    text = Syllables().decode(whole.token_ids[2:5])
    assert decode((text,), limit=5, draft_length=7).finish_reason == "stop"
    assert decode((text,), limit=4, draft_length=7).finish_reason == "length"


def test_stop_ids_of_a_request_end_it_like_the_targets_own_and_are_not_spoken():
    case = load_case("qwen3_vanilla")
    pair = case.pair._replace(tokenizer=Syllables())
    whole = decode((), draft_length=7)
    stop_id = whole.token_ids[6]
    sampling = Sampling(stop_ids=frozenset([stop_id]), stop=("no such text",))
    request = Request(Item(0, "0", "d", "t:1"), case.prompt("greedy0"), 24, sampling)
    (answer,) = Engine(pair).generate([request])
    end = whole.token_ids.index(stop_id) + 1
    assert answer.token_ids == whole.token_ids[:end]
    assert answer.text == Syllables().decode(whole.token_ids[: end - 1])
    assert answer.finish_reason == "stop"


def test_stop_strings_without_a_tokenizer_are_refused():
    pair = load_case("qwen3_vanilla").pair
    request = Request(Item(0, "0", "d", "t:1"), (5, 6), 4, Sampling(stop=("END",)))
    with pytest.raises(UsageError, match=r"t:1: stop strings \['END'\] need a tokenizer"):
        list(Engine(pair).generate([request]))
    list(Engine(pair).generate([dataclasses.replace(request, sampling=Sampling())]))
