"""`verify` passes what is right, and finds each damage that is planted here, with its sentence."""

import json
import shutil
from contextlib import chdir
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest
from small_jobs import rows_in, write_lines

from dspark_batch.audit.replay import Margin
from dspark_batch.cli.main import main
from dspark_batch.errors import EqualityError, OutputInUse, UsageError
from dspark_batch.numerics import steering
from dspark_batch.opening import open_with
from dspark_batch.output.finish import write_output
from dspark_batch.output.look import look
from dspark_batch.output.report import Report
from dspark_batch.pair import load_pair
from dspark_batch.record.journal import Journal, scan
from dspark_batch.record.rows import sum_and_mean
from dspark_batch.record.run_dir import RunDir
from dspark_batch.run import run
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Said
from dspark_batch.verify import verify

SPELL, WRITE = 'Spell "cat" backwards.', "Write 62 in words."
RECORDS = [
    {"id": "spell", "prompt": SPELL},
    {"id": "cut", "prompt": WRITE, "sampling_params": {"max_tokens": 9}},
    {"id": "talk", "turns": [SPELL, WRITE]},
    {"id": "until", "prompt": WRITE, "sampling_params": {"stop": "Ones"}},
    b"nope",
    {"id": "free", "prompt": WRITE, "sampling_params": {"temperature": 1.5, "max_tokens": 20}},
]
SIZE, ANSWERS = len(RECORDS), len(RECORDS) - 1
OUT = Path("out.jsonl")


@pytest.fixture(scope="module")
def pair():
    return load_pair("tiny", dtype="float32")


@pytest.fixture(scope="module")
def opener(pair):
    """Make an `open_engine` over the same pair, with another identity or baseline if need be.

    What was opened for a job is kept: checking a target takes longer than most tests.
    """
    kept = {}  # spec -> Opened

    def opener(baseline=None, **identity):
        def open_engine(spec, manifest):
            if repr(spec) not in kept:
                kept[repr(spec)] = open_with(pair, spec)
            opened = kept[repr(spec)]
            known = opened.identity | identity
            return opened._replace(identity=known, baseline=baseline or opened.baseline)

        return open_engine

    return opener


@pytest.fixture(scope="module")
def whole(tmp_path_factory, opener):
    """A finished run, named by relative paths so that it can be copied."""
    folder = tmp_path_factory.mktemp("whole")
    with chdir(folder):
        made(opener)
    return folder


def made(opener, out="out.jsonl", records=RECORDS, **options):
    write_lines(Path("in.jsonl"), *records)
    options = {"max_tokens": 20, "slots": SIZE} | options
    return run(Spec(inputs=("in.jsonl",), out=out, **options), open_engine=opener())


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    """A copy of the finished run, which a test can damage; the working directory."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def audit(opener):
    """Verify `out.jsonl` without decoding answers again, unless told otherwise."""

    def audit(out="out.jsonl", sample=0, opened=None, **options):
        return verify(out, sample=sample, open_engine=opened or opener(), **options)

    return audit


def entries():
    job = look("out.jsonl")
    with job.run_dir.rows.open("rb") as stream:
        return [line.entry for line in scan(stream, job.run_id, "rows.jsonl")]


def plant(change, rewrite=True):
    """Change the entries of the journal and have every checksum, and the output, agree with it."""
    job, planted = look("out.jsonl"), change(entries())
    job.run_dir.rows.unlink()
    with Journal(job.run_dir.rows, job.run_id) as journal:
        for entry in planted:
            journal.append(entry)
    if rewrite:
        from datetime import datetime

        with job.surveyed() as (found, rows):
            begun = datetime.fromisoformat(job.manifest["created"])
            draft = write_output(OUT, rows, job.spec, begun)
            report = Report.of_rows(rows, out="out.jsonl", resumed=0, new_tokens=0)
            job.run_dir.publish(draft, report.to_json(), found.inputs)


def change_row(name, change, **options):
    """Change the row of one item by a function, as `plant` does."""

    def change_one(all_entries):
        return [
            replace(e, row=change(json.loads(json.dumps(e.row))))
            if e.row["custom_id"] == name
            else e
            for e in all_entries
        ]

    plant(change_one, **options)


def said(audit, step):
    """The sentences of a step; no other step has found anything."""
    assert {finding.kind for finding in audit.findings} == {step}
    assert audit.exit_code == EqualityError.exit_code
    assert audit.verdict == "damaged"
    return [finding.says for finding in audit.findings]


def edit_lines(change, path=OUT):
    """Change the lines of a file by a function of a list."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))


