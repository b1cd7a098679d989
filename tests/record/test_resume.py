"""The same command continues; another job is refused; an edited input keeps what it can."""

import json
import logging
from contextlib import nullcontext
from dataclasses import fields

import pytest
from fakes import FakeEngine, fake_opener, refuse_to_open
from small_jobs import errors_in, prompts, rows_in, start, write_lines

from dspark_batch.errors import DsparkBatchError, Resumable, ResumeMismatch, UsageError
from dspark_batch.record.run_dir import RunDir, refuse_another_job
from dspark_batch.spec.spec import Spec


def stop_after(folder, rows, **options):
    """Start a job and interrupt it."""
    with pytest.raises(KeyboardInterrupt):
        start(folder, engine=FakeEngine(slots=1, dies_after=rows), **options)


def ids_run(folder, **options):
    """Start a job and list the custom_ids that were generated."""
    ran = []
    start(folder, observe=lambda t: t.outcome and ran.append(t.outcome.item.custom_id), **options)
    return ran


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b", "c", "d"))
    return tmp_path


def test_the_same_command_continues(folder):
    stop_after(folder, 2)
    assert not (folder / "out.jsonl").exists()
    assert ids_run(folder) == ["id-c", "id-d"]
    assert [row["custom_id"] for row in rows_in(folder / "out.jsonl")] == [
        *("id-a", "id-b", "id-c", "id-d")
    ]


def test_the_same_command_on_a_complete_output_does_nothing(folder):
    first = start(folder)
    before = (folder / "out.jsonl").stat()
    again = start(folder, opener=refuse_to_open)
    assert (folder / "out.jsonl").stat() == before
    assert (again.total, again.succeeded, again.resumed) == (4, 4, 4)
    assert (again.completion_tokens, again.new_tokens) == (first.completion_tokens, 0)


def test_the_exit_code_of_a_complete_output_stays(folder):
    write_lines(folder / "in.jsonl", *prompts("a"), b"nope")
    assert start(folder).exit_code == 1
    assert start(folder, opener=refuse_to_open).exit_code == 1


def test_progress_counts_every_row_once(folder):
    write_lines(folder / "in.jsonl", *prompts("a", "b"), b"nope", *prompts("c"))
    stop_after(folder, 3)
    ticks = []
    start(folder, observe=ticks.append)
    assert [(t.stage, t.total, t.done, t.failed, t.resumed) for t in ticks] == [
        ("load", 4, 3, 1, 3),
        ("decode", 4, 3, 1, 3),
        ("decode", 4, 4, 1, 3),
        ("finish", 4, 4, 1, 3),
    ]
    assert [t.outcome is not None for t in ticks] == [False, False, True, False]


