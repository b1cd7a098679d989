"""The bundled pair's tasks: short instructions, each with a worked answer."""

from dspark_batch.train.tasks.code import CODE_KINDS
from dspark_batch.train.tasks.numbers import NUMBER_KINDS
from dspark_batch.train.tasks.prose import PROSE_KINDS
from dspark_batch.train.tasks.records import RECORD_KINDS
from dspark_batch.train.tasks.task import MakeTask, Task
from dspark_batch.train.tasks.text import TEXT_KINDS
from dspark_batch.train.tasks.time import TIME_KINDS

# kind -> the function that draws one task of it
KINDS: dict[str, MakeTask] = {
    **NUMBER_KINDS,
    **TIME_KINDS,
    **TEXT_KINDS,
    **RECORD_KINDS,
    **CODE_KINDS,
    **PROSE_KINDS,
}

__all__ = ["KINDS", "MakeTask", "Task"]
