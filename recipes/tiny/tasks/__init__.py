"""The bundled pair's tasks: short instructions, each with a worked answer."""

from recipes.tiny.tasks.code import CODE_KINDS
from recipes.tiny.tasks.numbers import NUMBER_KINDS
from recipes.tiny.tasks.prose import PROSE_KINDS
from recipes.tiny.tasks.records import RECORD_KINDS
from recipes.tiny.tasks.task import MakeTask, Task
from recipes.tiny.tasks.text import TEXT_KINDS
from recipes.tiny.tasks.time import TIME_KINDS

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
