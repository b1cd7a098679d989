"""mlx-vlm's BatchGenerator; settings: batch, prefill, shared.

shared: it caches the beginnings of prompts. It does not draft for this target: "DSpark target
LanguageModel does not expose speculative cache rollback support".
"""

import mlx.core as mx
from mlx_vlm import load as load_model
from mlx_vlm.apc import APCManager
from mlx_vlm.generate.ar import BatchGenerator


def load(target, drafter, stop_ids):
    """Load the target."""
    model, processor = load_model(target)

    def embedded(ids):
        found = model.get_input_embeddings(mx.array([ids]), None).to_dict()
        # Its server gives text this hash; else its cache would tell prompts apart by embeddings.
        embeddings = {name: value for name, value in found.items() if value is not None}
        return embeddings | {"_apc_semantic_hash": 0}

    def answer(prompts, max_tokens, batch, prefill=None, shared=False):
        generator = BatchGenerator(
            model.language_model,
            processor,
            stop_tokens=set(stop_ids),
            completion_batch_size=batch,
            prefill_batch_size=prefill or batch,
            compute_logprobs=False,
            apc_manager=APCManager() if shared else None,
        )
        uids = generator.insert(
            prompts, max_tokens, prompt_kwargs=[embedded(ids) for ids in prompts]
        )
        answers = {uid: [] for uid in uids}
        while generator.has_work:
            for response in generator.next()[1]:
                answers[response.uid].append(response.token)
        generator.close()
        return [answers[uid] for uid in uids]

    return answer
