"""The page of a training: how it learnt, and what it was measured to do."""

from dspark_batch.page import charts
from dspark_batch.page.page import Number, Picture, Table, filled
from dspark_batch.train.measure import ALL
from dspark_batch.train.training import Training
from dspark_batch.wording import count

_CURVES = {
    "loss": ("Loss", "What a step minimises, averaged between two points."),
    "accept_length": (
        "Accept length, expected",
        "What sampled drafts of the answers in training could expect, bonus included. Answers that "
        "training never saw have less.",
    ),
}


def training_page(training: Training) -> str:
    """Write the page."""
    after, before, steps = training.after, training.before, [p["step"] for p in training.curve]
    pictures = [
        Picture(title, says, charts.curve(steps, [p[name] for p in training.curve], name))
        for name, (title, says) in _CURVES.items()
    ]
    was = None if before is None else before[ALL]["accept_rate"]
    says = "Of the rounds on held-out answers, the share that kept this draft and all before it."
    rates = charts.rates_by_position(after[ALL]["accept_rate"], was)
    pictures.append(Picture("Accept rate by position", says, rates))
    return filled(
        training.to,
        f"A {training.about['kind']} drafter, trained in {count(training.about['steps'])} steps.",
        [
            Number("accept length, held out", f"{after[ALL]['accept_length']:.2f}"),
            *([Number("before", f"{before[ALL]['accept_length']:.2f}")] if before else []),
            Number("answers learnt", count(training.answers)),
            Number("answers held out", count(training.held_out)),
        ],
        pictures,
        [_by_group(training)],
    )


def _by_group(training: Training) -> Table:
    rows = [
        (name, count(each["tokens"]), f"{each['accept_length']:.2f}")
        for name, each in training.after.items()
    ]
    says = "Tokens that rounds committed, and how many of them a round."
    return Table("Held-out answers", says, rows, ("answers of", "tokens", "accept length"))
