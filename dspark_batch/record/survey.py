"""The first pass over the input: what there is, and which of it is finished already."""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from typing import Protocol

from dspark_batch.errors import Resumable, UsageError
from dspark_batch.intake.mapping import ignored_in
from dspark_batch.intake.reader import Source, count_records, item_of, read
from dspark_batch.record.formats import InputJson
from dspark_batch.record.journal import Found, Retries
from dspark_batch.record.named_columns import NamedColumns
from dspark_batch.record.rows import Layout, layout_of
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Item

TO_DO = -1


class Claims(Protocol):
    """The journal, as far as a survey knows it."""

    def claim(self, item: Item, retries: Retries) -> Found | None:
        """Take a finished row of this very record; None: it has to run."""
        ...


# A row in JSON: its fixed part, and for each token its text, its id and its share of the metrics.
_ROW_BYTES, _TOKEN_BYTES = 900, 20


@dataclass(frozen=True, slots=True)
class Survey:
    """What a start finds. The array is the run's only memory of its items."""

    inputs: tuple[InputJson, ...]  # path, bytes, sha256 and records of each file
    part: range  # of the records: those of the job
    offsets: "array[int]"  # of the rows in the journal, or TO_DO, by item of these records
    resumed: int  # rows that earlier starts left
    failed: int  # of these, how many are failures; what the job says to skip is none
    ignored: Mapping[str, int]  # field that is left aside -> records that have it
    hints: tuple[str, ...] = ()  # what the columns suggest, for people

    @property
    def total(self) -> int:
        """Rows of the job: one for each sample of each record."""
        return len(self.offsets)

    @property
    def samples(self) -> int:
        """Rows of each record."""
        return self.total // max(1, len(self.part))

    @property
    def num_to_do(self) -> int:
        """Rows that are missing."""
        return self.offsets.count(TO_DO)

    def is_to_do(self, index: int) -> bool:
        """Whether the item with an index has no row; one that is none of the job's is not asked."""
        place = self._place(index)
        return 0 <= place < self.total and self.offsets[place] == TO_DO

    def offset_of(self, index: int) -> int:
        """Say where in the journal the row of the item with an index is; TO_DO: it has none."""
        return self.offsets[self._place(index)]

    def add(self, index: int, offset: int) -> None:
        """Note where the row of the item with an index is."""
        self.offsets[self._place(index)] = offset

    def _place(self, index: int) -> int:
        return index - self.part.start * self.samples


def most_bytes(found: Survey, spec: Spec) -> int:
    """Estimate the most that the journal and the output may still grow by."""
    row = _ROW_BYTES + _TOKEN_BYTES * spec.max_tokens
    to_do = found.total - found.resumed
    records = sum(each["records"] for each in found.inputs)
    passed_through = sum(each["bytes"] for each in found.inputs) * found.total // records
    return row * (to_do + found.total) + passed_through


def survey(sources: Sequence[Source], spec: Spec, journal: Claims) -> Survey:
    """Count and digest the inputs, and claim the finished row of every record that has one.

    A shard looks at the other shards' records as well, so that all of them refuse the same.

    Raises:
        UsageError: no records, an input that cannot be read, or a column with one of our names.
        Resumable: the input shrank while it was read.
    """
    inputs = tuple(describe(source) for source in sources)
    records = sum(described["records"] for described in inputs)
    if not records:
        names = ", ".join(source.name for source in sources)
        raise UsageError(f"{names}: holds no records; give it at least one line or row.")
    part = spec.part_of(records)
    offsets = array("q")
    failed = 0
    layout, named, retries = layout_of(spec), NamedColumns(spec), spec.retries()
    ignored: Counter[str] = Counter()
    for record in read(sources, spec.limited(records), spec.samples):
        item = item_of(record)
        named.see(item.record, is_whole=isinstance(record, Item))
        if spec.ignore_fields and not item.sample_index:
            ignored.update(ignored_in(item.record, spec))
        if spec.format == "rows":
            _refuse_clash(item, layout)
        if item.index // spec.samples not in part:
            continue
        row = journal.claim(item, retries)
        offsets.append(TO_DO if row is None else row.offset)
        failed += row is not None and row.errored
    named.check(", ".join(source.name for source in sources))
    resumed = len(offsets) - offsets.count(TO_DO)
    if len(offsets) < len(part) * spec.samples:
        raise Resumable(f"{sources[-1].name} shrank while it was read; run the same command again.")
    return Survey(inputs, part, offsets, resumed, failed, dict(ignored), named.hints())


def describe(source: Source) -> InputJson:
    """Digest a file and count its records."""
    with source.path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
        size = file.tell()
    return {
        "path": source.name,
        "bytes": size,
        "sha256": digest,
        "records": count_records(source),
    }


def _refuse_clash(item: Item, layout: Layout) -> None:
    shared = layout.clashes(item.record)
    if shared:
        raise UsageError(
            f"{item.where}: the input has a column `{min(shared)}`, which is one of ours; "
            "tell them apart with --output-prefix, or leave it out with --drop."
        )
