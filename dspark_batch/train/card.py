"""The model card of a drafter: what it was made of, and what it was measured to do."""

from collections.abc import Iterator, Sequence

from dspark_batch.output.look import Look
from dspark_batch.train.training import Reports, Training
from dspark_batch.wording import count

_KIND = {"dspark": "DSpark", "dflash": "DFlash"}
_HUB_NAME = 2  # parts of OWNER/NAME


def model_card(training: Training, job: Look) -> str:
    """Write the README.md of a drafter's directory.

    Args:
        training: what came out.
        job: a run that it learnt from; its target is named if the Hub knows it.
    """
    about, target = training.about, _target(job)
    front = ["---", *([f"base_model: {target}"] if target else [])]
    front += ["tags:", "- speculative-decoding", f"- {about['kind']}", "- dspark-batch", "---"]
    words = (
        f"A {_KIND[about['kind']]} drafter for {target or 'a target of its maker'}, trained by "
        f"`dspark-batch train-drafter` on {count(training.answers)} answers of the target itself. "
        f"It drafts {about['block']} tokens in one pass. DeepSpec's packaging; the embedding and "
        "the head are the target's."
    )
    parts = ["\n".join(front), f"# {training.to}", words]
    parts += [f"## Measured\n\n{_measured(training)}"]
    parts += ["## Training\n\n" + _table(("", ""), _settings(training))]
    parts += [
        "## Use\n\n```sh\ndspark-batch run prompts.jsonl -o out.jsonl "
        f"--target {target or 'TARGET'} --drafter {training.to}\n```"
    ]
    return "\n\n".join(parts) + "\n"


def _target(job: Look) -> str | None:
    """Name the target as the Hub does; None: it was a directory of somebody's machine."""
    source = str(job.manifest["identity"].get("target_source") or "")
    name = source.partition("@")[0]
    return name if "@" in source and len(name.split("/")) == _HUB_NAME else None


def _measured(training: Training) -> str:
    says = (
        f"{count(training.held_out)} answers that training never saw, each drafted again as greedy "
        "verification would. Accept length counts the target's own token of a round; accept rate k "
        "is the share of rounds that kept draft k."
    )
    heads: tuple[str, ...] = ("answers of", "tokens", "accept length", "accept rate by position")
    rows = list(_rows(training.after))
    if training.before is None:
        return f"{says}\n\n{_table(heads, rows)}"
    before = {name: each["accept_length"] for name, each in training.before.items()}
    heads = (*heads[:2], "before", *heads[2:])
    rows = [(*row[:2], f"{before[row[0]]:.2f}", *row[2:]) for row in rows]
    return f"{says}\n\n{_table(heads, rows)}"


def _rows(reports: Reports) -> Iterator[tuple[str, ...]]:
    for name, report in reports.items():
        rates = " ".join(f"{rate:.2f}" for rate in report["accept_rate"])
        yield name, count(report["tokens"]), f"{report['accept_length']:.2f}", rates


def _settings(training: Training) -> list[tuple[str, str]]:
    settings = [(name.replace("_", " "), _said(value)) for name, value in training.about.items()]
    left_out = [(f"rows {why}", f"{count(n)}, left out") for why, n in training.left_out.items()]
    return [*settings, ("answers", count(training.answers)), *left_out]


def _said(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.3g}"
    return count(value) if isinstance(value, int) else str(value)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    cells = (" | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in r) for r in lines)
    return "\n".join(f"| {line} |" for line in cells)
