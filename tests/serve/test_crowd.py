"""Many clients, some of whom go: no slot is lost, no memory grows, no answer changes."""

import asyncio
import gc
import json
import random
import socket

import httpx
import pytest
from fakes import FakeSteps
from serving import chat, served, wait_for

QUESTIONS = [f"Question {n}?" for n in range(20)]


async def ask(client, question, rng, answers):
    """Ask; go away in the middle, half of the time."""
    body, goes = chat(question, stream=rng.random() < 0.7), rng.random() < 0.5
    if not goes:
        reply = await client.post("/v1/chat/completions", json=body | {"stream": False})
        answers.append((question, reply.json()["choices"][0]["message"]["content"]))
        return
    try:
        async with asyncio.timeout(rng.random() * 0.3):
            await client.post("/v1/chat/completions", json=body)
    except (TimeoutError, httpx.TransportError):
        return


async def crowd(url, num_clients, num_requests, seed):
    rng, answers, left = random.Random(seed), [], iter(range(num_requests))

    async def one():
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            for _ in left:
                await ask(client, rng.choice(QUESTIONS), rng, answers)

    await asyncio.gather(*(one() for _ in range(num_clients)))
    return answers


@pytest.mark.parametrize("num_requests", [120, pytest.param(2000, marks=pytest.mark.slow)], ids=str)
def test_clients_half_of_whom_go_lose_no_slot_and_no_memory_and_change_no_answer(
    tmp_path, num_requests
):
    with served(tmp_path, FakeSteps(slots=8, pause_s=0.01), max_waiting=100) as server:
        replies = [server.http.post("/v1/chat/completions", json=chat(q)) for q in QUESTIONS]
        said = [reply.json()["choices"][0]["message"]["content"] for reply in replies]
        alone = dict(zip(QUESTIONS, said, strict=True))
        asyncio.run(crowd(server.url, 50, 200, 1))
        before, ours_before = num_objects(server)
        answers = asyncio.run(crowd(server.url, 50, num_requests, 2))
        after, ours_after = num_objects(server)
        assert (ours_before, ours_after) == (0, 0)
        assert after < before + 3000  # of connections that have just been closed
        assert len(answers) > num_requests / 3
        assert all(alone[question] == answer for question, answer in answers)
        hub = server.server.hub
        assert (len(hub._inside), len(hub._bulk), len(hub._again)) == (0, 0, 0)
        assert hub.counts.ended["cancelled"] > 0


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_is_given_up_in_the_next_round(tmp_path, stream):
    with served(tmp_path, FakeSteps(pause_s=0.2)) as server:
        body = chat("a", stream=stream)
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/v1/chat/completions", json=body, timeout=0.1)
        wait_for(lambda: server.http.get("/health").json()["running"] == 0)
        assert dict(server.server.hub.counts.ended) == {"cancelled": 1}


def num_objects(server):
    """Count what is in memory when all is quiet, and how much of it belongs to requests."""
    quiet = {"status": "ok", "running": 0, "waiting": 0}
    wait_for(lambda: server.http.get("/health").json() == quiet)
    gc.collect()
    names = [type(each).__name__ for each in gc.get_objects()]
    return len(names), sum(name in ("Ticket", "Answers", "Growing") for name in names)


def test_who_reads_slowly_has_the_same_answer_and_holds_nobody_up(tmp_path):
    with served(tmp_path, FakeSteps(slots=2, pause_s=0.002)) as server:
        whole = server.http.post("/v1/chat/completions", json=chat("Name a sea.")).json()
        url = httpx.URL(server.url)
        body = json.dumps(chat("Name a sea.", stream=True)).encode()
        with socket.create_connection((url.host, url.port)) as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            slow.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            slow.recv(1)
            others = [server.http.post("/v1/chat/completions", json=chat(q)) for q in QUESTIONS]
            assert all(other.status_code == 200 for other in others)
            with slow.makefile("rb") as file:
                text = file.read().decode()
        said = "".join(
            json.loads(line[6:])["choices"][0]["delta"].get("content", "")
            for line in text.splitlines()
            if line.startswith("data: {")
        )
        assert said == whole["choices"][0]["message"]["content"]
