"""One thread owns the engine: jobs and people share it, and nobody's answer changes."""

import sys
import threading
import time
from collections import deque
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue

import mlx.core as mx
import pytest
from fakes import FakeSteps, fake_answer, fake_steps_opener
from golden_cases import load_case

from dspark_batch import hub as hubs
from dspark_batch.engine.engine import Engine
from dspark_batch.errors import Resumable
from dspark_batch.hub import Hub
from dspark_batch.opening import Opened
from dspark_batch.types import Completion, Failure, Item, Partial, Request, Sampling

IDS = load_case("qwen3_vanilla")["greedy0.output_ids"].tolist()


def request(n, max_tokens=12, name="a"):
    sampling = Sampling(temperature=1.0 if n % 3 == 2 else 0.0)
    item = Item(n, f"{name}{n}", f"digest-{n}", f"{name}:{n}")
    return Request(item, tuple(IDS[n % 8 : n % 8 + 6]), max_tokens, sampling)


def engine_half(slots=3):
    pair = load_case("qwen3_vanilla").pair
    return Opened(Engine(pair, slots=slots), lambda c: [1], 400, {}, slots=slots)


@cache
def answer_to(n, max_tokens=12, name="a"):
    """Answer a request alone; no hub may use the pair meanwhile."""
    engine = Engine(load_case("qwen3_vanilla").pair, draft_length=0)
    (answer,) = engine.generate([request(n, max_tokens, name)])
    return answer.token_ids


@pytest.fixture
def open_hub():
    """Make hubs that are closed at the end."""
    hubs_made = []

    def open_one(open_engine, **settings):
        hubs_made.append(Hub(open_engine, **settings))
        return hubs_made[-1]

    yield open_one
    for hub in hubs_made:
        hub.close()


class Hears:
    """The owner of a ticket."""

    def __init__(self):
        self.news = []
        self._ended = threading.Event()

    def __call__(self, news):
        self.news.append(news)
        if not isinstance(news, Partial):
            self._ended.set()

    def end(self):
        assert self._ended.wait(20)
        return self.news[-1]


def paused(requests, every=2):
    """A stream that has nothing right now, time and again."""
    for place, each in enumerate(requests):
        if place % every == 0:
            yield None
        yield each


def walked_to_the_end(generate, stream):
    """Call it again while the stream has more."""
    outcomes, left = [], deque()

    def told():
        yield from stream
        left.append("over")

    pending = told()
    while not left:
        outcomes += generate(pending)
    return outcomes


def test_a_none_in_a_stream_means_nothing_right_now():
    engine = Engine(load_case("qwen3_vanilla").pair, slots=2)
    outcomes = walked_to_the_end(engine.generate, paused(map(request, range(6))))
    assert sorted(o.item.index for o in outcomes) == list(range(6))
    assert all(o.token_ids == answer_to(o.item.index) for o in outcomes)


def test_an_engine_that_decodes_goes_on_while_its_stream_has_nothing():
    engine, pulls = Engine(load_case("qwen3_vanilla").pair, slots=2), []

    def stream():
        yield request(0, 30)
        for _ in range(4):
            pulls.append(None)
            yield None
        yield request(1)

    outcomes = list(engine.generate(stream()))
    assert {o.item.index for o in outcomes} == {0, 1}
    assert len(pulls) == 4


def test_a_none_in_the_stream_of_a_view_means_the_same(open_hub):
    hub = open_hub(fake_steps_opener())
    view = hub.view(None, None).engine
    outcomes = walked_to_the_end(view.generate, paused(map(request, range(40)), every=3))
    assert sorted(o.item.index for o in outcomes) == list(range(40))


def test_jobs_and_people_share_an_engine_and_each_has_the_answer_that_it_has_alone(open_hub):
    alone = {name: [answer_to(n, 9, name) for n in range(6)] for name in ("a", "b")}
    alone["live"] = [answer_to(n, 15, "live") for n in range(4)]
    hub, answers = open_hub(engine_half), SimpleQueue()

    def work(name):
        view = hub.view(None, None).engine
        for outcome in view.generate(request(n, 9, name) for n in range(6)):
            answers.put((name, outcome))

    jobs = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for job in jobs:
        job.start()
    people = []
    for n in range(4):
        hears = Hears()
        hub.put(request(n, 15, "live"), hears, urgent=True)
        people.append(hears)
        time.sleep(0.01)
    for n, hears in enumerate(people):
        assert hears.end().token_ids == alone["live"][n]
        assert hears.end().item == request(n, 15, "live").item
        *partials, answer = hears.news
        for one in partials:
            assert answer.token_ids[: len(one.token_ids)] == one.token_ids
    for job in jobs:
        job.join(20)
    told = [answers.get() for _ in range(12)]
    assert answers.empty()
    assert all(o.token_ids == alone[name][o.item.index] for name, o in told)
    assert hub.counts.ended.total() == 16
    assert sum(hub.counts.first_tokens) == 4


def test_who_is_waited_for_goes_before_a_job_and_slots_stay_free_for_the_next(open_hub):
    engine = FakeSteps(slots=8, pause_s=0.002)
    hub = open_hub(fake_steps_opener(engine), live_slots=3)
    job = hub.view(None, None).engine.generate(map(request, range(400)))
    next(job)
    first = Hears()
    hub.put(request(1000), first, urgent=True)
    begun = time.monotonic()
    while engine.most_active < 8 or len(engine._active) > 5:
        next(job)
        assert time.monotonic() < begun + 20
    assert isinstance(first.end(), Completion)
    for _ in range(40):
        next(job)
        assert len(engine._active) <= 5
    second = Hears()
    ticket = hub.put(request(1001), second, urgent=True)
    assert isinstance(second.end(), Completion)
    assert ticket.num_seen > 0
    job.close()