REFUSED = [  # options before, options after, what is said
    ({"shard": "1/2"}, {"shard": "2/2"}, 'shard is "1/2" there and "2/2" here'),
    ({"max_tokens": 5}, {"max_tokens": 6}, "max_tokens is 5 there and 6 here"),
    ({}, {"system_prompt": "Hi."}, 'system_prompt is null there and "Hi." here'),
    ({}, {"prompt_column": "id"}, 'prompt_column is null there and "id" here'),
    ({}, {"messages_column": "m"}, 'messages_column is null there and "m" here'),
    ({}, {"system_column": "prompt"}, 'system_column is null there and "prompt" here'),
    ({}, {"id_column": "prompt"}, 'id_column is null there and "prompt" here'),
    ({}, {"last_assistant": "drop"}, 'last_assistant is "refuse" there and "drop" here'),
    ({}, {"regenerate": "all"}, 'regenerate is null there and "all" here'),
    ({}, {"ignore_fields": ("n",)}, 'ignore_fields is [] there and ["n"] here'),
    (
        {},
        {"special_tokens": "as-tokens"},
        'special_tokens is "as-text" there and "as-tokens" here',
    ),
    ({}, {"template": "{{id}}"}, 'template is null there and "{{id}}" here'),
    ({}, {"on_overflow": "skip"}, 'on_overflow is "error" there and "skip" here'),
    ({}, {"keep": ("id",)}, 'keep is [] there and ["id"] here'),
    ({}, {"drop": ("id",)}, 'drop is [] there and ["id"] here'),
    ({}, {"output_column": "x"}, 'output_column is null there and "x" here'),
    ({}, {"format": "openai"}, 'format is "rows" there and "openai" here'),
    ({}, {"output_prefix": "o_"}, 'output_prefix is "" there and "o_" here'),
    ({"temperature": 0.5}, {"temperature": 1}, "temperature is 0.5 there and 1 here"),
    ({}, {"top_p": 0.9}, "top_p is 1.0 there and 0.9 here"),
    ({}, {"top_k": 5}, "top_k is 0 there and 5 here"),
    ({}, {"min_p": 0.1}, "min_p is 0.0 there and 0.1 here"),
    ({}, {"frequency_penalty": 0.5}, "frequency_penalty is 0.0 there and 0.5 here"),
    ({}, {"presence_penalty": 0.5}, "presence_penalty is 0.0 there and 0.5 here"),
    ({}, {"repetition_penalty": 1.5}, "repetition_penalty is 1.0 there and 1.5 here"),
    ({}, {"bad_words": ("no",)}, 'bad_words is [] there and ["no"] here'),
    ({}, {"min_tokens": 2}, "min_tokens is 0 there and 2 here"),
    ({}, {"logprobs": 2}, "logprobs is null there and 2 here"),
    ({}, {"prompt_logprobs": 2}, "prompt_logprobs is null there and 2 here"),
    ({}, {"score": "prompt"}, 'score is null there and "prompt" here'),
    ({}, {"json_schema": "{}"}, 'json_schema is null there and "{}" here'),
    ({}, {"regex": "a"}, 'regex is null there and "a" here'),
    ({}, {"grammar": "start: /a/"}, 'grammar is null there and "start: /a/" here'),
    ({}, {"choice": ("a",)}, 'choice is [] there and ["a"] here'),
    ({}, {"ignore_eos": True}, "ignore_eos is false there and true here"),
    ({}, {"seed": 1}, "seed is 0 there and 1 here"),
    ({}, {"stop": ("a",)}, 'stop is [] there and ["a"] here'),
    (
        {"sampling": "rejection"},
        {"sampling": "rejection", "draft_length": 2},
        'draft_length is "auto" there and 2 here',
    ),
    (
        {"sampling": "rejection"},
        {"sampling": "rejection", "confidence_threshold": 0.5},
        "confidence_threshold is 0.0 there and 0.5 here",
    ),
    (
        {"max_tokens": 5},
        {"system_prompt": "Hi.", "max_tokens": 6},
        'system_prompt is null there and "Hi." here; max_tokens is 5 there and 6 here',
    ),
]
FREE = [  # options that change no row
    *({"slots": 2}, {"draft_length": 0}, {"confidence_threshold": 0.5}, {"no_prefix_cache": True}),
    {"lookup": True},
    *({"drafter": "d"}, {"drafter_bits": 4}, {"trust_remote_code": True}),
    *({"verify_greedy": "50%"}, {"max_mismatches": 2}, {"log_confidence": True}),
    *({"fsync_every": 2}, {"grace": 1.0}, {"max_runtime": "1h"}),
    *({"report_by": "id"}, {"resume": "always"}, {"retry_failed": True}),
    *({"workers": 2}, {"ray": "auto"}, {"ray": "auto", "worker_resources": '{"mlx": 1}'}),
    {"retry_where": ("status=errored",)},
]
REFUSED_WITH_THE_MODEL = {"family", "target", "target_bits", "dtype", "thinking", "sampling"}
SAY_WHICH_ROWS_AND_WHEN = {"inputs", "out", "limit", "samples", "overwrite", "deadline"}


def test_every_option_is_refused_or_changes_no_row():
    refused = {name for _, after, _ in REFUSED for name in after} | REFUSED_WITH_THE_MODEL
    free = {name for after in FREE for name in after} | SAY_WHICH_ROWS_AND_WHEN
    assert refused | free == {field.name for field in fields(Spec)}
    assert refused & free == {  # the rejection rule looks at drafts
        *("draft_length", "confidence_threshold")
    }


@pytest.mark.parametrize(("before", "after", "said"), REFUSED)
@pytest.mark.parametrize("complete", [True, False])
def test_a_job_with_other_options_is_refused_with_both_values(
    folder, before, after, said, complete
):
    start(folder, **before) if complete else stop_after(folder, 1, **before)
    with pytest.raises(ResumeMismatch) as error:
        start(folder, opener=refuse_to_open, **after)
    assert error.value.exit_code == 4
    assert str(error.value) == (
        f"{folder}/out.jsonl.run holds another job: {said}. Put the old values back, choose "
        "another output, or start over with --overwrite."
    )


