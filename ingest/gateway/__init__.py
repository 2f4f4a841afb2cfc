"""The HTTP entry before an upstream: speaks its clients' languages, passes everything on and records it."""

from ingest.gateway.app import create_app, serve

__all__ = ["create_app", "serve"]
