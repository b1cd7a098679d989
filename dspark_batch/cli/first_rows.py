"""The first rows of a run, as they finish: what `--show N` puts beside the progress."""

from typing import TYPE_CHECKING

from dspark_batch.intake.mapping import last_question
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Completion
from dspark_batch.wording import one_line

if TYPE_CHECKING:
    from dspark_batch.output.report import Tick
    from dspark_batch.types import Outcome

_MOST_ASKED, _MOST_ANSWERED = 40, 60  # characters


class FirstRows:
    """Puts the first rows into words, a line for each."""

    def __init__(self, limit: int, spec: Spec) -> None:
        self._left = limit
        self._spec = spec

    def __call__(self, tick: "Tick") -> str:
        """Say what has just finished; "": nothing, or enough was shown."""
        if tick.outcome is None or not self._left:
            return ""
        self._left -= 1
        item = tick.outcome.item
        asked = _cut(last_question(item.record, self._spec), _MOST_ASKED)
        return f"{item.custom_id}: {asked} -> {_cut(_said(tick.outcome), _MOST_ANSWERED)}"


def _said(outcome: "Outcome") -> str:
    return outcome.text if isinstance(outcome, Completion) else outcome.message


def _cut(text: str, most: int) -> str:
    line = one_line(text)
    return line if len(line) <= most else line[: most - 1] + "…"
