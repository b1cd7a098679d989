"""Answers of a conversation are made again, and it comes back in the shape in which it came."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import fake_answer, fake_render
from small_jobs import rows_in, start, write_lines

from dspark_batch.errors import UsageError
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Item, Request

SYSTEM = {"role": "system", "content": "S"}
CHAT = [
    SYSTEM,
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "old 1"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "old 2"},
]


def answer(*messages):
    return fake_answer(Request(Item(0, "", "", ""), tuple(fake_render(list(messages))), 12)).text


FIRST = answer(*CHAT[:2])
SECOND = answer(*CHAT[:2], {"role": "assistant", "content": FIRST}, CHAT[3])
LAST = answer(*CHAT[:4])


def with_answers(chat, *answers):
    answers = iter(answers)
    return [m | {"content": next(answers)} if m["role"] == "assistant" else m for m in chat]


def in_sharegpt(chat):
    words = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": words[m["role"]], "value": m["content"]} for m in chat]


def again(folder, record, **options):
    write_lines(folder / "in.jsonl", record)
    report = start(folder, **options)
    [row] = rows_in(folder / "out.jsonl")
    return row if report.exit_code == 0 else row["error"]["message"]


def test_the_last_answer_is_made_again(tmp_path):
    row = again(tmp_path, {"messages": CHAT, "x": 1}, regenerate="last")
    assert row["messages"] == with_answers(CHAT, "old 1", LAST)
    assert (row["completion"], row["earlier_answers"], row["x"]) == (LAST, None, 1)


def test_all_answers_are_made_again_each_behind_the_new_ones(tmp_path):
    row = again(tmp_path, {"messages": CHAT}, regenerate="all")
    assert row["messages"] == with_answers(CHAT, FIRST, SECOND)
    assert (row["earlier_answers"], row["completion"]) == ([FIRST], SECOND)


@pytest.mark.parametrize("which", ["last", "all"])
@pytest.mark.parametrize(
    "shape",
    [
        lambda chat: {"conversations": in_sharegpt(chat)},
        lambda chat: {"messages": json.dumps(chat, separators=(",", ":"))},
        lambda chat: {"prompt": chat},
        lambda chat: {"custom_id": "c", "url": "/v1/chat/completions", "body": {"messages": chat}},
        lambda chat: {"messages": [m | {"weight": 1, "id": i} for i, m in enumerate(chat)]},
    ],
)
def test_a_conversation_comes_back_in_its_own_shape(tmp_path, which, shape):
    new = (FIRST, SECOND) if which == "all" else ("old 1", LAST)
    row = again(tmp_path, shape(CHAT), regenerate=which)
    expected = shape(with_answers(CHAT, *new))
    assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize("which", ["last", "all"])
def test_an_answer_that_is_not_there_yet_is_put_there(tmp_path, which):
    chat = CHAT[:2]
    for end in ([], [{"role": "assistant", "content": None}]):
        row = again(tmp_path, {"messages": [*chat, *end]}, regenerate=which, overwrite=True)
        assert row["messages"] == [*chat, {"role": "assistant", "content": FIRST}]
    said = [{"from": "human", "value": "a"}]
    row = again(tmp_path, {"conversations": said}, regenerate=which, overwrite=True)
    assert row["conversations"][1]["from"] == "gpt"


def test_a_greeting_before_the_first_question_stays(tmp_path):
    hello = {"role": "assistant", "content": "Hello."}
    row = again(tmp_path, {"messages": [hello, *CHAT[1:3]]}, regenerate="all")
    assert row["messages"][0] == hello
    assert row["messages"][2]["content"] == answer(hello, CHAT[1])


def test_what_belongs_to_the_old_answer_goes_with_it(tmp_path):
    old = CHAT[2] | {"reasoning_content": "old", "content": [{"type": "text", "text": "old"}]}
    row = again(tmp_path, {"messages": [CHAT[1], old]}, regenerate="last")
    assert row["messages"][1] == {
        "role": "assistant",
        "content": [{"type": "text", "text": row["completion"]}],
        "reasoning_content": None,
    }


@pytest.mark.parametrize("out", ["out.parquet", "out.jsonl"])
@pytest.mark.parametrize("which", ["last", "all"])
def test_a_table_comes_back_with_every_column_and_its_types(tmp_path, which, out):
    table = pa.table(
        {
            "id": ["x", "y"],
            "conversations": [in_sharegpt(CHAT), in_sharegpt(CHAT[:2])],
            "meta": [{"n": 1}, None],
            "day": pa.array([1, 2], pa.date32()),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    inputs = (str(tmp_path / "in.parquet"),)
    start(tmp_path, inputs=inputs, out=f"{tmp_path}/{out}", regenerate=which)
    rows = rows_in(tmp_path / out)
    new = (FIRST, SECOND) if which == "all" else ("old 1", LAST)
    assert rows[0]["conversations"] == in_sharegpt(with_answers(CHAT, *new))
    assert rows[1]["conversations"][-1] == {"from": "gpt", "value": FIRST}
    if out == "out.parquet":
        assert pq.read_schema(tmp_path / out).field("day").type == pa.date32()
        written = pq.read_table(tmp_path / out)
        assert (
            written.schema.field("conversations").type
            == pq.read_schema(tmp_path / "in.parquet").field("conversations").type
        )
        assert written.select(["id", "meta", "day"]).equals(table.select(["id", "meta", "day"]))


def test_a_failure_keeps_its_conversation(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"messages": CHAT[:1]}, {"prompt": "text"}, {"turns": ["a"]})
    start(tmp_path, regenerate="all")
    first, second, third = rows_in(tmp_path / "out.jsonl")
    assert first["messages"] == CHAT[:1]
    assert "`messages` has no user message" in first["error"]["message"]
    assert "`prompt` has no answers; --regenerate needs a list" in second["error"]["message"]
    assert "`turns` has no answers; --regenerate needs a list" in third["error"]["message"]


def test_two_answers_in_a_row_are_refused(tmp_path):
    said = again(tmp_path, {"messages": [*CHAT, CHAT[4]]}, regenerate="all")
    assert "are both the assistant's" in said


@pytest.mark.parametrize(
    "option", [{"template": "x"}, {"format": "openai"}, {"last_assistant": "continue"}]
)
def test_options_that_contradict_it_are_refused(option):
    with pytest.raises(UsageError, match="regenerate"):
        Spec(inputs=("in.jsonl",), out="o.jsonl", regenerate="last", **option)


def test_samples_each_have_a_conversation(tmp_path):
    write_lines(tmp_path / "in.jsonl", {"messages": CHAT})
    start(tmp_path, regenerate="last", samples=2, temperature=1.0)
    rows = rows_in(tmp_path / "out.jsonl")
    assert [row["messages"][-1]["content"] for row in rows] == [r["completion"] for r in rows]


RECORDS = [
    {
        "id": "a",
        "messages": CHAT,
        "source": None,
        "scores": [1.5, None],
        "at": {"n": 1, "of": None},
    },
    {"id": "b", "messages": CHAT[1:3], "source": "s", "scores": [], "at": {"n": 2, "of": "x"}},
    {"id": "c", "messages": [SYSTEM], "source": "s", "scores": None, "at": None},  # fails: no user
]


@pytest.mark.parametrize("which", ["last", "all"])
@pytest.mark.parametrize("words", [list, in_sharegpt])
@pytest.mark.parametrize("form", ["json", "parquet"])
def test_it_goes_through_datasets_and_back_with_no_column_lost(tmp_path, which, words, form):
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    records = [record | {"messages": words(record["messages"])} for record in RECORDS]
    ending = {"json": "jsonl", "parquet": "parquet"}[form]
    source, out = f"{tmp_path}/in.{ending}", f"{tmp_path}/out.{ending}"
    before = datasets.Dataset.from_list(records)
    getattr(before, f"to_{form}")(source)

    start(tmp_path, inputs=(source,), out=out, regenerate=which)

    files = {"data_files": out, "split": "train", "cache_dir": f"{tmp_path}/cache"}
    after = datasets.load_dataset(form, **files)
    assert after["status"] == ["succeeded", "succeeded", "errored"]
    new = (FIRST, SECOND) if which == "all" else ("old 1", LAST)
    first = records[0] | {"messages": words(with_answers(CHAT, *new))}
    second = records[1] | {"messages": words(with_answers(CHAT[1:3], answer(CHAT[1])))}
    theirs = after.select_columns(before.column_names)
    assert theirs.to_list() == [first, second, records[2]]
    assert theirs.features == before.features
