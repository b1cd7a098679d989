"""An item that kills the process, again and again, costs itself and no other item."""

import json
from itertools import islice

import pytest
from fakes import FakeEngine, begun, fake_opener
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.errors import Resumable
from dspark_batch.types import Completion, Request


class Crash(BaseException):
    """The process is gone: nothing of ours handles this."""


class Fragile(FakeEngine):
    """Dies when a poisoned item is among those in flight, before any of them is finished."""

    def __init__(self, *poisoned, slots=3, error=Crash):
        super().__init__(slots)
        self.poisoned, self.error = set(poisoned), error
        self.together = []  # by batch: the items in flight

    def generate(self, stream, may_begin):
        pending = begun(stream, may_begin)
        while admitted := list(islice(pending, self.slots)):
            ids = [r.item.custom_id for r in admitted if isinstance(r, Request)]
            self.together += [ids] if ids else []
            if self.poisoned & {*ids}:
                raise self.error("[malloc] Unable to allocate 99 bytes.")
            yield from super().generate(admitted)


def start_until_done(folder, most=20, **fragile):
    """Start again after each crash; return the batches of each start, and the report."""
    options = {key: fragile.pop(key) for key in ("slots", "retry_failed") if key in fragile}
    starts = []
    for _ in range(most):
        engine = Fragile(*fragile["poisoned"], error=fragile.get("error", Crash))
        starts.append(engine.together)

        def opener(spec, manifest, engine=engine):
            engine.slots = spec.slots
            return fake_opener(engine)(spec, manifest)

        try:
            return starts, start(folder, opener=opener, **{"slots": 3} | options)
        except (Crash, Resumable, ValueError):
            continue
    raise AssertionError(f"not done after {most} starts: {starts}")


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts(*"abcdefgh"))
    return tmp_path


def codes(folder):
    rows = rows_in(folder / "out.jsonl")
    return {r["custom_id"]: r["error"]["code"] for r in rows if r["error"]}


def test_a_poisoned_item_becomes_a_failure_row_and_all_others_are_answered(folder):
    starts, report = start_until_done(folder, poisoned=["id-b"])
    assert starts == [
        [["id-a", "id-b", "id-c"]],
        [["id-a"], ["id-b"]],  # those in flight, one at a time; alone in flight: 1
        [["id-b"]],  # 2
        [["id-b"]],  # 3
        [["id-c", "id-d", "id-e"], ["id-f", "id-g", "id-h"]],
    ]
    assert (report.succeeded, report.errored) == (7, 1)
    assert codes(folder) == {"id-b": "poison"}
    [row] = [row for row in rows_in(folder / "out.jsonl") if row["error"]]
    assert row["error"]["message"] == (
        f"{folder}/in.jsonl:2: 3 starts crashed while this item was alone in flight. Find out what "
        "it does to them, and run it again with --retry-failed."
    )


@pytest.mark.parametrize("poisoned", ["ab", "ah", "gh", "adg", "abcdefgh"])
@pytest.mark.parametrize("slots", [1, 3, 20])
def test_every_poisoned_item_and_no_other_is_given_up(folder, poisoned, slots):
    names = {f"id-{name}" for name in poisoned}
    _, report = start_until_done(folder, poisoned=names, slots=slots, most=60)
    assert codes(folder) == dict.fromkeys(names, "poison")
    assert report.total == 8


def test_a_crash_after_a_finished_item_slows_nothing_down(folder):
    start_until_done(folder, poisoned=["id-a"], most=20)
    write_lines(folder / "in.jsonl", *prompts(*"abcdefghijkl"))
    engine = Fragile("id-l")
    with pytest.raises(Crash):
        start(folder, engine=engine)
    assert engine.together == [["id-i", "id-j", "id-k"], ["id-l"]]
    again = Fragile()
    start(folder, engine=again)
    assert again.together == [["id-l"]]


class Interrupted(Fragile):
    """Is stopped with Ctrl-C in the middle of its first items."""

    def generate(self, stream, may_begin):
        yield from ()
        next(begun(stream, may_begin))
        raise KeyboardInterrupt


def test_an_orderly_stop_is_no_crash(folder):
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            start(folder, engine=Interrupted())
    engine = Fragile()
    start(folder, engine=engine)
    assert engine.together[0] == ["id-a", "id-b", "id-c"]
    assert codes(folder) == {}


