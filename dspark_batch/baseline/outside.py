"""Answers by mlx-lm's own generation: a reference from outside."""

from collections.abc import Iterable, Iterator

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from dspark_batch.answers.sequence import Sequence
from dspark_batch.answers.stopping import StopStrings
from dspark_batch.numerics.rows import as_they_come
from dspark_batch.pair import Pair
from dspark_batch.types import Failure, Outcome, Request


def generate_outside(
    pair: Pair, slots: int, stream: Iterable[Request | Failure]
) -> Iterator[Outcome]:
    """Answer greedy requests with mlx-lm's batch generator; failures pass through.

    The weights in memory are the pair's own; caches, masks, batching and the loop are mlx-lm's.

    Args:
        pair: whose target answers.
        slots: answers that decode together; as many wait to come in.
        stream: requests without a temperature.
    """
    generator = BatchGenerator(
        pair.target.model,
        stop_tokens=[[token] for token in sorted(pair.config.stop_ids)],
        completion_batch_size=slots,
        prefill_batch_size=min(slots, 8),
    )
    pending = iter(stream)
    sequences: dict[int, Sequence] = {}  # by uid
    made: dict[object, mx.array] = {}
    try:
        while True:
            yield from _admit(pair, slots, pending, generator, sequences)
            if not sequences:
                return
            with as_they_come(made):
                responses = generator.next_generated()
            for response in responses:
                outcome = _taken(pair, sequences, response.uid, int(response.token))
                if outcome is None:
                    continue
                if response.finish_reason is None:  # a stop string, which mlx-lm does not know
                    generator.remove([response.uid])
                yield outcome
    finally:
        generator.close()


def _admit(
    pair: Pair,
    slots: int,
    pending: Iterator[Request | Failure],
    generator: BatchGenerator,
    sequences: dict[int, Sequence],
) -> Iterator[Failure]:
    """Fill the generator up to its slots."""
    while len(sequences) < slots:
        request = next(pending, None)
        if request is None:
            return
        if isinstance(request, Failure):
            yield request
            continue
        (uid,) = generator.insert([list(request.prompt_ids)], max_tokens=[request.max_tokens])
        stops = request.sampling.stop
        looks = StopStrings(stops, pair.reader.decode) if stops else None
        sequences[uid] = Sequence(request, pair.config.stop_ids, looks)


def _taken(pair: Pair, sequences: dict[int, Sequence], uid: int, token: int) -> Outcome | None:
    """Give an answer its next token; return the outcome if that ends it."""
    sequence = sequences[uid]
    if sequence.token_ids:
        sequence.advance([], token, 0)
    else:
        sequence.begin(token)
    if sequence.finish_reason is None:
        return None
    del sequences[uid]
    spoken = pair.tokenizer.decode(sequence.spoken_ids()) if pair.tokenizer else ""
    return sequence.completion(spoken)
