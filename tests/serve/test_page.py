"""What docs/serve.md shows works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
from serving import served, wait_for

from dspark_batch.cli.serve_command import serve_command

PAGE = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


COMMANDS = re.findall(
    r"dspark-batch serve (--.*)", "\n".join(map("".join, map(blocks, ("console", "sh", "ini"))))
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(tmp_path_factory.mktemp("data")) as one:
        yield one


def do(program, server):
    """Run a program of the page against another address."""
    exec(compile(program.replace("http://127.0.0.1:8000", server.url), "serve.md", "exec"), {})


@pytest.mark.parametrize("words", COMMANDS)
def test_each_command_is_one(words):
    assert serve_command.make_context("serve", shlex.split(words, comments=True))


def test_the_first_program_prints_a_stream(server, capsys):
    do(blocks("python")[0], server)
    assert len(capsys.readouterr().out) == 12


def test_a_batch_is_sent_in_the_evening_and_fetched_in_the_morning(
    server, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("requests.jsonl").write_text(blocks("json")[0])
    (send,) = [each for each in blocks("python") if "batches.create" in each]
    (fetch,) = [each for each in blocks("python") if "batches.retrieve" in each]
    do(send, server)
    batch = capsys.readouterr().out.strip()
    url = f"/v1/batches/{batch}"
    wait_for(lambda: server.http.get(url).json()["status"] == "completed")
    monkeypatch.setattr("sys.argv", ["fetch.py", batch])
    do(fetch, server)
    assert capsys.readouterr().out.startswith("completed ")
    assert len(Path("answers.jsonl").read_text().splitlines()) == 2
    assert not Path("failures.jsonl").exists()


def test_the_morning_says_why_a_file_was_refused(server, tmp_path, monkeypatch, capsys):
    files = {"file": ("in.jsonl", b"{}\n")}
    file = server.http.post("/v1/files", data={"purpose": "batch"}, files=files).json()
    asked = {"input_file_id": file["id"], "completion_window": "24h"}
    asked["endpoint"] = "/v1/chat/completions"
    batch = server.http.post("/v1/batches", json=asked).json()["id"]
    wait_for(lambda: server.http.get(f"/v1/batches/{batch}").json()["status"] == "failed")
    monkeypatch.setattr("sys.argv", ["fetch.py", batch])
    (fetch,) = [each for each in blocks("python") if "batches.retrieve" in each]
    do(fetch, server)
    assert "line 1: `custom_id`" in capsys.readouterr().out