@pytest.mark.parametrize(
    ("name", "there"),
    [("target", '"t0"'), ("tokenizer", '"k0"'), ("chat_template", '"c0"'), ("numerics", "null")],
)
def test_another_model_is_refused(folder, name, there):
    stop_after(folder, 1)
    with pytest.raises(ResumeMismatch, match=f'{name} is {there} there and "new" here') as error:
        start(folder, opener=fake_opener(**{name: "new"}))
    assert error.value.exit_code == 4


def test_another_machine_is_told_by_what_rounds_otherwise():
    def setup(kernel):
        return {"machine": {"mlx": "1", "blas": f"OpenBLAS {'a' * 80}, kernel {kernel}"}}

    manifest = {"fingerprint": {"fields": {"numerics": "a"}}, "setup": setup("Zen")}
    with pytest.raises(ResumeMismatch) as error:
        refuse_another_job(RunDir("out"), manifest, {"numerics": "b"}, setup("Haswell"))
    assert 'numerics is "a" there and "b" here; its blas was OpenBLAS aaa' in str(error.value)
    assert "kernel Zen there and is OpenBLAS aaa" in str(error.value)
    assert "kernel Haswell here. Put the old values back" in str(error.value)
    assert "mlx" not in str(error.value)


def test_another_length_of_the_context_is_refused(folder):
    def opener(spec, manifest):
        return fake_opener()(spec, manifest)._replace(context_length=99)

    stop_after(folder, 1)
    with pytest.raises(ResumeMismatch, match="context_length is 400 there and 99 here"):
        start(folder, opener=opener)


def test_a_target_with_other_bits_is_refused(folder):
    stop_after(folder, 1)
    with pytest.raises(ResumeMismatch, match='target_bits is null there and "8 bits" here'):
        start(folder, opener=fake_opener(target_bits="8 bits"), target_bits=8)


@pytest.mark.parametrize("complete", [True, False])
def test_another_thinking_is_refused(folder, complete):
    start(folder) if complete else stop_after(folder, 1)
    with pytest.raises(ResumeMismatch, match='thinking is null there and "on" here'):
        start(folder, opener=fake_opener(thinking="on"), thinking="on")


def test_a_complete_output_is_no_excuse_for_other_bits(folder):
    start(folder)
    with pytest.raises(ResumeMismatch, match='target_bits is null there and "8 bits" here'):
        start(folder, opener=fake_opener(target_bits="8 bits"), target_bits=8)


def test_the_number_type_of_the_first_start_is_kept(folder):
    with pytest.raises(KeyboardInterrupt):
        start(folder, opener=fake_opener(FakeEngine(dies_after=1)), dtype="bfloat16")
    assert start(folder).exit_code == 0  # dtype None takes what the manifest says
    write_lines(folder / "in.jsonl", *prompts("e"))
    with pytest.raises(ResumeMismatch, match='dtype is "bfloat16" there and "float16" here'):
        start(folder, dtype="float16")


def test_a_complete_output_is_no_excuse_for_another_model(folder):
    start(folder)
    with pytest.raises(ResumeMismatch, match='target is "t0" there and "t1" here'):
        start(folder, opener=fake_opener(target="t1"), family="another")


def test_another_rule_is_refused(folder):
    stop_after(folder, 1)
    with pytest.raises(ResumeMismatch, match='sampling is "coupled" there and "rejection" here'):
        start(folder, sampling="rejection")


@pytest.mark.parametrize("complete", [True, False])
def test_another_drafter_is_refused_where_answers_depend_on_drafts(folder, complete):
    rejection = {"sampling": "rejection"}
    start(folder, **rejection) if complete else stop_after(folder, 1, **rejection)
    with pytest.raises(ResumeMismatch, match='drafter is "d0" there and "d9" here'):
        start(folder, opener=fake_opener(drafter="d9"), drafter="another", **rejection)
    with pytest.raises(ResumeMismatch, match='drafter_bits is null there and "4 bits" here'):
        start(folder, opener=fake_opener(drafter_bits="4 bits"), drafter_bits=4, **rejection)


