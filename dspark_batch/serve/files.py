"""Uploads and outputs: a file of bytes, and beside it what clients are told of it.

Under `files/`, `file-….jsonl` is the bytes, and `file-….json` the object: a file is there when this
is.
"""

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import orjson

from dspark_batch.errors import JournalError
from dspark_batch.record.disk import (
    full_disk_is_resumable,
    sync_file,
    write_text,
)
from dspark_batch.serve.problems import bad_field, not_found

Object: TypeAlias = dict[str, Any]  # what clients are told of a file or a batch

PURPOSES = ("batch",)
_ID = re.compile(r"file-[0-9a-f]{16,40}")
_LIMIT = re.compile(r"[1-9][0-9]{0,3}|10000")


def new_id(prefix: str) -> str:
    """Make a name; later ones sort behind earlier ones."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(4)}"


class Files:
    """The files of a server, on the disk; names are data, and never part of a path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for path in (*folder.glob("*.tmp"), *folder.glob("file-*.jsonl")):
            if not self._object(path.stem).exists():  # a crash cut it off
                path.unlink()

    def add(self, content: BinaryIO, name: str, purpose: str) -> Object:
        """Keep an upload.

        Raises:
            Problem: nobody knows this purpose.
        """
        if purpose not in PURPOSES:
            raise bad_field("purpose", f"`purpose` is {purpose!r}, expected {PURPOSES[0]!r}.")
        file_id = new_id("file-")
        draft = self.path(file_id).with_suffix(".tmp")
        try:
            with full_disk_is_resumable(draft), draft.open("wb") as file:
                shutil.copyfileobj(content, file)
            return self.keep(draft, file_id, name, purpose)
        except BaseException:  # a full disk has no room for half a file
            for path in (draft, self.path(file_id)):
                path.unlink(missing_ok=True)
            raise

    def keep(self, draft: Path, file_id: str, name: str, purpose: str) -> Object:
        """Take a whole file of ours in; the same again changes nothing."""
        path = self.path(file_id)
        with full_disk_is_resumable(path):
            sync_file(draft)
            draft.replace(path)
        told: Object = {
            "id": file_id,
            "object": "file",
            "bytes": path.stat().st_size,
            "created_at": int(time.time()),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
        }
        write_object(self._object(file_id), told)
        return told

    def path(self, file_id: str) -> Path:
        """Say where the bytes of a file are."""
        return self._folder / f"{file_id}.jsonl"

    def find(self, file_id: str) -> Object:
        """Look a file up.

        Raises:
            Problem: there is none.
        """
        found = read_object(self._object(file_id)) if _ID.fullmatch(file_id) else None
        if found is None:
            raise not_found("File object", file_id)
        return found

    def all(self) -> list[Object]:
        """List the files, the newest first."""
        paths = sorted(self._folder.glob("*.json"), reverse=True)
        return [each for each in map(read_object, paths) if each is not None]

    def delete(self, file_id: str) -> Object:
        """Forget a file."""
        self.find(file_id)
        self._object(file_id).unlink(missing_ok=True)
        self.path(file_id).unlink(missing_ok=True)
        return {"id": file_id, "object": "file", "deleted": True}

    def link(self, file_id: str, to: Path) -> None:
        """Give somebody a file that stays when this one is forgotten."""
        try:
            os.link(self.path(file_id), to)
        except FileNotFoundError as error:  # since somebody looked
            raise not_found("File object", file_id) from error
        except OSError:  # a file system without links
            shutil.copyfile(self.path(file_id), to)
            sync_file(to)

    def _object(self, file_id: str) -> Path:
        return self._folder / f"{file_id}.json"


def read_object(path: Path) -> Object | None:
    """Read what clients are told of something; None: it is not there.

    Raises:
        JournalError: it is not as we wrote it.
    """
    try:
        return orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise JournalError(f"{path}: damaged ({error}); restore it, or take it away.") from error


def write_object(path: Path, told: Object) -> None:
    """Write it so that it is there whole or not at all."""
    write_text(path, orjson.dumps(told).decode())


def page(objects: Iterable[Object], query: Mapping[str, str], most: int = 100) -> Object:
    """Give a part of a list, as a query asks for it: `limit`, `after`, `order`, `purpose`.

    Args:
        objects: the newest first.
        query: of the request.
        most: that are given where nobody asks for fewer.

    Raises:
        Problem: it asks for something else.
    """
    listed = list(objects)
    if query.get("order", "desc") not in ("asc", "desc"):
        raise bad_field("order", f"`order` is {query['order']!r}, expected 'asc' or 'desc'.")
    if query.get("order") == "asc":
        listed.reverse()
    if "purpose" in query:
        listed = [each for each in listed if each.get("purpose") == query["purpose"]]
    if "after" in query:
        places = [n for n, each in enumerate(listed) if each["id"] == query["after"]]
        if not places:
            raise not_found("object", query["after"])
        listed = listed[places[0] + 1 :]
    limit = _limit(query.get("limit"), most)
    shown = listed[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(listed) > limit,
    }


def _limit(asked: str | None, most: int) -> int:
    if asked is None:
        return most
    if not _LIMIT.fullmatch(asked):
        raise bad_field("limit", f"`limit` is {asked!r}, expected 1 to 10000.")
    return int(asked)
