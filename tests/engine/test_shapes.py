"""Which passes run: any, or one that everything is padded to."""

import pytest

from dspark_batch.engine import shapes
from dspark_batch.engine.shapes import FALLBACK, Shapes

ONE = Shapes(fixed=FALLBACK)
SLOTS, WIDTH = FALLBACK


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(shapes, "_IS_CPU", True)
    monkeypatch.setattr(shapes, "_STEP", 1)
    monkeypatch.setattr(shapes, "_TOGETHER", range(1, 257))
    monkeypatch.setattr(shapes, "_PASS_ROWS", 40)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A GPU compiles for each shape."""
    monkeypatch.setattr(shapes, "_IS_CPU", False)
    monkeypatch.setattr(shapes, "_STEP", 32)
    monkeypatch.setattr(shapes, "_TOGETHER", (8, 16, 32, 64))
    monkeypatch.setattr(shapes, "_PASS_ROWS", 800)


@pytest.mark.usefixtures("on_a_cpu")
def test_on_a_cpu_any_pass_runs_as_it_comes():
    free = Shapes()
    assert [free.slots_for(n) for n in (1, 3, 5, 64)] == [1, 3, 5, 64]
    assert [free.width(n) for n in (1, 3, 8)] == [1, 3, 8]
    assert free.prefill_pass(3, 50) == (3, 50)


@pytest.mark.usefixtures("on_a_cpu")
def test_a_long_or_a_wide_prefill_is_cut():
    assert Shapes().prefill_pass(1, 9000) == (1, 256)
    assert Shapes().prefill_pass(64, 9000) == (64, 32)
    assert Shapes().prefill_pass(256, 9000) == (256, 8)
    assert Shapes().most_prompts == 256


@pytest.mark.usefixtures("on_a_gpu")
def test_on_a_gpu_there_are_few_numbers_of_slots_and_widths_of_prefill():
    free = Shapes()
    assert [free.slots_for(n) for n in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]
    assert [free.width(n) for n in (1, 3, 8)] == [1, 3, 8]
    assert free.prefill_pass(1, 1) == (1, 32)
    assert free.prefill_pass(3, 33) == (4, 64)
    assert free.prefill_pass(1, 9000) == (1, 256)
    assert free.prefill_pass(64, 9000) == (64, 32)


@pytest.mark.parametrize("device", ["on_a_cpu", "on_a_gpu"])
def test_a_fixed_shape_is_every_pass(device, request):
    request.getfixturevalue(device)
    assert [ONE.slots_for(n) for n in (1, SLOTS)] == [SLOTS, SLOTS]
    assert [ONE.width(n) for n in (1, WIDTH)] == [WIDTH, WIDTH]
    assert {ONE.prefill_pass(n, length) for n in (1, SLOTS) for length in (1, 9000)} == {FALLBACK}
    assert ONE.most_prompts == SLOTS


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("lengths", "together"),
    [
        ([126, 54, 50, 50, 48], 1),  # padded to the longest, the others would be 302 tokens more
        ([126, 120, 54, 50, 50, 48], 2),
        ([54, 54, 50, 40, 30], 5),  # the work of a pass is more than the padding
        ([20, 9, 9], 3),
        ([9, 200], 1),  # whoever is urgent goes first
        ([7], 1),
        ([], 0),
    ],
)
def test_a_cpu_does_not_pad_many_prompts_to_a_long_one(lengths, together):
    assert Shapes().num_together(lengths) == together
    assert ONE.num_together(lengths) == len(lengths)


@pytest.mark.usefixtures("on_a_cpu")
def test_the_split_of_prompts_is_the_one_with_the_least_work():
    def least_work(lengths):
        return min(
            (
                shapes._PASS_ROWS + n * max(lengths[:n]) + least_work(lengths[n:])
                for n in range(1, 1 + len(lengths))
            ),
            default=0,
        )

    for seed in range(40):
        lengths = [1 + (seed * 7919 + n * 104729) % 150 for n in range(1 + seed % 7)]
        n = Shapes().num_together(lengths)
        first = shapes._PASS_ROWS + n * max(lengths[:n])
        assert first + least_work(lengths[n:]) == least_work(lengths)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("lengths", "together"),
    [
        ([126, 54, 50], 3),  # a pass costs more than so few tokens
        ([30] * 64, 64),
        ([600] * 16 + [40] * 48, 16),  # padded, the short ones would be 27,000 tokens more
        ([600 - 9 * n for n in range(64)], 16),
        ([600, *[40] * 20], 8),  # few numbers of prompts are compiled
        ([], 0),
    ],
)
def test_a_gpu_splits_prompts_of_different_lengths_where_that_is_less_work(lengths, together):
    assert Shapes().num_together(lengths) == together
    assert ONE.num_together(lengths) == len(lengths)


@pytest.mark.usefixtures("on_a_gpu")
def test_a_gpu_compiles_few_kinds_of_passes_for_prompts():
    seen = set()
    for seed in range(200):
        left = [1 + (seed * 7919 + n * 104729) % 600 for n in range(64)]
        while left:
            number = Shapes().num_together(left)
            seen.add((number, number == len(left)))
            left = left[number:]
    assert {number for number, is_rest in seen if not is_rest} <= {8, 16, 32, 64}


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize(
    ("used", "tokens", "packs"),
    [(20, 36, True), (21, 36, False), (122, 144, True), (123, 144, False), (144, 144, False)],
)
def test_a_pass_is_packed_where_what_it_leaves_out_pays(used, tokens, packs):
    assert Shapes().packs(used, tokens) == packs
    assert not Shapes(packed=False).packs(used, tokens)
    assert not Shapes(fixed=(4, 9)).packs(used, tokens)
