"""What statements on shards are made of."""

from __future__ import annotations

import pytest

from store import duck, tables


@pytest.mark.parametrize("item", [0, -1, 1 << 62, "", "it's", "a\0b", "\\x41", "é\n", b"", b"'\\x00", bytes(range(256))])
def test_a_literal_is_its_value(item: int | str | bytes) -> None:
    """DuckDB reads the same number, text or bytes out of the statement."""
    with duck.connect() as connection:
        found = connection.execute(f"SELECT {tables.value(item)}").fetchall()

    assert found == [(item,)]
