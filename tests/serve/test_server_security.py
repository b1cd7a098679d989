"""Who may ask, and that nobody can keep the server from answering others."""

import json
import socket
import time
from contextlib import ExitStack, suppress

import httpx
import pytest
from serving import chat, served, wait_for

from dspark_batch.errors import UsageError
from dspark_batch.serve.service import Service
from dspark_batch.spec.spec import Spec

ASK = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer sesame\r\n"


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """A server with a key, and with little patience."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_batch.serve.server._HEADERS_S", 0.3)
        patch.setattr("dspark_batch.serve.guard._BODY_S", 0.3)
        folder = tmp_path_factory.mktemp("data")
        with served(folder, keys=("sesame", "other"), max_body=1 << 20) as one:
            one.http.headers["Authorization"] = "Bearer sesame"
            yield one


def lives(server):
    reply = server.http.post("/v1/chat/completions", json=chat("Name a sea."))
    return reply.status_code == 200


def connected(server):
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port), timeout=10)


def answer_on(sock):
    with sock.makefile("rb") as file:
        return file.read()


@pytest.mark.parametrize("given", [None, "", "sesame", "Bearer", "Bearer guess", "Basic sesame"])
def test_without_a_key_nothing_is_told_but_health(locked, given):
    headers = {} if given is None else {"Authorization": given}
    with httpx.Client(base_url=locked.url, headers=headers) as http:
        for path in ("/v1/models", "/metrics", "/v1/files", "/nowhere"):
            reply = http.get(path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200


def test_each_key_opens(locked):
    for key in ("sesame", "other"):
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{locked.url}/v1/models", headers=headers).status_code == 200


def test_a_body_of_100_mb_is_refused_unread_or_read_away(locked):
    length = b"Content-Length: 104857600\r\n"
    with suppress(OSError), connected(locked) as sock:
        sock.sendall(ASK + length + b"Connection: close\r\n\r\n" + b"x" * (100 << 20))
        assert b"413" in answer_on(sock)[:20]  # if it was not closed before all was sent
    for key, status in ((b"sesame", b"413"), (b"guess", b"401")):
        with connected(locked) as sock:
            head = ASK.replace(b"sesame", key) + length
            sock.sendall(head + b"Expect: 100-continue\r\n\r\n")
            assert status in answer_on(sock)[:20]
    assert lives(locked)


def test_a_body_that_does_not_say_how_long_it_is_ends_at_the_limit(locked):
    with connected(locked) as sock:
        sock.sendall(ASK + b"Transfer-Encoding: chunked\r\n\r\n200000\r\n")
        sock.sendall(b"x" * ((1 << 20) + 1))  # of the 2 MiB that were announced
        assert b"413" in sock.recv(20)
    assert lives(locked)


def test_an_upload_may_be_larger_than_a_question(locked):
    files = {"file": ("in.jsonl", b"x" * (3 << 20))}
    reply = locked.http.post("/v1/files", data={"purpose": "batch"}, files=files)
    assert reply.json()["bytes"] == 3 << 20


@pytest.mark.parametrize("beginning", [b"", b"POST /v1/ch", ASK])
def test_who_never_sends_the_headers_is_let_go(locked, beginning):
    with connected(locked) as sock:
        sock.sendall(beginning)
        began = time.monotonic()
        assert answer_on(sock) == b""
        assert time.monotonic() < began + 8
    assert lives(locked)


def test_who_asks_once_and_never_sends_the_next_headers_is_let_go(locked):
    with connected(locked) as sock:
        for beginning in (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /he"):
            sock.sendall(beginning)
            time.sleep(0.1)
        began = time.monotonic()
        assert b"200 OK" in answer_on(sock)
        assert time.monotonic() < began + 4  # a connection without any request has 5 seconds
    assert lives(locked)


def test_who_never_sends_the_body_is_let_go(locked):
    with connected(locked) as sock:
        sock.sendall(ASK + b"Content-Length: 1000\r\n\r\n{")
        assert b"408" in answer_on(sock)[:20]
    assert lives(locked)


def test_a_thousand_connections_keep_nobody_from_being_answered(locked):
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connected(locked))
        wait_for(lambda: is_answered(locked))


def is_answered(server):
    try:
        return lives(server)
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(
    "name",
    [
        "../lock",
        "..%2flock",
        "%2e%2e%2flock",
        "/etc/passwd",
        "file-../../x",
        "file-0/..",
        "x" * 999,
    ],
)
def test_a_path_is_no_file(locked, name):
    for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{name}"):
        with connected(locked) as sock:
            head = ASK.replace(b"POST /v1/chat/completions", f"GET {path}".encode())
            sock.sendall(head + b"Connection: close\r\n\r\n")
            assert b"404" in answer_on(sock)[:20]
    assert locked.http.delete(f"/v1/files/{name.replace('/', '%2F')}").status_code in (404, 405)


def test_the_name_of_an_upload_is_data(locked, tmp_path):
    files = {"file": ("../../../evil.jsonl", b"{}")}
    told = locked.http.post("/v1/files", data={"purpose": "batch"}, files=files).json()
    assert told["filename"] == "../../../evil.jsonl"
    path = locked.service.data_dir / "files" / f"{told['id']}.jsonl"
    assert path.read_bytes() == b"{}"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_foreign_host_is_refused(locked, host):
    reply = locked.http.get("/v1/models", headers={"Host": host})
    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "foreign_host"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:8000", "[::1]:8000"])
def test_this_machine_has_several_names(locked, host):
    assert locked.http.get("/v1/models", headers={"Host": host}).status_code == 200


def test_pages_may_ask_only_from_where_it_was_allowed(locked, tmp_path):
    asks = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in locked.http.options("/v1/models").headers
    with served(tmp_path, cors_origins=("http://page.example",), keys=("k",)) as one:
        reply = one.http.options("/v1/chat/completions", headers=asks)
        assert reply.headers["access-control-allow-origin"] == "http://page.example"
        other = one.http.options("/v1/chat/completions", headers=asks | {"Origin": "http://x"})
        assert "access-control-allow-origin" not in other.headers


def test_a_script_of_a_foreign_page_is_refused_though_its_browser_sends_what_it_asks(tmp_path):
    """Text and forms go without a preflight, and only their answers are kept from the page."""
    body = json.dumps(chat("a")).encode()
    with served(tmp_path, cors_origins=("http://page.example",)) as one:
        replies = {
            origin: one.http.post(
                "/v1/chat/completions",
                content=body,
                headers={"Origin": origin, "Content-Type": "text/plain"},
            )
            for origin in ("http://evil.example", "null", "http://page.example")
        }
        assert [reply.status_code for reply in replies.values()] == [403, 403, 200]
        assert replies["null"].json()["error"]["code"] == "foreign_origin"
        assert one.server.hub.counts.ended.total() == 1


def test_who_never_reads_is_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr("dspark_batch.serve.server._UNREAD_S", 0.2)
    with served(tmp_path) as one:
        files = {"file": ("in.jsonl", b"x" * (24 << 20))}
        told = one.http.post("/v1/files", data={"purpose": "batch"}, files=files).json()
        one.http.close()
        connections = one.server._uvicorn.server_state.connections
        with connected(one) as sock:
            path = f"/v1/files/{told['id']}/content".encode()
            sock.sendall(b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path)
            wait_for(lambda: len(connections) == 1)
            wait_for(lambda: not connections, seconds=4)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "my-machine"])
def test_other_machines_are_served_with_a_key_or_when_that_is_said(tmp_path, host):
    spec = Spec(inputs=("live",), out="-")
    how = {"spec": spec, "data_dir": tmp_path, "host": host}
    with pytest.raises(UsageError, match="--no-auth"):
        Service(**how)
    assert not Service(**how, keys=("k",)).is_loopback
    assert not Service(**how, no_auth=True).is_loopback
