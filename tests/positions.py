"""Where partitions stand in a catalog, set as no indexer would: back, or to a digest that is not the log's."""

from __future__ import annotations

from store.catalog import Catalog, Position
from store.catalog_tables import insert, position_to_row


def put_position(catalog: Catalog, position: Position) -> None:
    """Write a position over the one that is there."""
    with catalog._writing("set position") as connection:
        insert(connection, "position", position_to_row(position))
