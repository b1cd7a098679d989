"""Structured answers: exact under speculation, whole, and nobody else's business."""

import json
from functools import cache

import jsonschema
import pytest
from grids import grid

from dspark_batch.answers import steering
from dspark_batch.baseline.margins import margins
from dspark_batch.engine.engine import Engine
from dspark_batch.models.grammar import Grammars, Guide, Marks
from dspark_batch.pair import load_pair
from dspark_batch.spec.structure import structure_of
from dspark_batch.types import Failure, Item, Request, Sampling, Structure

LENGTH = 100
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["sea", "lake"]},
        "depths": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 2},
    },
    "required": ["name", "kind", "depths"],
}
STRUCTURES = [
    structure_of("json_schema", SCHEMA),
    structure_of("choice", ["yes", "no", "perhaps"]),
    None,  # wants nothing
    structure_of("regex", "[a-c]{3}-[0-9]{2,4}"),
    structure_of("grammar", 'start: "x" ("y" | "z"){1,5} "."'),
    structure_of("json_schema", SCHEMA),
]


@cache
def tiny():
    return load_pair("tiny", dtype="float32")


def request(index, structure, temperature=0.0, max_tokens=LENGTH, **choices):
    asked = [{"role": "user", "content": f'Spell "cat{index}" backwards.'}]
    item = Item(index, str(index), f"digest-{index}", f"test:{index}")
    sampling = Sampling(temperature=temperature, structure=structure, **choices)
    return Request(item, tuple(tiny().tokenizer.render(asked)), max_tokens, sampling)


def requests(temperature=0.0):
    return [
        request(i, structure, temperature, LENGTH if structure else 40)
        for i, structure in enumerate(STRUCTURES)
    ]


def answers(asked, **settings):
    outcomes = list(Engine(tiny(), **settings).generate(asked))
    assert not [o.message for o in outcomes if isinstance(o, Failure)]
    return {outcome.item.index: outcome for outcome in outcomes}


def ids(outcomes):
    return {index: outcome.token_ids for index, outcome in outcomes.items()}


@cache
def plain(temperature=0.0):
    return answers(requests(temperature), draft_length=0)


def is_as_asked(index, text):
    kind = STRUCTURES[index].kind
    if kind == "json_schema":
        jsonschema.validate(json.loads(text), SCHEMA)
    return True


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_answer_is_as_it_was_asked(temperature):
    said = plain(temperature)
    for index in (0, 5):
        jsonschema.validate(json.loads(said[index].text), SCHEMA)
    assert said[1].text in ("yes", "no", "perhaps")
    assert said[2].structure is None
    assert {i: a.structure for i, a in said.items() if i != 2} == {
        i: (STRUCTURES[i].kind, True) for i in said if i != 2
    }
    assert all(said[i].finish_reason == "stop" for i in said if i != 2)


@pytest.mark.parametrize(
    ("temperature", "settings"),
    grid([1.0, 0.0], [{}, {"slots": 4, "draft_length": 3}, {"slots": 6, "drafts_ahead": True}]),
)
def test_neither_drafts_nor_neighbours_change_a_structured_answer(settings, temperature):
    assert ids(answers(requests(temperature), **settings)) == ids(plain(temperature))


def test_who_asks_for_no_structure_answers_as_if_alone():
    (alone,) = answers([requests()[2]]).values()
    assert plain()[2].token_ids == alone.token_ids


def test_drafts_follow_the_grammar():
    free = answers([request(i, None, max_tokens=30, ignore_eos=True) for i in range(4)], slots=4)
    bound = answers([request(i, STRUCTURES[0]) for i in range(4)], slots=4)
    assert all(sum(a.num_accepted) > 0 for a in bound.values())
    assert free.keys() == bound.keys()


def test_the_rejection_rule_draws_what_may_come():
    said = answers(requests(1.0), sampling="rejection", slots=6)
    assert all(a.structure.parsed for i, a in said.items() if i != 2)
    assert sum(sum(a.num_accepted) for a in said.values()) > 0
    jsonschema.validate(json.loads(said[0].text), SCHEMA)


def test_a_matcher_that_is_not_taken_back_changes_answers(monkeypatch):
    monkeypatch.setattr(Guide, "_take_back", lambda self: self._before.clear())
    outcomes = Engine(tiny(), slots=6).generate(requests())
    found = {o.item.index: getattr(o, "token_ids", None) for o in outcomes}
    assert found != ids(plain())


