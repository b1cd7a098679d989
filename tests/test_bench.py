"""`bench` measures what it says: everybody answers everything, and no other answer goes unseen."""

import importlib
import json
from dataclasses import replace

import pytest
from fakes import (
    CONTEXT_LENGTH,
    FakeEngine,
    OtherEngine,
    fake_answer,
    fake_baseline,
    fake_render,
)
from small_jobs import prompts, write_lines

from dspark_batch.bench import (
    MLX_LM,
    PLAIN,
    SPECULATION,
    Comparison,
    Contest,
    Contestant,
    Standing,
    bench,
    open_pair_for,
)
from dspark_batch.cli.bench_command import bench_command
from dspark_batch.cli.main import main
from dspark_batch.cli.run_command import run_command
from dspark_batch.errors import UsageError
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Item, Request

TEXTS = ("one", "two", "three", "four")


class Recorder(FakeEngine):
    """Notes whose turn it was."""

    def __init__(self, name, turns, engine=None):
        super().__init__()
        self.name, self.turns, self.engine = name, turns, engine or FakeEngine()

    def generate(self, stream, may_begin=lambda item: True):
        self.turns.append(self.name)
        yield from self.engine.generate(stream, may_begin)


@pytest.fixture
def race(tmp_path):
    """Run a bench over fakes; others: contestant -> the engine in its place."""
    turns = []

    def race(*texts, records=None, others=None, spread=1.0, divergence=0.0, drop=(), **options):
        write_lines(tmp_path / "in.jsonl", *(records or prompts(*(texts or TEXTS))))
        engines = {PLAIN: None, SPECULATION: None, MLX_LM: None} | (others or {})
        contestants = {
            name: Contestant(2, Recorder(name, turns, engine).generate)
            for name, engine in engines.items()
            if name not in drop
        }
        contest = Contest(
            contestants,
            fake_render,
            CONTEXT_LENGTH,
            fake_baseline(spread=spread)("engine"),
            divergence,
            {"dtype": "float32"},
        )
        spec_fields = {k: options.pop(k) for k in list(options) if k in ("limit", "temperature")}
        spec = Spec(inputs=(str(tmp_path / "in.jsonl"),), out="-", **spec_fields)
        return bench(spec, open_contest=lambda spec, num_items: contest, **options)

    race.turns = turns
    return race


def test_everybody_takes_every_turn_and_each_turn_begins_with_another(race):
    found = race(turns=3)
    assert race.turns == [
        *(PLAIN, SPECULATION, MLX_LM),
        *(SPECULATION, MLX_LM, PLAIN),
        *(MLX_LM, PLAIN, SPECULATION),
    ]
    assert [len(each.seconds) for each in found.standings] == [3, 3, 3]
    assert [each.equal for each in found.standings] == [4, 4, 4]
    assert found.exit_code == 0


def test_the_first_turn_warms_up_unless_it_is_the_only_one():
    timed = Standing(name=PLAIN, slots=1, completion_tokens=12, seconds=[60.0, 3.0, 1.0, 2.0])
    assert timed.tokens_per_s == 6.0
    assert replace(timed, seconds=[4.0]).tokens_per_s == 3.0


def test_speed_is_measured_and_compared_with_plain_decoding(race):
    found = race(others={PLAIN: FakeEngine(pause_s=0.02)}, turns=1)
    assert found.plain.seconds[0] >= 0.08
    assert found.times_plain(found.plain) == 1.0
    assert found.times_plain(found.speculation) > 1.0
    assert found.speculation.accept_length == pytest.approx(mean_accept_length())


def mean_accept_length():
    item = Item(0, "0", "0", "x")
    asked = [
        Request(item, tuple(fake_render([{"role": "user", "content": text}])), 12) for text in TEXTS
    ]
    lengths = [n for each in asked for n in fake_answer(each).accept_lengths]
    return sum(lengths) / len(lengths)


