"""The HTTP entry before an OpenAI-compatible upstream: passes everything on and records it."""

from ingest.gateway.app import create_app, serve

__all__ = ["create_app", "serve"]
