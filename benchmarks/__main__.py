"""Runs the benchmarks and writes the table to `benchmarks/results/`.

python -m benchmarks [recorder ingest query bytes gateway history fresh memory custody retention damage verdicts …]
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

NAMES = (
    "recorder",
    "ingest",
    "fresh",
    "query",
    "bytes",
    "gateway",
    "history",
    "stops",
    "memory",
    "custody",
    "retention",
    "damage",
    "verdicts",
)
LONG = ("api", "open_streams", "capture", "exact", "page", "replay")
"""Only when they are named: they take long, or a machine of their own."""

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run those named, or all; a benchmark that fails is a row that says so, and the exit code is 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)} (default: these), {', '.join(LONG)}")
    names = parser.parse_args().names or list(NAMES)
    if unknown := [name for name in names if name not in NAMES + LONG]:
        parser.error(f"no benchmark is called {unknown[0]!r}; valid: {', '.join(NAMES + LONG)}")
    failed = False
    for name in names:
        rows, failure = _run(name)
        failed |= failure is not None
        table = markdown(name, rows, failure)
        print(f"\n{table}", flush=True)
        _write(RESULTS / name, table, {"machine": machine(), "rows": rows, "failure": failure})
    return 1 if failed else 0


def _write(place: Path, table: str, figures: dict[str, Any]) -> None:
    """Write both files of a benchmark; sections of the table, and further keys, are of other machines and stay."""
    place.parent.mkdir(exist_ok=True)
    page, data = place.with_suffix(".md"), place.with_suffix(".json")
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    known = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {}
    page.write_text(table + (text[text.index("\n## ") :] if "\n## " in text else ""), encoding="utf-8")
    data.write_text(json.dumps(known | figures, indent=1) + "\n", encoding="utf-8")


def _run(name: str) -> tuple[list[dict[str, Any]], str | None]:
    print(f"{name} …", file=sys.stderr, flush=True)
    began = time.monotonic()
    try:
        rows = importlib.import_module(f"benchmarks.{name}").run()
    except Exception as error:
        return [], f"{type(error).__name__}: {error}"
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return rows, None


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def markdown(name: str, rows: list[dict[str, Any]], failure: str | None) -> str:
    """The table of one benchmark."""
    head = f"# {name}\n\n{' · '.join(f'{key} {value}' for key, value in machine().items())}\n\n"
    if failure is not None:
        return f"{head}**failed**: {failure}\n"
    lines = ["| what | value | unit | beside | its value | ratio | reach |", "|---|---:|---|---|---:|---:|---|"]
    for row in rows:
        cells = [row.get(key) for key in ("what", "value", "unit", "beside", "beside_value", "ratio", "reach")]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return head + "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
