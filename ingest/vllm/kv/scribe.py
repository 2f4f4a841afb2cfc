"""KV operations as events, in a session of their own per engine."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from ingest.recorder import Recorder
from ingest.vllm.names import named
from schemas import events as e
from schemas.enginerun.sessions import kv_session
from schemas.settings import Settings
from schemas.sink import SessionContext

KNOWN_MAX = 10_000
"""Requests that are remembered after their end, since a connector may finish with them later."""


class KvScribe:
    """Turns operations of one process's KV connectors into events; requests that are not known yet wait for their arrival."""

    def __init__(self, recorder: Recorder, settings: Settings, engine_id: str, engine_run: bytes | None, *, content: bool) -> None:
        self._recorder = recorder
        self._engine_run = engine_run
        self._context = SessionContext(
            kv_session(engine_id), settings.tenant, "engine", "", settings.retention_class, content=content, sample_rate=1.0
        )
        self._opened = False
        self._known: OrderedDict[str, bytes] = OrderedDict()
        self._waiting: dict[str, list[dict[str, Any]]] = {}

    def met(self, parent: str, generation_id: bytes) -> None:
        """The engine core knows a request by this name."""
        self._known[parent] = generation_id
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        for operation in self._waiting.pop(parent, ()):
            self._record(operation, generation_id)

    def told(self, operation: dict[str, Any]) -> None:
        """One operation. A call that hangs is not kept waiting: the engine may never say more."""
        name = named(operation["request"]) if operation.get("request") else None
        if name is None:
            self._record(operation, None)
            return
        generation_id = name.generation_id or self._known.get(name.parent)
        operation["request"] = name.external
        if generation_id is None and self._engine_run is not None and operation["outcome"] != "hanging":
            self._waiting.setdefault(name.parent, []).append(operation)
        else:
            self._record(operation, generation_id)

    def lost(self, count: int, reason: str) -> None:
        """So many operations are not on the tape."""
        self._tell(e.RecordsLost(reason=reason, count=count, kinds=[e.Count(key=e.KvOperation.KIND, count=count)]))

    def close(self, reason: str) -> None:
        """The process has ended, or is not recorded any longer."""
        for operations in self._waiting.values():
            for operation in operations:
                self._record(operation, None)
        self._waiting.clear()
        if self._opened:
            self._recorder.record(self._context, e.SessionClosed(reason=reason))

    def _record(self, operation: dict[str, Any], generation_id: bytes | None) -> None:
        error, hashes = operation.pop("error", ""), operation.pop("block_hashes", None)
        content = e.KvContent(error=error, block_hashes=hashes) if error or hashes else None
        self._tell(e.KvOperation(**operation, generation_id=generation_id, content=content))

    def _tell(self, payload: e.Payload) -> None:
        if not self._opened:
            self._opened = True
            opened = e.SessionOpened(workflow="engine", purpose="kv operations", parent_session=self._engine_run, tags=["engine", "kv"])
            self._recorder.record(self._context, opened)
        self._recorder.record(self._context, payload)
