"""A Hub on this machine: serves directories as repositories, as far as its client asks."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from checkpoints import COMMIT
from huggingface_hub import constants

GATED, MISSING = "somebody/gated", "somebody/missing"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append(self.path)
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+", path):
            self._json([_entry(file) for file in self._files(found[1])])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/(.+))?", path):
            self._about(found[1], found[3])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(*found.groups())
        else:
            self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def _files(self, repo):
        return sorted(self.server.repos[repo].iterdir())

    def _about(self, repo, revision):
        if repo not in self.server.repos and repo != GATED:
            self._refuse(404, "RepoNotFound")
        elif revision not in (None, "main", "v1", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif repo == GATED:
            self._refuse(403, "GatedRepo")
        else:
            files = [{"rfilename": file.name} for file in self._files(repo)]
            self._json({"id": repo, "sha": COMMIT, "siblings": files})

    def _file(self, repo, name):
        content = (self.server.repos[repo] / name).read_bytes()
        if self.command == "GET" and name in self.server.breaks:
            self.close_connection = True  # the network goes away in the middle of a file
            content = content[: len(content) // 2]
        size = (self.server.repos[repo] / name).stat().st_size
        etag = {"ETag": f'"{_blob_id(self.server.repos[repo] / name)}"', "X-Repo-Commit": COMMIT}
        self._send(200, content, etag | {"Content-Length": str(size)})

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status, code):
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"{code} says so"})

    def _send(self, status, content, headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def _blob_id(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _entry(path):
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": _blob_id(path)}


@contextmanager
def serving(repos):
    """Serve {ORG/NAME: directory}; `breaks` of the result names files that end in the middle."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.repos, server.breaks, server.asked = repos, set(), []
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def point_client_at(monkeypatch, cache, server=None):
    """Let the Hub's client use this cache, and this server; without one there is no network."""
    port = server.server_port if server else 9  # discard: nobody listens
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
