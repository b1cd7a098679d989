"""Hand-out, take-back and deaths, with workers that are no processes."""

from collections import Counter

import pytest
from fakes import fake_answer
from team import Team, expected, request, texts

from dspark_batch.errors import ModelError, Resumable
from dspark_batch.fleet.news import Answers
from dspark_batch.types import Failure

ALL = [request(n) for n in range(60)]
ANSWERS = {f"q{n}": expected(n) for n in range(60)}


def rows(team):
    return {told["name"]: told["rows"] for told in team.fleet.gauge().workers}


def test_every_request_is_answered_once_whoever_answers():
    team = Team(3)
    outcomes = list(team.fleet.generate(ALL))
    assert texts(outcomes) == ANSWERS
    assert {outcome.item.record["prompt"] for outcome in outcomes} == set(range(60))
    assert {outcome.worker for outcome in outcomes} == {"host:0", "host:1", "host:2"}


def test_failures_pass_through_and_go_to_no_worker():
    team = Team(2)
    failure = Failure(ALL[1].item, "bad_record", "in.jsonl:2: not JSON")
    outcomes = list(team.fleet.generate([ALL[0], failure, ALL[2]]))
    assert texts(outcomes) == {"q0": expected(0), "q1": "bad_record", "q2": expected(2)}
    assert not any("q1" in worker.sent for worker in team.workers)


def test_workers_of_one_speed_get_equal_shares():
    assert rows(after := finished(Team(2))) == {"host:0": 30, "host:1": 30}
    assert len(after.workers) == 2


def finished(team, stream=ALL):
    assert texts(team.fleet.generate(stream)) == ANSWERS
    return team


def test_a_worker_that_is_ready_first_leaves_others_their_share():
    team = Team(2, {1: {"loads": 12}}, slots=16)
    assert len(texts(team.fleet.generate(ALL[:40]))) == 40
    assert team.at(0)[0].most_held <= 20  # it could have had all


def test_a_worker_has_no_more_than_it_can_choose_from():
    team = Team(2, slots=1)
    many = [request(n) for n in range(300)]
    assert len(texts(team.fleet.generate(many))) == 300
    assert max(worker.most_held for worker in team.workers) == team.workers[0].hello().ahead


def test_a_slow_worker_gives_back_what_it_has_not_begun():
    team = finished(Team(2, {1: {"every": 10}}))
    assert rows(team)["host:0"] > 45
    assert len(team.at(0)[0].sent) + len(team.at(1)[0].sent) > 60  # some were handed out again


def test_a_stream_is_pulled_no_further_than_workers_have_room():
    pulled = []

    def stream():
        for each in ALL * 10:
            pulled.append(each)
            yield each

    team = Team(2, slots=1)
    team.fleet.first()
    next(team.fleet.generate(stream()))
    assert len(pulled) <= 2 * team.workers[0].hello().ahead + 2, len(pulled)


def test_a_none_in_the_stream_means_nothing_right_now():
    def paused():
        for n, each in enumerate(ALL):
            if n % 7 == 0:
                yield None
            yield each

    team, stream, found = Team(2), paused(), {}
    while len(found) < 60:
        found |= texts(team.fleet.generate(stream))
    assert found == ANSWERS


def test_prompts_with_the_same_beginning_go_to_the_same_worker():
    beginnings = [(b,) * 64 for b in (1, 2, 3)]
    many = [request(n, beginnings[n % 3]) for n in range(60)]
    team = Team(2, slots=16)
    homes = {}
    for outcome in team.fleet.generate(many):
        homes.setdefault(outcome.item.index % 3, Counter())[outcome.worker] += 1
    assert min(max(home.values()) for home in homes.values()) >= 15, homes  # of 20


