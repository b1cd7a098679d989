"""Train a drafter on the rows of finished runs: the target's own answers.

    rows -> ids on the disk -> batch -> target (frozen) -> drafter -> loss
                                                              |
                                               state, every so many steps

A training is a function of its plan. The same command goes on where it stopped.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from dspark_batch.check import Reads, open_reading
from dspark_batch.errors import UsageError
from dspark_batch.output.look import Look, look
from dspark_batch.record.run_dir import RunDir
from dspark_batch.spec.budget import Budget
from dspark_batch.train.training import Asked, Lesson, Observe, Training

__all__ = ["Asked", "Lesson", "Training", "train_drafter"]

_MUST_AGREE = ("target", "tokenizer", "chat_template", "target_bits")
_READ_AGAIN = ("tokenizer", "chat_template")


def _ignore(lesson: Lesson) -> None:
    """Tell nobody."""


def _never() -> bool:
    """Go on to the end."""
    return False


def train_drafter(  # noqa: PLR0913  each is an option of the command
    outs: Sequence[str],
    to: str,
    asked: Asked | None = None,
    *,
    max_runtime: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    observe: Observe = _ignore,
    stop: Callable[[], bool] = _never,
) -> Training:
    """Train a drafter for the target of some runs, and measure it on answers it never saw.

    Args:
        outs: outputs of runs of one target; their items that are finished count.
        to: the directory of the drafter.
        asked: sizes, steps and what else a rule would decide.
        max_runtime: stop after so long, "45m"; the same command goes on.
        overwrite: start over.
        trust_remote_code: let the target run Python code of its own, as the runs may have done.
        observe: told how far it is.
        stop: asked behind each step; once it says yes, the state is saved and it ends.

    Raises:
        UsageError: the options or the runs are not such that a drafter can be made of them.
        ResumeMismatch: `to` belongs to another training.
        ModelError: the loss is no number any more.
        OutputInUse: another process trains it.
        Resumable: the time is over, or `stop` said so; the same command goes on.
    """
    asked = asked or Asked()
    _refuse_sizes_of_trained(asked)
    jobs = [look(out, trust_remote_code=trust_remote_code) for out in outs]
    budget = Budget(None, max_runtime)
    _refuse_several_targets(jobs)
    reads = open_reading(replace(jobs[0].spec, drafter=None))
    _refuse_other_reading(jobs[0], reads)
    from dspark_batch.train.session import Session

    with RunDir(to).lock():
        session = Session(to, jobs, asked, observe, stop)
        return session.run(reads.render, reads.context_length, budget, overwrite=overwrite)


def _refuse_sizes_of_trained(asked: Asked) -> None:
    if asked.init is not None and asked.sizes:
        raise UsageError(
            f"--{next(iter(asked.sizes))} is for a new drafter, and --init {asked.init} has its "
            "own. Leave one of them out."
        )


def _refuse_several_targets(jobs: Sequence[Look]) -> None:
    first = jobs[0]
    for job in jobs[1:]:
        for part in _MUST_AGREE:
            here, there = (each.manifest["identity"].get(part) for each in (job, first))
            if here != there:
                raise UsageError(
                    f"{job.run_dir.out} is a run of another target than {first.run_dir.out}: its "
                    f"{part} is {_short(here)} and not {_short(there)}. A drafter learns from one "
                    "target; train one for each."
                )


def _refuse_other_reading(job: Look, reads: Reads) -> None:
    for part in _READ_AGAIN:
        there, here = job.manifest["identity"].get(part), reads.identity.get(part)
        if there != here:
            raise UsageError(
                f"{job.run_dir.out}: the target's {part} is {_short(here)} now and was "
                f"{_short(there)} when it ran, so its prompts would be others. Put the old target "
                "back, or run the job again."
            )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}…"