def test_an_orderly_stop_forgets_no_crash(folder):
    for _ in range(3):  # together, alone, alone
        with pytest.raises(Crash):
            start(folder, engine=Fragile("id-a"))
        with pytest.raises(KeyboardInterrupt):
            start(folder, engine=Interrupted())
    with pytest.raises(Crash):
        start(folder, engine=Fragile("id-a"))
    start(folder, engine=Fragile("id-a"))
    assert codes(folder) == {"id-a": "poison"}


def test_a_poisoned_item_gets_new_chances_when_failed_items_are_asked_for_again(folder):
    start_until_done(folder, poisoned=["id-b"])
    starts, _ = start_until_done(folder, poisoned=["id-b"], retry_failed=True)
    assert len(starts) == 4
    assert codes(folder) == {"id-b": "poison"}
    start(folder, engine=Fragile(), retry_failed=True)
    assert codes(folder) == {}


def test_an_edited_record_is_not_blamed_for_what_was_there_before(folder):
    for _ in range(4):
        with pytest.raises(Crash):
            start(folder, engine=Fragile("id-a"))
    write_lines(folder / "in.jsonl", {"id": "new", "prompt": "x"}, *prompts(*"bcdefgh"))
    assert start(folder, engine=Fragile()).succeeded == 8


@pytest.mark.parametrize("tail", [b'{"admitted":{"ind', b"\0" * 300, b"[]\n", b""])
def test_attempts_with_a_torn_tail_teach_what_is_whole(folder, tail):
    with pytest.raises(Crash):
        start(folder, engine=Fragile("id-b"))
    path = folder / "out.jsonl.run/attempts.jsonl"
    path.write_bytes(path.read_bytes() + tail)
    engine = Fragile("id-b")
    with pytest.raises(Crash):
        start(folder, engine=engine)
    assert engine.together == [["id-a"], ["id-b"]]
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_what_is_admitted_is_on_the_disk_before_it_is_generated(folder):
    class Looks(FakeEngine):
        def generate(self, stream, may_begin):
            for request in begun(stream, may_begin):
                [*_, last] = (folder / "out.jsonl.run/attempts.jsonl").read_bytes().splitlines()
                assert json.loads(last)["admitted"]["custom_id"] == request.item.custom_id
                yield from super().generate([request])

    assert start(folder, engine=Looks()).succeeded == 8


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_running_out_of_memory_is_resumable_and_takes_fewer_slots_each_time(folder, error, caplog):
    starts, report = start_until_done(folder, poisoned=["id-e"], error=error, slots=4)
    assert report.succeeded == 7
    assert [max(map(len, batches)) for batches in starts] == [4, 2, 1, 1, 1, 1]
    assert codes(folder) == {"id-e": "poison"}
    assert caplog.messages[0] == ("an earlier start ran out of memory: taking slots 2 instead of 4")


def test_out_of_memory_says_what_is_safe_and_ends_with_75(folder):
    with pytest.raises(Resumable) as error:
        start(folder, engine=Fragile("id-a", error=MemoryError))
    assert error.value.exit_code == 75
    assert str(error.value) == (
        "out of memory with slots 1 ([malloc] Unable to allocate 99 bytes.). The finished rows are "
        "safe; the same command continues, with fewer slots where there are more than one."
    )


def test_another_error_of_the_engine_is_no_lack_of_memory(folder):
    class Buggy(FakeEngine):
        def generate(self, stream, may_begin):
            raise RuntimeError("shapes do not match")
            yield

    with pytest.raises(RuntimeError, match="shapes do not match"):
        start(folder, engine=Buggy())
    assert start(folder, slots=5).succeeded == 8


class Unwritable(FakeEngine):
    """One of its answers cannot be written as JSON."""

    def generate(self, stream, may_begin):
        for outcome in super().generate(stream, may_begin):
            sick = outcome.item.custom_id == "id-b" and isinstance(outcome, Completion)
            yield outcome._replace(text="\ud800") if sick else outcome


def test_an_answer_that_the_writer_chokes_on_costs_itself(folder):
    for _ in range(3):
        with pytest.raises(TypeError):
            start(folder, engine=Unwritable(slots=1))
    assert start(folder, engine=Unwritable(slots=1)).succeeded == 7
    assert codes(folder) == {"id-b": "poison"}