# What is right


def test_a_finished_run_is_what_its_job_gave(folder, audit):
    found = audit(sample=None)
    assert (found.exit_code, found.verdict) == (0, "equal")
    assert (found.rows, found.answers, found.replayed) == (SIZE, ANSWERS, ANSWERS)
    saved = json.loads((folder / "out.jsonl.run/audit.json").read_bytes())
    assert saved == json.loads(json.dumps(found.to_json()))
    assert not (folder / "out.jsonl.run/audit.jsonl").exists()


@pytest.mark.parametrize(
    ("out", "options"),
    [
        ("out.parquet", {"keep": ("id",)}),
        ("out.jsonl", {"drop": ("prompt",), "output_prefix": "o_", "output_column": "answer"}),
        ("out.jsonl", {"format": "openai"}),
        ("out.parquet", {"logprobs": 2, "frequency_penalty": 0.5}),
        ("out.jsonl", {"logprobs": 1, "prompt_logprobs": 0, "format": "openai"}),
        ("out.parquet", {"samples": 2, "temperature": 0.9}),
        ("out.jsonl", {"system_prompt": "Answer in short.", "draft_length": 2, "limit": 3}),
    ],
)
def test_every_form_of_output_can_be_verified(out, options, tmp_path, monkeypatch, opener, audit):
    monkeypatch.chdir(tmp_path)
    made(opener, out, records=RECORDS[1:5], **{"max_tokens": 9} | options)
    found = audit(out, sample=1)
    assert [finding.says for finding in found.findings] == []
    assert (found.exit_code, found.replayed) == (0, 1)


@pytest.mark.parametrize("options", [{"regenerate": "all"}, {"last_assistant": "continue"}])
def test_conversations_that_go_on_can_be_verified(options, tmp_path, monkeypatch, opener, audit):
    monkeypatch.chdir(tmp_path)
    said = [("user", SPELL), ("assistant", "b"), ("user", WRITE), ("assistant", "Ones <|im_end|>")]
    chat = [{"role": role, "content": content} for role, content in said]
    tools = [{"name": "add"}]
    records = [{"messages": chat, "n": 10**30, "tools": tools}, {"messages": chat[:1]}]
    report = made(opener, records=records, max_tokens=9, ignore_fields=("tools",), **options)
    assert report.succeeded == 2
    found = audit(sample=1)
    assert [finding.says for finding in found.findings] == []


def test_more_answers_can_be_decoded_together_than_the_run_had(folder, opener, audit):
    seen = []

    def open_engine(spec, manifest):
        seen.append(spec.slots)
        return opener()(spec, manifest)

    assert audit(opened=open_engine, slots=SIZE + 2).exit_code == 0
    assert audit(opened=open_engine).exit_code == 0
    assert seen == [SIZE + 2, SIZE]


def test_the_run_directory_names_its_output(folder, audit):
    assert audit("out.jsonl.run/").out == "out.jsonl"


def test_a_half_finished_run_is_verified_as_far_as_it_is(folder, audit):
    plant(lambda all_entries: all_entries[-2:], rewrite=False)
    RunDir("out.jsonl").withdraw_output()
    found = audit(sample=None)
    assert (found.exit_code, found.rows, found.replayed) == (0, 2, 2)
    assert "output" not in found.looked_at


def test_a_sample_is_always_the_same_and_a_larger_one_holds_it(folder, opener):
    asked = []

    def watched(pair_baseline, against):
        baseline = pair_baseline(against)

        def generate(stream):
            requests = list(stream)
            asked.append({request.item.custom_id for request in requests})
            yield from baseline.generate(requests)

        return baseline._replace(generate=generate)

    whole = opener()(look("out.jsonl").spec, None)
    opened = opener(baseline=partial(watched, whole.baseline))
    for sample in (1, 1, 2):
        verify("out.jsonl", sample=sample, open_engine=opened)
    assert asked[0] == asked[1] < asked[2]


def test_mlx_lm_is_a_reference_for_greedy_answers(folder, audit):
    found = audit(sample=None, against="mlx-lm")
    assert (found.exit_code, found.replayed) == (0, ANSWERS - 1)
    assert dict(found.left_out) == {"sampled, which mlx-lm does with other noise": 1}


