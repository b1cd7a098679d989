"""Inputs and outputs at URLs: a real S3 server, and an HTTP server with bad manners, both here."""

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fakes import FakeEngine, refuse_to_open
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.cli.main import main
from dspark_batch.errors import Resumable, UsageError
from dspark_batch.intake import remote
from dspark_batch.record.run_dir import RunDir

pytestmark = pytest.mark.filterwarnings("ignore")  # of the clients and servers

LINES = b"".join(json.dumps(record).encode() + b"\n" for record in prompts("a", "b"))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "_PAUSE_S", 0.01)
    write_lines(tmp_path / "in.jsonl", *prompts("a", "b", "c"), b"nope")
    return tmp_path


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    server.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """A file system with an empty bucket."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem(use_listings_cache=False)
    if system.exists("bucket"):
        system.rm("bucket", recursive=True)
    system.mkdir("bucket")
    yield system
    s3fs.S3FileSystem.clear_instance_cache()


def on_disk():
    return {str(path) for path in Path().rglob("*")}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_output_on_s3_is_what_it_would_be_here(s3, folder, suffix):
    report = start(folder, out=f"s3://bucket/deep/out.{suffix}", samples=2)
    start(folder, out=f"here.{suffix}", samples=2)
    s3.get_file(f"bucket/deep/out.{suffix}", f"there.{suffix}")
    rows = [rows_in(Path(f"{place}.{suffix}")) for place in ("there", "here")]
    for row in (*rows[0], *rows[1]):
        del row["metrics"]
    assert rows[0] == rows[1]
    assert report.out == f"s3://bucket/deep/out.{suffix}"
    assert s3.find("bucket") == [f"bucket/deep/out.{suffix}"]
    assert not Path("s3:").exists()


def test_inputs_on_s3_are_fetched_once_and_resume_without_a_network(s3, folder, monkeypatch):
    s3.pipe("bucket/in/b.jsonl", LINES)
    s3.pipe("bucket/in/a.jsonl", b'{"id":"x","prompt":"x"}\n')
    options = {"inputs": ("s3://bucket/in/a.jsonl", "s3://bucket/in/b.jsonl"), "out": "out.jsonl"}
    with pytest.raises(KeyboardInterrupt):
        start(folder, engine=FakeEngine(slots=1, dies_after=1), **options)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert start(folder, **options).resumed == 1
    assert [row["custom_id"] for row in rows_in(Path("out.jsonl"))] == ["x", "id-a", "id-b"]
    assert main(["show", "out.jsonl"]) == 0


def test_a_pattern_on_s3_is_read_in_name_order(s3, folder):
    for name in ("b", "a", "c"):
        s3.pipe(f"bucket/in/{name}.jsonl", json.dumps({"prompt": name}).encode())
    start(folder, inputs=("s3://bucket/in/[ab].jsonl",))
    assert [row["prompt"] for row in rows_in(Path("out.jsonl"))] == ["a", "b"]
    with pytest.raises(UsageError, match=r"s3://bucket/no\*: no file there matches this pattern"):
        start(folder, inputs=("s3://bucket/no*",))


def test_a_job_that_was_stopped_goes_on_and_then_puts_its_output(s3, folder):
    out = "s3://bucket/out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        start(folder, engine=FakeEngine(slots=1, dies_after=2), out=out)
    assert s3.find("bucket") == []
    for words in (["status", out], ["show", out], ["export", out, "s3://bucket/now.parquet"]):
        assert main(words) == 0
    with s3.open("bucket/now.parquet") as file:
        assert pq.read_table(file).num_rows == 2
    assert start(folder, out=out).resumed == 2
    assert start(folder, out=out, opener=refuse_to_open).total == 4  # nothing to do
    assert main(["export", out, "here.jsonl"]) == 0
    assert len(rows_in(Path("here.jsonl"))) == len(s3.cat("bucket/out.jsonl").splitlines()) == 4
    assert main(["export", out, "s3://bucket/now.parquet"]) == 2  # exists
    write_lines(folder / "in.jsonl", *prompts("a", "b", "c", "d"))
    assert start(folder, out=out).total == 4
    assert b"id-d" in s3.cat("bucket/out.jsonl")


def test_a_network_that_fails_at_the_end_costs_no_row(s3, server, folder, monkeypatch):
    out = "s3://bucket/out.jsonl"

    def cut(tick):
        if tick.stage == "finish":
            monkeypatch.setattr(remote, "_put", fail)

    def fail(*words):
        raise ConnectionError("the line is dead")

    with pytest.raises(Resumable, match="The finished rows are safe; run the same command again"):
        start(folder, out=out, observe=cut)
    assert s3.find("bucket") == []
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert start(folder, out=out, opener=refuse_to_open).total == 4
    assert s3.find("bucket") == ["bucket/out.jsonl"]


def test_a_file_that_is_there_is_not_overwritten_by_mistake(s3, folder):
    s3.pipe("bucket/out.jsonl", b"mine")
    with pytest.raises(UsageError, match=r"s3://bucket/out.jsonl exists; choose another name"):
        start(folder, out="s3://bucket/out.jsonl", opener=refuse_to_open)
    assert s3.cat("bucket/out.jsonl") == b"mine"
    start(folder, out="s3://bucket/out.jsonl", overwrite=True)
    assert s3.cat("bucket/out.jsonl") != b"mine"


@pytest.mark.usefixtures("s3")
def test_what_is_not_there_is_said_at_once(folder):
    with pytest.raises(UsageError, match=r"s3://bucket/no.jsonl: cannot be fetched \("):
        start(folder, inputs=("s3://bucket/no.jsonl",), opener=refuse_to_open)
    before = on_disk()
    with pytest.raises(UsageError, match=r"s3://nobucket/out.jsonl: cannot be written \("):
        start(folder, out="s3://nobucket/out.jsonl", opener=refuse_to_open)
    assert on_disk() == before


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("http://127.0.0.1/out.jsonl", "http:// cannot be written; name a file, or s3://"),
        ("https://user:pw@host/out.jsonl", "https://host/out.jsonl: https:// cannot be written"),
        ("hf://datasets/o/n/out.parquet", "--push-to-hub OWNER/NAME"),
        ("memory://out.jsonl", "memory:// cannot be written"),
        ("nope://b/out.jsonl", "cannot be written (Protocol not known: nope)"),
        ("S4://b/out.jsonl", "cannot be written (Protocol not known: S4)"),
        ("oss://b/out.jsonl", "without another package; pip install 'dspark-batch[remote]'."),
    ],
)
def test_a_place_that_takes_no_output_is_refused_before_anything_is_made(folder, out, says, capsys):
    before = on_disk()
    with pytest.raises(UsageError) as error:
        start(folder, out=out, opener=refuse_to_open)
    assert says in str(error.value)
    assert on_disk() == before
    start(folder, out="here.jsonl")
    assert main(["export", "here.jsonl", out]) == 2
    assert says in capsys.readouterr().err


def test_a_job_file_leaves_urls_as_they_are(folder):
    from datetime import date

    from dspark_batch.spec.job_file import read_job

    (folder / "sub").mkdir()
    (folder / "sub/job.toml").write_text(
        'inputs = ["s3://b/{date}.jsonl"]\nout = "az2://b/o.jsonl"'
    )
    job = read_job(folder / "sub/job.toml", date(2025, 3, 9))
    assert job == {"inputs": ("s3://b/2025-03-09.jsonl",), "out": "az2://b/o.jsonl"}


def test_two_urls_never_share_a_run_directory():
    urls = ["s3://a/o.jsonl", "s3://b/o.jsonl", "gs://a/o.jsonl", "s3://a/x/o.jsonl"]
    assert len({RunDir(url).path for url in urls}) == 4
    assert RunDir(urls[0]).path == RunDir(urls[0]).path
    assert str(RunDir(urls[0]).out).startswith("o.")


class Moody(BaseHTTPRequestHandler):
    """Serves LINES; the first requests in its manner."""

    mood, left = "", 0

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(LINES)))
        self.end_headers()

    def do_GET(self):
        is_moody, type(self).left = self.left > 0, self.left - 1
        status = {"missing": 404, "forbidden": 403, "busy": 503}.get(self.mood, 200)
        self.send_response(status if is_moody else 200)
        if self.mood == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(LINES)))
        self.end_headers()
        if self.mood == "chunks":
            self.wfile.write(b"%x\r\n%s\r\n" % (len(LINES), LINES))
            self.wfile.write(b"" if is_moody else b"0\r\n\r\n")
        elif is_moody and self.mood in ("stalls", "cuts"):
            self.wfile.write(LINES[:20])
            self.wfile.flush()
            if self.mood == "stalls":
                threading.Event().wait(1.0)
        else:
            self.wfile.write(LINES)
        self.close_connection = True

    def log_message(self, *words):
        """Say nothing."""


@pytest.fixture
def web(monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "STALL_S", 0.2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def serve(mood, times=99):
        Moody.mood, Moody.left = mood, times
        return f"http://127.0.0.1:{server.server_port}/deep/in.jsonl?token=s3cret*"

    yield serve
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("mood", ["", "stalls", "cuts", "chunks", "busy"])
def test_a_server_that_gets_over_it_is_read_whole(web, folder, mood):
    assert start(folder, inputs=(web(mood, times=1 if mood else 0),)).succeeded == 2
    assert [row["id"] for row in rows_in(Path("out.jsonl"))] == ["id-a", "id-b"]


@pytest.mark.parametrize("mood", ["stalls", "cuts", "chunks", "busy"])
def test_a_server_that_does_not_is_given_up_and_the_command_continues(web, folder, mood):
    with pytest.raises(Resumable, match=r"/in.jsonl: cannot be fetched \(.*Run the same command"):
        start(folder, inputs=(web(mood),), opener=refuse_to_open)
    assert not Path("out.jsonl.run").exists()
    assert start(folder, inputs=(web(mood, times=0),)).succeeded == 2


@pytest.mark.parametrize("mood", ["missing", "forbidden"])
def test_a_server_that_refuses_is_not_asked_again(web, folder, mood):
    with pytest.raises(UsageError, match=r"/in.jsonl: cannot be fetched \("):
        start(folder, inputs=(web(mood, times=1),), opener=refuse_to_open)


def test_no_secret_of_a_url_gets_into_rows_or_messages(web, folder):
    url = web("", times=0)
    start(folder, inputs=(url,), prompt_column="prompt", system_prompt="x" * 400)
    assert "s3cret" not in Path("out.jsonl").read_text()
    assert "s3cret" not in Path("out.jsonl.run/rows.jsonl").read_text()
    with pytest.raises(UsageError) as error:
        start(folder, inputs=(web("missing"),), out="o.jsonl")
    assert "s3cret" not in str(error.value)


def test_a_page_that_asks_for_a_login_is_one_sentence(web, folder, monkeypatch):
    monkeypatch.setitem(globals(), "LINES", b"<!doctype html><title>Sign in</title>")
    with pytest.raises(UsageError, match="is a page of HTML or XML and not the file"):
        start(folder, inputs=(web("", times=0),), opener=refuse_to_open)


def test_file_urls_are_files(folder):
    out = f"file://{folder}/out.jsonl"
    assert start(folder, inputs=(f"file://{folder}/in.jsonl",), out=out).total == 4
    assert len(rows_in(folder / "out.jsonl")) == 4
    assert os.fspath(RunDir(out).out) != "out.jsonl"