def test_an_answer_that_speculation_changes_is_exit_code_3_with_its_margin(race):
    found = race(others={SPECULATION: OtherEngine(others=frozenset({"id-two"}))}, spread=0.5)
    assert (found.exit_code, found.speculation.equal, found.speculation.different) == (3, 3, 1)
    (difference,) = found.speculation.differences
    assert (difference.custom_id, difference.position) == ("id-two", 2)
    assert (difference.spread, difference.verdict) == (0.5, "defect")


def test_a_difference_to_mlx_lm_is_told_and_no_failure_of_ours(race):
    other = OtherEngine(others=frozenset({"id-two"}))
    found = race(others={MLX_LM: other}, spread=0.5, divergence=0.25)
    assert found.exit_code == 0
    assert (found.standings[-1].near_ties, found.standings[-1].spread) == (1, 0.5)


class Fickle(FakeEngine):
    """Gives another answer from its second time on."""

    times = 0

    def generate(self, stream, may_begin=lambda item: True):
        self.times += 1
        engine = FakeEngine() if self.times == 1 else OtherEngine(others=frozenset({"id-one"}))
        yield from engine.generate(stream, may_begin)


@pytest.mark.parametrize("name", [PLAIN, SPECULATION])
def test_an_answer_that_changes_from_turn_to_turn_is_found(race, name):
    assert race(others={name: Fickle()}, turns=1).exit_code == 0
    assert race(others={name: Fickle()}, turns=2).exit_code == 3


def test_an_answer_that_fails_is_a_difference_unless_it_fails_plainly_too(race):
    failing = FakeEngine(fails_on=frozenset({"id-one"}))
    found = race(others={SPECULATION: failing})
    assert found.speculation.differences[0].row.startswith("a failure (")
    assert race(others={PLAIN: failing, SPECULATION: failing, MLX_LM: failing}).exit_code == 0


def test_what_cannot_be_asked_is_told_and_the_others_are_measured(race):
    found = race(records=[*prompts("one"), b"nope", {"prompt": "x" * 500}])
    assert (found.items, dict(found.not_asked)) == (1, {"bad_record": 1, "prompt_too_long": 1})
    assert "in.jsonl:2" in found.first_failures[0]


def test_nothing_to_ask_is_refused(race):
    with pytest.raises(UsageError, match=r"nothing to ask \(.*in\.jsonl:1"):
        race(records=[b"{nope"])
    with pytest.raises(UsageError, match="turns is 0"):
        race(turns=0)


def test_standard_input_is_refused():
    with pytest.raises(UsageError, match="save it to a file"):
        bench(Spec(inputs=("-",), out="-"))


def test_mlx_lm_stays_out_where_items_are_sampled(race):
    found = race(temperature=0.5)
    assert [each.name for each in found.standings] == [PLAIN, SPECULATION]
    assert found.left_out == {MLX_LM: "items are sampled, which mlx-lm does with other noise"}
    assert len(race(outside=False).standings) == 2


def test_a_target_without_a_drafter_is_compared_with_mlx_lm_alone(race):
    found = race(drop=(SPECULATION,))
    assert found.speculation is None
    assert list(found.left_out) == [SPECULATION]


def test_the_json_is_whole_and_plain(race):
    found = race(others={MLX_LM: OtherEngine(others=frozenset({"id-two"}))})
    told = json.loads(json.dumps(found.to_json()))
    plain, speculation, outside = told["standings"]
    assert (plain["name"], plain["times_plain"], plain["equal"]) == (PLAIN, 1.0, 4)
    assert speculation["tokens_per_s"] == pytest.approx(found.speculation.tokens_per_s)
    assert (outside["different"], outside["differences"][0]["custom_id"]) == (1, "id-two")
    assert told["facts"] == {"dtype": "float32"}


def test_progress_counts_the_answers_of_all(race):
    ticks = []
    race(turns=2, observe=ticks.append)
    assert (ticks[0].stage, ticks[-1].done, ticks[-1].total) == ("load", 24, 24)
    assert ticks[2].doing == "turn 1 of 2: plain decoding"


