"""mlx-lm's BatchGenerator; settings: batch, prefill, shared.

shared: what all prompts begin with is computed once, and each prompt gets a copy of its cache.
mlx-lm drafts for one prompt at a time only, with a model that is a language model.
"""

from copy import deepcopy

import mlx.core as mx
from mlx_lm import load as load_model
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.peers.engines import beginning


def load(target, drafter, stop_ids):
    """Load the target."""
    model, _ = load_model(target)

    def answer(prompts, max_tokens, batch, prefill=8, shared=False):
        generator = BatchGenerator(
            model,
            stop_tokens=[[token] for token in stop_ids],
            completion_batch_size=batch,
            prefill_batch_size=min(batch, prefill),
        )
        caches = None
        if shared:
            shared_ids = beginning(prompts)
            cache = make_prompt_cache(model)
            model(mx.array([shared_ids]), cache=cache)
            mx.eval([layer.state for layer in cache])
            caches = [deepcopy(cache) for _ in prompts]
            prompts = [ids[len(shared_ids) :] for ids in prompts]
        uids = generator.insert(prompts, max_tokens=[max_tokens] * len(prompts), caches=caches)
        answers = {uid: [] for uid in uids}
        while responses := generator.next_generated():
            for response in responses:
                answers[response.uid].append(response.token)
        generator.close()
        return [answers[uid] for uid in uids]

    return answer