@pytest.mark.parametrize(("draft_length", "is_refused"), [(2, True), (None, False)])
def test_drafts_made_in_another_way_are_refused_where_blocks_are_short(
    folder, draft_length, is_refused
):
    """By the rejection rule; a whole block is made as older versions made it."""
    asked = {"sampling": "rejection", "draft_length": draft_length}
    stop_after(folder, 1, **asked)  # an older job does not say how drafts were made
    refused = pytest.raises(ResumeMismatch, match='drafting is null there and "anew" here')
    with refused if is_refused else nullcontext():
        start(folder, opener=fake_opener(drafting="anew"), **asked)


@pytest.mark.parametrize("change", FREE)
def test_what_changes_no_row_may_change(folder, change):
    stop_after(folder, 2)
    assert start(folder, opener=fake_opener(drafter="d9"), **change).resumed == 2


def test_long_values_are_shortened_in_the_refusal(folder):
    stop_after(folder, 1)
    with pytest.raises(ResumeMismatch) as error:
        start(folder, system_prompt="long " * 99)
    assert len(str(error.value)) < 400


def test_resume_never_refuses_a_run_directory(folder):
    assert start(folder, resume="never").total == 4
    with pytest.raises(UsageError, match="holds a job already; drop --resume never"):
        start(folder, resume="never")
    assert start(folder, resume="never", overwrite=True).resumed == 0


def test_resume_always_needs_a_run_directory(folder):
    with pytest.raises(UsageError, match="holds nothing to resume; drop --resume always"):
        start(folder, resume="always")
    stop_after(folder, 1)
    assert start(folder, resume="always").resumed == 1


def test_overwrite_starts_over_and_takes_new_options(folder):
    start(folder, max_tokens=3)
    report = start(folder, max_tokens=5, overwrite=True)
    assert (report.resumed, report.completion_tokens) == (0, 20)


def test_overwrite_replaces_a_file_that_nobody_knows(folder):
    (folder / "out.jsonl").write_bytes(b"old\n")
    assert start(folder, overwrite=True).total == 4
    assert len(rows_in(folder / "out.jsonl")) == 4


def test_an_output_that_appeared_beside_an_unfinished_job_is_not_replaced(folder):
    stop_after(folder, 1)
    (folder / "out.jsonl").write_bytes(b"precious\n")
    with pytest.raises(UsageError, match="it is not the output of a job in"):
        start(folder)
    assert (folder / "out.jsonl").read_bytes() == b"precious\n"


def test_a_limit_takes_the_first_records_and_can_be_lifted(folder):
    assert ids_run(folder, limit=2) == ["id-a", "id-b"]
    assert len(rows_in(folder / "out.jsonl")) == 2
    assert ids_run(folder) == ["id-c", "id-d"]
    assert len(rows_in(folder / "out.jsonl")) == 4
    assert start(folder, limit=3, opener=refuse_to_open).total == 3
    assert len(rows_in(folder / "out.jsonl")) == 3


def test_failed_items_run_again_only_when_asked(folder):
    fails = FakeEngine(fails_on=frozenset({"id-b", "id-c"}))
    assert start(folder, engine=fails).errored == 2
    assert start(folder, opener=refuse_to_open).errored == 2
    still = FakeEngine(fails_on=frozenset({"id-b"}))
    assert sorted(ids_run(folder, engine=still, retry_failed=True)) == ["id-b", "id-c"]
    assert [error and error["code"] for error in errors_in(folder / "out.jsonl")] == [
        *(None, "engine", None, None)
    ]
    assert ids_run(folder, retry_failed=True) == ["id-b"]
    assert errors_in(folder / "out.jsonl") == [None] * 4


