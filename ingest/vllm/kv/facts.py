"""What of a connector's calls is worth the tape: by method, from what it was given and what it answered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPERATIONS = {
    "get_num_new_matched_tokens": "lookup",
    "update_state_after_alloc": "load",
    "build_connector_meta": "metadata",
    "request_finished": "finish",
    "request_finished_all_groups": "finish",
    "start_load_kv": "load",
    "wait_for_layer_load": "load",
    "get_block_ids_with_load_errors": "load",
    "save_kv_layer": "save",
    "wait_for_save": "save",
    "get_finished": "finish",
    "get_transfer_results": "finish",
}
"""The connector's methods by what they do; any other is an operation by its own name, told when it fails or takes long."""
ALWAYS = frozenset({"construct", "get_num_new_matched_tokens", "request_finished", "request_finished_all_groups", "register_kv_caches"})
"""Told one by one, however quick."""
SUMMED = frozenset({"start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save"})
"""Called once a layer or a step, and told once a step."""
AT_WORK = frozenset({"get_num_new_matched_tokens", "build_connector_meta", "bind_connector_metadata"})
"""Calls by which a step has begun, so that all parts of the engine exist."""
HASHES_MAX = 64
"""Blocks of a prompt of which the hash is kept …"""
HASH_BYTES = 8
"""… and how much of each: enough to tell whether two are equal."""
PAGE_BYTES = 4096
"""Unit of /proc/self/statm."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """`token_bytes` is what one token takes in the cache of all layers, `layer_bytes` in one's."""

    block_tokens: int
    token_bytes: float
    layer_bytes: float

    @classmethod
    def of(cls, config: Any, kv_cache_config: Any) -> Sizes:
        """From vLLM's own specification of its cache; zero bytes where that is of a kind unknown here."""
        block = getattr(config.cache_config, "block_size", None) or 16
        total, layers = 0.0, 0
        for group in getattr(kv_cache_config, "kv_cache_groups", None) or ():
            spec, count = group.kv_cache_spec, len(group.layer_names)
            total += count * getattr(spec, "page_size_bytes", 0) / (getattr(spec, "block_size", 0) or block)
            layers += count
        return cls(block, total, total / layers if layers else 0.0)


def asked(name: str, args: tuple[Any, ...], more: dict[str, Any]) -> dict[str, Any]:
    """What a method was given. Never raises: a signature that is not known says nothing."""
    try:
        if name == "get_num_new_matched_tokens":
            request, local = (*args, *more.values())[:2]
            hashes = b"".join(bytes(block)[:HASH_BYTES] for block in list(getattr(request, "block_hashes", ()))[:HASHES_MAX])
            tokens = request.num_tokens - local
            return {"request": request.request_id, "tokens_asked": tokens, "tokens_local": local, "block_hashes": hashes or None}
        if name in ("request_finished", "request_finished_all_groups"):
            request, blocks = (*args, *more.values())[:2]
            return {"request": request.request_id, "blocks": len(blocks) if name == "request_finished" else sum(map(len, blocks))}
        if name == "update_state_after_alloc":
            request, _, tokens = (*args, *more.values())[:3]
            return {"request": request.request_id, "tokens_matched": tokens}
    except (TypeError, ValueError, AttributeError):
        pass
    return {}


def answered(name: str, answer: Any, args: tuple[Any, ...], sizes: Sizes) -> dict[str, Any]:
    """What a method answered or moved; `notable` where it did something. Never raises."""
    try:
        return _answered(name, answer, args, sizes)
    except (TypeError, ValueError, AttributeError, IndexError):
        return {}


def _answered(name: str, answer: Any, args: tuple[Any, ...], sizes: Sizes) -> dict[str, Any]:
    if name == "get_num_new_matched_tokens":
        matched = answer[0]
        blocks = None if matched is None else -(-matched // sizes.block_tokens)
        return {"tokens_matched": matched, "blocks": blocks, "outcome": "pending" if matched is None else "ok"}
    if name in ("request_finished", "request_finished_all_groups"):
        return {"outcome": "deferred" if answer[0] else "ok"}
    if name == "update_state_after_alloc":
        tokens = args[2]
        moved = {"blocks": -(-tokens // sizes.block_tokens), "bytes": round(tokens * sizes.token_bytes)}
        return {"notable": True, **moved} if tokens else {}
    if name == "build_connector_meta":
        new = args[0].scheduled_new_reqs
        return {"tokens_asked": args[0].total_num_scheduled_tokens, "notable": bool(new)}
    if name == "save_kv_layer":
        tokens = int(args[2].num_actual_tokens)
        return {"tokens_asked": tokens, "bytes": round(tokens * sizes.layer_bytes)}
    if name == "get_block_ids_with_load_errors":
        return {"blocks": len(answer), "outcome": "failed", "notable": True} if answer else {}
    if name == "get_transfer_results":
        return _transferred(answer.finished_sending, answer.finished_recving, answer.failed_recving)
    if name == "get_finished":
        return _transferred(answer[0], answer[1], None)
    return {}


def _transferred(sent: set[str] | None, received: set[str] | None, failed: set[str] | None) -> dict[str, Any]:
    """The end of transfers beside the engine's work, by its request where it is one."""
    for outcome, names in (("failed", failed), ("received", received), ("sent", sent)):
        if names:
            return {"request": min(names), "calls": len(names), "outcome": outcome, "notable": True}
    return {}


def memory_bytes(statm: Path) -> int | None:
    """Resident memory of this process; None where the system does not tell."""
    try:
        return int(statm.read_text().split()[1]) * PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None
