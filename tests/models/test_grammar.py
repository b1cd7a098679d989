"""A guide says what may come next, and drafts that did not stay have not happened."""

import random
from functools import cache

import pytest

from dspark_batch.models.grammar import Grammars, Guide, Marks, bits_of, has, thinks_at_end
from dspark_batch.pair import load_reading
from dspark_batch.spec.structure import structure_of

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 3},
        "size": {"type": "integer"},
    },
    "required": ["name", "tags"],
}
STRUCTURES = [
    structure_of("json_schema", SCHEMA),
    structure_of("regex", "[a-c]{3}-[0-9]{2,40}"),
    structure_of("grammar", 'start: "x" ("y" | start)*'),
    structure_of("choice", ["yes", "yesterday", 'a "b"\\', "é\n"]),
]
OPEN, SHUT = (7, 8), (9, 8)  # ids that stand for the marks of thinking
NO_MARKS = Marks()


@cache
def tokenizer():
    return load_reading("tiny").tokenizer


@cache
def grammars(marks):
    return Grammars(tokenizer()._wrapped._tokenizer, tokenizer().stop_ids, marks)


def guide(structure=STRUCTURES[0], prompt=(1,), marks=NO_MARKS):
    return grammars(marks).guide(structure, prompt, tokenizer().stop_ids)


def allowed(guide):
    (bits,) = bits_of([guide])
    return None if bits is None else [t for t in range(32 * len(bits)) if has(bits, t)]


def grown(structure, seed):
    """Let an answer grow at random, drafts that do not stay in between; yield what was allowed."""
    chance, following = random.Random(seed), guide(structure)
    said = []
    while True:
        following.follow(said)
        yield tuple(said), allowed(following)
        for _ in range(chance.randrange(5)):
            may = [t for t in allowed(following) if t not in following.stop_ids]
            if not may:
                break
            following.take(chance.choice(may))
        following.follow(said)
        may = [t for t in allowed(following) if t not in following.stop_ids]
        if not may or len(said) > 40:
            return
        said.append(chance.choice(may))


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: s.kind)
@pytest.mark.parametrize("seed", range(3))
def test_what_may_come_depends_on_what_is_committed_alone(structure, seed):
    steps = list(grown(structure, seed))
    for said, may in steps:
        fresh = guide(structure)
        fresh.follow(said)
        assert allowed(fresh) == may


def test_a_matcher_that_is_not_taken_back_is_seen(monkeypatch):
    monkeypatch.setattr(Guide, "_take_back", lambda self: self._before.clear())
    with pytest.raises(AssertionError):
        test_what_may_come_depends_on_what_is_committed_alone(STRUCTURES[0], 0)


@pytest.mark.parametrize("text", ["yes", "yesterday", 'a "b"\\', "é\n"])
def test_an_answer_ends_where_it_is_whole_and_nowhere_else(text):
    following = guide(STRUCTURES[3])
    said = tokenizer()._wrapped.encode(text, add_special_tokens=False)
    for at in range(len(said)):
        following.follow(said[:at])
        may = allowed(following)
        assert said[at] in may
        assert following.stop_ids.isdisjoint(may) or text == "yesterday"
    assert following.is_whole(said)
    assert following.stop_ids <= set(allowed(following))
    assert text == "yes" or set(allowed(following)) == following.stop_ids


def test_a_requests_own_stop_tokens_may_come_where_the_answer_may_end():
    following = tokenizer().grammars.guide(STRUCTURES[3], (1,), tokenizer().stop_ids | {77})
    assert 77 not in allowed(following)
    following.follow(tokenizer()._wrapped.encode("yes", add_special_tokens=False))
    assert 77 in allowed(following)


def test_what_must_come_is_known_before_it_is_said():
    following = guide()
    assert following.forced() == []  # a blank or a line break may come behind the brace
    following.follow(tokenizer()._wrapped.encode('{"', add_special_tokens=False))
    assert tokenizer().decode(following.forced()) == "name"
    assert guide(STRUCTURES[1]).forced() == []


def test_the_grammar_begins_behind_the_thinking():
    following = guide(prompt=(1, *OPEN, 3), marks=Marks(OPEN, SHUT))
    following.follow([50, 60])
    assert allowed(following) is None
    following.take(SHUT[0])
    assert allowed(following) is None
    following.take(SHUT[1])
    first = allowed(guide())
    assert allowed(following) == first
    following.take(first[0])
    following.follow([50, 60])
    assert allowed(following) is None
    following.follow([50, 60, *SHUT, first[0]])
    fresh = guide()
    fresh.follow([first[0]])
    assert allowed(following) == allowed(fresh)


def test_a_target_may_think_first_where_the_prompt_leaves_it_open():
    following, first = guide(marks=Marks(OPEN, SHUT)), allowed(guide())
    assert allowed(following) == sorted([OPEN[0], *first])
    following.take(OPEN[0])
    assert allowed(following) == [OPEN[1]]
    following.take(OPEN[1])
    assert allowed(following) is None
    following.follow([])
    following.take(first[0])
    fresh = guide()
    fresh.follow([first[0]])
    assert allowed(following) == allowed(fresh)
    assert not following.is_whole([*OPEN, 50])


@pytest.mark.parametrize(
    ("prompt", "thinks"),
    [
        ((1, 2, *OPEN), True),
        ((1, 2, *OPEN, 3), True),
        ((1, *OPEN, 5, *SHUT, 3), False),
        ((1, *OPEN, 3, 3, 3, 3), None),
        ((1, 2), None),
        (OPEN, True),
    ],
)
def test_a_prompt_tells_whether_the_answer_begins_in_thinking(prompt, thinks):
    assert thinks_at_end(prompt, Marks(OPEN, SHUT)) is thinks


def test_without_a_stop_token_nothing_structured_could_end():
    with pytest.raises(ValueError, match="no stop token"):
        Grammars(tokenizer()._wrapped._tokenizer, frozenset(), Marks())


def test_grammars_are_kept_up_to_a_number(monkeypatch):
    monkeypatch.setattr("dspark_batch.models.grammar._COMPILED", 2)
    kept = Grammars(tokenizer()._wrapped._tokenizer, tokenizer().stop_ids, Marks())
    for structure in (*STRUCTURES, STRUCTURES[0]):
        kept.guide(structure, (1,), frozenset())
    assert list(kept._compiled) == [s.grammar for s in (STRUCTURES[3], STRUCTURES[0])]