def test_a_mask_one_position_late_changes_answers(monkeypatch):
    real = steering._Allowed._ask

    def late(self, *asked):
        real(self, *asked)
        if len(self._rows) > 1:
            self._rows[-1] = self._rows[-2]

    monkeypatch.setattr(steering._Allowed, "_ask", late)
    outcomes = Engine(tiny(), slots=6).generate(requests())
    found = {o.item.index: getattr(o, "token_ids", None) for o in outcomes}
    assert found != ids(plain())


@pytest.mark.parametrize("settings", [{"draft_length": 0}, {"slots": 2}], ids=str)
def test_a_target_thinks_freely_before_its_structured_answer(settings, monkeypatch):
    free = plain()[2].token_ids
    end = next(n for n, token in enumerate(free) if n > 2 and token not in free[:n])
    prompt = request(2, None).prompt_ids
    tokenizer = tiny().tokenizer
    marks = Marks(prompt[-2:], (free[end],))
    grammars = Grammars(tokenizer._wrapped._tokenizer, tokenizer.stop_ids, marks)
    monkeypatch.setitem(vars(tokenizer), "grammars", grammars)
    said = answers([request(2, STRUCTURES[1]), request(0, STRUCTURES[0])], **settings)[2]
    assert said.token_ids[: end + 1] == free[: end + 1]
    assert tokenizer.decode(said.token_ids[end + 1 : -1]) in ("yes", "no", "perhaps")
    assert said.structure.parsed


def test_an_answer_that_is_cut_is_not_whole():
    said = answers(
        [request(0, STRUCTURES[0], max_tokens=4), request(1, STRUCTURES[1], stop=("e",))]
    )
    assert (said[0].finish_reason, said[0].structure.parsed) == ("length", False)
    assert said[1].structure.parsed is ("e" not in plain()[1].text)


def test_an_answer_is_whole_where_a_stop_string_cuts_the_line_break_behind_its_json():
    (line_break,) = tiny().tokenizer._wrapped.encode("\n", add_special_tokens=False)
    wish = {"logit_bias": ((line_break, 50.0),)}
    word = structure_of("json_schema", {"enum": ["yes"]})
    said = answers([request(0, word, stop=("\n",), **wish), request(1, word, **wish)])
    assert (said[0].text, said[1].text) == ('"yes"', '"yes"\n')
    assert said[0].structure.parsed
    assert said[1].structure.parsed


def test_the_audits_margin_knows_the_grammar():
    said = plain()[0].token_ids
    for at in range(0, len(said), 3):
        asked = request(0, STRUCTURES[0])
        assert margins(tiny(), asked, said[:at], (said[at], said[at]))[1] == pytest.approx(
            0, abs=1e-4
        )


def test_a_word_that_must_come_comes_although_it_is_bad():
    said = answers([request(0, structure_of("choice", ["yes"]), bad_words=("yes",))])
    assert said[0].text == "yes"


def test_a_grammar_that_fails_on_the_way_fails_its_item_only(monkeypatch):
    real, expected = Guide.follow, ids(plain())

    def failing(self, token_ids):
        real(self, token_ids)
        if self.name == "bad" and len(token_ids) > 3:
            self.problem = "parser error: too many items"

    made = steering.guide_of

    def named(pair, request):
        guide = made(pair, request)
        if guide is not None:
            guide.name = "bad" if request.item.index == 3 else "good"
        return guide

    monkeypatch.setattr(Guide, "follow", failing)
    monkeypatch.setattr(steering, "guide_of", named)
    outcomes = {o.item.index: o for o in Engine(tiny(), slots=3).generate(requests())}
    assert "cannot be followed any further: parser error: too many items." in outcomes[3].message
    rest = {i: o.token_ids for i, o in outcomes.items() if i != 3}
    assert rest == {i: t for i, t in expected.items() if i != 3}


def test_a_grammar_that_this_tokenizer_cannot_follow_fails_its_item_only():
    strange = Structure("grammar", "start: <|no_such_token|>")
    good, bad = request(0, STRUCTURES[0]), request(1, strange)
    outcomes = {o.item.index: o for o in Engine(tiny(), slots=2).generate([good, bad])}
    assert outcomes[0].token_ids == plain()[0].token_ids
    assert "does not go with this target" in outcomes[1].message