WISHES = {"repetition_penalty": 1.4, "frequency_penalty": -1.2, "min_tokens": 4}
STEERED = [
    {"id": "spell", "prompt": SPELL, "sampling_params": {"logit_bias": {"7": 2}}},
    {"id": "write", "prompt": WRITE, "sampling_params": {"stop": "O"}},
    {"id": "free", "prompt": WRITE, "sampling_params": {"temperature": 1.5, "ignore_eos": True}},
    {"id": "bad", "prompt": WRITE, "sampling_params": {"bad_words": ["Ones", "ten"]}},
]


def test_penalties_and_biases_are_audited(tmp_path, monkeypatch, opener, audit):
    monkeypatch.chdir(tmp_path)
    made(opener, records=STEERED, **WISHES)
    assert audit(sample=None).exit_code == 0
    assert sum(audit(sample=None, against="mlx-lm").left_out.values()) == len(STEERED)


def test_a_penalty_that_counted_rejected_drafts(tmp_path, monkeypatch, opener, audit):
    monkeypatch.chdir(tmp_path)
    real = steering._penalised

    def all_drafts(logits, drafts, rows, penalties):
        return real(logits, drafts, mx.full(rows.shape, drafts.shape[1]), penalties)

    with monkeypatch.context() as planted:
        planted.setattr(steering, "_penalised", all_drafts)
        made(opener, records=STEERED, **WISHES)
    found = audit(sample=None)
    assert found.exit_code == EqualityError.exit_code
    assert {difference.verdict for difference in found.differences} == {"defect"}


def changed_first(column, name):
    """Plant another log-probability at the second place of a row, with the sum to go with it."""

    def change(row):
        told = row[column]
        told[name][1] -= 0.000001
        told["sum"], told["mean"] = sum_and_mean(told["token_logprobs"])
        return row

    return change


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("logprobs", "token_logprobs"),
        ("logprobs", "top_logprobs"),
        ("prompt_logprobs", "token_logprobs"),
        ("prompt_logprobs", "top_ids"),
    ],
)
def test_a_changed_log_probability(column, name, tmp_path, monkeypatch, opener, audit):
    monkeypatch.chdir(tmp_path)
    made(opener, records=RECORDS[:2], logprobs=1, prompt_logprobs=1, max_tokens=9)
    change = changed_first(column, name)
    if name == "top_ids":
        change = lambda row: row[column][name].__setitem__(1, 5) or row  # noqa: E731
    change_row("spell", change)
    found = audit(sample=None)
    assert [finding.says for finding in found.findings] == []
    (difference,) = found.differences
    assert difference.verdict == "defect"
    assert f"{column}.{name}[1] " in str(difference)
    assert audit(sample=None, against="mlx-lm").exit_code == 0  # which tells none


def test_log_probabilities_that_do_not_add_up_or_are_not_all_there(
    tmp_path, monkeypatch, opener, audit
):
    monkeypatch.chdir(tmp_path)
    made(opener, records=RECORDS[:2], logprobs=0, prompt_logprobs=0, max_tokens=9)

    def change(row):
        row["logprobs"]["sum"] += 1
        row["prompt_logprobs"]["token_logprobs"][0] = -1.0
        row["prompt_logprobs"]["token_ids"][0] += 1
        return row

    change_row("spell", change)
    assert [sentence.partition("): ")[2] for sentence in said(audit(), "rows")] == [
        "logprobs.sum or mean is not that of its token_logprobs",
        "prompt_logprobs.token_logprobs is null elsewhere than for its first 1 tokens",
        "prompt_logprobs.token_ids are not those of the prompt",
    ]


GIVEN = [
    {"id": "one", "prompt": SPELL, "completion": "Letters: c a t"},
    {"id": "two", "prompt": SPELL, "completion": ""},
]


def test_scores_are_audited(tmp_path, monkeypatch, opener, audit):
    monkeypatch.chdir(tmp_path)
    options = {"max_tokens": 512, "score": "completion"}
    made(opener, records=GIVEN, **options)
    found = audit(sample=None)
    assert (found.exit_code, found.replayed) == (0, 2)
    change_row("one", changed_first("logprobs", "token_logprobs"))
    (difference,) = audit(sample=None).differences
    assert "logprobs.token_logprobs[1] " in str(difference)
    change_row("two", lambda row: row | {"token_ids": [5], "completion": "x"})
    sentences = [each.says for each in audit().findings if each.kind == "rows"]
    assert any("completion is not that of the record" in each for each in sentences)


