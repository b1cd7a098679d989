"""Files at URLs that fsspec knows: `s3://`, `gs://`, `az://`, `https://` and the like.

An input is fetched once, whole, into the run directory. An output is made here and then put there,
so a job waits for no network while it decodes, and loses no row to one.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import has_magic
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from dspark_batch.errors import DsparkBatchError, Resumable, UsageError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

STALL_S = 60.0  # without a byte: the connection is given up
_TRIES = 3
_PAUSE_S = 1.0  # before the second try; twice as long before the third
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_SECRET = re.compile(r"(?<=://)[^\s/@]*@|(?<=[^\s])\?[^\s'\")]*=[^\s'\")]*")  # user, query
_WEB = ("http", "https")
_READ_ONLY = (*_WEB, "data", "github", "gist", "zip", "tar", "git", "reference")
_PASSING = ("memory",)  # gone with the process
# In the name of an exception: nothing that a second try can mend.
_FINAL = re.compile(
    "NotFound|NoSuch|Permission|Forbidden|Credential|Auth|ParamValid|Value|Type|Import|ADirectory"
    "|NotImplemented"
)


def is_url(name: str) -> bool:
    """Whether a name is a URL, and no path."""
    return _URL.match(name) is not None


def shown(url: str) -> str:
    """Leave out of a URL what may be secret: a user with a password, and the query."""
    parts = urlsplit(url)
    if parts.scheme not in _WEB:
        return url
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def expand(url: str) -> list[str]:
    """List the files that a URL or a pattern means, in name order."""
    if urlsplit(url).scheme in _WEB or not has_magic(url):
        return [url]
    with _said(f"{url}: cannot be listed"):
        system, path = _open(url)
        found = sorted(system.unstrip_protocol(name) for name in system.glob(path))
    if not found:
        raise UsageError(f"{url}: no file there matches this pattern; check it.")
    return found


def place(url: str, folder: Path) -> Path:
    """Say where a file is kept that `fetch` gets."""
    name = PurePosixPath(urlsplit(url).path).name or "file"
    return folder / f"{_digest(url)}-{name}"


def local_name(url: str) -> str:
    """Name the file beside whose run directory an output for a URL is made."""
    name = PurePosixPath(urlsplit(url).path)
    return f"{name.stem}.{_digest(url)}{name.suffix}"


def fetch(url: str, path: Path) -> None:
    """Get a file, whole or not at all, unless it is there.

    Raises:
        UsageError: it cannot be had.
        Resumable: it does not come, or only in part, after several tries.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    with _said(f"{shown(url)}: cannot be fetched"):
        system, there = _open(url)
        try:
            _tried(lambda: _get(system, there, draft))
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def refuse_unwritable(url: str) -> None:
    """Refuse at once a place for an output that can never be one.

    Raises:
        UsageError: saying why.
    """
    scheme = urlsplit(url).scheme
    if scheme == "hf":
        raise UsageError(
            f"{url}: write a file, and then put it on the Hub with `dspark-batch export OUT "
            "--push-to-hub OWNER/NAME`."
        )
    if scheme in _READ_ONLY or scheme in _PASSING:
        raise UsageError(f"{shown(url)}: {scheme}:// cannot be written; name a file, or s3://…")
    with _said(f"{url}: cannot be written"):
        _open(url)


def refuse_taken(url: str, *, overwrite: bool) -> None:
    """Make sure that an output can be put there: nothing is there yet, and a trial file can be.

    Raises:
        UsageError: something is there, or the place takes no file.
        Resumable: nobody answers.
    """
    with _said(f"{url}: cannot be written"):
        system, path = _open(url)
        taken = not overwrite and system.exists(path)
        if not taken:
            system.pipe_file(f"{path}.trial", b"")
            system.rm_file(f"{path}.trial")
    if taken:
        raise UsageError(f"{url} exists; choose another name, or replace it with --overwrite.")


def put(path: Path, url: str) -> None:
    """Put a file there, over what is there.

    Raises:
        Resumable: it cannot be written now.
    """
    try:
        system, there = _open(url)
        _tried(lambda: _put(system, path, there))
    except Exception as error:  # whatever it was, the rows are here
        raise Resumable(
            f"{url}: cannot be written ({_reason(error)}). The finished rows are safe; run the "
            "same command again."
        ) from error


def _digest(url: str) -> str:
    return sha256(url.encode()).hexdigest()[:12]


def _open(url: str) -> tuple["AbstractFileSystem", str]:
    import fsspec  # slow to import

    options = {}
    if urlsplit(url).scheme in _WEB:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
        options = {"client_kwargs": {"timeout": timeout}, "skip_instance_cache": True}
    return fsspec.url_to_fs(url, use_listings_cache=False, **options)


def _get(system: "AbstractFileSystem", there: str, path: Path) -> None:
    system.get_file(there, str(path))
    _compare(system.size(there), path.stat().st_size)


def _put(system: "AbstractFileSystem", path: Path, there: str) -> None:
    system.put_file(str(path), there)
    system.invalidate_cache()
    _compare(path.stat().st_size, system.size(there))


def _compare(expected: int | None, found: int | None) -> None:
    if expected is not None and (found or 0) < expected:
        raise ConnectionError(f"{found} of {expected} bytes came")


def _tried(act: Callable[[], T]) -> T:
    """Try again what a network may have broken."""
    for pause_s in (_PAUSE_S * 2**i for i in range(_TRIES - 1)):
        try:
            return act()
        except Exception as error:
            if _is_final(error):
                raise
            time.sleep(pause_s)
    return act()


def _is_final(error: BaseException) -> bool:
    status = getattr(error, "status", None)
    if isinstance(status, int):  # of HTTP
        return 400 <= status < 500
    return any(_FINAL.search(kind.__name__) for kind in type(error).__mro__)


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Turn whatever a file system raises into a sentence that begins with `what`."""
    try:
        yield
    except DsparkBatchError:
        raise
    except ImportError as error:
        raise UsageError(
            f"{what} without another package; pip install 'dspark-batch[remote]'."
        ) from error
    except Exception as error:
        said = f"{what} ({_reason(error)})."
        if _is_final(error):
            raise UsageError(f"{said} Check the name, and who may do so.") from error
        raise Resumable(f"{said} Run the same command again.") from error


def _reason(error: Exception) -> str:
    """Say in one line why something failed, without what a URL may keep secret."""
    said = _SECRET.sub("", " ".join(str(error).split()))
    return said.removesuffix(".") or type(error).__name__
