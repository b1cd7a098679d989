"""`check` says before the night what `run` would say in the morning, and writes nothing."""

import subprocess
import sys
from dataclasses import replace

import pytest
from fakes import CONTEXT_LENGTH, FakeEngine, fake_render
from small_jobs import planned, prompts, start, write_lines

from dspark_batch.check import Reads, check, open_reading
from dspark_batch.cli.main import main
from dspark_batch.errors import ResumeMismatch, UsageError
from dspark_batch.intake.prompts import BLOCK, Prompts
from dspark_batch.pair import load_pair, load_reading
from dspark_batch.record.run_dir import RunDir
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Item, Request

IDENTITY = {"tokenizer": "k0", "chat_template": "c0"}  # as fakes.fake_opener has it


def reads(spec):
    per_position = 40 if spec.dtype == "float32" else 20
    return Reads(
        fake_render,
        lambda ids: "".join(map(chr, ids)),
        CONTEXT_LENGTH,
        IDENTITY,
        5_000,
        (per_position, 1000),
    )


def look(folder, **options):
    options = {"inputs": (str(folder / "in.jsonl"),), "out": str(folder / "out.jsonl")} | options
    examples = options.pop("examples", 1)
    return check(Spec(**options), examples=examples, open_reading=reads)


def stop_after(folder, rows):
    with pytest.raises(KeyboardInterrupt):
        start(folder, engine=FakeEngine(slots=1, dies_after=rows))


def prompt(index, ids):
    return Request(Item(index, str(index), "d", f"in.jsonl:{index + 1}"), tuple(ids), 5)


