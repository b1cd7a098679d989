"""Lets transformers start without reading its models' files, and then reading them again.

transformers finds out which of its files has which name by reading the 1,700 files of its models
when it is imported, and once more for `AutoTokenizer`: 0.7 s of every start. What it finds follows
from these files. So they are read once, and what was found is kept until one of them changes. A
transformers that does this in another way is left alone.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

import orjson

from dspark_batch.errors import UsageError

# What must be installed for some modules -> each of these modules -> its names.
Names: TypeAlias = dict[frozenset[str], dict[str, set[str]]]
Reader: TypeAlias = Callable[..., Names]

_WHO_READS = "transformers.utils.import_utils"
_READER = "define_import_structure"
_TAKES = ["module_path", "prefix"]


def keep_names() -> None:
    """Have names kept once transformers is imported; if it is there already, change nothing."""
    if _WHO_READS not in sys.modules:
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds the module that reads the files, as Python would.

    It stays for ever: another thread that imports meanwhile would miss a finder behind it.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WHO_READS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Runs the module, and gives its reader a memory."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        reader = getattr(module, _READER, None)
        if reader is not None and list(signature(reader).parameters) == _TAKES:
            setattr(module, _READER, with_memory(reader, Path(self.path)))


def with_memory(reader: Reader, code: Path) -> Reader:
    """Make a reader that reads the models' files once, and in later processes not at all.

    Args:
        reader: takes a folder or a file in it, and what to put in front of each module's name.
        code: the reader's own file, in a folder beside `models`.
    """
    models = code.parents[1] / "models"

    @cache
    def names() -> Names | None:  # None: nothing can be kept, or not in this form
        try:
            path = _path(models, code)
        except (UsageError, OSError):  # no place to keep anything, or a file that is none
            return None
        if (kept := _kept(path)) is not None:
            return kept
        found = reader(models)
        body = _encoded(found)
        if body is None:
            return None
        _keep(path, body)
        return found

    def read(module_path: str | Path, prefix: str | None = None) -> Names:
        place = Path(module_path)
        folder = place.parent if place.is_file() else place
        found = names() if folder == models else None
        if found is None:
            return reader(module_path, prefix)
        front = "" if prefix is None else f"{prefix}."
        return {
            needed: {front + module: set(its) for module, its in modules.items()}
            for needed, modules in found.items()
        }

    return read


def _path(models: Path, code: Path) -> Path:
    """Name the file of what is kept by all that decides it."""
    from dspark_batch.device import cache_folder  # loads MLX

    stamps = sorted([*_stamps(models), _stamp(str(code), code.stat())])
    digest = hashlib.sha256(orjson.dumps(stamps)).hexdigest()[:32]
    return cache_folder() / "machines" / f"names-{digest}.json"


def _stamps(folder: str | Path) -> Iterator[tuple[str, int, int]]:
    """Say of each Python file in a folder where it is, its size, and when it was written."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                yield _stamp(entry.path, entry.stat())
            elif entry.is_dir() and entry.name != "__pycache__":
                yield from _stamps(entry.path)


def _stamp(path: str, found: os.stat_result) -> tuple[str, int, int]:
    return path, found.st_size, found.st_mtime_ns


def _kept(path: Path) -> Names | None:
    """Read what is kept; None: nothing, or not what was written."""
    try:
        if not path.is_file():  # a pipe would be waited for without end
            return None
        seal, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return _decoded(body) if seal == _seal(body) else None


def _keep(path: Path, body: bytes) -> None:
    """Keep names; a folder that cannot be written costs time only."""
    from dspark_batch.device import keep  # loads MLX

    with suppress(OSError):
        keep(path, _seal(body) + b"\n" + body)


def _encoded(names: Names) -> bytes | None:
    """Put names into bytes; None: they have another form."""
    try:
        body = orjson.dumps(
            [
                [sorted(needed), {module: sorted(its) for module, its in modules.items()}]
                for needed, modules in names.items()
            ]
        )
    except (AttributeError, TypeError):
        return None
    return body if _decoded(body) == names else None


def _decoded(body: bytes) -> Names:
    return {
        frozenset(needed): {module: set(its) for module, its in modules.items()}
        for needed, modules in orjson.loads(body)
    }


def _seal(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()
