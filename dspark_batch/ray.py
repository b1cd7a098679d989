"""A stage for a Ray Data pipeline: rows in, rows out, answered by resident pairs.

    from dspark_batch.ray import GenerateConfig, build_processor

    processor = build_processor(
        GenerateConfig(family="tiny", concurrency=4, max_tokens=512),
        preprocess=lambda row: {**row, "prompt": f"Summarise: {row['text']}"},
    )
    processor(ray.data.read_parquet("in/")).write_parquet("out/")

There is no journal here: what is kept, and what is done again after a crash, is the pipeline's.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeAlias, Unpack

import pyarrow as pa

from dspark_batch.errors import UsageError
from dspark_batch.generate import Options, spec_of_answers
from dspark_batch.hub import Hub
from dspark_batch.intake.reader import item_of, records_of_table
from dspark_batch.opening import Opened, answer, ask, open_pair
from dspark_batch.record.named_columns import wanted_columns
from dspark_batch.record.rows import ROW_SCHEMA, Row, layout_of, row_of
from dspark_batch.spec.spec import Spec
from dspark_batch.types import Failure, Item, Json, Request

try:
    import ray
    import ray.data
except ImportError as error:
    raise ImportError(
        f"dspark_batch.ray needs {error.name}: pip install 'dspark-batch[ray]'"
    ) from error

RowMap: TypeAlias = Callable[[dict[str, Json]], dict[str, Json]]

_BLOCKS_AT_ONCE = 2  # so that slots stay full while one block ends and the next begins


class GenerateConfig:
    """How a stage answers.

    Args:
        concurrency: workers, each with a pair of its own.
        batch_size: rows that go to a worker together; two such blocks are in its engine at a time.
        num_cpus: of each worker, as Ray counts them; None: Ray decides.
        num_gpus: of each worker, as Ray counts them; None: one if the cluster has any.
        options: as `generate` has them.

    Raises:
        UsageError: an option is impossible.
    """

    def __init__(
        self,
        *,
        concurrency: int = 1,
        batch_size: int = 64,
        num_cpus: float | None = None,
        num_gpus: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        for name, number in (("concurrency", concurrency), ("batch_size", batch_size)):
            if number < 1:
                raise UsageError(f"{name} is {number}, expected 1 or more.")
        self.spec = spec_of_answers(options)
        self.concurrency, self.batch_size = concurrency, batch_size
        self.num_cpus, self.num_gpus = num_cpus, num_gpus


class Processor:
    """Maps a dataset to one with answers; `build_processor` makes it."""

    def __init__(
        self, config: GenerateConfig, preprocess: RowMap | None, postprocess: RowMap | None
    ) -> None:
        self._config, self._preprocess, self._postprocess = config, preprocess, postprocess

    def __call__(self, dataset: "ray.data.Dataset") -> "ray.data.Dataset":
        """Add the stage to a dataset, which is computed when somebody consumes it."""
        config = self._config
        if self._preprocess is not None:
            dataset = dataset.map(self._preprocess)
        num_gpus = config.num_gpus
        if num_gpus is None:
            num_gpus = 1 if ray.cluster_resources().get("GPU") else None
        dataset = dataset.map_batches(
            Answers,
            fn_constructor_kwargs={"spec": config.spec},
            batch_size=config.batch_size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=config.concurrency,
                max_tasks_in_flight_per_actor=2 * _BLOCKS_AT_ONCE,
                max_concurrent_calls_per_actor=_BLOCKS_AT_ONCE,
                enable_true_multi_threading=True,
            ),
            num_cpus=config.num_cpus,
            num_gpus=num_gpus,
            udf_modifying_row_count=False,
        )
        return dataset if self._postprocess is None else dataset.map(self._postprocess)


def build_processor(
    config: GenerateConfig,
    preprocess: RowMap | None = None,
    postprocess: RowMap | None = None,
) -> Processor:
    """Make a stage that answers the rows of a dataset.

    A row is asked what a record of an input is: it has a `prompt`, `messages` or another known
    shape, and a `custom_id` and `sampling_params` if it wants. Out come its columns and those of a
    row of `run`. A row that has no answer says why in `status` and `error`.

    Args:
        config: who answers, and how.
        preprocess: makes of a row the one that is asked; None: it is asked as it is.
        postprocess: makes of a row with its answer the one that comes out; None: all of it does.
    """
    return Processor(config, preprocess, postprocess)


class Answers:
    """Answers tables of rows in the process of one worker, from any of its threads.

    Args:
        spec: how.
        open_engine: loads the pair.

    Raises:
        DsparkBatchError: the pair cannot be loaded.
    """

    def __init__(self, spec: Spec, open_engine: Callable[[Spec, None], Opened] = open_pair) -> None:
        self._spec = spec
        self._is_up = False
        self._hub = Hub(lambda: open_engine(spec, None), on_end=self._lost)
        self._hub.opened()
        self._is_up = True

    def __call__(self, table: pa.Table) -> pa.Table:
        """Give a table its answers, in its order.

        Raises:
            UsageError: it has a column with one of our names.
        """
        if shared := layout_of(self._spec).clashes(table.column_names):
            raise UsageError(
                f"the rows have a column `{min(shared)}`, which is one of ours; rename it in "
                "preprocess."
            )
        rows = self._rows(table)
        ours = pa.RecordBatch.from_pylist([rows[i] for i in range(table.num_rows)], ROW_SCHEMA)
        for name in set(table.column_names) & set(ROW_SCHEMA.names):
            table = table.drop_columns(name)
        for field, column in zip(ROW_SCHEMA, ours.columns, strict=True):
            table = table.append_column(field, column)
        return table

    def close(self) -> None:
        """Let go of the engine."""
        self._hub.close()

    def _rows(self, table: pa.Table) -> dict[int, Row]:
        """Answer each row, by its place in the table."""
        opened = self._hub.view(self._spec, None)
        try:
            outcomes = answer(self._spec, opened, self._requests(table, opened), _always)
            return {outcome.item.index: row_of(outcome) for outcome in outcomes}
        except BaseException as error:
            if self._hub.error is not None:
                self._lost(error)
            raise

    def _requests(self, table: pa.Table, opened: Opened) -> Iterator[Request | Failure]:
        for record in records_of_table(table, wanted_columns(self._spec)):
            named = _named(record)
            yield named if isinstance(named, Failure) else ask(self._spec, opened, named)

    def _lost(self, error: BaseException) -> None:
        """End the process: Ray gives its blocks to a new worker, which an exception would not."""
        if self._is_up:
            _end_process(error)


def _end_process(error: BaseException) -> NoReturn:
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def _always(item: Item) -> bool:
    """Begin every item."""
    return True


def _named(record: Item | Failure) -> Item | Failure:
    """Call a row by what it is: its place depends on how Ray cut the blocks."""
    item = item_of(record)
    name = f"#{item.digest}" if item.custom_id == f"#{item.index}" else item.custom_id
    named = item._replace(custom_id=name, where=f"row {name}")
    if isinstance(record, Item):
        return named
    return record._replace(
        item=named, message=named.where + record.message.removeprefix(item.where)
    )
