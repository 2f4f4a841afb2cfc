"""`doctor kv`: whether a KV connector can be found and built, reaches its store, and gives back what it was given."""

from __future__ import annotations

import json
import queue
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from schemas.errors import UsageError
from tokentape.doctor import Finding

CONNECT_S = 3.0
"""How long a store may take to accept a connection."""
START_S = 120.0
"""How long vLLM may take to be imported before its first word."""
END_S = 10.0
"""How long its last words may take once it was ended."""
DRIVER = "ingest.vllm.kv.by_hand"
"""The module that drives a connector, in a process of its own: a connector that hangs or crashes takes nothing with it."""

_ADDRESS = re.compile(r"^(?:[a-z][a-z0-9+.-]*://)?[A-Za-z0-9_.-]+:\d{2,5}(?:/.*)?$|^(?:https?|redis|rediss|tcp|s3)://.+$")
_PATH_KEY = re.compile(r"(path|dir|directory|folder|root)$")
_PORTS = {"http": 80, "https": 443, "redis": 6379, "rediss": 6379}


def transfer_of(connector: str | None, config: str | None) -> dict[str, Any]:
    """The `kv_transfer_config` that the command line means: JSON, @FILE of it, MODULE:CLASS or a name that vLLM registers.

    Raises:
        UsageError: none of these, or both.
    """
    if (connector is None) == (config is None):
        raise UsageError("say which connector", operation="doctor kv", hint="either --connector MODULE:CLASS or --config JSON, not both")
    if connector is not None:
        module, _, name = connector.rpartition(":")
        return {"kv_connector": name, "kv_role": "kv_both"} | ({"kv_connector_module_path": module} if module else {})
    assert config is not None
    try:
        found = json.loads(Path(config[1:]).read_text(encoding="utf-8") if config.startswith("@") else config)
    except ValueError as error:
        raise UsageError(f"--config is no JSON: {error}", operation="doctor kv", hint="as for vllm serve --kv-transfer-config") from error
    if not isinstance(found, dict):
        raise UsageError("--config is no JSON object", operation="doctor kv", hint="as for vllm serve --kv-transfer-config")
    return found


def kv(transfer: dict[str, Any], *, dtype: str, device: str, seconds: float, profile: Path | None = None) -> list[Finding]:
    """What is right and wrong with a connector, in the order in which it would show; the first fault of the driven part ends it.

    A profile of its calls goes to the file `profile`.
    """
    findings = [*_places(transfer.get("kv_connector_extra_config") or {})]
    if any(finding.state == "bad" for finding in findings):
        return findings
    return findings + _driven([json.dumps(transfer), dtype, device, str(seconds), *([str(profile)] if profile else [])], seconds)


def _places(extra: Any) -> Iterator[Finding]:
    """Paths and addresses anywhere in a connector's own configuration."""
    for key, value in _strings(extra):
        if _ADDRESS.match(value):
            yield _reached(key, value)
        elif value.startswith(("/", "~", "./", "file:///")) or (_PATH_KEY.search(key) and value):
            yield _writable(key, Path(value.removeprefix("file://")).expanduser())


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    for name, item in value.items() if isinstance(value, dict) else [(key, item) for item in value] if isinstance(value, list) else ():
        yield from _strings(item, str(name))


def _reached(key: str, address: str) -> Finding:
    parts = urlsplit(address if "://" in address else f"//{address}")
    place = f"{parts.hostname}:{parts.port or _PORTS.get(parts.scheme, 80)}"
    try:
        with socket.create_connection((parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 80)), CONNECT_S):
            return Finding("store", "ok", f"{key} = {place} takes connections")
    except OSError as error:
        return Finding("store", "bad", f"{key} = {place}: {error}", "start the store, or correct its address; a firewall looks the same")


def _writable(key: str, path: Path) -> Finding:
    """A folder that is not there yet may be one that the connector makes."""
    nearest = next((parent for parent in (path, *path.parents) if parent.exists()), Path("/"))
    cure = "create the folder, and let the user of the engine write there; every worker has to see the same one"
    if not nearest.is_dir():
        return Finding("path", "bad", f"{key} = {path}: {nearest} is no folder", cure)
    try:
        canary = nearest / ".tokentape-doctor"
        canary.write_bytes(b"")
        canary.unlink()
    except OSError as error:
        return Finding("path", "bad", f"{key} = {path}: {error.strerror}", cure)
    if nearest != path:
        return Finding("path", "warn", f"{key} = {path} is not there; {nearest} can be written to", "create it, unless the connector does")
    return Finding("path", "ok", f"{key} = {path} can be written to")


def _driven(arguments: list[str], seconds: float) -> list[Finding]:
    """What the driver says; a stage that takes too long is the finding, and its process is ended."""
    command = [sys.executable, "-m", DRIVER, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    noise: list[str] = []
    readers = [
        threading.Thread(target=_pump, args=(process, lines), daemon=True),
        threading.Thread(target=lambda: noise.extend(process.stderr or ()), daemon=True),
    ]
    for reader in readers:
        reader.start()
    findings: list[Finding] = []
    begun: Finding | None = None
    try:
        while (line := lines.get(timeout=START_S if begun is None or begun.check == "module" else seconds * 3)) is not None:
            told = Finding(*json.loads(line))
            begun = told if told.state == "begun" else None if told.state == "bad" else begun
            findings += [] if told.state == "begun" else [told]
    except queue.Empty:
        stage = begun.check if begun else "the start of vLLM"
        detail = f"{stage} had not ended after {seconds * 3 if begun else START_S:g} s"
        return [*findings, Finding("time-out", "bad", detail, "look at the store's log and at the connector's own time-outs")]
    finally:
        process.kill()
        for reader in readers:
            reader.join(END_S)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    if not findings or (
        process.returncode not in (0, 1) and findings[-1].state == "ok" and findings[-1].check not in ("compare", "profile")
    ):
        last = next((text.strip() for text in reversed(noise) if text.strip()), "it said nothing")
        findings.append(
            Finding("connector", "bad", f"the process ended with {process.returncode}: {last}", "run it again and read its log")
        )
    return findings


def _pump(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in process.stdout or ():
        lines.put(line)
    lines.put(None)
