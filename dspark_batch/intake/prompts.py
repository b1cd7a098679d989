"""What the prompts of a job have in common: ids, contents, beginnings; a few bytes for each."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from dspark_batch.types import Item, Request

BLOCK = 16  # tokens by which beginnings are compared
_MOST_BEGINNINGS = 2_000_000  # further ones are only looked up, so that memory ends somewhere
_SHOWN_IDS = 3


@dataclass(slots=True)
class Prompts:
    """The prompts of a job, added up one by one."""

    lengths: "array[int]" = field(default_factory=lambda: array("q"))  # tokens
    longest: int = 0  # tokens
    longest_at: str | None = None  # the place of the longest one; None: there is none
    repeated_tokens: int = 0  # in whole blocks that begin an earlier prompt too
    repeated_contents: int = 0  # records that an earlier one equals byte for byte
    repeated_ids: int = 0
    first_repeated_ids: list[str] = field(default_factory=list)
    _beginnings: set[int] = field(default_factory=set)
    _digests: set[str] = field(default_factory=set)
    _ids: set[str] = field(default_factory=set)

    def see(self, item: Item) -> None:
        """Count a record, whether or not it can be asked."""
        self.repeated_contents += item.digest in self._digests
        self._digests.add(item.digest)
        if item.custom_id in self._ids:
            self.repeated_ids += 1
            is_new = item.custom_id not in self.first_repeated_ids
            if is_new and len(self.first_repeated_ids) < _SHOWN_IDS:
                self.first_repeated_ids.append(item.custom_id)
        self._ids.add(item.custom_id)

    def add(self, request: Request) -> None:
        """Count a prompt."""
        if len(request.prompt_ids) > self.longest:
            self.longest, self.longest_at = len(request.prompt_ids), request.item.where
        self.lengths.append(len(request.prompt_ids))
        self._compare(request.prompt_ids)

    @property
    def tokens(self) -> int:
        """Of all prompts."""
        return sum(self.lengths)

    @property
    def median(self) -> int:
        """Tokens of a prompt in the middle."""
        return sorted(self.lengths)[len(self.lengths) // 2] if self.lengths else 0

    def _compare(self, ids: Sequence[int]) -> None:
        """Find how many leading blocks an earlier prompt has too, and remember the rest."""
        beginning, is_repeated = 0, True
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            beginning = hash((beginning, *ids[start : start + BLOCK]))
            is_repeated = is_repeated and beginning in self._beginnings
            if is_repeated:
                self.repeated_tokens += BLOCK
            elif len(self._beginnings) < _MOST_BEGINNINGS:
                self._beginnings.add(beginning)