def test_a_minute_after_the_last_person_a_job_has_all_slots_again(open_hub, monkeypatch):
    engine = FakeSteps(slots=4, pause_s=0.001)
    hub = open_hub(fake_steps_opener(engine), live_slots=3)
    monkeypatch.setattr(hubs, "_LIVE_S", 0.0)
    hears = Hears()
    hub.put(request(0), hears, urgent=True)
    hears.end()
    outcomes = list(hub.view(None, None).engine.generate(map(request, range(40))))
    assert len(outcomes) == 40
    assert engine.most_active == 4


def test_whatever_is_taken_back_for_a_person_is_answered_all_the_same(open_hub):
    alone = {n: answer_to(n, 8) for n in (*range(12), 20)}
    hub = open_hub(partial(engine_half, 2), live_slots=1)
    job = hub.view(None, None).engine.generate(request(n, 8) for n in range(12))
    outcomes = [next(job)]
    hears = Hears()
    hub.put(request(20, 8), hears, urgent=True)
    outcomes += job
    assert hears.end().token_ids == alone[20]
    assert sorted(o.item.index for o in outcomes) == list(range(12))
    assert all(o.token_ids == alone[o.item.index] for o in outcomes)


def test_who_gives_up_hears_of_it_and_others_keep_their_answers(open_hub):
    hub = open_hub(fake_steps_opener(FakeSteps(slots=2, pause_s=0.01)))
    owners = [Hears() for _ in range(5)]
    tickets = [hub.put(request(n), owners[n], urgent=n < 2) for n in range(5)]
    for n in (0, 2, 4):
        tickets[n].cancel()
    ended = [owner.end() for owner in owners]
    assert [isinstance(e, Failure) and e.code for e in ended] == [
        *("cancelled", False, "cancelled", False, "cancelled")
    ]
    assert ended[1] == fake_answer(request(1))
    tickets[1].cancel()  # too late, and no mistake
    last = Hears()
    hub.put(request(7), last)
    assert last.end() == fake_answer(request(7))


def test_after_a_no_what_has_not_begun_is_taken_back(open_hub):
    hub = open_hub(fake_steps_opener(FakeSteps(slots=2, pause_s=0.005)))
    asked = []

    def may_begin(item):
        asked.append(item.index)
        return len(asked) <= 25

    outcomes = list(hub.view(None, None).engine.generate(map(request, range(99)), may_begin))
    assert len(asked) == 26
    assert 2 <= len(outcomes) <= 10
    assert all(isinstance(o, Completion) for o in outcomes)


def test_a_job_that_is_left_gives_its_slots_back(open_hub):
    hub = open_hub(fake_steps_opener(FakeSteps(slots=2, pause_s=0.005)))
    job = hub.view(None, None).engine.generate(map(request, range(99)))
    next(job)
    job.close()
    hears = Hears()
    hub.put(request(0), hears, urgent=True)
    hears.end()
    begun = time.monotonic()
    while hub.num_running + hub.num_waiting:
        time.sleep(0.001)
        assert time.monotonic() < begun + 20
    assert hub.counts.ended["cancelled"] > 0


def test_failures_pass_through_a_view(open_hub):
    hub = open_hub(fake_steps_opener())
    bad = Failure(request(5).item, "bad_record", "nothing to ask")
    outcomes = list(hub.view(None, None).engine.generate([request(0), bad]))
    assert {type(o) for o in outcomes} == {Completion, Failure}


def test_when_the_engine_dies_everybody_hears_why_and_nobody_gets_in(open_hub):
    ends = SimpleQueue()
    engine = FakeSteps(slots=2, pause_s=0.01, dies_on="!")
    hub = open_hub(fake_steps_opener(engine), on_end=ends.put)
    job = hub.view(None, None).engine.generate(map(request, range(50)))
    next(job)
    owners = [Hears() for _ in range(4)]
    for n, owner in enumerate(owners):
        poisoned = request(n)
        if n == 3:
            poisoned = Request(poisoned.item, (ord("!"),), 12)
        hub.put(poisoned, owner, urgent=True)
    died = ends.get(timeout=20)
    assert "broke" in str(died)
    assert owners[3].end() is died
    with pytest.raises(RuntimeError, match="broke"):
        list(job)
    with pytest.raises(RuntimeError, match="broke"):
        hub.put(request(9), Hears())
    assert not hub.is_open


def test_an_engine_that_cannot_be_opened_says_so_to_whoever_waits_for_it(open_hub):
    def refuse():
        raise OSError("no weights")

    hub = open_hub(refuse)
    with pytest.raises(OSError, match="no weights"):
        hub.view(None, None)


def test_a_hub_that_closes_tells_who_still_waits(open_hub):
    hub = open_hub(fake_steps_opener(FakeSteps(slots=1, pause_s=0.01)))
    owners = [Hears() for _ in range(9)]
    for n, owner in enumerate(owners):
        hub.put(request(n), owner, urgent=n % 2 == 0)
    hub.close()
    assert any(isinstance(owner.end(), Resumable) for owner in owners)
    with pytest.raises(Resumable):
        hub.put(request(0), Hears())


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells whether a thread is gone")
def test_a_closed_hub_leaves_nothing_that_needs_python_later(open_hub):
    """MLX drops a thread's compiled functions late; a process that ends meanwhile aborts."""

    def open_engine():
        for _ in range(20):
            mx.eval(mx.compile(lambda a: a @ a)(mx.ones((4, 4))))  # no kernel to build
        return fake_steps_opener()()

    hub = open_hub(open_engine)
    hub.opened()
    hub.close()
    assert not Path(f"/proc/self/task/{hub._thread.native_id}").exists()
