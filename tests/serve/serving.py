"""Servers for tests, with a fake engine unless told otherwise."""

import json
import threading
import time
from contextlib import contextmanager

import httpx
from fakes import FakeSteps, fake_steps_opener

from dspark_batch.serve.server import Server
from dspark_batch.serve.service import Service
from dspark_batch.spec.spec import Spec


class Served:
    """A server on the loopback, in a thread of its own."""

    def __init__(self, folder, opener, **service):
        spec = Spec(inputs=("live",), out="-", grace=1, **service.pop("spec", {}))
        self.service = Service(spec=spec, data_dir=folder, port=0, **service)
        self.server = Server(self.service, opener)
        self.error = None
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._is_ready.wait(20), self.error
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def _run(self):
        try:
            self.server.run(self._ready)
        except Exception as error:  # noqa: BLE001  for the test to look at
            self.error = error
        finally:
            self._is_ready.set()

    def _ready(self, url):
        self.url = url
        self._is_ready.set()

    def wait_until_loaded(self):
        wait_for(lambda: self.http.get("/health").status_code == 200)

    def close(self):
        self.server.stop()
        self.join()
        self.http.close()

    def join(self):
        self._thread.join(20)
        assert not self._thread.is_alive()


@contextmanager
def served(folder, engine=None, opener=None, **service):
    """Serve until the block ends."""
    one = Served(folder, opener or fake_steps_opener(engine or FakeSteps()), **service)
    try:
        one.wait_until_loaded()
        yield one
    finally:
        one.close()


def wait_for(is_true, seconds=20):
    """Wait until something is so."""
    ends = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < ends
        time.sleep(0.01)


def chat(text, **more):
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], **more}


def batch_line(name, body, url="/v1/chat/completions"):
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def jsonl(*lines):
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def events_of(text):
    """Read a stream of events; the last one is [DONE], or an error."""
    return [
        json.loads(line.removeprefix("data: ")) if line != "data: [DONE]" else "[DONE]"
        for line in text.split("\n\n")
        if line.startswith("data: ")
    ]


def said_in(events):
    """Put the parts of a streamed chat together."""
    deltas = [e["choices"][0]["delta"] for e in events if e != "[DONE]" and e["choices"]]
    parts = [[d.get(name, "") for d in deltas] for name in ("reasoning_content", "content")]
    return tuple("".join(texts) for texts in parts)
