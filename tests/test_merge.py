"""Shards and their merge are one job: nothing missing, nothing doubled, nothing of another job."""

import json
import random
import shutil
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import FakeEngine, fake_opener, refuse_to_open
from small_jobs import SETUP, planned, prompts, rows_in, start, write_lines

from dspark_batch.cli.main import main
from dspark_batch.diff import diff
from dspark_batch.errors import Resumable, ResumeMismatch, UsageError
from dspark_batch.merge import merge
from dspark_batch.opening import open_with
from dspark_batch.output.export import export
from dspark_batch.output.shown import rows_of
from dspark_batch.output.status import status
from dspark_batch.pair import load_pair
from dspark_batch.record.run_dir import RunDir
from dspark_batch.spec.shard import Shard
from dspark_batch.verify import verify

LINES = [
    *prompts("a", "b", "a"),  # two of them are equal
    b"nope",
    {"prompt": "nameless", "n": 1},
    {"id": "long", "prompt": "x" * 500, "n": None},
    {"id": "turns", "turns": ["one", "two"], "n": 2.5},
    *prompts("c", "d", "e", "f"),
]


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "in.jsonl", *LINES)
    return tmp_path


def run_shards(folder, count=3, *, numbers=None, suffix="jsonl", **options):
    """Run some of the shards, and list their outputs."""
    outs = []
    for number in numbers or range(1, count + 1):
        outs.append(str(folder / f"part-{number}.{suffix}"))
        start(folder, out=outs[-1], shard=f"{number}/{count}", **options)
    return outs


def without_metrics(path):
    """Give the rows without what tells how they were made; in Parquet with the types of columns."""
    rows = rows_in(path)
    for row in rows:
        row.pop("metrics", None)
        row.pop("id" if "response" in row else "", None)
        if row.get("response"):
            row["response"]["body"] = row["response"]["body"] | {"created": 0}
    return rows, (pq.read_schema(path) if path.suffix == ".parquet" else None)


def audited(out):
    """Verify a job of the fake engine, whose answers have no real ends: all else must be right."""
    audit = verify(out, open_engine=planned())
    assert (set(+audit.wrong), audit.differences) == ({"rows"}, [])
    return audit


@pytest.mark.parametrize("seed", range(20))
def test_each_record_is_in_exactly_one_shard(seed):
    chance = random.Random(seed)
    count = chance.randint(1, 40)
    total = chance.randint(count, 500)
    parts = [Shard(number, count).part_of(total) for number in range(1, count + 1)]
    assert list(chain(*parts)) == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "options",
    [{}, {"samples": 3}, {"limit": 7}, {"output_prefix": "o_"}, {"retry_failed": True}],
    ids=str,
)
def test_a_merge_is_what_one_process_writes(folder, suffix, options):
    whole, merged = folder / f"out.{suffix}", folder / f"merged.{suffix}"
    expected = start(folder, out=str(whole), **options)
    shards = run_shards(folder, suffix="jsonl", **options)
    report = merge(str(merged), shards[::-1])
    assert without_metrics(merged) == without_metrics(whole)
    assert (report.total, report.errored) == (expected.total, expected.errored)
    assert report.exit_code == expected.exit_code == 1
    assert report.completion_tokens == expected.completion_tokens


def test_a_merge_of_the_batch_api_is_what_one_process_writes(folder):
    write_lines(folder / "in.jsonl", *prompts("a", "b", "c"), b"nope")
    start(folder, format="openai")
    merge(str(folder / "merged.jsonl"), run_shards(folder, 2, format="openai"))
    assert without_metrics(folder / "merged.jsonl") == without_metrics(folder / "out.jsonl")


def test_the_columns_of_a_table_keep_their_types(folder):
    table = pa.table({"prompt": list("abcde"), "n": pa.array([None, None, None, None, 5], "uint8")})
    pq.write_table(table, folder / "in.parquet")
    inputs = (str(folder / "in.parquet"),)
    shards = run_shards(folder, 4, suffix="parquet", inputs=inputs)
    merge(str(folder / "merged.parquet"), shards)
    merged = pq.read_table(folder / "merged.parquet")
    assert merged.schema.field("n").type == pa.uint8()
    assert merged["n"].to_pylist() == [None, None, None, None, 5]


def test_a_merge_is_a_job_like_any_other(folder):
    shards = run_shards(folder, opener=planned())
    out = str(folder / "merged.jsonl")
    merge(out, shards)
    rows = rows_in(folder / "merged.jsonl")
    audit = audited(out)
    assert (audit.rows, audit.replayed, audit.looked_at["output"]) == (len(LINES), 9, len(LINES))
    found = status(out)
    assert (found.state, found.total, found.done, found.shard) == ("finished", 11, 11, None)
    assert [shown.custom_id for shown in rows_of(out)] == [row["custom_id"] for row in rows]
    export(out, str(folder / "copy.parquet"))
    assert pq.read_table(folder / "copy.parquet").num_rows == len(LINES)
    again = start(folder, out=out, opener=refuse_to_open)
    assert (again.total, again.resumed) == (11, 11)
    start(folder)
    assert diff(out, str(folder / "out.jsonl")).counts == {"same": 11}
    assert diff(out, str(folder / "out.jsonl")).settings == []


