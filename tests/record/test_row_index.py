"""The compact index does what a dictionary of dictionaries would."""

import random

import pytest

from dspark_batch.record.row_index import RowIndex, key_of


class Plain:
    """The definition: key -> index -> the last row."""

    def __init__(self):
        self.rows = {}

    def add(self, key, index, offset, *, failed):
        self.rows.setdefault(key, {})[index] = (offset, failed)

    def take_own(self, key, index):
        return self.rows.get(key, {}).pop(index, None)

    def take_other(self, key):
        rows = self.rows.get(key, {})
        return next((rows.pop(i) for i in sorted(rows) if not rows[i][1]), None)

    def count(self):
        left = [failed for rows in self.rows.values() for _, failed in rows.values()]
        return len(left), sum(left)


def taken(rows, row):
    if row is None:
        return None
    rows.take(row)
    return rows.offset(row), rows.is_failure(row)


@pytest.mark.parametrize("seed", range(30))
def test_random_rows_are_found_as_a_dictionary_finds_them(seed):
    chance = random.Random(seed)
    keys = [key_of(f"name {n}", "d", 0) for n in range(chance.choice([1, 3, 40]))]
    rows, plain = RowIndex(), Plain()
    for offset in range(chance.randrange(80)):
        added = (chance.choice(keys), chance.randrange(12), offset * 100)
        failed = chance.random() < 0.3
        rows.add(*added, failed=failed)
        plain.add(*added, failed=failed)
    assert rows.count() == plain.count()
    for _ in range(100):
        key, index = chance.choice(keys), chance.randrange(12)
        if chance.random() < 0.5:
            assert taken(rows, rows.own(key, index)) == plain.take_own(key, index)
        else:
            assert taken(rows, rows.other(key)) == plain.take_other(key)
    assert rows.count() == plain.count()


def test_an_empty_journal_has_no_rows():
    assert RowIndex().count() == (0, 0)
    assert RowIndex().own(key_of("a", "d", 0), 0) is None
    assert RowIndex().other(key_of("a", "d", 0)) is None


def test_name_content_and_sample_all_count():
    named = {key_of("a", "d", 0), key_of("b", "d", 0), key_of("a", "e", 0), key_of("a", "d", 1)}
    assert len(named) == 4
