"""What a live request waits beside a full batch, and what the batch loses by live requests.

A server with the bundled pair answers one question after the other: alone, and beside a batch with
live slots. A second batch of the same requests runs with nobody asking. The clock of `/metrics` is
not used: a first token is timed by the client.

python -m benchmarks.serve --items 400 --probes 60
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from statistics import quantiles

import httpx

from benchmarks.common import held_out_records, print_line, surroundings

FINAL = ("completed", "failed", "cancelled", "expired")


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=400, help="requests of a batch")
    parser.add_argument("--probes", type=int, default=60, help="live requests, one by one")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two of them")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--live-slots", type=int, default=None)
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--port", "0", "--data-dir", folder, "--slots", str(args.slots)]
        if args.live_slots is not None:
            words += ["--live-slots", str(args.live_slots)]
        server = subprocess.Popen(
            [sys.executable, "-m", "dspark_batch", "serve", *words],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            url = re.search(r"http://[\d.:]+", server.stderr.readline())[0]
            with httpx.Client(base_url=url, timeout=300) as http:
                print_line(surroundings() | vars(args) | measured(http, args))
        finally:
            server.terminate()
            server.communicate()


def measured(http, args):
    """Measure with a server that has nothing else to do."""
    while http.get("/health").status_code != 200:
        time.sleep(0.2)
    prompts = [record["prompt"] for record in held_out_records(args.probes)]
    prompts = (prompts * args.probes)[: args.probes]
    probe(http, prompts[0])  # compiled and learnt, if anything is
    idle = asked(http, prompts, args.pause)
    alone_s, alone_tokens = batch(http, args.items, lambda: None)
    beside = []

    def ask():
        beside.extend(asked(http, prompts[len(beside) :][:1], args.pause))

    beside_s, beside_tokens = batch(http, args.items, ask)
    return {
        "first_token_s_idle": shown(idle),
        "first_token_s_beside_a_batch": shown(beside),
        "batch_tokens_per_s_alone": round(alone_tokens / alone_s, 1),
        "batch_tokens_per_s_beside_live": round(beside_tokens / beside_s, 1),
        "live_requests_beside": len(beside),
    }


def batch(http, num_items, meanwhile):
    """Run a batch; return its seconds and the tokens of its answers."""
    records = held_out_records(num_items)
    lines = []
    for n in range(num_items):
        asks = [{"role": "user", "content": records[n % len(records)]["prompt"]}]
        line = {"custom_id": f"q{n}", "method": "POST", "url": "/v1/chat/completions"}
        lines.append(json.dumps(line | {"body": {"messages": asks}}))
    files = {"file": ("in.jsonl", "\n".join(lines).encode())}
    upload = http.post("/v1/files", data={"purpose": "batch"}, files=files).json()
    how = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    began = time.perf_counter()
    told = http.post("/v1/batches", json=how | {"input_file_id": upload["id"]}).json()
    while told["status"] not in FINAL:
        meanwhile()
        time.sleep(0.05)
        told = http.get(f"/v1/batches/{told['id']}").json()
    seconds = time.perf_counter() - began
    content = http.get(f"/v1/files/{told['output_file_id']}/content").text.splitlines()
    bodies = [json.loads(line)["response"]["body"] for line in content]
    return seconds, sum(body["usage"]["completion_tokens"] for body in bodies)


def asked(http, prompts, pause):
    """Ask one question after the other; return the seconds to each first token."""
    times = []
    for prompt in prompts:
        times.append(probe(http, prompt))
        time.sleep(pause)
    return times


def probe(http, prompt):
    """Ask, read the whole answer, and return the seconds to its first text."""
    body = {"stream": True, "messages": [{"role": "user", "content": prompt}]}
    began, first = time.perf_counter(), None
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        for line in reply.iter_lines():
            if first is None and '"content":"' in line and '"content":""' not in line:
                first = time.perf_counter() - began
    return time.perf_counter() - began if first is None else first


def shown(times):
    """Median, and what one in twenty exceeds."""
    if len(times) < 2:
        return {"p50": times[0] if times else None, "p95": None}
    cuts = quantiles(times, n=20, method="inclusive")
    return {"p50": round(cuts[9], 4), "p95": round(cuts[18], 4)}


if __name__ == "__main__":
    main()
