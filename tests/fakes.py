"""Stand-ins that can notice a bug: every answer depends on the whole of what was asked."""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice, takewhile
from time import sleep

from dspark_batch.audit.replay import Baseline, Margin
from dspark_batch.opening import Opened
from dspark_batch.spec.spec import number_or_none
from dspark_batch.types import Completion, Failure, Outcome, Partial, Request, Said

CONTEXT_LENGTH = 400


def unsplit(text):
    """Find no reasoning in an answer."""
    return Said(None, text)


def fake_render(messages: list[dict[str, str]]) -> list[int]:
    """One token per character of the whole conversation, roles included, or of a plain text."""
    if isinstance(messages, str):
        return [ord(c) for c in messages]
    return [ord(c) for message in messages for c in f"{message['role']}:{message['content']}\n"]


def begun(stream, may_begin):
    """Leave out what may not begin, and all behind it."""
    return takewhile(lambda r: isinstance(r, Failure) or may_begin(r.item), stream)


@dataclass
class FakeEngine:
    """Answers with a digest of all prompt tokens; the last admitted comes out first."""

    slots: int = 3
    pause_s: float = 0.0  # for each item
    pulled: int = 0  # items that left the stream
    dies_after: int | None = None  # outcomes; None: never
    fails_on: frozenset[str] = frozenset()  # custom_ids

    def generate(self, stream, may_begin=lambda item: True) -> Iterator[Outcome]:
        pending = begun(stream, may_begin)
        yielded = 0
        while admitted := list(islice(pending, self.slots)):
            self.pulled += len(admitted)
            for request in reversed(admitted):
                if yielded == self.dies_after:
                    raise KeyboardInterrupt
                if self.pause_s:
                    sleep(self.pause_s)
                yield self._outcome(request)
                yielded += 1

    def _outcome(self, request: Request | Failure) -> Outcome:
        if isinstance(request, Failure):
            return request
        if request.item.custom_id in self.fails_on:
            return Failure(request.item, "engine", f"{request.item.where}: not finite")
        return fake_answer(request)


def fake_answer(request: Request) -> Completion:
    """Up to 12 tokens; one with a 7 in its digest stops by itself."""
    seed = sha256(repr(request.prompt_ids).encode()).hexdigest()
    ids = tuple(int(c, 16) for c in seed)[: min(request.max_tokens, 12)]
    rounds = [len(ids[i : i + 3]) for i in range(1, len(ids), 3)]
    return Completion(
        item=request.item,
        text="".join(f"{i:x}" for i in ids),
        token_ids=ids,
        finish_reason="stop" if 7 in ids else "length",
        prompt_tokens=len(request.prompt_ids),
        accept_lengths=tuple(rounds),
        num_accepted=tuple(n - 1 for n in rounds),
        num_drafted=(4,) * len(rounds),
        prefill_s=0.25,
        decode_s=0.5,
    )


@dataclass
class OtherEngine(FakeEngine):
    """A baseline that gives some items another answer from the third token on."""

    others: frozenset[str] = frozenset()  # custom_ids

    def _outcome(self, request: Request | Failure) -> Outcome:
        outcome = super()._outcome(request)
        if isinstance(outcome, Failure) or outcome.item.custom_id not in self.others:
            return outcome
        ids = (*outcome.token_ids[:2], *((i + 1) % 16 for i in outcome.token_ids[2:]))
        return outcome._replace(token_ids=ids, text="".join(f"{i:x}" for i in ids))


def fake_baseline(engine=None, spread=1.0, split=unsplit):
    """A baseline as an engine half offers it; every choice of its target is equally clear."""

    def baseline(against):
        return Baseline(
            (engine or FakeEngine()).generate,
            lambda ids: "".join(f"{i:x}" for i in ids),
            lambda request, answer, tokens: Margin(spread / 2, spread),
            frozenset(),
            split,
        )

    return baseline


def fake_opener(engine=None, split=unsplit, baseline=None, **identity):
    """Make an `open_engine` whose model can be told apart by its identity."""
    known = {"target": "t0", "tokenizer": "k0", "chat_template": "c0", "drafter": "d0"}

    def open_engine(spec, manifest):
        slots = number_or_none(spec.slots) or 1
        dtype = spec.dtype or (manifest["identity"]["dtype"] if manifest else "float32")
        return Opened(
            engine or FakeEngine(slots),
            fake_render,
            CONTEXT_LENGTH,
            known | {"dtype": dtype} | identity,
            slots=slots,
            split=split,
            baseline=baseline or fake_baseline(split=split),
        )

    return open_engine


def refuse_to_open(spec, manifest):
    """An `open_engine` for starts that must not load a model."""
    raise AssertionError("the model was loaded")


@dataclass
class FakeSteps:
    """An engine that commits three tokens of each answer in a step, and can die."""

    slots: int = 3
    pause_s: float = 0.0  # for each step
    dies_on: str | None = None  # a text in the prompt of an item that has a slot
    most_active: int = 0  # that were ever seen

    def __post_init__(self):
        self._waiting: list[tuple[bool, Request]] = []
        self._active: list[tuple[Request, Completion, int]] = []
        self._ended: list[Outcome] = []

    @property
    def is_idle(self):
        return not (self._waiting or self._active or self._ended)

    def add(self, request, *, urgent=False):
        self._waiting.append((urgent, request))
        self._waiting.sort(key=lambda waiting: not waiting[0])

    def cancel(self, item):
        gone = [r for _, r in self._waiting if r.item.is_same(item)]
        gone += [r for r, *_ in self._active if r.item.is_same(item)]
        self._waiting = [w for w in self._waiting if not w[1].item.is_same(item)]
        self._active = [a for a in self._active if not a[0].item.is_same(item)]
        self._ended += [Failure(r.item, "cancelled", f"{r.item.where}: given up") for r in gone]

    def so_far(self, item):
        for request, answer, num_tokens in self._active:
            if request.item.is_same(item) and num_tokens:
                return Partial(answer.token_ids[:num_tokens], answer.is_drafted[:num_tokens])
        return None

    def step(self):
        sleep(self.pause_s)
        going, self._active = self._active, []
        for request, answer, num_tokens in going:
            said = "".join(map(chr, request.prompt_ids))
            if self.dies_on is not None and self.dies_on in said:
                raise RuntimeError(f"the engine broke at {self.dies_on}")
            if num_tokens + 3 >= len(answer.token_ids):
                self._ended.append(answer)
            else:
                self._active.append((request, answer, num_tokens + 3))
        while self._waiting and len(self._active) < self.slots:
            request = self._waiting.pop(0)[1]
            self._active.append((request, fake_answer(request), 0))
        self.most_active = max(self.most_active, len(self._active))
        ended, self._ended = self._ended, []
        return ended


def fake_decode(token_ids):
    return "".join(f"{i:x}" for i in token_ids)


def fake_steps_opener(engine=None):
    """Make what a hub opens: an engine with steps."""

    def open_engine():
        steps = engine or FakeSteps()
        identity = {"target": "t0", "tokenizer": "k0", "chat_template": "c0", "drafter": "d0"}
        return Opened(
            steps,
            fake_render,
            CONTEXT_LENGTH,
            identity | {"dtype": "float32"},
            slots=steps.slots,
            split=unsplit,
            decode=fake_decode,
            vocab_size=0x110000,  # an id is a character
        )

    return open_engine
