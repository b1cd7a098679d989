"""Every drafter satisfies the whole contract, the one that never drafts too."""

import re
from pathlib import Path

import mlx.core as mx
import pytest
from golden_cases import load_case

from dspark_batch.drafters.drafter import Drafter
from dspark_batch.drafters.plain import NoDrafter

PACKAGE = Path(__file__).parents[2] / "dspark_batch"
MEMBERS = {name for name in vars(Drafter) if not name.startswith("_")}
DRAFTERS = {
    "none": lambda: (NoDrafter(), None),
    "dspark": lambda: of_case("qwen3_vanilla"),
    "dflash": lambda: of_case("qwen3_dflash"),
}


def of_case(name):
    pair = load_case(name).pair
    cache = pair.target.make_cache(1, 0)
    cache.reserve(3)
    _, features = pair.target(mx.array([[5, 6, 7]]), cache)
    return pair.drafter, features


def test_the_contract_is_what_the_engine_uses():
    engine = "".join(path.read_text() for path in (PACKAGE / "engine").glob("*.py"))
    used = set(re.findall(r"\bdrafter\.(\w+)", engine)) - {"Drafter"}  # modules models.drafter
    assert used == MEMBERS


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_drafter_has_all_of_it_and_does_what_it_says(name):
    drafter, features = DRAFTERS[name]()
    assert all(hasattr(drafter, member) for member in MEMBERS)
    assert isinstance(drafter.has_confidence, bool)
    assert all(isinstance(layer, int) for layer in drafter.tap_ids)
    context = drafter.make_cache(1, 0)
    context.reserve(3 + max(1, drafter.block_size))
    drafter.extend(context, features)
    context.keep(mx.array([3]))
    num_drafts = min(2, drafter.block_size)
    draft = drafter.propose(
        mx.array([7]), context, num_drafts, lambda logits, k, among: logits.argmax(-1)
    )
    assert draft.tokens.shape == (1, num_drafts)
    assert (draft.confidence is not None) == drafter.has_confidence


@pytest.mark.parametrize("name", ["dspark", "dflash"])
@pytest.mark.parametrize(("value", "is_sane"), [(mx.nan, False), (mx.inf, False), (-mx.inf, True)])
def test_one_logit_that_is_no_number_is_told(monkeypatch, name, value, is_sane):
    drafter, features = DRAFTERS[name]()
    context = drafter.make_cache(2, 0)
    context.reserve(3 + drafter.block_size)
    drafter.extend(context, mx.concatenate([features, features]))
    context.keep(mx.array([3, 3]))
    whole = type(drafter).base_logits

    def spoilt(self, hidden):
        logits = whole(self, hidden)
        logits[1, 1, 5] = value
        return logits

    monkeypatch.setattr(type(drafter), "base_logits", spoilt)
    draft = drafter.propose(
        mx.array([7, 7]), context, 2, lambda logits, k, among: logits.argmax(-1)
    )

    assert (draft.highest < mx.inf).tolist() == [True, is_sane]


def test_nobody_asks_which_drafter_it_is():
    asks = [p for p in PACKAGE.rglob("*.py") if re.search(r"isinstance\(.*Drafter", p.read_text())]
    assert not asks