def test_answers_drawn_by_the_rejection_rule_are_left_out(tmp_path, monkeypatch, opener, audit):
    monkeypatch.chdir(tmp_path)
    made(opener, sampling="rejection", temperature=1.0, records=RECORDS[:2])
    found = audit(sample=None)
    assert (found.exit_code, found.replayed) == (0, 0)
    assert [*found.left_out] == [
        "drawn by the rejection rule, by which an answer depends on the drafts"
    ]


def test_a_run_that_goes_on_is_not_disturbed(folder, audit):
    with RunDir("out.jsonl").lock(), pytest.raises(OutputInUse):
        audit()


def test_what_is_no_run_is_refused(tmp_path, audit):
    with pytest.raises(UsageError, match="no job here"):
        audit(str(tmp_path / "none.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_reasoning_is_split_off_what_tokens_decode_to(tmp_path, monkeypatch, opener):
    """A text that is continued has none."""

    def split(text):
        return Said(text[:3], text[3:])

    def open_engine(spec, manifest):
        opened = opener()(spec, manifest)
        baseline = opened.baseline("engine")._replace(split=split)
        return opened._replace(split=split, baseline=lambda against: baseline)

    monkeypatch.chdir(tmp_path)
    body = {"url": "/v1/completions", "body": {"prompt": "Hundreds:"}}
    write_lines(Path("in.jsonl"), *RECORDS[:3], body)
    spec = Spec(inputs=("in.jsonl",), out="out.jsonl", max_tokens=9, slots=SIZE)
    run(spec, open_engine=open_engine)
    assert [row["reasoning"] is None for row in rows_in(OUT)] == [False, False, False, True]
    found = verify("out.jsonl", open_engine=open_engine)
    assert (found.exit_code, found.replayed, found.findings) == (0, 4, [])
    change_row("spell", lambda row: row | {"reasoning": "Hm."})
    found = verify("out.jsonl", open_engine=open_engine)
    [sentence] = said(found, "rows")
    assert "reasoning is not what token_ids decode to: 'Hm.' and not 'Let'" in sentence
    assert "the reasoning 'Hm.' in the row, the reasoning 'Let' in" in str(found.differences[0])


# Damage of files


def test_a_changed_character_of_a_completion_in_the_output(folder, audit):
    edit_lines(lambda lines: [lines[0].replace(b"Letters", b"Lettars"), *lines[1:]])
    [sentence] = said(audit(), "output")
    assert sentence.startswith("out.jsonl: row 1 (custom_id spell) was changed: completion is")
    assert "Lettars" in sentence


def test_a_changed_statistic_in_the_output(folder, audit):
    cached = rows_in(OUT)[0]["metrics"]["cached_tokens"]
    was, is_now = (f'"cached_tokens":{n},'.encode() for n in (cached, cached + 1))
    edit_lines(lambda lines: [lines[0].replace(was, is_now), *lines[1:]])
    assert said(audit(), "output") == [
        "out.jsonl: row 1 (custom_id spell) was changed: metrics.cached_tokens is "
        f"{cached + 1}, expected {cached}"
    ]


def test_a_swapped_pair_of_rows(folder, audit):
    edit_lines(lambda lines: [lines[1], lines[0], *lines[2:]])
    assert said(audit(), "output") == [
        "out.jsonl: 2 rows are out of order: where row 1 belongs stands row 2"
    ]


def test_a_dropped_row(folder, audit):
    edit_lines(lambda lines: lines[:2] + lines[3:])
    assert said(audit(), "output") == ["out.jsonl: row 3 is missing: custom_id talk"]


def test_a_doubled_row(folder, audit):
    edit_lines(lambda lines: [*lines, lines[0]])
    assert said(audit(), "output") == [f"out.jsonl: row {SIZE + 1} stands there twice"]


def test_a_row_of_another_job(folder, audit):
    edit_lines(lambda lines: [*lines, b'{"custom_id": "x"}\n'])
    assert said(audit(), "output") == [f"out.jsonl: row {SIZE + 1} is no row of this job"]


def test_a_row_of_a_parquet_output(tmp_path, monkeypatch, opener, audit):
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    made(opener, "out.parquet")
    table = pq.read_table("out.parquet")
    pq.write_table(table.slice(0, 2), "out.parquet")
    assert (
        said(audit("out.parquet"), "output")[0] == "out.parquet: row 3 is missing: custom_id talk"
    )
    Path("out.parquet").write_bytes(b"PAR1")
    assert "not a whole Parquet file" in said(audit("out.parquet"), "output")[0]


def test_a_changed_input_file(folder, audit):
    edit_lines(lambda lines: [lines[0].replace(b"cat", b"car"), *lines[1:]], Path("in.jsonl"))
    [sentence] = said(audit(), "inputs")
    assert sentence.startswith(f"in.jsonl is not what the job read: {SIZE} records with SHA-256 ")


def test_an_edited_manifest(folder, audit):
    path = folder / "out.jsonl.run/manifest.json"
    path.write_text(path.read_text().replace('"max_tokens": 20', '"max_tokens": 21'))
    [sentence] = said(audit(), "manifest")
    assert sentence.startswith("out.jsonl.run/manifest.json was edited: its SHA-256 is not the one")


def test_a_manifest_that_cannot_be_read(folder, audit):
    (folder / "out.jsonl.run/manifest.json").write_bytes(b'{"version":')
    with pytest.raises(EqualityError, match=r"manifest.json: damaged"):
        audit()


def test_another_revision_of_the_model(folder, audit, opener):
    [sentence] = said(audit(opened=opener(target="another")), "models")
    assert sentence.startswith("another model or setting than the job had: target is ")
    assert sentence.endswith(' there and "another" here')


def test_another_drafter_is_no_damage(folder, audit, opener):
    assert audit(opened=opener(drafter="another")).exit_code == 0


def test_a_flipped_byte_of_the_journal(folder, audit):
    path = folder / "out.jsonl.run/rows.jsonl"
    edit_lines(lambda lines: [lines[0].replace(b"sample_index", b"sample_indax"), *lines[1:]], path)
    [sentence] = said(audit(), "journal")
    assert "rows.jsonl:1: not the row that this run wrote here" in sentence


def test_a_report_that_was_edited(folder, audit):
    path = folder / "out.jsonl.run/report.json"
    path.write_text(path.read_text().replace(f'"succeeded": {ANSWERS}', '"succeeded": 9'))
    assert said(audit(), "report") == [f"report.json: succeeded is 9, expected {ANSWERS}"]


# Damage that agrees with all checksums


def test_a_row_that_was_dropped_everywhere(folder, audit):
    plant(lambda all_entries: all_entries[:-1])
    lost = entries()
    names = {each["id"] for each in RECORDS if isinstance(each, dict)}
    [name] = names - {entry.row["custom_id"] for entry in lost}
    assert f"(custom_id {name}): has no row in the journal" in said(audit(), "journal")[0]


def test_a_row_that_was_doubled_in_the_journal(folder, audit):
    plant(lambda all_entries: [*all_entries, all_entries[-1]])
    assert f"rows.jsonl:{SIZE + 1}: a second row for in.jsonl:" in said(audit(), "journal")[0]


def test_two_answers_that_were_swapped(folder, audit):
    """Texts, tokens and statistics agree; only decoding again can tell."""

    def swap(all_entries):
        by_id = {entry.row["custom_id"]: entry for entry in all_entries}
        a, b = by_id["spell"], by_id["until"]
        swapped = {"spell": b, "until": a}
        ours = ("completion", "token_ids", "usage", "metrics", "finish_reason")
        return [
            replace(e, row=e.row | {k: swapped[e.row["custom_id"]].row[k] for k in ours})
            if e.row["custom_id"] in swapped
            else e
            for e in all_entries
        ]

    plant(swap)
    found = audit(sample=None)
    assert found.exit_code == 3
    assert sorted(d.custom_id for d in found.differences) == ["spell", "until"]


def row_said(audit, name, change):
    """The only sentence about a row that was changed by a function."""
    change_row(name, change)
    sentences = said(audit(), "rows")
    where = 1 + next(i for i, r in enumerate(RECORDS) if isinstance(r, dict) and r["id"] == name)
    head = f"in.jsonl:{where} (custom_id {name}): "
    assert all(sentence.startswith(head) for sentence in sentences)
    return [sentence.removeprefix(head) for sentence in sentences]


def test_a_changed_character_of_a_completion_everywhere(folder, audit):
    [sentence] = row_said(
        audit, "spell", lambda row: row | {"completion": row["completion"].replace("4", "5", 1)}
    )
    assert sentence.startswith("completion is not what token_ids decode to: ")


def test_token_ids_that_do_not_decode_to_the_text(folder, audit):
    def change(row):
        return row | {"token_ids": [row["token_ids"][1], *row["token_ids"][1:]]}

    [sentence] = row_said(audit, "spell", change)
    assert sentence.startswith("completion is not what token_ids decode to: ")


def test_token_ids_that_nobody_knows(folder, audit):
    def change(row):
        return row | {"token_ids": [-1, *row["token_ids"][1:]]}

    [sentence] = row_said(audit, "spell", change)
    assert sentence.startswith("token_ids decode to nothing (")


def longer(row, pair, tokens):
    """Let an answer go on, in all that counts its tokens and rounds."""
    told = row["metrics"]["speculative_decoding"]
    ids = row["token_ids"] + tokens
    told["num_spec_steps"] += len(tokens)
    told["per_step_accepted"] += [0] * len(tokens)
    told["per_step_drafted"] += [0] * len(tokens)
    told["acceptance_histogram"][0] += len(tokens)
    told["mean_acceptance_length"] = (len(ids) - 1) / told["num_spec_steps"]
    usage = row["usage"] | {"completion_tokens": len(ids)}
    return row | {"token_ids": ids, "completion": pair.tokenizer.decode(ids), "usage": usage}


def test_a_completion_past_its_stop_token(folder, audit, pair):
    sentences = row_said(audit, "spell", lambda row: longer(row, pair, [row["token_ids"][0]]))
    assert sentences[0].startswith("goes on past its stop token ")
    assert "finish_reason is 'stop', expected 'length'" in sentences


def test_a_completion_past_its_stop_text(folder, audit, pair):
    def change(row):
        text = row["completion"]
        return longer(row, pair, [row["token_ids"][0]]) | {"completion": text}

    assert row_said(audit, "until", change) == ["goes on past its stop text"]


def test_a_completion_past_max_tokens(folder, audit, pair):
    sentences = row_said(audit, "cut", lambda row: longer(row, pair, row["token_ids"][:1]))
    assert sentences == ["goes on past max_tokens: 10 tokens, at most 9"]


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [("spell", "length", "stop"), ("cut", "stop", "length")],
)
def test_a_wrong_finish_reason(folder, audit, name, wrong, right):
    [sentence] = row_said(audit, name, lambda row: row | {"finish_reason": wrong})
    assert sentence == f"finish_reason is {wrong!r}, expected {right!r}"


def test_an_answer_that_ends_too_early(folder, audit, pair):
    def change(row):
        told, ids = row["metrics"]["speculative_decoding"], row["token_ids"][:1]
        told |= {"num_spec_steps": 0, "num_accepted_draft_tokens": 0, "num_draft_tokens": 0}
        told |= {"acceptance_histogram": [], "per_step_accepted": [], "per_step_drafted": []}
        told |= {"mean_acceptance_length": None, "draft_acceptance_rate": None}
        usage = row["usage"] | {"completion_tokens": 1}
        return row | {"token_ids": ids, "completion": pair.tokenizer.decode(ids), "usage": usage}

    assert row_said(audit, "cut", change) == ["ends after 1 tokens without a stop, expected 9"]


def inside(name, **fields):
    return lambda row: row | {name: row[name] | fields}


def with_told(**fields):
    def change(row):
        told = row["metrics"]["speculative_decoding"]
        told |= {name: change(told[name]) for name, change in fields.items()}
        return row

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (with_told(mean_acceptance_length=lambda n: n + 1), "1 + the sum of accept lengths is "),
        (with_told(acceptance_histogram=lambda h: [*h, 1]), "acceptance_histogram ["),
        (with_told(per_step_accepted=lambda a: [*a[1:], 0]), "acceptance_histogram is ["),
        (with_told(per_step_drafted=lambda d: d[1:]), "per_step_drafted ["),
        (with_told(num_accepted_draft_tokens=lambda n: n - 1), "acceptance_histogram ["),
        (with_told(num_draft_tokens=lambda n: n + 7), "draft_acceptance_rate is not "),
        (
            lambda row: row | {"usage": row["usage"] | {"prompt_tokens": 3}},
            "prompt_tokens is 3, exp",
        ),
        (
            lambda row: row | {"usage": row["usage"] | {"completion_tokens": 3}},
            "completion_tokens is 3",
        ),
        (
            lambda row: row | {"metrics": row["metrics"] | {"cached_tokens": 999}},
            "cached_tokens is 999",
        ),
    ],
)
def test_statistics_that_do_not_add_up(folder, audit, change, sentence):
    assert any(each.startswith(sentence) for each in row_said(audit, "spell", change))


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        ({"prompt_tokens": 3}, "prompt_tokens is 3, expected "),
        ({"completion_tokens": 20}, "completion_tokens is 20, expected 21 to 40"),
        ({"completion_tokens": 41}, "completion_tokens is 41, expected 21 to 40"),
    ],
)
def test_tokens_that_are_not_of_all_turns(folder, audit, tokens, sentence):
    change_row("talk", inside("usage", **tokens))
    assert f"(custom_id talk): {sentence}" in said(audit(), "rows")[0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda row: row | {"sample_index": 1}, "has no row"),
        (lambda row: row | {"verified": False}, "verified is false: the run itself found"),
        (lambda row: row | {"token_ids": []}, "is an answer without a token"),
        (lambda row: row | {"usage": None}, "is an answer without usage"),
        (inside("metrics", speculative_decoding=None), "is an answer without num_spec_steps"),
        (inside("usage", prompt_tokens=None), "is an answer without prompt_tokens"),
        (lambda row: row | {"token_ids": ["a"]}, "does not fit the schema of a row"),
        (lambda row: row | {"more": 1}, "has the columns custom_id, "),
        (lambda row: row | {"earlier_answers": ["x"]}, "answers 2 turns, expected 1"),
        (lambda row: row | {"status": "errored"}, "is errored, but has an answer or no error"),
    ],
)
def test_a_row_that_is_no_row_of_its_record(folder, audit, change, sentence):
    change_row("spell", change, rewrite=False)
    found = audit()
    assert found.exit_code == 3
    assert any(sentence in finding.says for finding in found.findings)