@pytest.mark.parametrize(
    ("conditions", "to_run"),
    [
        (["error.code=engine"], ["id-a"]),
        (["error.code=bad_record"], ["id-n"]),
        (["status=skipped"], ["id-long"]),
        (["status=errored"], ["id-a", "id-n"]),
        (["status=skipped", "error.code=engine"], ["id-a", "id-long"]),
        (["error.code=poison"], []),
    ],
)
def test_failures_that_run_again_can_be_chosen(tmp_path, conditions, to_run):
    empty = {"id": "id-n", "prompt": ""}
    write_lines(
        tmp_path / "in.jsonl", *prompts("a", "b"), empty, {"id": "id-long", "prompt": "x" * 999}
    )
    options = {"on_overflow": "skip", "slots": 1}
    start(tmp_path, engine=FakeEngine(slots=1, fails_on=frozenset({"id-a"})), **options)
    ran = ids_run(tmp_path, engine=FakeEngine(slots=1), retry_where=tuple(conditions), **options)
    assert ran == [name for name in ("id-a", "id-n", "id-long") if name in to_run]
    assert [error and error["code"] for error in errors_in(tmp_path / "out.jsonl")] == [
        *("engine" if "id-a" not in to_run else None, None),
        *("bad_record", "prompt_too_long"),
    ]


def test_choosing_what_runs_again_changes_no_setting(folder):
    start(folder, engine=FakeEngine(fails_on=frozenset({"id-b"})), max_tokens=5)
    with pytest.raises(ResumeMismatch, match="max_tokens is 5 there and 6 here"):
        start(folder, max_tokens=6, retry_where=("error.code=engine",))


def test_rows_that_were_skipped_are_no_failures_of_a_later_start(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"prompt": "x" * 999}, b"nope", *prompts("a"))
    stop_after(tmp_path, 2, on_overflow="skip")
    ticks = []
    start(tmp_path, observe=ticks.append, on_overflow="skip")
    assert (ticks[0].done, ticks[0].failed, ticks[-1].failed) == (2, 1, 1)


def test_an_interrupted_retry_keeps_the_rows_it_did_not_reach(folder):
    start(folder, engine=FakeEngine(fails_on=frozenset({"id-b", "id-c"})))
    stop_after(folder, 1, retry_failed=True)
    report = start(folder, opener=refuse_to_open)
    assert [error is None for error in errors_in(folder / "out.jsonl")] == [True, True, False, True]
    assert report.errored == 1


def fresh_output(folder):
    """The output of a first start on the input as it is now."""
    start(folder, out=f"{folder}/fresh.jsonl", overwrite=True)
    return (folder / "fresh.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("edited", "to_run"),
    [
        (("x", "a", "b", "c", "d"), ["id-x"]),
        (("a", "b", "x", "c", "d", "y"), ["id-x", "id-y"]),
        (("a", "d"), []),
        (("d", "c", "b", "a"), []),
        (("a", "B", "c", "d"), ["id-B"]),
        (("a", "a", "b"), ["id-a"]),
        (("w", "x"), ["id-w", "id-x"]),
    ],
)
def test_an_edited_input_keeps_the_rows_of_unchanged_records(folder, edited, to_run):
    start(folder)
    write_lines(folder / "in.jsonl", *prompts(*edited))
    assert ids_run(folder) == to_run
    assert (folder / "out.jsonl").read_bytes() == fresh_output(folder)


def test_records_without_an_id_are_named_by_their_index_and_run_again_when_it_changes(folder):
    write_lines(folder / "in.jsonl", {"prompt": "a"}, b"nope", {"prompt": "b"})
    start(folder)
    write_lines(folder / "in.jsonl", {"prompt": "a"}, {"prompt": "x"}, b"nope", {"prompt": "b"})
    assert ids_run(folder) == ["#1", "#2", "#3"]
    assert [row["custom_id"] for row in rows_in(folder / "out.jsonl")] == ["#0", "#1", "#2", "#3"]
    assert (folder / "out.jsonl").read_bytes() == fresh_output(folder)


def test_a_record_with_a_known_id_and_new_content_runs_again(folder):
    start(folder)
    records = prompts("a", "b", "c", "d")
    records[1]["prompt"] = "new"
    write_lines(folder / "in.jsonl", *records)
    assert ids_run(folder) == ["id-b"]
    assert (folder / "out.jsonl").read_bytes() == fresh_output(folder)


def test_equal_records_each_get_their_own_row(folder):
    write_lines(folder / "in.jsonl", *prompts("a", "a", "a"))
    stop_after(folder, 2)
    assert ids_run(folder) == ["id-a"]
    assert len(rows_in(folder / "out.jsonl")) == 3