def test_a_merge_can_be_continued(folder):
    shards = run_shards(folder, engine=FakeEngine(fails_on={"id-c"}))
    merge(str(folder / "merged.jsonl"), shards)
    ran = []
    start(
        folder,
        out=str(folder / "merged.jsonl"),
        retry_where=("error.code=engine",),
        observe=lambda tick: tick.outcome and ran.append(tick.outcome.item.custom_id),
    )
    assert ran == ["id-c"]
    with pytest.raises(UsageError, match="a job or an output is here"):
        merge(str(folder / "merged.jsonl"), shards)
    assert merge(str(folder / "merged.jsonl"), shards, overwrite=True).errored == 3


def test_a_shard_is_a_job_of_its_part(folder):
    [out] = run_shards(folder, 3, numbers=[2], opener=planned(), keep=("n",))
    rows = rows_in(folder / "part-2.jsonl")
    assert [row["custom_id"] for row in rows] == ["#3", "#4", "long", "turns"]
    found = status(out)
    assert (found.shard, found.total, found.done) == ("2/3", 4, 4)
    assert [shown.prompt for shown in rows_of(out)][1:] == ["nameless", "x" * 500, "two"]
    assert audited(out).rows == 4
    manifest = RunDir(out).manifest()
    assert (manifest["spec"]["shard"], manifest["inputs"][0]["records"]) == ("2/3", len(LINES))


def test_a_shard_that_was_stopped_goes_on(folder):
    with pytest.raises(KeyboardInterrupt):
        run_shards(folder, 2, numbers=[2], engine=FakeEngine(slots=1, dies_after=2))
    with pytest.raises(ResumeMismatch, match='shard is "2/2" there and "1/2" here'):
        start(folder, out=str(folder / "part-2.jsonl"), shard="1/2", opener=refuse_to_open)
    report = start(folder, out=str(folder / "part-2.jsonl"), shard="2/2")
    assert (report.resumed, report.total) == (1, 6)  # the other answer has a turn behind it


def test_a_shard_refuses_what_the_whole_job_refuses(folder):
    write_lines(folder / "in.jsonl", *prompts("a", "b", "c"), {"prompt": "d", "status": 1})
    with pytest.raises(UsageError, match=r"in.jsonl:4: the input has a column `status`"):
        run_shards(folder, 4, numbers=[1])
    write_lines(folder / "in.jsonl", *prompts("a", "b", "c"), {"prompt": "d", "rare": 1})
    assert run_shards(folder, 4, numbers=[1], drop=("rare",))


@pytest.mark.parametrize("said", ["0/3", "4/3", "3", "a/b", "1/0", "1/3/5", "-1/3", "", "01/3"])
def test_what_is_no_shard_is_refused(folder, said):
    with pytest.raises(UsageError, match=f"shard is '{said}', expected one of the parts 1/N to N/"):
        start(folder, shard=said)


def test_more_shards_than_records_are_refused(folder):
    with pytest.raises(UsageError, match="shard is 2/12, but the job has 11 records; make at most"):
        start(folder, shard="2/12", opener=refuse_to_open)


def test_a_shard_to_standard_output_is_refused(folder):
    with pytest.raises(UsageError, match="-o - keeps nothing to merge"):
        start(folder, out="-", shard="1/2")


def refused(folder, shards, error, *words, out="merged.jsonl"):
    """Make sure that a merge is refused, and that nothing of it is there."""
    with pytest.raises(error) as raised:
        merge(str(folder / out), shards)
    for word in words:
        assert word in str(raised.value)
    assert not (folder / "merged.jsonl").exists()
    assert not (folder / "merged.jsonl.run").exists()


def test_a_missing_shard_is_told(folder):
    shards = run_shards(folder, 4, numbers=[2, 4])
    refused(folder, shards, UsageError, "shards 1/4, 3/4 are missing; name the outputs of all.")


def test_a_shard_that_is_named_twice_is_told(folder):
    shards = run_shards(folder, 2)
    shutil.copytree(f"{shards[0]}.run", f"{folder}/copy.jsonl.run")
    shutil.copy(shards[0], folder / "copy.jsonl")
    both = [*shards, str(folder / "copy.jsonl")]
    refused(folder, both, UsageError, "part-1.jsonl and", "copy.jsonl are both shard 1/2; name one")
    refused(folder, [shards[0], shards[0], shards[1]], UsageError, "are both shard 1/2")


