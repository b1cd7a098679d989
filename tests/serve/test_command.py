"""`dspark-batch serve` says in one sentence why it cannot begin."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from fakes import FakeSteps
from serving import batch_line, chat, jsonl, served, wait_for

from dspark_batch.cli.main import main


def refused(capsys, *words):
    code = main(["serve", *words])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    return code, said[0]


@pytest.mark.parametrize("library", ["starlette", "uvicorn", "python_multipart"])
def test_without_its_libraries_it_names_them(library):
    program = f"import sys; sys.modules['{library}'] = None; from dspark_batch.cli import main;"
    program += "sys.exit(main.main(['serve']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    (said,) = done.stderr.splitlines()
    assert (done.returncode, "pip install 'dspark-batch[serve]'" in said) == (2, True)


@pytest.mark.parametrize("words", [["--host", "0.0.0.0"], ["--retain", "soon"]], ids=" ".join)
def test_an_option_that_cannot_be_is_refused(capsys, words, tmp_path):
    code, said = refused(capsys, *words, "--data-dir", str(tmp_path))
    assert (code, " ".join(words) in said) == (2, True)


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff"])
def test_a_file_without_a_key_is_refused(capsys, tmp_path, content):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    code, said = refused(capsys, "--api-key-file", str(path))
    assert (code, str(path) in said) == (2, True)


def test_a_port_and_a_folder_that_are_taken_are_named(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, said = refused(capsys, "--port", port, "--data-dir", str(tmp_path / "x"))
        assert (code, port in said) == (2, True)
    with served(tmp_path / "data"):
        code, said = refused(capsys, "--port", "0", "--data-dir", str(tmp_path / "data"))
        assert (code, "another server" in said) == (5, True)


@pytest.mark.parametrize("name", ["batches", "batches/batch_0/batch.json"])
def test_a_folder_that_is_not_as_we_left_it_is_named_and_nothing_is_loaded_for_it(
    capsys, tmp_path, monkeypatch, name
):
    loaded = []
    monkeypatch.setattr("dspark_batch.serve.server.open_pair", lambda *args: loaded.append(args))
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    code, said = refused(capsys, "--port", "0", "--data-dir", str(tmp_path))
    assert (code, str(path if name.endswith(".json") else tmp_path) in said) == (2, True)
    assert loaded == []


def test_a_folder_that_cannot_be_made_is_named(capsys, tmp_path):
    (tmp_path / "file").touch()
    code, said = refused(capsys, "--data-dir", str(tmp_path / "file" / "data"))
    assert (code, "--data-dir" in said) == (2, True)


def test_a_model_that_cannot_be_loaded_is_the_last_word(capsys, tmp_path):
    code = main(["serve", "--port", "0", "--data-dir", str(tmp_path), "--family", "none"])
    _, said = capsys.readouterr().err.splitlines()
    assert (code, "--family none: unknown" in said) == (2, True)


@pytest.fixture
def process(tmp_path):
    """A server process with a slow fake engine, and a function that waits for a line of its log."""
    words = json.dumps({"data_dir": str(tmp_path / "data"), "pause_s": 0.4})
    command = [sys.executable, str(Path(__file__).with_name("driver.py")), words]
    one = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    said = []

    def until(text):
        while not any(text in line for line in said):
            line = one.stderr.readline()
            assert line, said
            said.append(line)
        return next(line for line in said if text in line)

    yield one, until, said
    one.kill()
    one.wait()
    one.stderr.close()


def test_the_log_tells_the_life_of_a_server_and_no_prompt(process):
    one, until, said = process
    url = until("/v1, data in").split()[2].rstrip(",").removesuffix("/v1")
    until("tiny is loaded")
    with httpx.Client(base_url=url) as http:
        bad = jsonl(batch_line("a", {}), batch_line("a", {}))
        for content in (jsonl(batch_line("a", chat("a secret", max_tokens=2))), bad):
            files = {"file": ("in.jsonl", content)}
            file = http.post("/v1/files", data={"purpose": "batch"}, files=files).json()
            asked = {"input_file_id": file["id"], "completion_window": "24h"}
            http.post("/v1/batches", json=asked | {"endpoint": "/v1/chat/completions"})
    until("is in_progress: 0 of 1 requests have an answer")
    until("is completed: 1 of 1 requests have an answer")
    until("is failed: duplicate_custom_id in line 2")
    one.send_signal(signal.SIGTERM)
    until("stopping; live answers have 1 s")
    said += one.stderr.readlines()
    assert one.wait() == 0
    assert all(line.startswith("dspark-batch: ") for line in said if "/v1, data in" not in line)
    assert "secret" not in "".join(said)


def test_a_second_interrupt_stops_at_once_and_shows_no_traceback(process):
    one, until, said = process
    url = until("/v1, data in").split()[2].rstrip(",")
    until("tiny is loaded")
    with httpx.stream("POST", f"{url}/chat/completions", json=chat("a", stream=True)) as answer:
        next(answer.iter_lines())
        os.kill(one.pid, signal.SIGINT)
        until("stopping")
        os.kill(one.pid, signal.SIGINT)
        said += one.stderr.readlines()
    wait_for(lambda: one.poll() is not None, 5)
    assert (one.returncode, "Traceback" in "".join(said)) == (0, False)


def test_a_server_that_is_stopped_at_once_still_ends_its_engine(tmp_path):
    """With MLX in the middle of a round the process would abort."""
    with served(tmp_path, FakeSteps(slots=2, pause_s=0.1)) as one:
        asked = ("POST", "/v1/chat/completions")
        with one.http.stream(*asked, json=chat("a", stream=True)) as answer:
            next(answer.iter_lines())
            one.server._uvicorn.force_exit = True  # as a second Ctrl-C does
            one.server.stop()
            one.join()
    assert not one.server.hub._thread.is_alive()
