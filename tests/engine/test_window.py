"""Which requests go next."""

from dataclasses import replace

from dspark_batch.caches.prefix_cache import PrefixCache
from dspark_batch.engine.scheduler import Window
from dspark_batch.types import Given, Item, Request

SYSTEM = tuple(range(1000, 1032))


def request(index, prompt=(1, 2, 3), max_tokens=5):
    return Request(Item(index, str(index), f"d{index}", f"t:{index}"), tuple(prompt), max_tokens)


def window(size=8, positions=1000):
    return Window(size, PrefixCache(positions))


def fill(window, *requests):
    for each in requests:
        window.add(each)


def take(window, most, fits=lambda request: True):
    return [waiting.request.item.index for waiting in window.take(most, fits)]


def test_it_is_full_when_enough_wait_and_takes_more_all_the_same():
    w = window(2)
    fill(w, request(0))
    assert w.has_room
    fill(w, request(1), request(2))
    assert not w.has_room
    assert len(w) == 3


def test_urgent_ones_go_first_and_are_not_passed_while_they_do_not_fit():
    w, urgent = window(), request(2, max_tokens=9)
    fill(w, request(0, range(50)))
    w.add(urgent, is_urgent=True)
    fill(w, request(1, range(60)))
    assert take(w, 3, lambda r: r is not urgent) == []
    assert take(w, 3) == [2, 1, 0]


def test_a_cancelled_item_leaves_whatever_else_its_request_says_of_it():
    w = window()
    fill(w, request(0), request(1), request(2))
    named = request(1).item._replace(notes=("a note",), record={"prompt": "other"})
    assert [r.item.index for r in w.cancel(named)] == [1]
    assert w.cancel(named) == []
    assert take(w, 3) == [0, 2]


def test_long_ones_go_first_among_those_that_share_nothing():
    w = window()
    fill(w, request(0), request(1, range(50)), request(2, range(100, 120)))
    assert take(w, 3) == [1, 2, 0]


def test_those_with_the_same_beginning_go_together_from_long_to_short():
    w = window()
    fill(
        w,
        request(0, (*SYSTEM, 1)),
        request(1, (5, 5, 5)),
        request(2, (*SYSTEM, *range(9))),
        request(3, (*SYSTEM, 7, 7)),
    )
    assert take(w, 3) == [2, 3, 0]
    assert take(w, 3) == [1]


def test_a_group_that_came_first_stays_first_while_it_is_served():
    w = window()
    fill(
        w,
        request(0, (*SYSTEM, 0)),
        request(1, (5, 5, 5)),
        request(2, (*SYSTEM, 1, 1)),
        request(3, (*SYSTEM, 2, 2, 2)),
    )
    assert take(w, 1) == [3]
    fill(w, request(4, (6, 6)))
    assert take(w, 4) == [2, 0, 1, 4]


def test_what_does_not_fit_lets_others_pass_until_it_loses_patience():
    w = window(size=2)
    large = request(0, range(90))
    fill(w, large)
    for index in range(1, 10):
        fill(w, request(index))
        assert take(w, 1, lambda r: r is not large) == [index]
    fill(w, request(10))
    assert take(w, 2, lambda r: r is not large) == []
    assert take(w, 2) == [0, 10]


def test_nobody_waits_for_ever_behind_a_group_that_keeps_coming():
    w, taken = window(size=4), []
    fill(w, request(0, (*SYSTEM, 0)), request(1, (*SYSTEM, 1)), request(2, (9, 9, 9)))
    for index in range(3, 60):
        fill(w, request(index, (*SYSTEM, index)))
        taken += take(w, 1)
    assert taken.index(2) < 25


def test_it_tells_how_much_of_the_next_prompts_is_theirs_alone():
    w = window()
    fill(w, request(0, range(50)), request(1, range(100, 170)), request(2, (7,)))
    assert w.lengths(2) == [70, 50]
    assert w.lengths(9) == [70, 50, 1]
    fill(w, request(3, (*SYSTEM, 1, 2, 3)), request(4, (*SYSTEM, 4)))
    assert sorted(w.lengths(9)) == [1, 1, 3, 50, 70]
    assert take(w, 1) == [1]  # and it takes none of them out
    w = window()
    fill(w, replace(request(0), given=Given("", tuple(range(20)))))
    fill(w, replace(request(1), given=Given("", ())))
    assert w.lengths(2) == [3 + 19, 3]  # nobody asks what comes behind the last token
