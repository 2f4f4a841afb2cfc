"""MinIO: one S3 server over one folder, on 127.0.0.1 only, with credentials of its own for each instance."""

from __future__ import annotations

import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from scripts.native import tools
from scripts.native.component import Address, Launch
from scripts.native.tools import Say


class Minio:
    """The server; buckets with object lock work as they do on S3."""

    name = "minio"
    patience_s = 60.0
    grace_s = 10.0
    ports: tuple[str, ...] = ("client",)

    def configure(self, home: Path, ports: Mapping[str, int], say: Say) -> Address:
        """Make the folder and, the first time, random credentials."""
        tools.minio_binary(say)
        (home / "data").mkdir(exist_ok=True)
        return {
            "endpoint": f"127.0.0.1:{ports['client']}",
            "access_key": f"tt{secrets.token_hex(8)}",
            "secret_key": secrets.token_urlsafe(32),
        }

    def launch(self, home: Path, address: Address, say: Say) -> Launch:
        """Credentials go through the environment, where other users of the machine cannot see them."""
        env = {
            **os.environ,
            "MINIO_ROOT_USER": address["access_key"],
            "MINIO_ROOT_PASSWORD": address["secret_key"],
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
            "HOME": str(home),  # it keeps certificates and settings below the home directory
        }
        argv = [str(tools.minio_binary(say)), "server", "--quiet", "--address", address["endpoint"], str(home / "data")]
        return Launch(argv=argv, env=env)

    def ready(self, address: Address) -> bool:
        """Whether the server says that it can serve requests."""
        try:
            with urllib.request.urlopen(f"http://{address['endpoint']}/minio/health/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def warm(self, address: Address) -> None:
        """Nothing: the first request is as fast as any."""
