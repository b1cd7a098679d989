"""The power goes at every call to the disk: what was promised is there, and the job ends right."""

import random
import shutil
from contextlib import suppress

import pytest
from power import Disk, PowerCut
from small_jobs import prompts, start, write_lines

MOST_CALLS = 200


def begin(folder, monkeypatch):
    """Make an input and stand in its folder, so that a journal says the same in every copy."""
    folder.mkdir()
    write_lines(folder / "in.jsonl", *prompts("a", "b"), b"nope")
    monkeypatch.chdir(folder)


def go(folder, monkeypatch, **options):
    monkeypatch.chdir(folder)
    return start(folder, inputs=("in.jsonl",), out="new/deep/out.jsonl", max_tokens=4, **options)


def cut(folder, cut_at, monkeypatch, **options):
    """Run until the power goes, at the latest when all is done; return the disk and the rows."""
    promised = []
    with monkeypatch.context() as patch:
        disk = Disk(folder, cut_at, patch)
        with suppress(PowerCut):
            go(folder, monkeypatch, observe=lambda t: promised.append(t.done), **options)
            disk.cut()
    return disk, max(promised, default=0)


def check_all_cuts(tmp_path, monkeypatch, before=None, *, seeds, **options):
    """Cut the power at every call; check what each survivor becomes. Return the cuts made."""
    begin(tmp_path / "calm", monkeypatch)
    go(tmp_path / "calm", monkeypatch)
    calm = (tmp_path / "calm/new/deep/out.jsonl").read_bytes()
    for cut_at in range(1, MOST_CALLS):
        folder = tmp_path / f"cut-{cut_at}"
        begin(folder, monkeypatch)
        if before is not None:
            before(folder)
        disk, promised = cut(folder, cut_at, monkeypatch, **options)
        for seed in [None, *range(seeds)]:
            survivor = tmp_path / f"cut-{cut_at}-{seed}"
            chance = None if seed is None else random.Random(1000 * cut_at + seed)
            disk.write_survivors(survivor, chance)
            report = go(survivor, monkeypatch, **options)
            assert (survivor / "new/deep/out.jsonl").read_bytes() == calm, (cut_at, seed)
            assert options or report.resumed >= promised, (cut_at, seed)
            shutil.rmtree(survivor)
        disk.close()
        if disk.calls < cut_at:
            return cut_at
    raise AssertionError(f"no end after {MOST_CALLS} calls")


@pytest.mark.parametrize("seeds", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_power_cut_at_any_call_takes_no_row_that_was_promised(tmp_path, monkeypatch, seeds):
    assert check_all_cuts(tmp_path, monkeypatch, seeds=seeds) > 20


def test_a_power_cut_while_a_job_is_started_over_leaves_what_can_be_started_over(
    tmp_path, monkeypatch
):
    def other_job(folder):
        go(folder, monkeypatch, system_prompt="Hi.")

    assert check_all_cuts(tmp_path, monkeypatch, other_job, seeds=1, overwrite=True) > 20
