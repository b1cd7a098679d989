"""Workers that are processes: the table of failures in docs/fleet.md, line by line."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from engines import fake_fleet, pids
from small_jobs import prompts, rows_in, start, write_lines

from dspark_batch.run import run
from dspark_batch.spec.spec import Spec
from dspark_batch.verify import verify

ray = pytest.importorskip("ray")

DRIVER = Path(__file__).with_name("fleet_driver.py")
NAMES = [f"p{n}" for n in range(60)]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """A Ray of these tests; it takes seconds to begin."""
    from dspark_batch.fleet import cluster

    before = dict(os.environ)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    found = [str(DRIVER.parent), str(DRIVER.parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(found)  # a worker has no other way to `engines`
    cluster.begin_local(2)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts(*NAMES))
    start(tmp_path, out=str(tmp_path / "one.jsonl"))
    return tmp_path


def answers(path):
    return [json.dumps(row | {"metrics": None, "verified": None}) for row in rows_in(path)]


def is_equal(folder):
    return answers(folder / "out.jsonl") == answers(folder / "one.jsonl")


def begin(folder, *, observe=None, slots=2, **settings):
    """Run the job with two fake workers."""
    opener = fake_fleet(folder, **settings)
    return start(folder, opener=opener, observe=observe, workers=2, slots=slots)


def kills(folder, at, num=1):
    """Make what kills workers as rows come: the last of those that are there, once there are."""
    left = list(at)

    def observe(tick):
        if tick.outcome and left and tick.done - tick.resumed >= left[0]:
            left.pop(0)
            while len(alive := [p for p in pids(folder) if Path(f"/proc/{p}").exists()]) < num:
                time.sleep(0.02)
            for pid in alive[-num:]:
                os.kill(pid, signal.SIGKILL)

    return observe


def test_workers_that_are_killed_lose_nothing_and_double_nothing(folder, capsys):
    report = begin(folder, pause_s=0.02, observe=kills(folder, (1, 20, 56)))
    assert is_equal(folder)
    assert sum(worker["deaths"] for worker in report.workers) >= 2
    assert sum(worker["rows"] for worker in report.workers) == 60
    names = {row["metrics"]["worker"] for row in rows_in(folder / "out.jsonl")}
    assert names <= {worker["name"] for worker in report.workers}
    assert capsys.readouterr().out == ""  # rows may go there


@pytest.mark.slow
def test_both_workers_may_be_killed_at_once(folder):
    report = begin(folder, pause_s=0.02, observe=kills(folder, (10,), num=2))
    assert is_equal(folder)
    assert [worker["deaths"] for worker in report.workers] == [1, 1]


@pytest.mark.slow
def test_an_item_that_kills_its_worker_is_a_failure_row_and_no_other_is(folder):
    assert begin(folder, kills="p17").exit_code == 1
    expected = answers(folder / "one.jsonl")
    for row, line in zip(answers(folder / "out.jsonl"), expected, strict=True):
        if json.loads(row)["custom_id"] == "id-p17":
            assert json.loads(row)["error"]["code"] == "poison"
        else:
            assert row == line
    events = (folder / "out.jsonl.run/attempts.jsonl").read_text().splitlines()
    lost = [json.loads(line)["lost"]["items"] for line in events if '"lost"' in line]
    assert [index for [[index, _]] in lost[-3:]] == [17] * 3


@pytest.mark.slow
def test_a_worker_with_other_bits_is_refused_and_the_others_do_it_all(folder, caplog):
    begin(folder, numerics=("n0", "n1"), pause_s=0.02)
    assert is_equal(folder)
    assert 'numerics is "n0" in the job and "n1" there' in caplog.text
    workers = {row["metrics"]["worker"] for row in rows_in(folder / "out.jsonl")}
    assert len(workers) == 1


@pytest.mark.slow
def test_a_worker_out_of_memory_goes_on_with_half_its_slots(folder):
    report = begin(folder, slots=4, fits=2)
    assert is_equal(folder)
    died = [worker for worker in report.workers if worker["deaths"]]
    assert {worker["deaths"] for worker in died} == {1}
    assert 2 in {worker["slots"] for worker in died}  # the other may end before its next one loads


@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_with_the_same_command(folder, cluster):
    command = [sys.executable, DRIVER, folder, cluster]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    rows = folder / "out.jsonl.run/rows.jsonl"
    while not (rows.exists() and rows.read_bytes().count(b"\n") >= 10):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    old = pids(folder)
    report = begin(folder)
    assert is_equal(folder)
    assert 10 <= report.resumed < 60
    assert not [pid for pid in old if Path(f"/proc/{pid}").exists()]  # they died with their driver


RECORDS = [
    *({"prompt": f"Compute the sum of {n} and {n + 7}."} for n in range(8)),
    *(
        {
            "messages": [
                {"role": "system", "content": "You answer in one short sentence. " * 4},
                {"role": "user", "content": f"What is {n} minus 2?"},
            ],
            "sampling_params": {"temperature": 0.8},
        }
        for n in range(12)
    ),
    *({"turns": [f"Name {n} colours.", "And one more?"]} for n in range(1, 5)),
]


def test_real_workers_give_the_rows_of_one_process_and_pass_its_audits(tmp_path):
    records = write_lines(tmp_path / "in.jsonl", *RECORDS)
    options = {"inputs": (str(records),), "max_tokens": 16, "slots": 4}
    run(Spec(out=str(tmp_path / "one.jsonl"), **options))
    out = str(tmp_path / "out.jsonl")
    report = run(Spec(out=out, workers=2, verify_greedy="all", **options))
    assert is_equal(tmp_path)
    assert report.verified == len(RECORDS)
    assert verify(out, workers=2).verdict == "equal"
    assert sum(worker["rows"] for worker in report.workers) >= len(RECORDS)


@pytest.mark.slow
def test_the_head_of_ray_may_be_lost(tmp_path):
    write_lines(tmp_path / "in.jsonl", *prompts(*NAMES))
    start(tmp_path, out=str(tmp_path / "one.jsonl"))
    program = (
        f"import sys; sys.path[:0] = {[str(DRIVER.parent), str(DRIVER.parents[1])]!r}\n"
        "from pathlib import Path\n"
        "from engines import fake_fleet\n"
        "from small_jobs import start\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "start(folder, opener=fake_fleet(folder, pause_s=0.3), workers=2, slots=2)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    rows = tmp_path / "out.jsonl.run/rows.jsonl"
    while not (rows.exists() and rows.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    [head] = [pid for pid in children(process.pid) if "gcs_server" in command_of(pid)]
    family = children(process.pid)
    assert {address[:2] for address in listening(family)} == {"7F"}  # 127.: this machine alone
    os.kill(head, signal.SIGKILL)
    said = process.communicate(timeout=60)[1].decode()
    assert "Resumable: Ray's head at 127.0.0." in said
    assert "the same command continues" in said
    left = [pid for pid in family if Path(f"/proc/{pid}").exists()]
    assert not [pid for pid in left if "ray::Worker" in command_of(pid)]
    for pid in left:  # Ray's agents go by themselves, within a minute
        os.kill(pid, signal.SIGKILL)
    begin(tmp_path)
    assert is_equal(tmp_path)


def children(pid):
    """All processes below one."""
    own = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in own.read_text().split()] if own.exists() else []
    return [each for child in found for each in (child, *children(child))]


def listening(pids):
    """The addresses at which processes listen, in hexadecimal, the first number first."""
    sockets = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                sockets.add(str(fd.readlink()))
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, address, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in sockets:
            found.add(bytes.fromhex(address.partition(":")[0])[::-1].hex().upper())
    return found


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_three_items_are_enough_for_two_workers_and_the_workers_end_with_the_job(folder):
    opener = fake_fleet(folder)
    start(folder, opener=opener, workers=2, slots=2, limit=3)
    assert answers(folder / "out.jsonl") == answers(folder / "one.jsonl")[:3]
    deadline = time.monotonic() + 10
    while [pid for pid in pids(folder) if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ray.is_initialized()  # the caller's Ray stays
