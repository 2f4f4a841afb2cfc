"""A model's objects in an S3 store, under one prefix."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error

from schemas.errors import DataError, SettingsError, StoreUnavailable, UsageError
from schemas.settings import WeightsSettings
from store.weights.manifest import MANIFEST, Manifest

ATTEMPTS = 4
"""Of one piece, each going on where the one before broke off."""
CHUNK = 1 << 20
"""Bytes read and written at a time."""

_PLACE = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/?(.*)")
_GONE = ("NoSuchKey", "NoSuchBucket")


def place_of(address: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://BUCKET/PREFIX`.

    Raises:
        UsageError: it is no such address.
    """
    found = _PLACE.fullmatch(address)
    if found is None or not found[2].strip("/"):
        raise UsageError(f"{address!r} is no place of a model", operation="weights", hint="s3://BUCKET/PREFIX")
    return found[1], found[2].strip("/")


@dataclass(frozen=True, slots=True)
class Object:
    """One file of a model as the store holds it; `etag` names this very version of it."""

    name: str
    size: int
    etag: str


class Remote:
    """The objects of one model."""

    def __init__(self, settings: WeightsSettings, address: str) -> None:
        self.address = address
        self._bucket, self._prefix = place_of(address)
        self._region = settings.region
        timeout = urllib3.Timeout(connect=min(5.0, settings.timeout_s), read=settings.timeout_s)
        http = urllib3.PoolManager(maxsize=settings.connections + 2, timeout=timeout, retries=urllib3.Retry(connect=2, read=0))
        secret = settings.secret_key.get_secret_value() or None
        try:
            self._client = Minio(
                settings.endpoint, settings.access_key or None, secret, secure=settings.secure, region=settings.region, http_client=http
            )
        except ValueError as error:
            hint = "weights.endpoint is host:port; weights.secure = true asks for https"
            raise SettingsError(str(error), operation="weights", place=settings.endpoint, hint=hint) from error

    def manifest(self) -> Manifest:
        """What the model consists of.

        Raises:
            UsageError: no manifest is there.
        """
        with self._mapped(MANIFEST):
            answer = self._client.get_object(self._bucket, self._key(MANIFEST))
            try:
                return Manifest.read(answer.data, place=f"{self.address}/{MANIFEST}")
            finally:
                answer.close()
                answer.release_conn()

    def head(self, name: str) -> Object:
        """A file's size and version.

        Raises:
            UsageError: it is not there.
        """
        with self._mapped(name):
            found = self._client.stat_object(self._bucket, self._key(name))
            return Object(name, found.size or 0, found.etag or "")

    def fetch(self, found: Object, start: int, length: int, descriptor: int) -> None:
        """Write a range of an object to the same place of a file; a connection that breaks is taken up again where it broke.

        Raises:
            DataError: the object was changed meanwhile, or is shorter than it was.
            StoreUnavailable: the store is away.
        """
        done = 0
        for attempt in range(1, ATTEMPTS + 1):
            try:
                done += self._fetch(found, start + done, length - done, descriptor)
            except (StoreUnavailable, DataError):
                raise
            except (urllib3.exceptions.HTTPError, MinioException) as error:
                if attempt == ATTEMPTS:
                    raise self._away(error, found.name) from error
            if done == length:
                return
        fault = f"{found.name} ends {length - done:,} bytes early"
        raise DataError(fault, operation="fetch weights", place=self.address, hint="something on the way cuts it off: look there")

    def _fetch(self, found: Object, start: int, length: int, descriptor: int) -> int:
        """As much as came, which is less than asked where the connection broke."""
        done = 0
        with self._mapped(found.name, broken=True):
            headers: dict[str, str | list[str] | tuple[str]] = {"If-Match": f'"{found.etag}"'}  # all pieces are of one version
            answer = self._client.get_object(self._bucket, self._key(found.name), start, length, request_headers=headers)
            try:
                while done < length and (data := answer.read(min(CHUNK, length - done))):
                    _write(descriptor, data, start + done)
                    done += len(data)
            except urllib3.exceptions.HTTPError:
                pass  # what was written counts; the caller asks for the rest
            finally:
                answer.close()
                answer.release_conn()
        return done

    def publish(self, folder: Path, manifest: Manifest) -> None:
        """Put a model's files, its manifest last."""
        with self._mapped(""):
            if not self._client.bucket_exists(self._bucket):
                self._client.make_bucket(self._bucket, self._region)
        for name in manifest.files:
            with self._mapped(name):
                self._client.fput_object(self._bucket, self._key(name), str(folder / name))
        with self._mapped(MANIFEST):
            self._client.put_object(self._bucket, self._key(MANIFEST), io.BytesIO(manifest.data), len(manifest.data))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    @contextmanager
    def _mapped(self, name: str, *, broken: bool = False) -> Iterator[None]:
        """Errors of the client as ours; with `broken`, those of the connection stay what they are."""
        try:
            yield
        except S3Error as error:
            if error.code in _GONE:
                hint = f"a model is published with its {MANIFEST}: tokentape weights publish FOLDER {self.address}"
                raise UsageError(f"no {name or 'bucket'} is there", operation="weights", place=self.address, hint=hint) from error
            if error.code == "PreconditionFailed":
                hint = "somebody publishes it just now: try again then"
                raise DataError(f"{name} was changed while it was fetched", operation="weights", place=self.address, hint=hint) from error
            hint = "check weights.access_key and weights.secret_key"
            raise StoreUnavailable(f"{error.message} ({error.code})", operation="weights", place=self.address, hint=hint) from error
        except (urllib3.exceptions.HTTPError, MinioException) as error:
            if broken:
                raise
            raise self._away(error, name) from error

    def _away(self, error: Exception, name: str) -> StoreUnavailable:
        fault = f"{name or 'the store'} does not come: {type(error).__name__}"
        return StoreUnavailable(
            fault, operation="weights", place=self.address, hint="start it, or correct weights.endpoint; what came is kept"
        )


def _write(descriptor: int, data: bytes, at: int) -> None:
    """All of it: a disk that is nearly full takes a part first, and fails then."""
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written
