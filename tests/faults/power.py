"""A disk that forgets, when the power goes, what was not synced; or remembers it in any order.

POSIX promises for a file only what fsync has seen of it, and for a name (a new file, a rename, an
unlink) only what an fsync of its directory has seen. Everything later may be there or not.
"""

import os
import stat
from pathlib import Path

CALLS = ("fsync", "write", "replace", "unlink", "ftruncate", "mkdir")


class PowerCut(BaseException):
    """The machine is off: no handler of ours helps."""


class Disk:
    """Watches a folder, cuts the power before the n-th call, and writes what may be left."""

    def __init__(self, root: Path, cut_at: int, monkeypatch):
        self.root, self.cut_at, self.calls = root, cut_at, 0
        self.names = {}  # inode of a directory -> name -> inode, as synced
        self.content = {}  # inode of a file -> bytes, as synced
        self.held = {}  # inode -> descriptor, so that no inode is used again
        self.volatile = None  # names at the time of the cut
        self._look()
        for inode, fd in self.held.items():
            self._sync(inode, fd)
        for name in CALLS:
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name, real):
        def call(*args, **kwargs):
            if self.volatile is not None:
                raise PowerCut
            self.calls += 1
            if self.calls == self.cut_at:
                self.cut()
                raise PowerCut
            done = real(*args, **kwargs)
            self._look()
            if name == "fsync":
                inode = os.fstat(args[0]).st_ino
                self._sync(inode, self.held[inode])
            return done

        return call

    def cut(self):
        """Remember how it looks; from here on no call does anything."""
        self._look()
        self.volatile = {i: self._listed(i) for i, fd in self.held.items() if is_dir(fd)}

    def _look(self):
        """Hold every file and directory that exists now."""
        self.paths = {self.root.stat().st_ino: self.root}
        self.paths |= {path.stat().st_ino: path for path in self.root.rglob("*")}
        for inode, path in self.paths.items():
            if inode not in self.held:
                self.held[inode] = os.open(path, os.O_RDONLY)

    def _sync(self, inode, fd):
        if is_dir(fd):
            self.names[inode] = self._listed(inode)
        else:
            self.content[inode] = whole(fd)

    def _listed(self, inode):
        path = self.paths.get(inode)
        if path is None or not path.exists():
            return {}
        return {child.name: child.stat().st_ino for child in path.iterdir()}

    def write_survivors(self, folder: Path, chance=None):
        """Write what is left: the least that was promised, or by chance anything more."""
        self._write_directory(folder, self.root.stat().st_ino, chance)

    def _write_directory(self, folder, inode, chance):
        folder.mkdir()
        synced, now = self.names.get(inode, {}), self.volatile.get(inode, {})
        for name in sorted({*synced, *now}):
            child = synced.get(name) if chance is None else chance.choice([synced, now]).get(name)
            if child is None:
                continue
            if is_dir(self.held[child]):
                self._write_directory(folder / name, child, chance)
            else:
                (folder / name).write_bytes(self._surviving_bytes(child, chance))

    def _surviving_bytes(self, inode, chance):
        synced, now = self.content.get(inode, b""), whole(self.held[inode])
        if chance is None or not now.startswith(synced):
            return synced if chance is None else chance.choice([synced, now])
        cut = chance.randint(len(synced), len(now))
        nothing_written = bytes(len(now) - cut)  # the length was written, the content was not
        return chance.choice([synced, now, now[:cut], now[:cut] + nothing_written])

    def close(self):
        for fd in self.held.values():
            os.close(fd)


def is_dir(fd):
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def whole(fd):
    return os.pread(fd, os.fstat(fd).st_size, 0)
