"""An object store in one bucket of an S3 server (MinIO): create-once by conditional PUT, locks by object retention.

All goes through minio-py but the conditional PUT, which it lacks (see `store.objects.s3`). Each lock is sent with its
PUT, never left to the bucket's default: a legal-hold header alone switches that default off.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import urllib3
from minio import Minio
from minio.datatypes import Object
from minio.deleteobjects import DeleteObject
from minio.error import MinioException, S3Error
from minio.retention import Retention

from schemas import clock
from schemas.errors import ConflictError, SettingsError, StorageFull, StoreUnavailable, TokentapeError, UsageError
from schemas.settings import ColdSettings
from store.objects.base import NO_LOCK, Lock, ObjectInfo, StoreProbe
from store.objects.checks import check_key, check_prefix, check_range, check_until, open_source, taken
from store.objects.s3 import Answer, Payload, Place, put_if_absent

CONNECT_S_MAX = 5.0  # a server that takes longer to accept is away, however patient the read time-out is
ATTEMPTS = 4  # of one conditional PUT, within the time-out
BACKOFF_S = 0.2  # before the second attempt; doubles
CHUNK = 8 << 20  # bytes compared at a time when a key is taken
POOL = 32  # connections kept open, for callers with many threads
PROBE_LOCK_S = 10  # life of the canary's lock: longer than the probe takes and than clocks usually differ
URL_S_MAX = 7 * 86_400  # longest life of a presigned URL in S3

_GONE = {"NoSuchKey", "NoSuchVersion"}
_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthorizationHeaderMalformed", "InvalidBucketName"}
_FULL = {"XMinioStorageFull", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded"}
_BLOCKED = {"XMinioParentIsObject", "XMinioObjectExistsAsDirectory"}
_TRANSIENT = {409, 429, 500, 502, 503, 504}  # 409: another conditional PUT of the same key is under way
_UNLOCKABLE = "ObjectLockConfiguration"  # part of the message when a bucket keeps no locks


class MinioStore:
    """Objects in `settings.bucket`, which is made with object lock when it is missing."""

    def __init__(self, settings: ColdSettings) -> None:
        secret = settings.secret_key.get_secret_value()
        connect_s = min(CONNECT_S_MAX, settings.timeout_s)
        self.bucket = settings.bucket
        self._timeout_s = settings.timeout_s
        self._timeout = urllib3.Timeout(connect=connect_s, read=settings.timeout_s)
        retries = urllib3.Retry(
            connect=2, read=1, status=2, backoff_factor=BACKOFF_S, status_forcelist=[502, 503, 504], raise_on_status=False
        )
        self._http = urllib3.PoolManager(maxsize=POOL, timeout=self._timeout, retries=retries)
        self._place = Place(settings.endpoint, settings.secure, settings.bucket, settings.region, settings.access_key, secret)
        try:
            self._client = Minio(
                settings.endpoint, settings.access_key, secret, secure=settings.secure, region=settings.region, http_client=self._http
            )
        except ValueError as error:
            hint = "cold.endpoint is host:port; cold.secure = true asks for https"
            raise SettingsError(str(error), operation="open", place=settings.endpoint, hint=hint) from error
        self._make_bucket()

    def create(self, key: str, data: bytes, *, lock: Lock = NO_LOCK) -> None:
        """See `ObjectStore.create`. The lock is part of the PUT."""
        self._create(check_key(key, operation="create"), Payload.of_bytes(data), lock)

    def create_from_file(self, key: str, path: Path, *, lock: Lock = NO_LOCK) -> None:
        """See `ObjectStore.create_from_file`: one streamed PUT, at most 5 GiB (S3's limit)."""
        check_key(key, operation="create")
        with open_source(path) as file:
            self._create(key, Payload.of_file(file), lock)

    def get(self, key: str) -> bytes:
        """See `ObjectStore.get`."""
        return self._read(check_key(key, operation="get"), 0, 0)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See `ObjectStore.get_range`."""
        check_range(key, start, length)
        info = None if length else self.head(key)
        if not length and info is None:
            raise KeyError(key)
        return self._read(check_key(key, operation="get"), start, length) if length else b""

    def head(self, key: str) -> ObjectInfo | None:
        """See `ObjectStore.head`."""
        check_key(key, operation="head")
        try:
            with self._mapped("head", key):
                found = self._client.stat_object(self.bucket, key)
        except KeyError:
            return None
        return ObjectInfo(key, found.size or 0, found.last_modified or datetime.fromtimestamp(0, UTC))

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """See `ObjectStore.list`; pages of 1,000 are fetched as they are read."""
        check_prefix(prefix, operation="list")
        with self._mapped("list", prefix):
            found = self._client.list_objects(self.bucket, prefix or None, recursive=True, start_after=start_after or None)
        while True:
            with self._mapped("list", prefix):
                item = next(found, None)
            if item is None:
                return
            yield ObjectInfo(item.object_name or "", item.size or 0, item.last_modified or datetime.fromtimestamp(0, UTC))

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        check_key(key, operation="delete")
        for version in self._versions(key):
            try:
                with self._mapped("delete", key):
                    self._client.remove_object(self.bucket, key, version_id=version)
            except KeyError:
                continue
            except TokentapeError as error:
                raise self._explain_refusal(key, version, error) from error

    def purge(self, key: str) -> int:
        """See `ObjectStore.purge`. The permission `s3:BypassGovernanceRetention` is needed where there are governance locks."""
        check_key(key, operation="purge")
        versions = self._versions(key)
        with self._mapped("delete", key):
            wanted = [DeleteObject(key, version) for version in versions]
            errors = list(self._client.remove_objects(self.bucket, wanted, bypass_governance_mode=True)) if wanted else []
        for problem in errors:
            if problem.code not in _GONE:
                fault = self._by_code(problem.code, "purge", key, f"{problem.message} ({problem.code})")
                raise self._explain_refusal(key, problem.version_id, fault)
        return len(versions)

    def remains(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See `ObjectStore.remains`."""
        check_prefix(prefix, operation="list")
        with self._mapped("list", prefix):
            found = self._client.list_objects(self.bucket, prefix or None, recursive=True, include_version=True)
        for key, items in itertools.groupby(self._drawn(found, prefix)):
            yield key, sum(1 for _ in items)

    def _drawn(self, found: Iterator[Object], prefix: str) -> Iterator[str]:
        while True:
            with self._mapped("list", prefix):
                item = next(found, None)
            if item is None:
                return
            yield item.object_name or ""

    def lock_of(self, key: str) -> Lock:
        """See `ObjectStore.lock_of`."""
        if self.head(key) is None:
            raise KeyError(key)
        try:
            with self._mapped("lock", key):
                held = self._client.get_object_retention(self.bucket, key)
        except UsageError:
            return NO_LOCK  # a bucket that keeps no locks
        if held is None:
            return NO_LOCK
        return Lock("compliance" if held.mode == "COMPLIANCE" else "governance", held.retain_until_date)

    def set_hold(self, key: str, held: bool) -> None:
        """See `ObjectStore.set_hold`."""
        if self.head(key) is None:
            raise KeyError(key)
        with self._mapped("hold", key):
            if held:
                self._client.enable_object_legal_hold(self.bucket, key)
            else:
                self._client.disable_object_legal_hold(self.bucket, key)

    def read_url(self, key: str, *, expires_s: int) -> str:
        """A presigned GET URL: it is signed for reading this one object and for nothing else."""
        check_key(key, operation="read_url")
        life = timedelta(seconds=max(1, min(expires_s, URL_S_MAX)))
        with self._mapped("read_url", key):
            return self._client.presigned_get_object(self.bucket, key, expires=life)

    def probe(self) -> StoreProbe:
        """See `ObjectStore.probe`. Canaries of earlier probes are removed once their short lock has ended."""
        self._sweep_probes()
        key = f"probe/{uuid.uuid4()}"
        locks, why = self._probe_lock(key)
        second = self._put(key, Payload.of_bytes(b"second"), NO_LOCK)
        once = second.status == 412 and self.get(key) == b"first"
        words = "create-once holds" if once else "CREATE-ONCE DOES NOT HOLD"
        return StoreProbe(once, locks, f"bucket {self.bucket}: {words}; {why}")

    # How it is done.

    def _make_bucket(self) -> None:
        with self._mapped("open", ""):
            if self._client.bucket_exists(self.bucket):
                return
            try:
                self._client.make_bucket(self.bucket, self._place.region, object_lock=True)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

    def _create(self, key: str, payload: Payload, lock: Lock) -> None:
        """PUT; where the key is taken, equal bytes count as success and get the lock they should have had."""
        answer = self._put(key, payload, lock)
        if answer.status == 200:
            return
        if answer.status != 412:
            raise self._put_error(key, answer)
        if not self._holds(key, payload):
            raise taken(key)
        self._extend_lock(key, lock)

    def _put(self, key: str, payload: Payload, lock: Lock) -> Answer:
        """A conditional PUT, repeated while the server is away or busy: repeating it is safe."""
        deadline = time.monotonic() + self._timeout_s
        for attempt in itertools.count(1):
            last = attempt >= ATTEMPTS or time.monotonic() >= deadline
            try:
                answer = put_if_absent(self._http, self._place, key, payload, lock, self._timeout)
            except urllib3.exceptions.HTTPError as error:
                if last:
                    raise self._away("create", key, error) from error
            else:
                if last or answer.status not in _TRANSIENT:
                    return answer
            time.sleep(min(BACKOFF_S * 2 ** (attempt - 1), max(0.0, deadline - time.monotonic())))
        raise AssertionError("the loop above only ends by return or raise")

    def _put_error(self, key: str, answer: Answer) -> TokentapeError:
        fault = f"{answer.message or 'refused'} ({answer.code or answer.status})"
        if _UNLOCKABLE in answer.message:
            hint = 'make the bucket with object lock, or set cold.lock = "none"'
            return SettingsError("the bucket keeps no locks", operation="create", place=self._where(key), hint=hint)
        return self._by_code(answer.code, "create", key, fault)

    def _holds(self, key: str, payload: Payload) -> bool:
        """Whether the stored object has exactly these bytes; read back in pieces, since it may be large."""
        info = self.head(key)
        if info is None or info.size != payload.size:
            return False
        digest = hashlib.sha256()
        for start in range(0, payload.size, CHUNK):
            digest.update(self.get_range(key, start, CHUNK))
        return digest.digest() == payload.sha256

    def _extend_lock(self, key: str, lock: Lock) -> None:
        """Make the object's lock at least as strong and as long as asked; never weaken it."""
        if lock.mode == "none":
            return
        until = check_until(lock)
        with self._mapped("lock", key):
            held = self._client.get_object_retention(self.bucket, key)
            mode = "COMPLIANCE" if held is not None and held.mode == "COMPLIANCE" else lock.mode.upper()
            if held is None or held.mode != mode or held.retain_until_date < until.replace(microsecond=0):
                end = max(until, held.retain_until_date) if held is not None else until
                self._client.set_object_retention(self.bucket, key, Retention(mode, end))

    def _read(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`; 0 means to the end. Beyond the end there are none."""
        try:
            with self._mapped("get", key):
                response = self._client.get_object(self.bucket, key, offset=start, length=length)
                try:
                    return response.read()
                finally:
                    response.close()
                    response.release_conn()
        except _BeyondEnd:
            return b""

    def _versions(self, key: str) -> Sequence[str | None]:
        """Every version and delete marker of one key. Other keys may share the prefix; they sort after it."""
        with self._mapped("delete", key):
            found = self._client.list_objects(self.bucket, key, recursive=True, include_version=True)
            return [item.version_id for item in itertools.takewhile(lambda item: item.object_name == key, found)]

    def _explain_refusal(self, key: str, version: str | None, error: TokentapeError) -> TokentapeError:
        """A locked object where there is a lock; else the refusal as it came."""
        if error.retryable:
            return error
        with contextlib.suppress(TokentapeError, KeyError), self._mapped("lock", key):
            held = self._client.get_object_retention(self.bucket, key, version_id=version)
            if held is not None and held.retain_until_date > clock.now():
                hint = f"not before {held.retain_until_date.isoformat()}"
                return ConflictError(f"the object is locked ({held.mode.lower()})", operation="delete", place=self._where(key), hint=hint)
            if self._client.is_object_legal_hold_enabled(self.bucket, key, version_id=version):
                return ConflictError("the object is under legal hold", operation="delete", place=self._where(key))
        return error

    def _probe_lock(self, key: str) -> tuple[bool, str]:
        """Write the canary and try to delete its locked version: whether that is refused, and a few words."""
        # Of the server's own time, not of `schemas.clock`: the server says whether it is over.
        lock = Lock("governance", datetime.now(UTC) + timedelta(seconds=PROBE_LOCK_S))
        answer = self._put(key, Payload.of_bytes(b"first"), lock)
        if answer.status != 200:
            plain = self._put(key, Payload.of_bytes(b"first"), NO_LOCK)
            if plain.status != 200:
                raise self._put_error(key, plain)
            return False, f"locks refused: {answer.message or answer.code or answer.status}"
        try:
            self.delete(key)
        except ConflictError:
            return True, "locks are enforced"
        self._create(key, Payload.of_bytes(b"first"), NO_LOCK)
        return False, "LOCKS ARE NOT ENFORCED: a locked canary was deleted"

    def _sweep_probes(self) -> None:
        """Remove old canaries; one that is still locked waits for the next probe."""
        for info in self.list("probe/"):
            with contextlib.suppress(ConflictError):
                self.delete(info.key)

    def _where(self, key: str) -> str:
        return f"{self._place.host}/{self.bucket}/{key}".rstrip("/")

    def _away(self, operation: str, key: str, error: Exception) -> StoreUnavailable:
        reason = getattr(error, "reason", None) or error
        hint = "is the server running, and are cold.endpoint and cold.secure right?"
        return StoreUnavailable(f"no answer: {type(reason).__name__}", operation=operation, place=self._where(key), hint=hint)

    def _by_code(self, code: str | None, operation: str, key: str, fault: str) -> TokentapeError:
        """The error of the contract for an S3 error code."""
        place = self._where(key)
        if code in _FULL:
            return StorageFull(fault, operation=operation, place=place, hint="free some space on the server")
        if code in _REFUSED:
            return SettingsError(fault, operation=operation, place=place, hint="check cold.access_key, cold.secret_key and cold.bucket")
        if code in _BLOCKED:
            return ConflictError(fault, operation=operation, place=place, hint="no object's key may be the folder of another's")
        if code == "NoSuchBucket":
            return StoreUnavailable("the bucket is gone", operation=operation, place=place, hint="restart to make it again")
        if code in ("InvalidRequest", "InvalidArgument", "ObjectLocked", "MethodNotAllowed", "EntityTooLarge"):
            return UsageError(fault, operation=operation, place=place)
        return StoreUnavailable(fault, operation=operation, place=place, hint="look at the server's own log")

    @contextlib.contextmanager
    def _mapped(self, operation: str, key: str) -> Iterator[None]:
        """Turn what minio-py and urllib3 raise into the errors of the contract."""
        try:
            yield
        except S3Error as error:
            if error.code in _GONE:
                raise KeyError(key) from error
            if error.code == "InvalidRange":
                raise _BeyondEnd from error
            raise self._by_code(error.code, operation, key, f"{error.message} ({error.code})") from error
        except ValueError as error:
            raise SettingsError(str(error), operation=operation, place=self._where(key), hint="check cold.bucket") from error
        except MinioException as error:
            hint = "is this the address of an S3 server?"
            raise StoreUnavailable(str(error)[:200], operation=operation, place=self._where(key), hint=hint) from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise self._away(operation, key, error) from error


def remove_bucket(settings: ColdSettings) -> None:
    """Remove a bucket with all that is in it, legal holds or not: one that was made to be thrown away, without locks.

    Raises:
        ConflictError: something in it is locked. StoreUnavailable: the server does not answer.
    """
    store = MinioStore(settings)
    for key, _ in list(store.remains("")):
        try:
            store.purge(key)
        except ConflictError:
            store.set_hold(key, False)
            store.purge(key)
    with store._mapped("remove bucket", ""):
        store._client.remove_bucket(store.bucket)


class _BeyondEnd(Exception):
    """A range that starts at or after the end of an object."""