def test_a_beginning_stays_with_its_worker_where_all_have_as_much_as_they_may():
    beginnings = [(n // 20,) * 64 for n in range(1200)]
    team, homes = Team(4, slots=16), {}
    for outcome in team.fleet.generate([request(n, each) for n, each in enumerate(beginnings)]):
        homes.setdefault(beginnings[outcome.item.index], set()).add(outcome.worker)
    assert len(homes) == 60
    assert sum(map(len, homes.values())) <= 66  # times that one is computed


@pytest.mark.parametrize(("slots", "num", "most"), [(2, 200, 28), (16, 30, 20)])
def test_one_beginning_for_all_does_not_make_one_worker_do_it_all(slots, num, most):
    team = Team(2, slots=slots)
    assert len(texts(team.fleet.generate([request(n, (1,) * 64) for n in range(num)]))) == num
    assert min(rows(team).values()) > 0.3 * num
    assert max(worker.most_held for worker in team.workers) <= most  # 19 and 15 are equal shares


def test_an_item_that_may_not_begin_ends_the_stream_and_what_has_not_begun_comes_back():
    asked = []

    def may_begin(item):
        asked.append(item.index)
        return len(asked) <= 20

    team = Team(2, slots=1)
    outcomes = list(team.fleet.generate(ALL, may_begin))
    begun = sum(worker.answered for worker in team.workers)
    assert len(texts(outcomes)) == begun < 20
    assert len(asked) == 21
    assert texts(team.fleet.generate(ALL)) == ANSWERS  # and the fleet goes on


def test_a_stop_is_heeded_when_all_is_handed_out_too():
    asked = []

    def may_begin(item):
        asked.append(item.index)
        return len(asked) <= 30

    team = Team(2, slots=1)
    outcomes = list(team.fleet.generate(ALL[:30], may_begin))
    assert len(texts(outcomes)) < 10


@pytest.mark.parametrize("after", [0, 1, 7, 20])
def test_what_was_in_flight_in_a_worker_that_died_is_answered_all_the_same(after):
    team = finished(Team(2, {1: {"dies_after": after}}))
    assert len(team.at(1)) == 2
    assert {told["name"]: told["deaths"] for told in team.fleet.gauge().workers} == {
        "host:0": 0,
        "host:1": 1,
    }


def test_all_workers_may_die_at_once():
    team = Team(3, dies_after=2, later={"dies_after": None})
    assert texts(team.fleet.generate(ALL)) == ANSWERS
    assert len(team.workers) == 6


def test_others_are_fed_while_the_next_one_loads():
    team = Team(2, {1: {"dies_after": 3}}, later={"loads": 10_000})
    assert texts(team.fleet.generate(ALL)) == ANSWERS
    assert rows(team)["host:0"] == 57


def test_a_late_answer_of_a_worker_that_was_thought_dead_is_no_second_row():
    team = Team(2, {1: {"dies_after": 3}})
    dead = team.at(1)[0]
    outcomes = []
    for outcome in team.fleet.generate(ALL):
        outcomes.append(outcome)
        if dead.is_dead and dead.active:
            dead.tell(Answers([fake_answer(dead.active.popleft()[0])] * 2))
    assert texts(outcomes) == ANSWERS


def test_an_item_that_kills_its_worker_is_given_up_and_no_other_is():
    team = Team(2, dies_on=frozenset({"q17"}), slots=4)
    found = texts(team.fleet.generate(ALL))
    assert found == ANSWERS | {"q17": "poison"}
    alone = [ids for _, ids in team.lost if len(ids) == 1]
    assert alone[-3:] == [["q17"]] * 3
    assert max(len(ids) for _, ids in team.lost[2:]) <= 8  # kept apart from the second death on


def test_an_item_that_kills_workers_at_one_place_only_is_answered_at_another():
    kills = {"dies_on": frozenset({"q5"})}
    team = Team(2, {0: kills}, later=kills, slots=4)
    assert texts(team.fleet.generate(ALL)) == ANSWERS


def test_suspects_are_alone_with_suspects():
    team = Team(2, later={"loads": 60}, dies_on=frozenset({"q17"}), slots=4)  # one loads, one works
    assert len(texts(team.fleet.generate([request(n) for n in range(200)]))) == 200
    suspected = Counter()
    for _, ids in team.lost:
        if any(suspected[name] == 2 for name in ids):
            assert all(suspected[name] >= 2 for name in ids), ids
        suspected.update(ids)
    assert suspected["q17"] == 6  # with others, with suspects, and alone


@pytest.mark.parametrize("after", [0, 5])
def test_a_place_where_all_workers_die_is_left_empty_and_no_item_is_blamed(after, caplog):
    team = Team(2, {1: {"dies_after": after}}, later={"dies_after": 0})
    assert texts(team.fleet.generate(ALL)) == ANSWERS
    assert len(team.at(1)) == 4
    assert "nobody takes its place" in caplog.text


def test_where_all_places_are_empty_the_run_can_go_on_later():
    team = Team(2, dies_after=0)
    with pytest.raises(Resumable, match=r"host:. died \(killed\)\. No worker is left"):
        list(team.fleet.generate(ALL))


def test_a_worker_out_of_memory_comes_back_with_half_its_slots_and_nobody_is_blamed():
    team = Team(2, {1: {"dies_after": 3, "out_of_memory": True, "slots": 8}})
    assert texts(team.fleet.generate(ALL)) == ANSWERS
    assert team.slots_asked == [None, None, 4]
    assert team.lost == []


def test_a_worker_that_may_not_work_does_nothing_and_the_others_do_it_all(caplog):
    team = Team(3, {2: {"numerics": "n1"}})

    def refuses(hello):
        same = hello.identity["numerics"] == "n0"
        return None if same else ModelError(f"worker {hello.name}: numerics n1, expected n0.")

    team.fleet.refuses = refuses
    assert texts(team.fleet.generate(ALL)) == ANSWERS
    assert team.at(2)[0].sent == []
    assert team.at(2)[0].is_closed
    assert "host:2: numerics n1, expected n0. The job goes on with the other" in caplog.text


def test_where_nobody_can_load_the_pair_the_reason_is_told():
    team = Team(2, refuses="/models/x: no weights.")
    with pytest.raises(ModelError, match="/models/x: no weights"):
        list(team.fleet.generate(ALL))


def test_an_audit_goes_through_the_workers_while_answers_wait():
    team = Team(2)
    seen = {}
    for number, outcome in enumerate(team.fleet.generate(ALL)):
        seen[outcome.item.custom_id] = outcome.text
        if number in (10, 30):
            replayed = texts(team.fleet.replay("engine", ALL[:9]))
            assert replayed == {f"q{n}": f"engine: {expected(n)}" for n in range(9)}
    assert seen == ANSWERS


def test_a_worker_may_die_in_an_audit():
    team = Team(2, {1: {"dies_after": 12}})
    seen = {}
    for number, outcome in enumerate(team.fleet.generate(ALL)):
        seen[outcome.item.custom_id] = outcome.text
        if number == 15:
            assert len(texts(team.fleet.replay("engine", ALL[:30]))) == 30
    assert seen == ANSWERS


def test_gauges_are_added_up_and_seconds_are_a_mean():
    gauge = finished(Team(2)).fleet.gauge()
    assert (gauge.slots, gauge.busy_slots, gauge.memory_bytes) == (4, 2.0, 20)
    assert (gauge.peak_memory_bytes, gauge.prefill_s, gauge.round_s) == (21, 2.0, 4.0)
    assert gauge.prompt_tokens == 10


def test_the_end_of_a_fleet_is_the_end_of_its_workers():
    team = finished(Team(2))
    team.fleet.close()
    assert all(worker.is_closed and worker.has_parted for worker in team.workers)


def test_who_leaves_a_stream_hears_nothing_of_it_any_more():
    team = Team(2)
    walk = team.fleet.generate(ALL[:30])
    next(walk)
    walk.close()
    later = [request(n) for n in range(30, 60)]
    assert texts(team.fleet.generate(later)) == {f"q{n}": expected(n) for n in range(30, 60)}


def test_a_lost_head_ends_what_goes_on():
    team = Team(2)
    outcomes = team.fleet.generate(ALL)
    next(outcomes)
    team.fleet.end(Resumable("Ray's head is lost."))
    with pytest.raises(Resumable, match="head is lost"):
        list(outcomes)