# The pair that is bundled


def test_the_bundled_pair_gives_the_same_answers_three_times(tmp_path, monkeypatch):
    write_lines(
        tmp_path / "in.jsonl", *prompts("Add 3 and 5.", 'Spell "cat".', "Write 62 in words.")
    )
    monkeypatch.chdir(tmp_path)
    spec = Spec(inputs=("in.jsonl",), out="-", max_tokens=12, dtype="float32")
    found = bench(spec, turns=1)
    assert (found.items, found.exit_code, found.plain.slots) == (3, 0, 3)
    assert [each.name for each in found.standings] == [PLAIN, SPECULATION, MLX_LM]
    assert found.standings[-1].equal + found.standings[-1].near_ties == 3
    assert found.speculation.accept_length > 1
    assert found.plain.accept_length is None
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]  # it leaves nothing


def test_without_drafts_nobody_speculates(tmp_path):
    spec = Spec(inputs=("in.jsonl",), out="-", draft_length=0, dtype="float32")
    assert list(open_pair_for(spec, 2).contestants) == [PLAIN, MLX_LM]


# The command


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command over what a bench found; give exit code, output and what it was asked."""
    asked = {}

    def command(found, *words):
        def fake(spec, **options):
            asked.update(spec=spec, **options)
            return found

        monkeypatch.setattr(importlib.import_module("dspark_batch.bench"), "bench", fake)
        code = main(["bench", "in.jsonl", "-q", *words])
        return code, capsys.readouterr().out, asked

    return command


def found_with(**speculation):
    plain = Standing(name=PLAIN, slots=64, seconds=[2.0], completion_tokens=840, equal=28)
    drafting = Standing(
        name=SPECULATION,
        slots=28,
        seconds=[0.7],
        completion_tokens=840,
        accept_length=5.5,
        equal=28,
    )
    outside = replace(plain, name=MLX_LM, seconds=[1.5])
    return Comparison(
        items=28,
        turns=1,
        prompt_tokens=1090,
        divergence=0.001,
        facts={"dtype": "float32"},
        standings=[plain, replace(drafting, **speculation), outside],
    )


def test_the_command_says_the_gain_first(command):
    code, out, _ = command(found_with())
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == (
        "Speculation: 2.9 times plain decoding, same bytes: 28 of 28, accept length 5.50."
    )
    assert lines[2:6] == [
        "                tokens/s  times plain  accept length  same tokens as plain",
        "plain decoding  420       1.00                        28 of 28",
        "speculation     1,200     2.86         5.50           28 of 28",
        "mlx-lm          560       1.33                        28 of 28",
    ]


def test_the_command_says_a_change_first_and_exits_with_3(command):
    code, out, _ = command(found_with(equal=27, different=1))
    assert code == 3
    assert out.startswith("Speculation: 2.9 times plain decoding, but it CHANGED answers: 1 of 28.")


def test_the_command_prints_one_object(command):
    code, out, _ = command(found_with(), "--json")
    assert (code, json.loads(out)["items"]) == (0, 28)


def test_the_options_reach_the_bench(command):
    words = ["--limit", "5", "--slots", "3", "--max-tokens", "9", "--turns", "2", "--no-mlx-lm"]
    _, _, asked = command(found_with(), *words)
    spec = asked["spec"]
    assert (spec.limit, spec.slots, spec.max_tokens, asked["turns"]) == (5, 3, 9, 2)
    assert asked["outside"] is False
    assert spec.inputs == ("in.jsonl",)


def test_a_job_file_is_refused(capsys):
    assert main(["bench", "job.toml"]) == 2
    assert "bench takes no job file" in capsys.readouterr().err


def test_its_options_are_those_of_run():
    of_run = {each.name: each for each in run_command.params}
    own = {"turns", "no_mlx_lm", "as_json"}
    assert all(of_run[p.name] is p for p in bench_command.params if p.name not in own)
