"""Answers as a person or a program wants them: table, JSON, CSV, Arrow or Parquet."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

FORMATS = ("table", "json", "csv", "arrow", "parquet")

CELL_WIDTH_MAX = 60
"""Characters of one cell in a table on a terminal; machine-readable formats are never cut."""

WIDE = 10_000
"""Width of a table that goes to a file or a pipe."""

PAGE_WIDTH = 118
"""Width of a page that goes to a file or a pipe."""


def _page_width() -> int | None:
    return None if (sys.stdout is not None and sys.stdout.isatty()) or "COLUMNS" in os.environ else PAGE_WIDTH


out = Console(highlight=False, width=_page_width())
err = Console(stderr=True, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """One line on standard error about an answer that is not all it could be."""
    err.print(f"tokentape: {text}", style="yellow", markup=False)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to; the file is at `path` once the block has ended, and nowhere if it failed."""
    new = path.with_name(f".{path.name}.new")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is whole or absent."""
    with whole(path) as new:
        new.write_bytes(data)


def write_json(document: Any, *, indent: bool = False) -> None:
    """Write one JSON document to standard output."""
    sys.stdout.buffer.write(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE | (orjson.OPT_INDENT_2 if indent else 0)))
    sys.stdout.buffer.flush()


def write_table(table: pa.Table, fmt: str, *, stream: BinaryIO | None = None) -> None:
    """Write an Arrow table to standard output (or `stream`) in one of `FORMATS`."""
    stream = stream or sys.stdout.buffer
    if fmt == "table":
        _print_rich(table)
    elif fmt == "json":
        for row in table.to_pylist():
            stream.write(orjson.dumps(row, default=plain, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NAIVE_UTC))
    elif fmt == "csv":
        pa.csv.write_csv(_flat(table), stream)
    elif fmt == "arrow":
        with pa.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
    else:
        pa.parquet.write_table(table, stream)
    stream.flush()


def write_rows(rows: Sequence[dict[str, Any]], fmt: str, columns: Sequence[str]) -> None:
    """Write dicts with the given columns in one of `FORMATS`."""
    table = pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]) if rows else None
    write_table(table if table is not None else pa.table({name: pa.array([], pa.string()) for name in columns}), fmt)


def _print_rich(table: pa.Table) -> None:
    """Rows beside one another where they fit, else one field a line. Without a terminal nothing is too wide."""
    console = Console(highlight=False)
    width = console.width if console.is_terminal or "COLUMNS" in os.environ else WIDE
    console = Console(highlight=False, width=width)
    rows = [[_cell(value) for value in row.values()] for row in table.to_pylist()]
    widths = [max([cell_len(name), *(row[i].cell_len for row in rows)]) for i, name in enumerate(table.column_names)]
    if sum(widths) + 2 * len(widths) <= width:
        console.print(_grid(table.schema, rows))
    else:
        for row in rows:
            console.print(_record(table.column_names, row))
    console.print(f"[dim]{table.num_rows:,} row{'' if table.num_rows == 1 else 's'}[/dim]")


def _grid(schema: pa.Schema, rows: Sequence[Sequence[Text]]) -> Table:
    view = Table(box=None, header_style="bold", pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for field in schema:
        numeric = pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type)
        view.add_column(field.name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        view.add_row(*row)
    return view


def _record(names: Sequence[str], row: Sequence[Text]) -> Table:
    view = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    view.add_column(style="bold", no_wrap=True)
    view.add_column(overflow="fold")
    for name, cell in zip(names, row, strict=True):
        view.add_row(name, cell)
    view.add_row("", "")
    return view


def _cell(value: Any) -> Text:
    """One value in a table: newlines made visible, long texts cut."""
    if value is None:
        return Text("∅", style="dim")
    if isinstance(value, float | decimal.Decimal):
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
    elif isinstance(value, list):
        text = ", ".join(_cell(item).plain for item in value)
    elif isinstance(value, dt.datetime):
        text = value.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    else:
        text = str(plain(value)) if isinstance(value, bytes) else str(value)
    text = text.replace("\n", "⏎")
    return Text(text if len(text) <= CELL_WIDTH_MAX else text[: CELL_WIDTH_MAX - 1] + "…")


def plain(value: Any) -> Any:
    """Bytes for machine-readable texts: 16 bytes are an id and become UUID text, others hex up to 32 bytes, then base64."""
    if isinstance(value, bytes):
        if len(value) == 16:
            text = value.hex()
            return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
        return value.hex() if len(value) <= 32 else base64.b64encode(value).decode()
    if isinstance(value, dt.timedelta):
        return value.total_seconds()
    return str(value)


def _flat(table: pa.Table) -> pa.Table:
    """The table with nested and binary columns as JSON or hex text, which is all that CSV can hold."""
    columns = []
    for column in table.columns:
        if pa.types.is_nested(column.type) or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            column = pa.array([None if v is None else _text(v) for v in column.to_pylist()], pa.string())
        columns.append(column)
    return pa.table(dict(zip(table.column_names, columns, strict=True)))


def _text(value: Any) -> str:
    return str(plain(value)) if isinstance(value, bytes) else orjson.dumps(value, default=plain).decode()
