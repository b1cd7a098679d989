"""Opens a fleet as an engine: workers that compute the same bits, behind one `Opened`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias

from dspark_batch.audit.replay import Against, Baseline
from dspark_batch.errors import DsparkBatchError, ModelError, UsageError
from dspark_batch.fleet.fleet import Fleet
from dspark_batch.fleet.news import Hello
from dspark_batch.intake.mapping import Render
from dspark_batch.opening import Lost, Opened, open_pair
from dspark_batch.record.formats import Begun, Manifest
from dspark_batch.record.run_dir import begun_with, differences, fingerprint
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Json, Said

# Loads a pair in a worker: job, with what it began, items of this worker (None: unknown).
OpenThere: TypeAlias = Callable[[Spec, Begun | None, int | None], Opened]


class Words(NamedTuple):
    """What a job knows of a pair without its weights."""

    render: Render
    split: Callable[[str], Said]
    decode: Callable[[Sequence[int]], str]
    stop_ids: frozenset[int]
    marks: Sequence[str] = ()


def words_of(spec: Spec) -> Words:
    """Load tokenizer and template, and no weights.

    Raises:
        DsparkBatchError: they cannot be loaded.
    """
    from dspark_batch.models.thinking import settle_thinking
    from dspark_batch.pair import load_reading

    reading = load_reading(
        spec.family, target=spec.target, trust_remote_code=spec.trust_remote_code
    )
    tokenizer = reading.tokenizer
    thinking = settle_thinking(tokenizer, spec.thinking, spec.family, spec.target, spec.drafter)
    marks = [mark for mark in (tokenizer.think_start, tokenizer.think_end) if mark]
    return Words(
        thinking.render, thinking.split, tokenizer.decode, frozenset(tokenizer.stop_ids), marks
    )


def open_there(spec: Spec, begun: Begun | None, num_items: int | None) -> Opened:
    """Load a pair in a worker."""
    return open_pair(spec, begun, num_items=num_items)


def open_fleet(
    spec: Spec,
    manifest: Manifest | None,
    *,
    num_items: int | None = None,
    there: OpenThere = open_there,
    words: Callable[[Spec], Words] = words_of,
) -> Opened:
    """Begin workers, and wait for the first one; the others join as soon as they have loaded.

    The first one's bits are the job's, unless a manifest has them already. A worker whose bits are
    others does nothing.

    Args:
        spec: the job.
        manifest: of its first start; None: this is it.
        num_items: that are left; None: unknown.
        there: loads a pair in a worker.
        words: loads what this process needs of it.

    Raises:
        UsageError: Ray is not installed, or there is no room for so many workers.
        DsparkBatchError: the pair cannot be loaded.
    """
    spoken = words(spec)
    try:
        from dspark_batch.fleet.cluster import Cluster
    except ImportError as error:
        raise UsageError(
            f"workers need Ray, which is not here ({error}); pip install 'dspark-batch[ray]'."
        ) from error
    cluster = Cluster(spec)
    team = _Team(spec, manifest, num_items, there, cluster.workers)
    fleet = Fleet(
        lambda place, slots, tell: cluster.spawn(place, team.opener(slots), tell), cluster.workers
    )

    def close() -> None:
        fleet.close()
        cluster.close()

    try:
        cluster.watch(fleet.end)
        hello = team.assemble(fleet)
    except BaseException:
        close()
        raise
    return _opened(fleet, hello, spoken, cluster.workers)._replace(close=close)


class _Team:
    """What the workers of a job have in common.

    Args:
        spec: the job.
        begun: with what it began; None: the first worker decides.
        num_items: that are left; None: unknown.
        there: loads a pair in a worker.
        workers: how many there are.
    """

    def __init__(
        self,
        spec: Spec,
        begun: Manifest | None,
        num_items: int | None,
        there: OpenThere,
        workers: int,
    ) -> None:
        self._spec = spec
        self._begun: Begun | None = begun
        self._num_items = None if num_items is None else -(-num_items // workers)
        self._there = there
        self._workers = workers

    def opener(self, slots: int | None) -> Callable[[], Opened]:
        """Make what loads the pair in a worker, with this many slots at most; None: as planned."""
        spec = self._spec if slots is None else replace(self._spec, slots=slots)
        return partial(self._there, spec, self._begun, self._num_items)

    def assemble(self, fleet: Fleet) -> Hello:
        """Begin all workers; the first one alone, if it decides what the others are compared with.

        Raises:
            DsparkBatchError: none is there that may work.
        """
        fleet.refuses = self._refuses
        if self._begun is None:
            fleet.begin(0)
            hello = fleet.first()
            self._begun = begun_with(self._fields_of(hello), hello.identity, hello.setup)
        fleet.begin_all()
        return fleet.first()

    def _fields_of(self, hello: Hello) -> dict[str, Json]:
        return fingerprint(self._spec, hello.identity, hello.context_length)

    def _refuses(self, hello: Hello) -> DsparkBatchError | None:
        """Compare a worker with the job; its message names both values."""
        if self._begun is None:
            return None
        words, fields = ("in the job", "there"), self._fields_of(hello)
        differing = differences(self._begun, fields, words, hello.setup)
        if not differing:
            return None
        return ModelError(
            f"worker {hello.name} computes otherwise than the job, so its rows would not be equal: "
            f"{'; '.join(differing)}. Take machines of one kind, with the same libraries and "
            "driver; in a cluster --worker-resources says which."
        )


def _opened(fleet: Fleet, hello: Hello, words: Words, workers: int) -> Opened:
    def baseline(against: Against) -> Baseline:
        return Baseline(
            partial(fleet.replay, against),
            words.decode,
            partial(fleet.margin, against),
            words.stop_ids,
            words.split,
            scores=against == "engine",
        )

    def tell_lost(lost: Lost) -> None:
        fleet.on_lost = lost

    return Opened(
        fleet,
        words.render,
        hello.context_length,
        hello.identity,
        hello.slots * workers,
        hello.setup,
        fleet.gauge,
        words.split,
        baseline,
        decode=words.decode,
        marks=words.marks,
        vocab_size=hello.vocab_size,
        tell_lost=tell_lost,
    )
