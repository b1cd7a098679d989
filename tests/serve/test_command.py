"""`dspark-batch serve` says in one sentence why it cannot begin."""

import socket
import subprocess
import sys

import pytest
from serving import served

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
def test_a_folder_that_is_not_as_we_left_it_is_named(capsys, tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    code, said = refused(capsys, "--port", "0", "--data-dir", str(tmp_path))
    assert (code, str(path if name.endswith(".json") else tmp_path) in said) == (2, True)


def test_a_folder_that_cannot_be_made_is_named(capsys, tmp_path):
    (tmp_path / "file").touch()
    code, said = refused(capsys, "--data-dir", str(tmp_path / "file" / "data"))
    assert (code, "--data-dir" in said) == (2, True)
