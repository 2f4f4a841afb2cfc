"""One signed S3 request that minio-py lacks: PUT if the key is free, with its retention in the same request.

`If-None-Match: *` makes the server the judge between writers, and the retention headers make object and lock one
step: there is no moment at which the object stands unlocked. (obstore has the conditional PUT, but no retention
headers and the whole object in memory.) Signature: AWS SigV4 through minio-py's signer, all headers signed.
"""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import BinaryIO
from urllib.parse import SplitResult, quote, urlunsplit
from xml.etree import ElementTree

import urllib3
from minio.credentials.credentials import Credentials
from minio.signer import sign_v4_s3

from store.objects.base import Lock
from store.objects.checks import check_until

CHUNK = 1 << 20  # bytes read at a time


@dataclass(frozen=True, slots=True)
class Payload:
    """What a PUT sends: the bytes or an open file, with size and digests taken once for all attempts."""

    body: bytes | BinaryIO
    size: int
    sha256: bytes
    md5: bytes

    @classmethod
    def of_bytes(cls, data: bytes) -> Payload:
        """A payload in memory."""
        return cls(data, len(data), hashlib.sha256(data).digest(), hashlib.md5(data, usedforsecurity=False).digest())

    @classmethod
    def of_file(cls, file: BinaryIO) -> Payload:
        """A payload streamed from a seekable file, read once here for its digests."""
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            md5.update(chunk)
        return cls(file, os.fstat(file.fileno()).st_size, sha256.digest(), md5.digest())


@dataclass(frozen=True, slots=True)
class Answer:
    """Status of a PUT and, where it failed, the server's error code and message."""

    status: int
    code: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and as whom to write."""

    host: str
    secure: bool
    bucket: str
    region: str
    access_key: str
    secret_key: str


def put_if_absent(http: urllib3.PoolManager, place: Place, key: str, payload: Payload, lock: Lock, timeout: urllib3.Timeout) -> Answer:
    """Send one conditional PUT; 200 means written, 412 that the key is taken.

    Raises:
        urllib3.exceptions.HTTPError: no answer; the object may or may not have been written.
    """
    url = SplitResult("https" if place.secure else "http", place.host, quote(f"/{place.bucket}/{key}", safe="/-_.~"), "", "")
    now = datetime.now(UTC)  # not of `schemas.clock`: a server refuses a signature that is minutes off its own time
    digest = payload.sha256.hex()
    headers: dict[str, str | list[str] | tuple[str]] = {
        "Host": place.host,
        "Content-Length": str(payload.size),
        "Content-MD5": base64.b64encode(payload.md5).decode(),
        "Content-Type": "application/octet-stream",
        "If-None-Match": "*",
        "x-amz-content-sha256": digest,
        "x-amz-date": now.strftime("%Y%m%dT%H%M%SZ"),
        **lock_headers(lock),
    }
    credentials = Credentials(place.access_key, place.secret_key)
    sign_v4_s3(method="PUT", url=url, region=place.region, headers=headers, credentials=credentials, content_sha256=digest, date=now)
    if not isinstance(payload.body, bytes):
        payload.body.seek(0)
    sent = {name: str(value) for name, value in headers.items()}
    response = http.request("PUT", urlunsplit(url), body=payload.body, headers=sent, retries=False, redirect=False, timeout=timeout)
    return _answer(response.status, response.data)


def lock_headers(lock: Lock) -> dict[str, str]:
    """Retention as S3 headers; an end between two seconds is rounded up, never down."""
    if lock.mode == "none":
        return {}
    until = check_until(lock)
    if until.microsecond:
        until = until.replace(microsecond=0) + timedelta(seconds=1)
    return {
        "x-amz-object-lock-mode": lock.mode.upper(),
        "x-amz-object-lock-retain-until-date": until.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _answer(status: int, body: bytes) -> Answer:
    if status == 200:
        return Answer(status)
    try:
        document = ElementTree.fromstring(body)
        return Answer(status, document.findtext("{*}Code") or "", document.findtext("{*}Message") or "")
    except ElementTree.ParseError:
        return Answer(status, "", body[:200].decode(errors="replace"))
