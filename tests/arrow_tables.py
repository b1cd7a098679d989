"""Random Arrow tables: any type that a file can hold, nested to depth three, with any value."""

import random
from decimal import Decimal, localcontext
from itertools import pairwise

import pyarrow as pa

DEPTH = 3
UNITS = ("s", "ms", "us", "ns")
ZONES = (None, None, "UTC", "Europe/Paris", "+05:30", "No/Where")
TEXTS = (b"", b"a", "é\u2028".encode(), b"\0", b"[1]", b"{", b"nan", b"x" * 300)
BAD_TEXTS = (b"\xff", b"ok\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80")
NAMES = ("a", "b", "", "a.b", "prompt", "key", "ß", "status")


def random_table(seed):
    """A column of prompts and one to three others; few rows."""
    rng = random.Random(seed)
    size = rng.choice((1, 2, 3, 5, 8))
    columns = {"prompt": pa.array([f"prompt {i}" for i in range(size)])}
    for i in range(rng.randint(1, 3)):
        columns[f"x{i}"] = random_array(rng, size, DEPTH)
    return pa.table(columns)


def random_array(rng, size, depth):
    makers = [*FLAT, *(NESTED if depth > 1 else ())]
    maker = rng.choice(makers)
    return maker(rng, size, depth) if maker in NESTED else maker(rng, size)


def some(rng, size, draw):
    """Values, and a null here and there."""
    return [None if rng.random() < 0.2 else draw() for _ in range(size)]


def mask(rng, size):
    return pa.array([rng.random() < 0.2 for _ in range(size)], pa.bool_())


def whole(rng, bits):
    """A whole number: small, or one of the extremes."""
    top = 2 ** (bits - 1)
    return rng.choice((0, 1, -1, top - 1, -top, rng.randrange(-top, top), rng.randrange(-99, 99)))


def integers(rng, size):
    bits = rng.choice((8, 16, 32, 64))
    kind = getattr(pa, f"int{bits}")()
    array = pa.array(some(rng, size, lambda: whole(rng, bits)), kind)
    return array.view(getattr(pa, f"uint{bits}")()) if rng.random() < 0.4 else array


def floats(rng, size):
    kind = rng.choice((pa.float16(), pa.float32(), pa.float64()))
    values = (0.0, -0.0, 0.5, 1e30, float("nan"), float("inf"), float("-inf"))
    return pa.array(some(rng, size, lambda: rng.choice(values)), pa.float64()).cast(
        kind, safe=False
    )


def bools(rng, size):
    return pa.array(some(rng, size, lambda: rng.random() < 0.5), pa.bool_())


def nulls(rng, size):
    return pa.nulls(size)


def times(rng, size):
    unit = rng.choice(UNITS)
    kind = rng.choice(
        (
            *(pa.timestamp(unit, rng.choice(ZONES)), pa.timestamp(unit, rng.choice(ZONES))),
            *(pa.duration(unit), pa.date64(), pa.time64(rng.choice(UNITS[2:]))),
        )
    )
    near = lambda: rng.randrange(10 ** rng.randint(1, 18))  # noqa: E731
    array = pa.array(some(rng, size, lambda: rng.choice((whole(rng, 64), near()))), pa.int64())
    return array.view(kind)


def short_times(rng, size):
    kind = rng.choice((pa.date32(), pa.time32("s"), pa.time32("ms")))
    return pa.array(some(rng, size, lambda: whole(rng, 32)), pa.int32()).view(kind)


def decimals(rng, size):
    kind = rng.choice(
        (pa.decimal32(9, 2), pa.decimal64(18, 0), pa.decimal128(38, 10), pa.decimal256(76, 76))
    )
    top = 10**kind.precision - 1
    number = lambda: Decimal(rng.choice((0, 1, -top, top))).scaleb(-kind.scale)  # noqa: E731
    with localcontext(prec=100):
        return pa.array(some(rng, size, number), kind)


def texts(rng, size):
    words = TEXTS + (BAD_TEXTS if rng.random() < 0.3 else ())
    kind = rng.choice((pa.string(), pa.large_string(), pa.string_view()))
    raw = some(rng, size, lambda: rng.choice(words))
    if pa.types.is_string_view(kind):
        return pa.array(raw, pa.binary_view()).view(kind)
    return pa.array(raw, pa.large_binary() if kind == pa.large_string() else pa.binary()).view(kind)


def binaries(rng, size):
    kind = rng.choice((pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(4)))
    width = 4 if pa.types.is_fixed_size_binary(kind) else None
    word = lambda: rng.randbytes(4) if width else rng.choice(TEXTS + BAD_TEXTS)  # noqa: E731
    return pa.array(some(rng, size, word), kind)


def dictionaries(rng, size):
    words = rng.choice((texts, integers, binaries, bools, times, decimals))(rng, 3)
    kind = rng.choice((pa.int8(), pa.int32(), pa.uint16()))
    indices = pa.array(some(rng, size, lambda: rng.randrange(3)), kind)
    return pa.DictionaryArray.from_arrays(indices, words)


def extensions(rng, size):
    kind, raw = rng.choice(
        (
            (pa.uuid(), pa.array(some(rng, size, lambda: rng.randbytes(16)), pa.binary(16))),
            (pa.bool8(), pa.array(some(rng, size, lambda: rng.randrange(2)), pa.int8())),
            (pa.json_(), pa.array(some(rng, size, lambda: '{"a": 1}'), pa.string())),
        )
    )
    return pa.ExtensionArray.from_storage(kind, raw)


def offsets(rng, size):
    lengths = [rng.randrange(4) for _ in range(size)]
    return [sum(lengths[:i]) for i in range(size + 1)]


def lists(rng, size, depth):
    ends = offsets(rng, size)
    values = random_array(rng, ends[-1], depth - 1)
    if rng.random() < 0.3:
        make = rng.choice((pa.ListViewArray, pa.LargeListViewArray))
        sizes = [b - a for a, b in pairwise(ends)]
        kind = pa.int32() if make is pa.ListViewArray else pa.int64()
        return make.from_arrays(
            pa.array(ends[:-1], kind), pa.array(sizes, kind), values, mask=mask(rng, size)
        )
    make, kind = rng.choice(((pa.ListArray, pa.int32()), (pa.LargeListArray, pa.int64())))
    return make.from_arrays(pa.array(ends, kind), values, mask=mask(rng, size))


def fixed_lists(rng, size, depth):
    width = rng.randint(1, 3)
    values = random_array(rng, size * width, depth - 1)
    return pa.FixedSizeListArray.from_arrays(values, width, mask=mask(rng, size))


def structs(rng, size, depth):
    names = [rng.choice(NAMES) for _ in range(rng.randrange(4))]  # two may be the same
    fields = [random_array(rng, size, depth - 1) for _ in names]
    if not names:
        return pa.array([{}] * size, pa.struct([]))
    return pa.StructArray.from_arrays(fields, names=names, mask=mask(rng, size))


def maps(rng, size, depth):
    ends = offsets(rng, size)
    keys = rng.choice((pa.array([f"k{i % 2}" for i in range(ends[-1])], pa.string()), None))
    keys = pa.array(range(ends[-1]), pa.int64()) if keys is None else keys
    items = random_array(rng, ends[-1], depth - 1)
    return pa.MapArray.from_arrays(pa.array(ends, pa.int32()), keys, items, mask=mask(rng, size))


FLAT = (
    *(integers, floats, bools, nulls, times, short_times, decimals, texts, binaries),
    *(dictionaries, extensions),
)
NESTED = (lists, lists, fixed_lists, structs, structs, maps)
