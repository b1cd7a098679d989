"""Text that streams is the text that comes out, whatever its tokens are cut from."""

import random
from itertools import pairwise

import pytest

from dspark_batch.answers.stopping import StopStrings
from dspark_batch.answers.text_stream import TextStream

TEXTS = [
    "Name a sea.",
    "é",
    "👩‍👩‍👧",
    "日本語の文",
    "naïve 𝄞 ",
    "\n\n",
    "a\ufffdb",
    "STOP",
    "ST",
    "OP",
]


def plain(pieces):
    """Decode as byte-level tokenizers do."""
    return b"".join(pieces).decode(errors="replace")


def all_or_nothing(pieces):
    """Decode as tokenizers with byte tokens do: a run of those is text, or none of it is."""
    text, run = "", b""
    for piece in [*pieces, None]:
        if piece is not None and len(piece) == 1 and piece > b"\x7f":
            run += piece
            continue
        try:
            text += run.decode()
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
        text, run = text + (piece or b"").decode(errors="replace"), b""
    return text.removeprefix(" ")


def random_tokens(rng):
    whole = "".join(rng.choices(TEXTS, k=rng.randint(1, 6))).encode()
    if rng.random() < 0.5:
        whole = whole[: rng.randint(1, len(whole))] + rng.choice([b"", b"\xff\xfe", b"\x80 x"])
    cuts = sorted(rng.sample(range(len(whole) + 1), k=rng.randint(0, min(9, len(whole)))))
    bounds = [0, *cuts, len(whole)]
    return [whole[a:b] for a, b in pairwise(bounds) if a < b]


def random_bytes_and_words(rng):
    """Cut each character into bytes, or not at all, as tokenizers with byte tokens do."""
    tokens = []
    for text in rng.choices(TEXTS, k=rng.randint(1, 5)):
        for character in text:
            raw = character.encode()
            in_bytes = len(raw) > 1 and rng.random() < 0.5
            tokens += [bytes([b]) for b in raw] if in_bytes else [raw]
    return tokens[: rng.randint(1, len(tokens))]


def streamed(decode, tokens, stops, min_tokens=0):
    """Stream tokens until a stop string ends them; return the pieces and the final text."""
    stream = TextStream(decode, stops, min_tokens=min_tokens)
    strings = StopStrings(stops, decode, min_tokens) if stops else None
    said, pieces = [], []
    for token in tokens:
        said.append(token)
        pieces.append(stream.add(token))
        if strings and strings.add(token):
            break
    text = strings.cut(decode(said)) if strings else decode(said)
    return [*pieces, stream.end(text)], text


@pytest.mark.parametrize("min_tokens", [0, 3])
@pytest.mark.parametrize("stops", [(), ("STOP",), ("é", "OPS", "本語")], ids=str)
@pytest.mark.parametrize(
    ("decode", "make"), [(plain, random_tokens), (all_or_nothing, random_bytes_and_words)]
)
def test_all_pieces_together_are_the_text(decode, make, stops, min_tokens):
    rng = random.Random(7)
    for _ in range(400):
        tokens = make(rng)
        pieces, text = streamed(decode, tokens, stops, min_tokens)
        assert "".join(pieces) == text, tokens


def test_what_is_settled_is_given_at_once_and_parts_of_characters_wait():
    stream = TextStream(plain)
    euro = "€".encode()
    assert [stream.add(t) for t in (b"It is ", euro[:1], euro[1:], b"5")] == [
        "It is ",
        "",
        "",
        "€5",
    ]
    assert stream.end("It is €5.") == "."


def test_what_may_begin_a_stop_string_waits():
    stream = TextStream(plain, ("END", "NOW"))
    assert [stream.add(t) for t in (b"the E", b"N", b"gine NO")] == ["the ", "", "ENgine "]
    assert stream.add(b"W and more") == ""
    assert stream.end("the ENgine ") == ""


def test_several_tokens_at_once_are_the_same_text():
    rng = random.Random(8)
    for _ in range(400):
        tokens, pieces = random_tokens(rng), []
        stream = TextStream(plain, ("STOP", "é"))
        left = list(tokens)
        while left:
            now, left = left[: (n := rng.randint(1, 4))], left[n:]
            pieces.append(stream.add(*now))
        strings = StopStrings(("STOP", "é"), plain)
        text = strings.cut(plain(tokens))
        assert "".join([*pieces, stream.end(text)]) == text, tokens


def test_a_mark_is_given_whole_and_ends_no_text():
    stream = TextStream(plain, marks=("</think>",))
    assert [stream.add(b"so </th"), stream.add(b"ink> 4 <")] == ["so ", "</think> 4 "]
    assert stream.add(b"b>") == "<b>"


def test_a_decoder_that_takes_back_what_it_said_costs_a_line():
    stream = TextStream(lambda ids: "ab"[: len(ids)] if len(ids) < 3 else "xyz")
    assert [stream.add(1), stream.add(2), stream.add(3)] == ["a", "b", ""]
    assert stream.end("xyz") == "\nxyz"