def test_finds_what_a_run_would_fail_on(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a"), b"nope", {"q": 1}, {"prompt": "x" * 999})
    found = look(tmp_path)
    assert found.without_request == {"bad_record": 2, "prompt_too_long": 1}
    assert found.records == 4
    assert "in.jsonl:2: not JSON" in found.first_failures[0]
    report = start(tmp_path)
    assert found.without_request == report.errors_by_code
    assert found.exit_code == report.exit_code == 1


def test_what_the_job_says_to_skip_is_no_failure(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a"), {"prompt": "x" * 999})
    found = look(tmp_path, on_overflow="skip")
    assert found.without_request == {"prompt_too_long": 1}
    assert found.exit_code == start(tmp_path, on_overflow="skip").exit_code == 0


def test_shows_the_first_prompts_as_the_model_sees_them(tmp_path):
    write_lines(tmp_path / "in.jsonl", b"nope", *prompts("a", "b", "c"))
    found = look(tmp_path, examples=2, system_prompt="S")
    assert [each.where for each in found.examples] == [f"{tmp_path}/in.jsonl:{n}" for n in (2, 3)]
    assert found.examples[0].text == "system:S\nuser:a\n"
    assert found.examples[0].tokens == len("system:S\nuser:a\n")


def test_counts_the_tokens_that_a_run_would_prefill(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "bb", "dddd"))
    found = look(tmp_path).prompts
    assert found.tokens == start(tmp_path).prompt_tokens
    assert (found.median, found.longest) == (len("user:bb\n"), len("user:dddd\n"))
    assert found.longest_at == f"{tmp_path}/in.jsonl:3"


def test_names_ids_and_contents_that_come_again(tmp_path):
    twice = {"id": "one", "prompt": "p"}
    write_lines(tmp_path / "in.jsonl", twice, {"id": "one", "prompt": "q"}, twice)
    found = look(tmp_path)
    assert (found.prompts.repeated_ids, found.prompts.repeated_contents) == (2, 1)
    assert found.prompts.first_repeated_ids == ["one"]
    assert found.exit_code == 0  # a run takes them


def test_shared_beginnings_count_in_whole_blocks():
    seen = Prompts()
    seen.add(prompt(0, range(3 * BLOCK)))
    seen.add(prompt(1, [*range(2 * BLOCK + 5), *[999] * BLOCK]))  # two blocks and a bit
    seen.add(prompt(2, [999, *range(1, 3 * BLOCK)]))  # only its beginning is other
    assert seen.repeated_tokens == 2 * BLOCK


def test_a_block_in_the_middle_is_no_beginning():
    seen = Prompts()
    seen.add(prompt(0, [*[1] * BLOCK, *[2] * BLOCK]))
    seen.add(prompt(1, [*[3] * BLOCK, *[2] * BLOCK]))
    assert seen.repeated_tokens == 0


def test_says_what_a_resume_would_do(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b", "c", "d"))
    assert not look(tmp_path).has_job
    stop_after(tmp_path, 3)
    found = look(tmp_path)
    assert (found.has_job, found.total, found.resumed) == (True, 4, 3)
    assert look(tmp_path, overwrite=True).resumed == 0


@pytest.mark.parametrize(
    ("options", "says"), [({"max_tokens": 9}, "max_tokens is 512 there and 9 here")]
)
def test_says_which_key_a_resume_would_be_refused_for(tmp_path, options, says):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b"))
    stop_after(tmp_path, 1)
    with pytest.raises(ResumeMismatch, match=says):
        look(tmp_path, **options)


def test_another_tokenizer_is_another_job(tmp_path, monkeypatch):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b"))
    stop_after(tmp_path, 1)
    monkeypatch.setitem(IDENTITY, "tokenizer", "k1")
    with pytest.raises(ResumeMismatch, match='tokenizer is "k0" there and "k1" here'):
        look(tmp_path)


def test_estimates_only_what_somebody_measured(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts(*"abcdefgh"))
    found = look(tmp_path)
    assert (found.seconds, found.disk_is_measured) == (None, False)
    start(tmp_path, engine=FakeEngine(slots=1, pause_s=0.05), limit=2)
    found = look(tmp_path)
    assert 6 * 0.05 <= found.seconds < 6 * 0.5
    assert found.disk_is_measured
    assert found.disk_bytes < look(tmp_path, overwrite=True).disk_bytes


def test_the_cache_of_a_slot_ends_at_the_longest_prompt_and_its_answer(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "bb"))
    positions = len("user:bb\n") + 20
    assert look(tmp_path, max_tokens=20).slot_bytes == positions * 20 + 1000
    assert look(tmp_path, max_tokens=20, dtype="float32").slot_bytes == positions * 40 + 1000
    assert look(tmp_path).slot_bytes == CONTEXT_LENGTH * 20 + 1000


def test_the_slots_are_those_asked_for_or_planned_at_the_first_start(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a"))
    assert look(tmp_path).slots is None
    assert look(tmp_path, slots=3).slots == 3
    start(tmp_path, opener=planned())
    assert look(tmp_path).slots == 4


def test_writes_nothing(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a"))
    look(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_job_that_runs_is_named(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a"))
    with RunDir(str(tmp_path / "out.jsonl")).lock():
        assert look(tmp_path).holder.startswith("process ")


def test_standard_input_cannot_be_read_twice(tmp_path):
    with pytest.raises(UsageError, match="save it to a file first"):
        look(tmp_path, inputs=("-",))


def test_the_reading_of_a_pair_is_that_of_the_loaded_pair():
    reading, pair = load_reading("tiny"), load_pair("tiny")
    assert reading.context_length == pair.config.context_length
    assert reading.identity.items() <= pair.config.identity.items()
    messages = [{"role": "user", "content": "Add 1 and 2."}]
    assert reading.tokenizer.render(messages) == pair.tokenizer.render(messages)
    assert reading.weight_bytes > 0
    layers = pair.target.model.layers
    heads, head_dim = pair.target.model.args.num_key_value_heads, pair.target.model.args.head_dim
    assert reading.cached_bytes == (2 * 2 * len(layers) * heads * head_dim, 0)


def test_a_prompt_is_shown_with_the_thinking_that_a_run_would_have():
    spec = Spec(inputs=("in.jsonl",), out="out.jsonl")
    assert open_reading(spec).identity["thinking"] == "off"
    with pytest.raises(UsageError, match="has no thinking"):
        open_reading(replace(spec, thinking="on"))


def test_an_audit_has_its_items_counted_and_its_cost_estimated(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts(*map(str, range(20))))
    assert (look(tmp_path).audited, look(tmp_path, verify_greedy="all").audited) == (0, 20)
    some = look(tmp_path, verify_greedy="50%")
    assert (0 < some.audited < 20, some.audit_seconds) == (True, None)
    start(tmp_path, engine=FakeEngine(slots=1, pause_s=0.01), limit=2)
    found = look(tmp_path, verify_greedy="all")
    assert found.audited == 18
    assert found.audit_seconds > found.seconds  # a round of the fake commits 2.75 tokens


def test_the_command_says_it_in_words(tmp_path, capsys):
    write_lines(tmp_path / "in.jsonl", *prompts("Add 1 and 2."), b"nope")
    words = [str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert main(["check", *words]) == 1
    said = capsys.readouterr().out
    assert said.startswith("1 of 2 records can be asked.\n")
    assert "2 rows, from the start" in said
    assert "not measured yet: run it with --limit 20, then check again" in said
    assert "in.jsonl:1 as the model sees it" in said
    assert "user\nAdd 1 and 2." in said


def test_nothing_else_talks_about_a_prompt_that_is_too_long(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("x " * 3000))
    program = "import sys; from dspark_batch.cli.main import main; sys.exit(main(sys.argv[1:]))"
    words = ["check", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "1 prompt_too_long" in done.stdout


def test_columns_that_nobody_asks_for_are_suggested(tmp_path, capsys):
    record = {"uuid": "u", "system": "S", "prompt": "x", "question_id": None}
    write_lines(tmp_path / "in.jsonl", record, record | {"system": ""})
    named, system = look(tmp_path).hints[::-1]
    assert named == "no record has a custom_id or an id; `uuid` could name them: --id-column uuid"
    assert system.startswith("the column `system` is not asked; it is a system prompt with")
    assert look(tmp_path, id_column="uuid", system_column="system").hints == ()
    assert look(tmp_path, id_column="uuid", template="{{ prompt }}").hints == ()
    write_lines(tmp_path / "in.jsonl", record | {"id": 1, "system": ""})
    assert look(tmp_path).hints == ()


def test_columns_that_do_less_than_they_seem_to_are_told(tmp_path):
    record = {"id": 1, "prompt": "x", "max_tokens": 5, "temperature": 0.0, "images": ["a.png"]}
    write_lines(tmp_path / "in.jsonl", record | {"seed": None, "image": None})
    assert look(tmp_path).hints == (
        "the column `images` is not asked; the model reads only text",
        "the column `max_tokens` is not obeyed; a record's own settings stand in `sampling_params`",
        "the column `temperature` is not obeyed; a record's own settings stand in "
        "`sampling_params`",
    )


def test_fields_that_are_left_aside_are_counted(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"prompt": "x", "tools": [{}]}, {"prompt": "x"})
    found = look(tmp_path, ignore_fields=("tools",))
    assert (found.ignored, found.exit_code) == ({"tools": 1}, 0)
