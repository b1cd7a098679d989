"""vllm-mlx's scheduler without its server; settings: batch, prefill, shared.

It drafts only with heads that are part of a target. shared: what all prompts begin with is answered
first, as its warm-up of prompts does, so that its cache has it; requests ask the cache when they
come, all of them before the first has run.
"""

import mlx.core as mx
from mlx_lm import load as load_model
from vllm_mlx.request import Request, SamplingParams
from vllm_mlx.scheduler import Scheduler, SchedulerConfig

from benchmarks.peers.engines import beginning


def load(target, drafter, stop_ids):
    """Load the target; the scheduler begins anew in each turn, with an empty prefix cache."""
    model, tokenizer = load_model(target)

    def answer(prompts, max_tokens, batch, prefill=8, shared=False):
        scheduler = Scheduler(
            model,
            tokenizer,
            SchedulerConfig(
                max_num_seqs=batch,
                completion_batch_size=batch,
                prefill_batch_size=min(batch, prefill),
                enable_prefix_cache=shared,
            ),
        )
        sampling = {"temperature": 0.0, "stop_token_ids": stop_ids}
        if shared:
            one = SamplingParams(max_tokens=1, **sampling)
            scheduler.add_request(Request("beginning", beginning(prompts), one))
            _run(scheduler)
        for index, ids in enumerate(prompts):
            wanted = SamplingParams(max_tokens=max_tokens, **sampling)
            scheduler.add_request(Request(str(index), ids, wanted))
        answers = _run(scheduler)
        scheduler._close_batch_generator()
        mx.clear_cache()
        return [answers[str(index)] for index in range(len(prompts))]

    return answer


def _run(scheduler):
    answers = {}
    while scheduler.has_requests():
        for output in scheduler.step().outputs:
            if output.finish_reason == "error":
                raise RuntimeError("the scheduler gave its requests up")
            answers.setdefault(output.request_id, []).extend(output.new_token_ids)
    return answers
