"""Object stores: one interface, a local folder and S3 (MinIO)."""

from __future__ import annotations

from pathlib import Path

from schemas.settings import ColdSettings
from store.objects.base import ObjectStore


def open_store(settings: ColdSettings, data: Path) -> ObjectStore:
    """Open the store that the settings name; `data` is the data directory (local: `data/cold`).

    Raises:
        StoreUnavailable: the store does not answer.
        SettingsError: bucket or credentials are refused.
    """
    if settings.kind == "local":
        from store.objects.local import LocalStore

        return LocalStore(data / "cold")
    from store.objects.minio import MinioStore

    return MinioStore(settings)
