"""dspark-batch with its plan by rule, as a job has it; settings: drafts."""

from dspark_batch.drafters.plain import NoDrafter
from dspark_batch.engine.engine import Engine
from dspark_batch.engine.setup import set_up
from dspark_batch.pair import load_pair
from dspark_batch.types import Item, Request


def load(target, drafter, stop_ids):
    """Load the pair; its plan is made anew in each turn, since it depends on the work."""
    pair = load_pair(target=target, drafter=drafter)
    if sorted(pair.config.stop_ids) != stop_ids:
        raise ValueError(f"stop ids {sorted(pair.config.stop_ids)}, expected {stop_ids}")
    pairs = {True: pair, False: pair._replace(drafter=NoDrafter())}
    known = set_up(pair).conformance

    def answer(prompts, max_tokens, drafts):
        pair = pairs[drafts]
        setup = set_up(pair, max_tokens=max_tokens, num_items=len(prompts), known=known)
        engine = Engine(
            pair,
            slots=setup.plan.slots,
            shapes=setup.shapes,
            lengths=setup.lengths,
            costs=setup.costs,
            most_positions=setup.most_positions,
            prefix_positions=setup.prefix_positions,
            state_positions=setup.state_positions,
        )
        work = (
            Request(Item(n, str(n), f"{n:032x}", f"peers:{n}"), tuple(ids), max_tokens)
            for n, ids in enumerate(prompts)
        )
        done = sorted(engine.generate(work), key=lambda c: c.item.index)
        return [c.token_ids for c in done]

    return answer