def test_a_failure_that_is_none(folder, audit):
    def change(row):
        error = {"code": "bad_record", "message": "in.jsonl:1: not JSON"}
        return dict.fromkeys(row) | {
            "custom_id": "spell",
            "sample_index": 0,
            "status": "errored",
            "error": error,
        }

    job = entries()
    change_row("spell", change, rewrite=False)
    at = {entry.row["custom_id"]: entry for entry in job}["spell"].where
    found = audit()
    assert f"{at} (custom_id spell): failed with bad_record, but its record can be asked" in [
        finding.says for finding in found.findings
    ]


def test_a_failure_with_another_reason(folder, audit):
    def change(row):
        return row | {"error": row["error"] | {"message": "in.jsonl:5: it rained"}}

    change_row("#4", change)
    [sentence] = said(audit(), "rows")
    assert sentence.startswith(
        "in.jsonl:5 (custom_id #4): error is bad_record: in.jsonl:5: it rained"
    )


# Answers that are not the target's


def other_answer(pair, name="spell"):
    """Replace one token of an answer, and decode, so that the row agrees with itself."""

    def change(row):
        ids = row["token_ids"]
        ids[4] = next(i for i in ids[5:] if i != ids[4])
        return row | {"completion": pair.tokenizer.decode(ids[:-1])}

    change_row(name, change)


