"""What a server has done, as Prometheus reads it; vLLM's names behind `dspark:`."""

from itertools import accumulate

from dspark_batch.hub import Hub


def metrics(hub: Hub) -> str:
    """Write the metrics of a hub."""
    counts = hub.counts
    lines = [
        *_one("num_requests_running", "gauge", hub.num_running),
        *_one("num_requests_waiting", "gauge", hub.num_waiting),
        *_one("prompt_tokens_total", "counter", counts.prompt_tokens),
        *_one("generation_tokens_total", "counter", counts.generated_tokens),
        *_one("spec_decode_num_drafts_total", "counter", counts.rounds),
        *_one("spec_decode_num_draft_tokens_total", "counter", counts.drafted),
        *_one("spec_decode_num_accepted_tokens_total", "counter", counts.accepted),
        "# TYPE dspark:request_success_total counter",
    ]
    for reason, number in sorted(dict(counts.ended).items()):
        lines.append(f'dspark:request_success_total{{finished_reason="{reason}"}} {number}')
    name = "dspark:time_to_first_token_seconds"
    lines.append(f"# TYPE {name} histogram")
    seen = list(accumulate(counts.first_tokens))
    for bucket, number in zip((*counts.buckets, "+Inf"), seen, strict=True):
        lines.append(f'{name}_bucket{{le="{bucket}"}} {number}')
    lines += [f"{name}_sum {counts.first_token_s:.6f}", f"{name}_count {seen[-1]}"]
    return "\n".join(lines) + "\n"


def _one(name: str, kind: str, value: float) -> list[str]:
    return [f"# TYPE dspark:{name} {kind}", f"dspark:{name} {value}"]
