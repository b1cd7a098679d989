"""Batches: states, limits, and restarts after a kill at any of them."""

import errno
import json
import re
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from fakes import FakeSteps, fake_steps_opener
from serving import batch_line, chat, jsonl, served, wait_for

from dspark_batch.hub import Hub
from dspark_batch.serve.batches import Batches
from dspark_batch.serve.files import Files
from dspark_batch.serve.problems import Problem
from dspark_batch.serve.service import Service
from dspark_batch.spec.spec import Spec

DRIVER = Path(__file__).with_name("driver.py")
LINES = [batch_line(f"q{n}", chat(f"Question {n}?")) for n in range(30)]
LINES.insert(3, batch_line("bad", chat("a", n=2)))
FINAL = ("completed", "failed", "cancelled", "expired")
FILE_ID = "file-0123456789abcdef0123"


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A server on which a batch takes a second or two."""
    engine = FakeSteps(slots=2, pause_s=0.01)
    with served(tmp_path_factory.mktemp("data"), engine, max_batch_requests=100) as one:
        yield one


def upload(http, content):
    files = {"file": ("in.jsonl", content)}
    return http.post("/v1/files", data={"purpose": "batch"}, files=files).json()


def create(http, content, **more):
    asked = {"input_file_id": upload(http, content)["id"], "completion_window": "24h"}
    asked |= {"endpoint": "/v1/chat/completions"} | more
    return http.post("/v1/batches", json=asked).json()


def ended(http, batch):
    wait_for(lambda: http.get(f"/v1/batches/{batch['id']}").json()["status"] in FINAL)
    return http.get(f"/v1/batches/{batch['id']}").json()


def lines_in(http, file_id):
    content = http.get(f"/v1/files/{file_id}/content").content if file_id else b""
    return [json.loads(line) for line in content.splitlines()]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "invalid_json_line"),
        (b"[]", "invalid_request"),
        (b"{}", "missing_required_parameter"),
        (jsonl(batch_line("", {})), "missing_required_parameter"),
        (jsonl(batch_line("a", {}, url="/v1/completions")), "mismatched_endpoint"),
        (jsonl(batch_line("a", {}) | {"method": "GET"}), "invalid_method"),
        (jsonl(batch_line("a", [])), "missing_required_parameter"),
        (jsonl(batch_line("first", {})), "duplicate_custom_id"),
        (b'{"custom_id": "a", ' + jsonl(batch_line("b", {}))[1:], "invalid_json_line"),
    ],
    ids=str,
)
def test_an_input_with_one_impossible_line_fails_as_a_whole(slow, line, code):
    content = jsonl(batch_line("first", chat("a"))) + b"\n" + line.strip() + b"\n"
    batch = ended(slow.http, create(slow.http, content))
    assert (batch["status"], batch["output_file_id"]) == ("failed", None)
    (error,) = batch["errors"]["data"]
    assert (error["code"], error["line"]) == (code, 3)


def test_an_input_is_no_larger_than_a_batch_may_be_and_not_empty(slow):
    for content, code in ((b" \n", "empty_file"), (jsonl(*[LINES[0]] * 101), "too_many_requests")):
        batch = ended(slow.http, create(slow.http, content))
        assert batch["errors"]["data"][-1]["code"] == code


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_file_id", FILE_ID),
        ("input_file_id", None),
        ("endpoint", "/v1/embeddings"),
        ("completion_window", "soon"),
        ("completion_window", "0d"),
        ("completion_window", "9" * 30 + "d"),
        ("completion_window", "9" * 5000 + "h"),
        ("completion_window", None),
        ("metadata", {"a": 1}),
        ("output_expires_after", {"seconds": 5}),
    ],
)
def test_a_batch_that_cannot_be_is_refused_at_once(slow, field, value):
    asked = {"input_file_id": upload(slow.http, jsonl(LINES[0]))["id"]}
    asked |= {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    reply = slow.http.post("/v1/batches", json=asked | {field: value})
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["param"] in (field, None)


def test_batches_have_no_purpose_by_which_to_list_them(slow):
    create(slow.http, b" ")
    assert slow.http.get("/v1/batches?purpose=batch").json()["data"] == []


def test_a_batch_that_is_cancelled_keeps_what_is_answered_and_says_what_is_not(slow):
    batch = create(slow.http, jsonl(*LINES))
    url = f"/v1/batches/{batch['id']}"
    wait_for(lambda: slow.http.get(url).json()["request_counts"]["completed"] > 0)
    assert slow.http.post(f"{url}/cancel").json()["status"] == "cancelling"
    batch = ended(slow.http, batch)
    assert batch["status"] == "cancelled"
    answers = lines_in(slow.http, batch["output_file_id"])
    failures = lines_in(slow.http, batch["error_file_id"])
    names = [line["custom_id"] for line in answers + failures]
    assert sorted(names) == sorted(line["custom_id"] for line in LINES)
    codes = {line["custom_id"]: line["error"]["code"] for line in failures}
    assert codes.pop("bad", "bad_record") == "bad_record"
    assert set(codes.values()) == {"batch_cancelled"}
    counts = batch["request_counts"]
    assert (counts["completed"], counts["failed"]) == (len(answers), len(failures))
    assert slow.http.post(f"{url}/cancel").status_code == 409


def test_a_batch_that_is_cancelled_takes_back_what_waits_though_all_of_it_is_in_the_engine(
    tmp_path,
):
    with served(tmp_path, FakeSteps(slots=1, pause_s=0.05)) as one:
        batch = create(one.http, jsonl(*LINES[4:16]))  # for 2 seconds
        url = f"/v1/batches/{batch['id']}"
        wait_for(lambda: one.http.get(url).json()["request_counts"]["completed"] > 0)
        one.http.post(f"{url}/cancel")
        batch = ended(one.http, batch)
        assert batch["status"] == "cancelled"
        assert batch["request_counts"]["failed"] > 2


def test_a_batch_that_is_cancelled_while_it_waits_for_another_need_not_wait(slow):
    first = create(slow.http, jsonl(*LINES))
    whole, impossible = create(slow.http, jsonl(*LINES)), create(slow.http, b"{\n")
    for each in (whole, impossible):
        slow.http.post(f"/v1/batches/{each['id']}/cancel")
    whole, impossible = (ended(slow.http, each) for each in (whole, impossible))
    now = slow.http.get(f"/v1/batches/{first['id']}").json()
    assert (now["status"], whole["status"]) == ("in_progress", "cancelled")
    assert whole["request_counts"] == {"total": 31, "completed": 0, "failed": 31}
    assert impossible["errors"]["data"][0]["code"] == "invalid_json_line"
    assert ended(slow.http, first)["request_counts"]["completed"] == 30


def test_a_batch_that_ends_while_it_is_cancelled_stays_ended(tmp_path):
    service = Service(spec=Spec(inputs=("live",), out="-"), data_dir=tmp_path)
    hub = Hub(fake_steps_opener())
    for name in ("files", "batches"):
        (tmp_path / name).mkdir()
    files = Files(tmp_path / "files")
    batches = Batches(service, files, hub)
    try:
        asked = {"input_file_id": files.add(BytesIO(jsonl(LINES[0])), "in", "batch")["id"]}
        asked |= {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = batches.create(asked)
        wait_for(lambda: batches.all()[0]["status"] == "completed")
        batches.find = lambda batch_id: batch  # as it was a moment ago
        with pytest.raises(Problem, match="is completed"):
            batches.cancel(batch["id"])
        assert batches.all()[0]["status"] == "completed"
    finally:
        hub.close()
        batches.close()


def test_a_clock_that_is_put_forward_and_back_only_delays_a_batch(tmp_path, monkeypatch):
    is_stopped, asked = Batches._is_stopped, []

    def is_late_once(self, batch_id):
        asked.append(batch_id)
        return len(asked) == 9 or is_stopped(self, batch_id)

    monkeypatch.setattr(Batches, "_is_stopped", is_late_once)
    monkeypatch.setattr("dspark_batch.serve.batches._AGAIN_S", 0.05)
    with served(tmp_path) as one:
        batch = ended(one.http, create(one.http, jsonl(*LINES)))
    assert len(asked) > 9
    assert batch["request_counts"] == {"total": 31, "completed": 30, "failed": 1}


def is_full(*args, **more):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_when_a_batch_ends_only_delays_it(tmp_path, monkeypatch):
    monkeypatch.setattr("dspark_batch.serve.batches._AGAIN_S", 0.1)
    with served(tmp_path) as one:
        with monkeypatch.context() as full:
            full.setattr("dspark_batch.serve.files.sync_file", is_full)
            file_id = FILE_ID
            (tmp_path / "files" / f"{file_id}.jsonl").write_bytes(jsonl(*LINES))
            told = {"id": file_id, "purpose": "batch", "created_at": 0}
            (tmp_path / "files" / f"{file_id}.json").write_text(json.dumps(told))
            asked = {"input_file_id": file_id, "completion_window": "24h"}
            asked |= {"endpoint": "/v1/chat/completions"}
            batch = one.http.post("/v1/batches", json=asked).json()
            url = f"/v1/batches/{batch['id']}"
            wait_for(lambda: one.http.get(url).json()["status"] == "finalizing")
            time.sleep(0.3)
            assert one.http.get(url).json()["status"] == "finalizing"
        batch = ended(one.http, batch)
        assert batch["request_counts"] == {"total": 31, "completed": 30, "failed": 1}
        assert len(lines_in(one.http, batch["output_file_id"])) == 30


def test_a_disk_that_is_full_keeps_no_half_of_an_upload_or_a_batch(tmp_path, monkeypatch):
    with served(tmp_path) as one:
        file_id = upload(one.http, jsonl(LINES[0]))["id"]
        monkeypatch.setattr("dspark_batch.serve.files.sync_file", is_full)
        monkeypatch.setattr("dspark_batch.serve.files.os.link", is_full)
        files = {"file": ("in.jsonl", b"x")}
        reply = one.http.post("/v1/files", data={"purpose": "batch"}, files=files)
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "server_error")
        asked = {"input_file_id": file_id, "completion_window": "24h"}
        reply = one.http.post("/v1/batches", json=asked | {"endpoint": "/v1/chat/completions"})
        assert reply.status_code == 503
        monkeypatch.undo()
        assert len(list((tmp_path / "files").iterdir())) == 2
        assert list((tmp_path / "batches").iterdir()) == []


def test_a_start_takes_away_what_a_crash_left_and_nothing_of_others(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "batches" / "mine").mkdir(parents=True)
    (tmp_path / "batches" / "batch_0").mkdir()  # a crash while it was made
    (tmp_path / "batches" / ".DS_Store").touch()
    for name in (f"{FILE_ID}.jsonl", f"{FILE_ID}.json.tmp", f"{FILE_ID}.tmp"):
        (tmp_path / "files" / name).touch()
    with served(tmp_path):
        names = sorted(path.name for path in (tmp_path / "batches").iterdir())
        assert names == [".DS_Store", "mine"]
        assert list((tmp_path / "files").iterdir()) == []


def test_a_batch_whose_window_ends_is_expired(slow):
    batch = ended(slow.http, create(slow.http, jsonl(*LINES), completion_window="1s"))
    assert batch["status"] in ("expired", "completed")
    waiting = [create(slow.http, jsonl(*LINES)) for _ in range(2)]
    late = create(slow.http, jsonl(*LINES), completion_window="1s")
    late = ended(slow.http, late)
    assert late["status"] == "expired"
    errors = lines_in(slow.http, late["error_file_id"])
    assert "batch_expired" in {line["error"]["code"] for line in errors}
    for each in waiting:
        ended(slow.http, each)


def test_a_batch_keeps_its_input_when_the_upload_is_deleted(slow):
    batch = create(slow.http, jsonl(*LINES))
    slow.http.delete(f"/v1/files/{batch['input_file_id']}")
    batch = ended(slow.http, batch)
    assert batch["request_counts"] == {"total": 31, "completed": 30, "failed": 1}
    (failure,) = lines_in(slow.http, batch["error_file_id"])
    assert failure["error"]["message"].startswith("line 4: `body.n` is 2")


def test_a_live_answer_during_a_batch_is_the_answer_alone_and_does_not_wait_for_it(slow):
    alone = slow.http.post("/v1/chat/completions", json=chat("Name a sea.")).json()
    batch = create(slow.http, jsonl(*LINES))
    url = f"/v1/batches/{batch['id']}"
    wait_for(lambda: slow.http.get(url).json()["status"] == "in_progress")
    beside = slow.http.post("/v1/chat/completions", json=chat("Name a sea.")).json()
    assert beside["choices"] == alone["choices"]
    assert slow.http.get(url).json()["status"] == "in_progress"
    ended(slow.http, batch)


def test_old_files_and_ended_batches_go_at_the_start(tmp_path):
    with served(tmp_path) as one:
        batch = ended(one.http, create(one.http, jsonl(LINES[0])))
    with served(tmp_path, retain_s=3600.0) as one:
        assert one.http.get(f"/v1/batches/{batch['id']}").status_code == 200
    path = tmp_path / "batches" / batch["id"] / "batch.json"
    path.write_bytes(json.dumps(batch | {"created_at": 0}).encode())
    with served(tmp_path, retain_s=3600.0) as one:  # it took long, and has just ended
        assert one.http.get(f"/v1/batches/{batch['id']}").status_code == 200
    time.sleep(1.1)
    with served(tmp_path, retain_s=0.5) as one:
        assert one.http.get(f"/v1/batches/{batch['id']}").status_code == 404
        assert one.http.get("/v1/files").json()["data"] == []


class Process:
    """A server in a process of its own."""

    def __init__(self, data_dir, **how):
        words = json.dumps({"data_dir": str(data_dir)} | how)
        self.popen = subprocess.Popen(
            [sys.executable, DRIVER, words], stderr=subprocess.PIPE, text=True
        )
        said = ""
        while not (url := re.search(r"http://[\d.:]+", said)):
            said += (line := self.popen.stderr.readline())
            assert line, said
        self.http = httpx.Client(base_url=url[0], timeout=20)

    def ended(self):
        said = self.popen.communicate(timeout=20)[1]
        self.http.close()
        return self.popen.returncode, said

    def stop(self):
        self.popen.terminate()
        return self.ended()


def output_of(http, batch):
    """What a batch has answered, without what tells of time."""
    files = [lines_in(http, batch[name]) for name in ("output_file_id", "error_file_id")]
    for line in files[0]:
        body = line["response"]["body"]
        del body["metrics"], body["created"]
    return json.dumps(files).encode(), batch["request_counts"]


def create_on_a_server_that_dies(http, folder):
    """Make a batch; the server may die before it has said so."""
    try:
        return create(http, jsonl(*LINES))
    except httpx.TransportError:
        (path,) = (folder / "batches").iterdir()
        return {"id": path.name}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    with served(tmp_path_factory.mktemp("data"), FakeSteps(slots=2)) as one:
        return output_of(one.http, ended(one.http, create(one.http, jsonl(*LINES))))


@pytest.mark.parametrize(
    "how",
    [
        {"kill_at": "validating"},
        {"kill_at": "in_progress"},
        {"kill_at": "finalizing"},
        {"kill_in": "completed"},
        {"kill_at": "completed"},
        {"rows": 7},
    ],
    ids=str,
)
def test_a_server_that_is_killed_at_any_status_ends_its_batch_as_if_it_had_not_been(
    tmp_path, undisturbed, how
):
    rows = how.get("rows")
    how = {name: value for name, value in how.items() if name != "rows"}
    process = Process(tmp_path, pause_s=0.005, **how)
    batch = create_on_a_server_that_dies(process.http, tmp_path)
    if rows:
        journal = tmp_path / "batches" / batch["id"] / "out.jsonl.run" / "rows.jsonl"
        wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= rows)
        process.popen.kill()
    assert process.ended()[0] == -9
    left = json.loads((tmp_path / "batches" / batch["id"] / "batch.json").read_text())
    assert left["status"] == how.get("kill_at", "in_progress" if rows else "finalizing")
    with served(tmp_path, FakeSteps(slots=2)) as one:
        after = ended(one.http, batch)
        assert after["status"] == "completed"
        assert output_of(one.http, after) == undisturbed
        before = one.http.get(f"/v1/files/{after['output_file_id']}/content").content
    with served(tmp_path, FakeSteps(slots=2)) as one:  # a start changes nothing that is final
        assert one.http.get(f"/v1/batches/{batch['id']}").json() == after
        again = one.http.get(f"/v1/files/{after['output_file_id']}/content").content
        assert again == before


def test_a_batch_that_was_killed_while_it_was_cancelled_ends_so(tmp_path):
    process = Process(tmp_path, pause_s=0.01, kill_at="cancelling")
    batch = create(process.http, jsonl(*LINES))
    url = f"/v1/batches/{batch['id']}"
    wait_for(lambda: process.http.get(url).json()["request_counts"]["completed"] > 0)
    with pytest.raises(httpx.TransportError):
        process.http.post(f"{url}/cancel")
    assert process.ended()[0] == -9
    with served(tmp_path, FakeSteps(slots=2)) as one:
        after = ended(one.http, batch)
        assert after["status"] == "cancelled"
        assert after["request_counts"]["completed"] > 0
        assert sum(after["request_counts"].values()) == 62


def test_a_server_that_is_stopped_in_good_order_goes_on_with_its_batch(tmp_path, undisturbed):
    process = Process(tmp_path, pause_s=0.01)
    batch = create(process.http, jsonl(*LINES))
    url = f"/v1/batches/{batch['id']}"
    wait_for(lambda: process.http.get(url).json()["request_counts"]["completed"] > 2)
    code, said = process.stop()
    assert (code, "Traceback" in said) == (0, False)
    with served(tmp_path, FakeSteps(slots=2)) as one:
        assert output_of(one.http, ended(one.http, batch)) == undisturbed


def test_a_dead_engine_tells_everybody_and_ends_the_process(tmp_path):
    process = Process(tmp_path, pause_s=0.02, dies_on="!")
    batch = create(process.http, jsonl(*LINES))
    url = f"/v1/batches/{batch['id']}"
    wait_for(lambda: process.http.get(url).json()["request_counts"]["completed"] > 0)
    with process.http.stream("POST", "/v1/chat/completions", json=chat("a", stream=True)) as stream:
        lines = stream.iter_lines()
        next(lines)
        began = time.monotonic()
        reply = process.http.post("/v1/chat/completions", json=chat("!"))
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "engine")
        last = [line for line in lines if line][-1]
        assert '"error"' in last or last == "data: [DONE]"
        assert time.monotonic() < began + 3  # of which it takes milliseconds
    health = process.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "stopping")
    code, said = process.ended()
    assert (code, "broke" in said) == (70, True)
    with served(tmp_path, FakeSteps(slots=2)) as one:
        assert ended(one.http, batch)["status"] == "completed"