def test_another_answer_is_told_with_position_tokens_margin_and_verdict(folder, audit, pair):
    before = rows_in(OUT)[0]["token_ids"]
    other_answer(pair)
    found = audit(sample=None)
    [difference] = found.differences
    assert (found.exit_code, found.verdict, found.findings) == (3, "different", [])
    assert (difference.position, difference.baseline_token) == (4, before[4])
    assert difference.row_token == rows_in(OUT)[0]["token_ids"][4]
    assert difference.verdict == "defect"
    assert difference.spread > 0
    assert str(difference).startswith(
        "in.jsonl:1 (custom_id spell, sample 0): defect at answer token 4: "
    )


def tied(opener, spread=0.0):
    """Take every choice of the target for this unclear."""
    whole = opener()(look("out.jsonl").spec, None)
    return opener(
        baseline=lambda against: whole.baseline(against)._replace(
            margin=lambda *about: Margin(spread, spread)
        )
    )


@pytest.mark.parametrize(
    ("against", "strict", "code"), [("engine", False, 3), ("mlx-lm", False, 0), ("mlx-lm", True, 3)]
)
def test_a_near_tie_fails_against_the_engine_and_only_if_strict_against_mlx_lm(
    folder, audit, pair, opener, against, strict, code
):
    other_answer(pair)
    found = audit(sample=None, against=against, strict=strict, opened=tied(opener))
    assert [each.verdict for each in found.differences] == ["near-tie"]
    assert found.exit_code == code


