"""The ways into vLLM: what it loads in each of its processes, and its server's middleware.

Importing this costs nothing: what is not switched on is not loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokentape.installation import Installation


def register() -> None:
    """Entry point `vllm.general_plugins`: switch capture on where `engine.capture` says so.

    Raises:
        SettingsError: the settings cannot be read.
        UsageError: this version of vLLM is not supported.
    """
    from tokentape import config

    if config.load().engine.capture == "off":
        return
    from ingest.vllm.plugin import install

    install()


class Middleware:
    """For `vllm serve --middleware tokentape.vllm_plugin.Middleware`."""

    def __init__(self, app: Any) -> None:
        from ingest.vllm.middleware import RecordingMiddleware

        installation = _installation("gateway")
        self._recording = RecordingMiddleware(app, installation.recorder, installation.settings)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection."""
        await self._recording(scope, receive, send)


def _installation(source: str) -> Installation:
    """The installation of the settings, open until the process ends."""
    import atexit

    from tokentape import config
    from tokentape.installation import Installation

    installation = Installation(config.load(), source=source)
    atexit.register(installation.__exit__)
    return installation
