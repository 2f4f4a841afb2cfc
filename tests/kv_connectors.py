"""vLLM's example connector, broken in one way each: what `doctor kv` has to tell apart, and what recording has to survive."""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


class Forgetful(ExampleConnector):  # type: ignore[misc]  # vLLM is not typed here; so below
    """Finds nothing, whatever it was given."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False


class Believing(ExampleConnector):  # type: ignore[misc]
    """Finds what nobody saved."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 32, False


class Rounding(ExampleConnector):  # type: ignore[misc]
    """Keeps eight bits of each value."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **more: Any) -> None:
        super().save_kv_layer(layer_name, kv_layer.to(torch.float8_e4m3fn).to(kv_layer.dtype), attn_metadata, **more)


class Casting(ExampleConnector):  # type: ignore[misc]
    """Saves in a dtype that cannot be loaded into the cache."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **more: Any) -> None:
        super().save_kv_layer(layer_name, kv_layer.to(torch.float64), attn_metadata, **more)


class Elsewhere(ExampleConnector):  # type: ignore[misc]
    """Takes its tensors to a device that is not there."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **more: Any) -> None:
        super().save_kv_layer(layer_name, kv_layer.to("cuda"), attn_metadata, **more)


class Waiting(ExampleConnector):  # type: ignore[misc]
    """Waits for a store that does not answer."""

    def wait_for_save(self) -> None:
        time.sleep(3600)


class Stumbling(ExampleConnector):  # type: ignore[misc]
    """Takes its time to look something up, and raises when it is to save."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        time.sleep(2)
        return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def wait_for_save(self) -> None:
        raise ConnectionRefusedError("the store at nowhere refused the connection")


class Silent(ExampleConnector):  # type: ignore[misc]
    """Asserts what is not so, without a word."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        assert kv_cache_config is None


class Abstract(KVConnectorBase_V1):  # type: ignore[misc]
    """Implements nothing."""


class TwoArguments(ExampleConnector):  # type: ignore[misc]
    """Has the constructor of old."""

    def __init__(self, vllm_config: Any, role: Any) -> None:
        super().__init__(vllm_config, role, None)