def test_a_defect_fails_against_mlx_lm_too(folder, audit, pair):
    other_answer(pair)
    assert audit(sample=None, against="mlx-lm").exit_code == 3


def test_an_earlier_answer_that_was_changed(folder, audit):
    change_row("talk", lambda row: row | {"earlier_answers": ["dog"]})
    found = audit(sample=None)
    difference = next(each for each in found.differences if each.custom_id == "talk")
    assert (difference.turn, difference.position) == (0, None)
    assert "dog" in difference.row


# Interrupted


def test_an_interrupted_audit_goes_on_where_it_was(folder, opener, audit):
    def stop_at_the_second(tick):
        if tick.stage == "decode" and tick.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(sample=None, observe=stop_at_the_second)
    assert not (folder / "out.jsonl.run/audit.json").exists()
    kept = folder / "out.jsonl.run/audit.jsonl"
    kept.write_bytes(kept.read_bytes() + b'{"torn')
    ticks = []
    found = audit(sample=None, observe=ticks.append)
    assert (found.replayed, found.exit_code) == (ANSWERS, 0)
    assert len([tick for tick in ticks if tick.stage == "decode"]) == ANSWERS - 2
    assert not kept.exists()


def test_a_difference_that_was_found_before_the_interruption_is_not_forgotten(folder, audit, pair):
    other_answer(pair)

    def stop_at_it(tick):
        if tick.failed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(sample=None, observe=stop_at_it)
    assert [each.custom_id for each in audit(sample=None).differences] == ["spell"]


