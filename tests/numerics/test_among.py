"""Some tokens of a vocabulary are drafted as if all others had no chance."""

import mlx.core as mx
import pytest

from dspark_batch.numerics.among import Among
from dspark_batch.numerics.chance import Chance
from dspark_batch.numerics.rules import Coupled, Greedy, Rejection, Steered
from dspark_batch.numerics.sampling import Filters, Settings

VOCAB, SLOTS = 40, 64
AMONG = Among(mx.array([0, 3, 4, 9, 17, 18, 30, 39]), VOCAB)
FILTERS = Filters(mx.full(SLOTS, 5), mx.full(SLOTS, 0.9), mx.full(SLOTS, 0.01))
SETTINGS = {
    "greedy and sampled": Settings(mx.where(mx.arange(SLOTS) % 2 == 0, 0.0, 1.0)),
    "with filters": Settings(mx.full(SLOTS, 1.3), FILTERS),
}


def chance():
    keys = mx.stack([mx.full(SLOTS, 7), mx.arange(SLOTS)], axis=-1).astype(mx.uint32)
    return Chance(keys, mx.arange(SLOTS))


def forbid(logits, drafts, first=0, *, is_draft=False):
    """What a grammar does: two tokens are out."""
    out = (mx.arange(VOCAB) == 3) | (mx.arange(VOCAB) == 9)
    return mx.where(out, -mx.inf, logits)


def rules():
    yield "greedy", Greedy
    for name, settings in SETTINGS.items():
        yield f"coupled, {name}", lambda s=settings: Coupled(s, chance())
        yield f"rejection, {name}", lambda s=settings: Rejection(s, chance())
    yield "steered", lambda: Steered(Greedy(), forbid)


@pytest.mark.parametrize(("name", "make"), list(rules()))
def test_a_rule_takes_the_token_that_it_takes_of_all(name, make):
    logits = 3 * mx.random.normal((SLOTS, AMONG.ids.size), key=mx.random.key(5))
    whole, few = make(), make()
    for k in range(3):
        of_all = whole.draft(AMONG.spread(logits), k)
        of_few = few.draft(logits, k, AMONG)
        assert of_all.tolist() == of_few.tolist(), name
        assert set(of_few.tolist()) <= set(AMONG.ids.tolist())
        assert len(set(of_few.tolist())) > 2


def test_logits_are_spread_over_the_vocabulary():
    spread = AMONG.spread(mx.arange(8.0)[None])
    assert spread.shape == (1, VOCAB)
    assert spread[0, AMONG.ids].tolist() == list(range(8))
    assert mx.isneginf(spread).sum().item() == VOCAB - 8
