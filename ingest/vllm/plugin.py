"""Switches capture on in vLLM's own processes, whatever scheduler is in force."""

from __future__ import annotations

import functools
from typing import Any

from ingest.vllm.kv.connector import recording as recording_connector
from ingest.vllm.scheduler import recording
from schemas.enginerun import versions


def install() -> None:
    """From now on each engine core that this process makes is recorded; safe to call twice.

    Raises:
        UsageError: this version of vLLM is not supported.
    """
    import vllm
    from vllm.config import SchedulerConfig

    versions.check(vllm.__version__, operation="capture in the engine")
    chosen = SchedulerConfig.get_scheduler_cls
    if hasattr(chosen, "__wrapped__"):
        return

    @functools.wraps(chosen)
    def get_scheduler_cls(self: Any) -> Any:
        found = chosen(self)
        return recording(found) if isinstance(found, type) else found

    SchedulerConfig.get_scheduler_cls = get_scheduler_cls
    _record_connectors()


def _record_connectors() -> None:
    """Let vLLM's factory make the recording class of whatever KV connector is configured."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    found: Any = KVConnectorFactory.get_connector_class

    @functools.wraps(found)
    def get_connector_class(cls: Any, config: Any) -> Any:
        return recording_connector(found(config))

    KVConnectorFactory.get_connector_class = classmethod(get_connector_class)