def test_a_row_that_changed_since_is_compared_again(folder, audit, pair):
    def stop_at_the_end(tick):
        if tick.stage == "decode" and tick.done == ANSWERS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(sample=None, observe=stop_at_the_end)
    other_answer(pair)
    assert [each.custom_id for each in audit(sample=None).differences] == ["spell"]


def test_an_audit_of_rows_that_are_no_longer_all_goes_with_the_output(folder, audit):
    audit()
    RunDir("out.jsonl").withdraw_output()
    assert not (folder / "out.jsonl.run/audit.json").exists()


# The command


def test_the_command_proves_a_run_and_finds_its_damage(folder, capsys):
    assert main(["verify", "out.jsonl", "--sample", "1", "-q"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"out.jsonl is what its job gave: 1 of {ANSWERS} answers decoded again")
    assert "each row: text, limits, ends, statistics        " in shown
    edit_lines(lambda lines: lines[:2] + lines[3:])
    assert main(["verify", "out.jsonl", "--sample", "0", "-q", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["wrong"]) == ("damaged", {"output": 1})
    assert main(["verify", "out.jsonl", "--sample", "0", "-q"]) == 3
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "out.jsonl is NOT what its job gave: 1 finding."
    assert shown[-1] == "output: out.jsonl: row 3 is missing: custom_id talk"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prompts.jsonl", {}),
        ("prompts.parquet", {"temperature": 0.8}),
        ("mixed.jsonl", {}),
        ("orders.jsonl", {"prompt_column": "text"}),
        ("people.parquet", {"prompt_column": "note"}),
        ("turns.jsonl", {}),
    ],
)
def test_the_outputs_of_the_sample_inputs_verify(name, options, tmp_path, opener):
    out, source = str(tmp_path / "out.jsonl"), Path(__file__).parents[1] / "sample_inputs" / name
    run(Spec(inputs=(str(source),), out=out, slots=4, **options), open_engine=opener())
    found = verify(out, open_engine=opener())
    assert (found.exit_code, found.verdict, found.replayed) == (0, "equal", found.answers)