def test_an_edited_input_is_said_aloud(folder, caplog):
    start(folder)
    write_lines(folder / "in.jsonl", *prompts("a", "b", "c", "d", "e"))
    with caplog.at_level(logging.WARNING):
        start(folder)
    assert caplog.messages == [
        "the input is not what it was at the first start: 4 of 5 records have a row already"
    ]


def test_an_unchanged_input_is_not_talked_about(folder, caplog):
    stop_after(folder, 1)
    start(folder)
    assert caplog.messages == []


@pytest.mark.parametrize("edited", [prompts("a", "b", "c", "X"), prompts("a", "b")])
def test_an_input_that_changes_during_the_run_is_noticed_and_loses_nothing(folder, edited):
    def edit(tick):
        if tick.stage == "finish":
            write_lines(folder / "in.jsonl", *edited)

    with pytest.raises(Resumable, match="the input changed while the job ran"):
        start(folder, observe=edit)
    assert not (folder / "out.jsonl").exists()
    start(folder)
    assert (folder / "out.jsonl").read_bytes() == fresh_output(folder)


def test_an_input_that_shrinks_before_it_is_read_is_no_lost_item(folder):
    def shrink(tick):
        write_lines(folder / "in.jsonl", *prompts("a"))

    with pytest.raises(Resumable, match="the input changed while the job ran"):
        start(folder, observe=shrink)


class Forgets(FakeEngine):
    def generate(self, stream, may_begin):
        yield from list(super().generate(stream, may_begin))[1:]


class Repeats(FakeEngine):
    def generate(self, stream, may_begin):
        outcomes = list(super().generate(stream, may_begin))
        yield from [*outcomes, outcomes[0]]


@pytest.mark.parametrize(
    ("engine", "said"),
    [(Forgets(), "1 items went into the engine and did not come out"), (Repeats(), "twice")],
)
def test_an_engine_that_loses_or_repeats_an_item_is_caught(folder, engine, said):
    with pytest.raises(DsparkBatchError, match=said) as error:
        start(folder, engine=engine)
    assert error.value.exit_code == 70
    assert not (folder / "out.jsonl").exists()


def test_nothing_is_generated_before_it_is_asked_for(folder):
    engine = FakeEngine(slots=2, dies_after=0)
    with pytest.raises(KeyboardInterrupt):
        start(folder, engine=engine)
    assert engine.pulled == 2


def test_standard_input_can_be_continued_by_piping_it_again(folder, monkeypatch):
    for dies_after in (2, None):
        with (folder / "in.jsonl").open() as stream:
            monkeypatch.setattr("sys.stdin", stream)
            if dies_after:
                stop_after(folder, dies_after, inputs=("-",))
            else:
                assert start(folder, inputs=("-",)).resumed == 2
    assert len(rows_in(folder / "out.jsonl")) == 4


def test_the_manifest_says_what_ran(folder):
    start(folder, system_prompt="Hi.")
    manifest = json.loads((folder / "out.jsonl.run/manifest.json").read_bytes())
    assert manifest["version"] == 2
    assert manifest["spec"]["system_prompt"] == "Hi."
    assert manifest["identity"]["drafter"] == "d0"
    assert manifest["inputs"][0]["records"] == 4
    assert manifest["fingerprint"]["fields"].keys() == {
        *("target", "tokenizer", "chat_template", "thinking", "dtype", "target_bits"),
        *("context_length", "shard"),
        *("system_prompt", "prompt_column", "messages_column", "output_prefix", "max_tokens"),
        *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "sampling"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty", "bad_words"),
        *("min_tokens", "ignore_eos", "logprobs", "prompt_logprobs", "score", "numerics"),
        *("json_schema", "regex", "grammar", "choice"),
        *("template", "on_overflow", "keep", "drop", "output_column", "format", "id_column"),
        *("system_column", "last_assistant", "regenerate", "ignore_fields", "special_tokens"),
    }
    assert {"python", "mlx", "mlx-lm", "dspark-batch"} <= manifest["versions"].keys()


def test_a_manifest_of_another_format_is_refused(folder):
    stop_after(folder, 1)
    path = folder / "out.jsonl.run/manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 2', b'"version": 1'))
    with pytest.raises(ResumeMismatch, match="written by another version"):
        start(folder)


def test_a_run_directory_is_made_with_its_parents(folder):
    assert start(folder, out=f"{folder}/new/deep/out.jsonl").total == 4