def test_shards_of_other_counts_are_told(folder):
    shards = [*run_shards(folder, 2, numbers=[1]), *run_shards(folder, 3, numbers=[2, 3])]
    refused(folder, shards, UsageError, "part-1.jsonl is shard 1/2 and", "is shard 2/3")


def test_a_whole_job_is_no_shard_and_neither_is_a_merge(folder):
    start(folder)
    whole = [str(folder / "out.jsonl")]
    refused(folder, whole, UsageError, "out.jsonl: is no shard, but a whole job")
    merge(str(folder / "first.jsonl"), run_shards(folder, 2))
    refused(folder, [str(folder / "first.jsonl")], UsageError, "is no shard, but a whole job")


def test_unfinished_shards_are_told_in_one_sentence(folder):
    shards = run_shards(folder, 3, numbers=[1])
    for number in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            run_shards(folder, 3, numbers=[number], engine=FakeEngine(1, dies_after=number - 1))
    shards += [str(folder / f"part-{number}.jsonl") for number in (2, 3)]
    said = [f"shard 2/3 ({shards[1]}, 1 of 4 rows); shard 3/3 ({shards[2]}, 2 of 4 rows). Run"]
    refused(folder, shards, Resumable, *said)
    assert main(["merge", "-q", f"{folder}/merged.jsonl", *shards]) == 75


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 9}, "max_tokens is 512 in {0} and 9 in {1}"),
        ({"seed": 1, "stop": ("x",)}, "seed is 0 in {0} and 1 in {1}; stop is [] in {0} and"),
        ({"samples": 2}, "samples is 1 in {0} and 2 in {1}"),
        ({"limit": 10}, "limit is None in {0} and 10 in {1}"),
        ({"opener": fake_opener(target="t1")}, 'target is "t0" in {0} and "t1" in {1}'),
    ],
    ids=["max_tokens", "seed_and_stop", "samples", "limit", "target"],
)
def test_shards_of_other_jobs_are_told_with_both_values(folder, options, said):
    shards = run_shards(folder, 2, numbers=[1]) + run_shards(folder, 2, numbers=[2], **options)
    refused(folder, shards, ResumeMismatch, said.format(*shards))


def test_shards_with_other_numerics_are_told_with_what_rounds_otherwise(folder):
    def opener(numerics, kernel):
        setup = SETUP | {"machine": {"blas": kernel}}
        opened = fake_opener(numerics=numerics)
        return lambda spec, manifest: opened(spec, manifest)._replace(setup=setup)

    shards = run_shards(folder, 2, numbers=[1], opener=opener("n0", "Zen"))
    shards += run_shards(folder, 2, numbers=[2], opener=opener("n1", "Haswell"))
    said = 'numerics is "n0" in {0} and "n1" in {1}; its blas was Zen in {0} and is Haswell in {1}'
    refused(folder, shards, ResumeMismatch, said.format(*shards))


@pytest.mark.parametrize("older", [1, 2])
def test_a_shard_of_an_older_version_is_told_where_drafts_decide(folder, older):
    """Whichever of the two has a fingerprint that lacks a field."""
    asked = {"sampling": "rejection", "draft_length": 2}
    outs = {}
    for number in (1, 2):
        made = {} if number == older else {"drafting": "anew"}
        (outs[number],) = run_shards(
            folder, 2, numbers=[number], opener=fake_opener(**made), **asked
        )
    path = Path(f"{outs[older]}.run/manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["fingerprint"]["fields"]["drafting"]
    path.write_text(json.dumps(manifest))
    refused(folder, list(outs.values()), ResumeMismatch, "drafting is ")


def test_shards_of_other_inputs_are_told(folder):
    shards = run_shards(folder, 2, numbers=[1])
    write_lines(folder / "in.jsonl", *LINES[:-1], *prompts("other"))
    shards += run_shards(folder, 2, numbers=[2])
    refused(folder, shards, ResumeMismatch, f"input 1 is {folder}/in.jsonl with SHA-256 ")


def test_an_input_that_changed_after_the_shards_is_told(folder):
    shards = run_shards(folder, 2)
    write_lines(folder / "in.jsonl", *LINES[::-1])
    refused(folder, shards, ResumeMismatch, "the input is not what the shards read: ")
    (folder / "in.jsonl").unlink()
    refused(folder, shards, UsageError, "in.jsonl: no such file")


def test_a_file_that_came_after_the_shards_is_told(folder):
    shards = run_shards(folder, 2, inputs=(f"{folder}/in*.jsonl",))
    write_lines(folder / "in-2.jsonl", *prompts("late"))
    (folder / "in.jsonl").rename(folder / "in-1.jsonl")
    refused(folder, shards, ResumeMismatch, "in-1.jsonl with SHA-256 ", "is here, and they read")
    (folder / "in-1.jsonl").rename(folder / "in.jsonl")
    (folder / "in-2.jsonl").rename(folder / "in2.jsonl")
    refused(
        folder, shards, ResumeMismatch, "in2.jsonl with SHA-256 ", "here, and they read no file"
    )


def test_a_row_that_is_missing_in_a_shard_is_told(folder):
    shards = run_shards(folder, 2)
    rows = folder / "part-2.jsonl.run/rows.jsonl"
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:-1]))
    refused(folder, shards, UsageError, "has no row in", "part-2.jsonl.run/rows.jsonl, where shard")


