"""Beginnings that several prompts share: computed once, kept while there is room."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from dspark_batch.caches.slot_cache import Part

CHUNK = 8  # positions; only whole chunks are shared
_MOST_COUNTED = 1 << 17  # chunks of past prompts that are remembered, some 20 MB

Ids: TypeAlias = Sequence[int]
Chunks: TypeAlias = tuple[int, ...]  # of a prompt: a hash of each beginning of whole chunks
Parts: TypeAlias = tuple[Part, ...]  # what each model remembers of a run of positions


class Prefix(NamedTuple):
    """The longest stored beginning of some tokens."""

    length: int  # positions
    parts: list[Parts]  # one behind the other


class PrefixCache:
    """A tree of beginnings; what was used longest ago goes first.

    Stored is what more than one prompt begins with: a beginning counts as shared as soon as a
    second prompt with it is in sight, so prompts of their own cost a few bytes per chunk.

    What a slot remembers beside its positions cannot be cut. So it is known only where a beginning
    was stored, and what is found ends there.

    Args:
        most_positions: of all that is stored; 0 stores nothing.
        positions_per_end: what the end of a stored beginning takes besides, in positions.
    """

    def __init__(self, most_positions: int, positions_per_end: int = 0) -> None:
        self._room = most_positions
        self._most = most_positions
        self._per_end = positions_per_end
        self._root = _Segment(None, 0, ())
        self._by_age: OrderedDict[_Segment, None] = OrderedDict()  # used longest ago first
        self._prompts: OrderedDict[int, int] = OrderedDict()  # hash of a beginning -> prompts

    def expect(self, chunks: Chunks) -> None:
        """Count a prompt that will come."""
        for chunk in chunks:
            self._prompts[chunk] = self._prompts.pop(chunk, 0) + 1
        while len(self._prompts) > _MOST_COUNTED:
            self._prompts.popitem(last=False)

    def num_shared(self, chunks: Chunks) -> int:
        """Count the chunks with which another prompt begins too, as many as can be stored."""
        num_shared = 0
        for chunk in chunks:
            if self._prompts.get(chunk, 0) < 2:
                break
            num_shared += 1
        return min(num_shared, max(0, self._most - self._per_end) // CHUNK)

    def find(self, ids: Ids) -> Prefix:
        """Find the longest stored beginning of some tokens behind which a slot can go on."""
        path = self._path(ids)
        parts = [segment.cut(stop) for segment, stop in path]
        while parts and not all(part.is_whole for part in parts[-1]):
            segment, stop = path.pop()
            parts.pop()
            if end := segment.last_end(stop):
                path.append((segment, end))
                parts.append(segment.cut(end))
        for segment, _ in path:
            self._by_age.move_to_end(segment)
        return Prefix(sum(stop for _, stop in path), parts)

    def num_stored(self, ids: Ids) -> int:
        """Count the first positions of some tokens that are stored, wherever they can be cut."""
        return sum(stop for _, stop in self._path(ids))

    def store(self, ids: Ids, parts: Parts) -> None:
        """Store the end of a beginning, behind as much of it as is stored.

        Args:
            ids: the whole beginning, whole chunks.
            parts: of its positions from `num_stored` on, with what is known at its end.
        """
        path = self._path(ids)
        start = sum(stop for _, stop in path)
        parent, stop = path[-1] if path else (self._root, 0)
        for above, _ in path:
            self._by_age.move_to_end(above)
        if start == len(ids):  # a longer one has these positions, and not this end
            parent.ends[stop] = parts
            self._room -= self._per_end
        else:
            segment = _Segment(parent, start, ids[start:], parts)
            parent.children[stop, tuple(ids[start : start + CHUNK])] = segment
            self._by_age[segment] = None
            self._room -= self._size(segment)
        self._make_room()

    def _path(self, ids: Ids) -> list[tuple["_Segment", int]]:
        """Walk down along some tokens: segments, and in how many positions each one agrees."""
        path: list[tuple[_Segment, int]] = []
        segment, stop = self._root, 0
        while (at := segment.start + stop) + CHUNK <= len(ids):
            child = segment.children.get((stop, tuple(ids[at : at + CHUNK])))
            if child is None:
                break
            segment, stop = child, child.common_len(ids)
            path.append((segment, stop))
        return path

    def _make_room(self) -> None:
        for segment in list(self._by_age):
            if self._room >= 0:
                return
            if not segment.children:
                segment.remove()
                del self._by_age[segment]
                self._room += self._size(segment)

    def _size(self, segment: "_Segment") -> int:
        return len(segment.ids) + self._per_end * (1 + len(segment.ends))


class _Segment:
    """A run of tokens behind a part of its parent's, and what is remembered of them."""

    def __init__(self, parent: "_Segment | None", start: int, ids: Ids, parts: Parts = ()) -> None:
        self.parent = parent
        self.start = start  # position of the first token
        self.ids = tuple(ids)
        # How many positions of this segment come before the child; the child's first chunk.
        self.children: dict[tuple[int, tuple[int, ...]], _Segment] = {}
        self.ends: dict[int, Parts] = {}  # positions -> what is known there; cuts have no more
        self._parts = parts

    def cut(self, stop: int) -> Parts:
        """Return what is remembered of the first `stop` positions."""
        if stop == len(self.ids):  # the very objects, so that equal beginnings are joined once
            return self._parts
        cut = (part.cut(stop) for part in self._parts)
        ends = self.ends.get(stop)
        return tuple(map(Part.ending_like, cut, ends) if ends else cut)

    def last_end(self, stop: int) -> int:
        """Say behind how many positions, fewer than `stop`, an end is known; 0: behind none."""
        return max((end for end in self.ends if end < stop), default=0)

    def common_len(self, ids: Ids) -> int:
        """Count the positions, whole chunks, in which a prompt agrees with this segment."""
        there = tuple(ids[self.start : self.start + len(self.ids)])
        if there == self.ids:
            return len(there)
        at = 0
        while there[at : at + CHUNK] == self.ids[at : at + CHUNK]:
            at += CHUNK
        return at

    def remove(self) -> None:
        """Leave the tree."""
        if self.parent is None:  # the root stays
            return
        siblings = self.parent.children
        del siblings[next(key for key, child in siblings.items() if child is self)]


def chunks_of(ids: Ids) -> Chunks:
    """Hash every beginning of whole chunks that leaves at least one token of a prompt."""
    hashes, so_far = [], 0
    for at in range(0, (len(ids) - 1) // CHUNK * CHUNK, CHUNK):
        so_far = hash((so_far, tuple(ids[at : at + CHUNK])))
        hashes.append(so_far)
    return tuple(hashes)
