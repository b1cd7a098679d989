"""The audit that rides along: answers of a share are decoded again before they become rows."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from dspark_batch.audit.replay import Baseline, Claim, Difference, replay
from dspark_batch.errors import EqualityError
from dspark_batch.record.rows import AnswerRow, answer_row
from dspark_batch.spec.share import is_in_share
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Completion, Failure, Item, Outcome

log = logging.getLogger("dspark_batch")

ClaimsOf = Callable[[Item, AnswerRow], "list[Claim] | Failure"]


class Auditor:
    """Compares answers with the baseline, several at once.

    At most as many answers wait as the run has slots. They are no rows yet, so a crash costs
    generating them again, and nothing else.

    Args:
        spec: the job.
        baseline: what answers must be equal to.
        claims_of: what the row of an item claims.
        divergence: as `divergence_of` gives it.
        slots: answers that the baseline decodes together.
        on_spent: is told of the seconds of each comparison.

    Attributes:
        seconds: spent on the baseline.
        mismatches: answers that were not equal.
    """

    def __init__(
        self,
        spec: Spec,
        baseline: Baseline,
        claims_of: ClaimsOf,
        divergence: float,
        slots: int = 1,
        on_spent: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._spec = spec
        self._baseline = baseline
        self._claims_of = claims_of
        self._divergence = divergence
        self._slots = slots
        self._on_spent = on_spent
        self.seconds = 0.0
        self.mismatches = 0

    def verified(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        """Pass outcomes on, those of the share with the word whether they are the baseline's.

        Raises:
            EqualityError: as many were not as the job allows; the last of them has been passed on.
        """
        waiting: list[Completion] = []
        for outcome in outcomes:
            if isinstance(outcome, Failure) or not self._is_due(outcome):
                yield outcome
                continue
            waiting.append(outcome)
            if len(waiting) == self._slots:
                yield from self._compared(waiting)
                waiting = []
        yield from self._compared(waiting)

    def _is_due(self, completion: Completion) -> bool:
        return is_in_share(completion.item, self._spec.audited_share)

    def _compared(self, waiting: Sequence[Completion]) -> Iterator[Outcome]:
        asked = []
        for completion in waiting:
            claims = self._claims_of(completion.item, answer_row(completion))
            # What no baseline can answer again, such as a draw by the rejection rule, is passed on.
            if isinstance(claims, Failure) or not self._is_replayable(claims):
                yield completion
            else:
                asked.append((completion, claims))
        began = time.monotonic()
        found = list(replay(self._baseline, asked, self._divergence)) if asked else []
        spent = time.monotonic() - began
        self.seconds += spent
        self._on_spent(spent)
        for completion, difference in found:
            yield completion._replace(verified=difference is None)
            if difference is not None:
                self._count(difference)

    def _is_replayable(self, claims: Sequence[Claim]) -> bool:
        is_coupled = self._spec.sampling == "coupled"
        return is_coupled or all(claim.request.sampling.is_greedy for claim in claims)

    def _count(self, difference: Difference) -> None:
        self.mismatches += 1
        if self.mismatches < self._spec.max_mismatches:
            log.warning("not what plain decoding gives: %s", difference)
            return
        raise EqualityError(
            f"not what plain decoding gives: {difference}. The row is kept with verified false; "
            f"look further with dspark-batch verify {self._spec.out}. The same command goes on "
            "behind it, and --max-mismatches N stops at the Nth only."
        )