def test_rows_of_a_shard_that_are_no_longer_its_own_are_left_out(folder):
    write_lines(folder / "in.jsonl", *LINES[:4])
    run_shards(folder, 2)
    write_lines(folder / "in.jsonl", *LINES)  # it grew: all parts are others now
    start(folder)
    out = str(folder / "merged.jsonl")
    merge(out, run_shards(folder, 2))
    assert without_metrics(folder / "merged.jsonl") == without_metrics(folder / "out.jsonl")
    journal = (folder / "merged.jsonl.run/rows.jsonl").read_bytes().splitlines()
    assert len(journal) == len(LINES) == audited(out).rows


def test_an_output_that_is_one_of_the_shards_or_is_there_is_refused(folder):
    shards = run_shards(folder, 2)
    before = (folder / "part-1.jsonl").read_bytes()
    refused(folder, shards, UsageError, "is one of the shards", out="part-1.jsonl")
    refused(folder, shards, UsageError, "expected an output that ends in", out="merged.csv")
    assert (folder / "part-1.jsonl").read_bytes() == before
    (folder / "merged.parquet").write_text("not ours")
    refused(folder, shards, UsageError, "a job or an output is here", out="merged.parquet")
    assert (folder / "merged.parquet").read_text() == "not ours"


@pytest.mark.parametrize("when", ["claim", "write_manifest", "publish"])
def test_a_merge_that_was_killed_begins_again(folder, monkeypatch, when):
    from dspark_batch.record.journal import Journal

    shards, out = run_shards(folder, 2), folder / "merged.jsonl"
    owner = Journal if when == "claim" else RunDir
    with monkeypatch.context() as patch:
        # What SIGKILL leaves: nothing is cleared away.
        patch.setattr(RunDir, "discard", lambda run_dir: None)
        calls = iter(range(99))
        whole = getattr(owner, when)

        def dies(*args):
            if when != "claim" or next(calls) == 6:
                raise KeyboardInterrupt
            return whole(*args)

        patch.setattr(owner, when, dies)
        with pytest.raises(KeyboardInterrupt):
            merge(str(out), shards)
    assert not out.exists()
    assert (folder / "merged.jsonl.run/rows.jsonl").stat().st_size
    assert merge(str(out), shards).total == len(LINES)


def test_standard_input_is_taken_from_a_shard(folder, monkeypatch):
    import io
    import sys
    from types import SimpleNamespace

    text = (folder / "in.jsonl").read_bytes()
    shards = []
    for number in (1, 2):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
        shards += run_shards(folder, 2, numbers=[number], inputs=("-",))
    out = str(folder / "merged.jsonl")
    merge(out, shards)
    shutil.rmtree(f"{shards[0]}.run")
    assert len(list(rows_of(out))) == len(LINES)


def test_the_command_says_what_came_out(folder, capsys):
    shards = run_shards(folder, 2)
    assert main(["merge", str(folder / "merged.jsonl"), *shards]) == 1
    said = capsys.readouterr().out
    assert "9 of 11 items have an answer." in said
    assert "merged.jsonl.run/report.html" in said
    saved = json.loads((folder / "merged.jsonl.run/manifest.json").read_bytes())
    assert saved["shards"] == [RunDir(shard).manifest()["run_id"] for shard in shards]


def test_sampled_answers_of_a_real_pair_are_those_of_one_process(tmp_path):
    system = {"role": "system", "content": "Answer in one word."}
    lines = [
        {"messages": [system, {"role": "user", "content": f"Name the number {n}."}]}
        for n in range(7)
    ]
    write_lines(tmp_path / "in.jsonl", *lines)
    pair = load_pair("tiny", dtype="float32")

    def opener(spec, manifest):
        return open_with(pair, spec)

    options = {"opener": opener, "max_tokens": 12, "temperature": 0.8, "samples": 2}
    start(tmp_path, **options)
    merge(str(tmp_path / "merged.jsonl"), run_shards(tmp_path, 2, **options))
    assert without_metrics(tmp_path / "merged.jsonl") == without_metrics(tmp_path / "out.jsonl")
    audit = verify(str(tmp_path / "merged.jsonl"), open_engine=opener)
    assert (audit.verdict, audit.replayed) == ("equal", 14)
