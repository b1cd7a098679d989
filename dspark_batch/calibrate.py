"""Fit what a pair's confidences mean, from the log of a run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from dspark_batch.errors import UsageError
from dspark_batch.numerics.calibration import Round, calibration_errors, fit_temperatures
from dspark_batch.record.journal import scan
from dspark_batch.record.rows import Row
from dspark_batch.record.run_dir import RunDir


@dataclass(frozen=True, slots=True)
class Calibration:
    """How confidences must be divided, and what it is good for; tuples go by block position."""

    temperatures: tuple[float, ...]
    error_before: tuple[float, ...]  # expected calibration error of prefix survival, 0 to 1
    error_after: tuple[float, ...]
    num_rounds: int  # both errors come from one half of them, the temperatures from the other
    path: Path | None  # where they are kept; None: they are not, the error did not fall


def calibrate(out: str) -> Calibration:
    """Fit the confidence temperatures of the pair that made `out`, and keep them with the pair.

    They are used from then on wherever the pair is loaded, by `confidence_threshold`. They are
    not kept if they are no better on answers that they were not fitted to: then the confidences
    were right, or the log is short.

    Args:
        out: the output of a run with `log_confidence`; the run may still be unfinished.

    Raises:
        UsageError: there is no such run, or it logged too little.
    """
    # MLX loads only now, so that this module can be named without it.
    from dspark_batch.drafters.calibration import keep_temperatures

    run_dir = RunDir(out)
    manifest = run_dir.manifest()
    if manifest is None:
        raise UsageError(f"{run_dir.path}: no run here. Name the output of a run.")
    items = list(_logged(run_dir, manifest["run_id"]))
    fitted, measured = (list(chain.from_iterable(half)) for half in (items[::2], items[1::2]))
    if not (fitted and measured):
        raise UsageError(
            f"{run_dir.rows}: confidences of {len(items)} answers, expected 2 or more of several "
            "rounds. Run with --log-confidence, with more items and --confidence-threshold 0."
        )
    temperatures = fit_temperatures(fitted)
    before = calibration_errors(measured, [1.0] * len(temperatures))
    after = calibration_errors(measured, temperatures)
    path = None
    if sum(after) < sum(before):
        about = {"error_before": before, "error_after": after}
        path = keep_temperatures(manifest["identity"], temperatures, **about)
    return Calibration(temperatures, before, after, len(fitted) + len(measured), path)


def _logged(run_dir: RunDir, run_id: str) -> Iterator[Sequence[Round]]:
    """Yield the logged rounds of each answer that has some."""
    with run_dir.rows.open("rb") as journal:
        for line in scan(journal, run_id, str(run_dir.rows)):
            if rounds := _rounds(line.entry.row):
                yield rounds


def _rounds(row: Row) -> list[Round]:
    if row["status"] != "succeeded":
        return []
    log = row["metrics"]["speculative_decoding"]
    rounds = zip(log["per_step_confidence"] or [], log["per_step_accepted"], strict=False)
    # A limit or a stop may have cut the last round, so its count of accepted drafts is no label.
    return [Round(*logged) for logged in rounds][:-1]
