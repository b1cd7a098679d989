"""What is kept about a machine: believed only whole, and only where it was found."""

import os

import orjson
import pytest

from dspark_batch.numerics import rows
from dspark_batch.numerics.rows import Product
from dspark_batch.tuning import kept

PRODUCT = Product("float32", 96, 48)
QUANTISED = Product("bfloat16", 64, 32, quantised=(4, 64, "affine"), has_bias=True)
COSTS = (1.0, 0.25, 0.5, 0.125)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path))
    known = dict(rows.VERDICTS)
    rows.forget()
    yield tmp_path / "machines"
    rows.forget()
    rows.VERDICTS.update(known)


def learn():
    """Keep some verdicts and costs; give the verdicts."""
    found = {
        (product, count): rows.is_safe(product, count)
        for product in (PRODUCT, QUANTISED)
        for count in (1, 2, 16, 64)
    }
    kept.keep_verdicts()
    kept.keep_costs("pair", COSTS)
    return found


def read_anew():
    rows.forget()
    kept.read_verdicts()
    return dict(rows.VERDICTS)


def file_of(folder, name):
    (path,) = folder.glob(f"{name}-*.json")
    return path


def test_what_was_found_is_known_to_the_next_process(folder):
    found = learn()
    assert read_anew() == found
    assert kept.read_costs("pair") == COSTS
    assert kept.read_costs("another pair") is None
    assert len(list(folder.iterdir())) == 2


def test_a_machine_that_nothing_is_kept_of_knows_nothing():
    assert read_anew() == {}
    assert kept.read_costs("pair") is None


def test_later_verdicts_are_added():
    found = learn()
    read_anew()
    found[PRODUCT, 32] = rows.is_safe(PRODUCT, 32)
    kept.keep_verdicts()
    assert read_anew() == found


def torn(raw):
    return raw[: len(raw) // 2]


def empty(raw):
    return b""


def no_object(raw):
    return b"[]"


def edited(raw):
    return raw.replace(b"true", b"false").replace(b"0.25", b"0.26")


def turned(raw):
    return raw.replace(b"false", b"true").replace(b"0.25", b"9.25")


def of_another_machine(raw):
    content = orjson.loads(raw)
    content["machine"]["blas"] = "OpenBLAS 9, kernel Zen, threads 1"
    return orjson.dumps(content)


def of_another_mlx(raw):
    content = orjson.loads(raw)
    content["machine"]["mlx"] = "0.1"
    return orjson.dumps(content)


def without_a_seal(raw):
    content = orjson.loads(raw)
    del content["seal"]
    return orjson.dumps(content)


@pytest.mark.parametrize(
    "damage",
    [torn, empty, no_object, edited, of_another_machine, of_another_mlx, without_a_seal],
)
def test_a_damaged_file_is_ignored_and_written_anew(folder, damage):
    found = learn()
    for name in ("verdicts", "costs"):
        path = file_of(folder, name)
        raw = path.read_bytes()
        assert damage(raw) != raw
        path.write_bytes(damage(raw))
    assert read_anew() == {}
    assert kept.read_costs("pair") is None
    assert learn() == found
    assert read_anew() == found
    assert kept.read_costs("pair") == COSTS


def test_what_another_version_kept_is_ignored(folder, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(kept, "_FORMAT", kept._FORMAT - 1)
        found = learn()
        assert read_anew() == found
    assert read_anew() == {}
    assert kept.read_costs("pair") is None
    assert learn() == found


def test_a_product_of_other_fields_has_another_format():
    """An older program must not read what it cannot; count up both."""
    fields = "dtype size width is_transposed has_bias quantised is_attention matrices in_strips"
    assert (kept._FORMAT, " ".join(rows.Product._fields)) == (4, fields)


def test_a_library_that_multiplies_otherwise_is_noticed(folder, monkeypatch):
    """Another processor behind the same home, or an upgrade that changes no name."""
    learn()
    monkeypatch.setattr(rows, "reference_bits", lambda product: b"other bits")
    assert read_anew() == {}


def test_what_this_process_found_before_with_other_threads_is_forgotten(monkeypatch):
    learn()
    other = kept.machine() | {"blas": "the same, threads 2"}
    monkeypatch.setattr(kept, "machine", lambda: other)
    kept.read_verdicts()
    assert rows.VERDICTS == {}


def test_a_file_under_the_name_of_another_machine_is_not_read(monkeypatch):
    learn()
    other = kept.machine() | {"blas": "OpenBLAS 9, kernel Zen, threads 1"}
    monkeypatch.setattr(kept, "machine", lambda: other)
    assert read_anew() == {}
    assert kept.read_costs("pair") is None


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DSPARK_BATCH_CACHE", str(tmp_path / "file" / "own"))
    found = learn()
    assert read_anew() == {}
    assert learn() == found
    assert kept.read_costs("pair") is None
    assert kept.forget() == 0


def test_a_folder_in_the_place_of_a_file_costs_time_only(folder):
    learn()
    path = file_of(folder, "verdicts")
    path.unlink()
    path.mkdir()
    assert read_anew() == {}
    learn()


@pytest.mark.parametrize("name", ["verdicts", "costs"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder, name):
    learn()
    path = file_of(folder, name)
    path.unlink()
    os.mkfifo(path)
    read_anew()
    kept.read_costs("pair")
    learn()
    assert path.is_file()


def test_nothing_half_written_is_left_or_read(folder, monkeypatch):
    learn()
    before = file_of(folder, "verdicts").read_bytes()

    def fails(self, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(type(folder), "replace", fails)
    rows.is_safe(PRODUCT, 256)
    kept.keep_verdicts()
    assert file_of(folder, "verdicts").read_bytes() == before


def test_all_is_dropped_when_asked(folder):
    learn()
    assert kept.forget() == 2
    assert list(folder.iterdir()) == []
    assert read_anew() == {}
    assert kept.forget() == 0


def test_the_machine_is_what_decides_about_bits():
    known = kept.machine()
    assert known.keys() == {"device", "mlx", "mlx-lm", "blas", "kernels"}
    assert known == kept.machine()
    assert orjson.loads(orjson.dumps(known)) == known
