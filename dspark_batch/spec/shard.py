"""Which records one of N processes answers, when they share a job without talking to each other."""

import re
from dataclasses import dataclass

from dspark_batch.errors import UsageError

_SHARD = re.compile(r"([1-9]\d*)/([1-9]\d*)")


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` parts of the records."""

    number: int  # 1..count
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def part_of(self, num_records: int) -> range:
        """Say which of the records are this shard's.

        The parts are neighbours, in order and as equal as can be, so each record is in exactly one,
        and prompts that begin alike and stand together stay together.

        Raises:
            UsageError: there are fewer records than shards.
        """
        if num_records < self.count:
            raise UsageError(
                f"shard is {self}, but the job has {num_records} records; make at most "
                f"{num_records} shards."
            )
        begin = num_records * (self.number - 1) // self.count
        return range(begin, num_records * self.number // self.count)


def read_shard(said: str) -> Shard:
    """Read a shard as it is typed, "3/16".

    Raises:
        UsageError: it is something else.
    """
    match = _SHARD.fullmatch(said)
    shard = Shard(*map(int, match.groups())) if match else None
    if shard is None or shard.number > shard.count:
        raise UsageError(f"shard is {said!r}, expected one of the parts 1/N to N/N, as 3/16.")
    return shard
