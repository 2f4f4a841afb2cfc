"""Publishes the cold tier as an Apache Iceberg table, for engines that read no catalog of ours: Spark, Trino, DuckDB.

The segments are registered as they are, not copied. The table is a projection: signed manifests stay the commit point, and
whatever became of the table, publishing brings it to the live segments again (added is what it lacks, dropped what it has
too much), in one Iceberg snapshot. Metadata of Iceberg is unsigned and proves nothing.

Three settings of the table keep the segments safe, because maintenance commands of engines delete files: `gc.enabled=false`,
a location apart from the segments, and no retries within pyiceberg, which would skip its look for files that are there already.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from schemas.errors import ConflictError, CorruptStore, SettingsError, StoreUnavailable, UsageError
from schemas.settings import Settings
from store.catalog import Catalog

log = structlog.get_logger("tokentape.iceberg")

CATALOG, NAMESPACE, TABLE = "tokentape", "tokentape", "events"
"""The names of catalog, namespace and table: `tokentape.tokentape.events` in Spark."""

_PROPERTIES = {
    "gc.enabled": "false",
    "commit.retry.num-retries": "0",
    "write.metadata.delete-after-commit.enabled": "true",
    "write.metadata.previous-versions-max": "20",
}

_RACES_MAX = 10
"""Publishers that may come first before this one gives up; each leaves less to do."""


@dataclass(frozen=True, slots=True)
class Published:
    """The table after a run: how many files came and went, what it holds, and where readers find it."""

    added: int
    dropped: int
    files: int
    rows: int
    metadata: str

    def to_json(self) -> dict[str, Any]:
        """As a flat dict."""
        return {"added": self.added, "dropped": self.dropped, "files": self.files, "rows": self.rows, "metadata": self.metadata}


class Iceberg:
    """The cold tier's table in an Iceberg catalog that SQLAlchemy reaches (Java's JdbcCatalog reads it too)."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        self._settings = settings
        self._catalog = catalog

    @property
    def uri(self) -> str:
        """SQLAlchemy's address of the catalog's database."""
        return self._settings.iceberg.catalog or f"sqlite:///{(self._settings.data / 'iceberg' / 'catalog.sqlite').resolve()}"

    @property
    def shown(self) -> str:
        """The address without the password that it may hold."""
        return re.sub(r"//[^/@]*@", "//…@", self.uri)

    @property
    def name(self) -> str:
        """The table's name in its catalog."""
        return f"{NAMESPACE}.{TABLE}"

    @property
    def warehouse(self) -> str:
        """Where the table's own metadata lies; never below the segments."""
        if self._settings.iceberg.warehouse:
            return self._settings.iceberg.warehouse.rstrip("/")
        cold = self._settings.cold
        return f"s3://{cold.bucket}/iceberg" if cold.kind != "local" else str((self._settings.data / "iceberg").resolve())

    def preview(self) -> dict[str, Any]:
        """What `publish` would add and drop.

        Raises:
            As `publish`.
        """
        with self._mapped():
            table = self._table(create=False)
            have, wanted = (_files(table) if table is not None else {}), self._wanted()
        return {"would_add": sorted(wanted.keys() - have.keys()), "would_drop": sorted(have.keys() - wanted.keys())}

    def publish(self) -> Published:
        """Bring the table to the segments that are live now, and forget snapshots that name others.

        Raises:
            UsageError: the extra `iceberg` is not installed.
            SettingsError: the catalog's address cannot be used.
            CorruptStore: a segment is missing or has columns of another type; the table stays as it was.
            StoreUnavailable: catalog or store does not answer.
            ConflictError: others publish all the time.
        """
        with self._mapped():
            from pyiceberg.exceptions import CommitFailedException

            for _ in range(_RACES_MAX):
                table = self._table()
                try:
                    added, dropped = self._bring(table)
                except CommitFailedException:
                    continue
                # Files that an earlier snapshot names may be gone: whoever asks for it is told so by Iceberg.
                with contextlib.suppress(CommitFailedException):  # another publisher does it
                    _expire(table.refresh())
                return _published(table.refresh(), added, dropped)
        raise ConflictError("others publish as well", operation="publish", place=self.uri, hint="try again later")

    def _bring(self, table: Any) -> tuple[int, int]:
        """One snapshot with the difference; how many files came and went."""
        have, wanted = _files(table), self._wanted()
        new, old = sorted(wanted.keys() - have.keys()), sorted(have.keys() - wanted.keys())
        if not new and not old:
            return 0, 0
        from pyiceberg.io.pyarrow import parquet_file_to_data_file

        with table.transaction() as change:
            _widen(change, table, new)
            with change.update_snapshot({"tokentape.segments": str(len(wanted))}).overwrite() as snapshot:
                for path in new:
                    snapshot.append_data_file(parquet_file_to_data_file(table.io, change.table_metadata, path))
                for path in old:
                    snapshot.delete_data_file(have[path])
        log.info("iceberg.published", added=len(new), dropped=len(old), files=len(wanted))
        return len(new), len(old)

    def _wanted(self) -> dict[str, int]:
        """Address and rows of every live segment."""
        cold = self._settings.cold
        root = f"s3://{cold.bucket}" if cold.kind != "local" else str((self._settings.data / "cold").resolve())
        return {f"{root}/{segment.key}": segment.rows for segment in self._catalog.snapshot().segments}

    def _table(self, *, create: bool = True) -> Any:
        """The table, made when it is not there; None where it is not and may not be made."""
        from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError, TableAlreadyExistsError
        from pyiceberg.schema import Schema

        if not create and self.uri.startswith("sqlite:///") and not Path(self.uri.removeprefix("sqlite:///")).exists():
            return None
        catalog = self._open()
        try:
            return catalog.load_table(self.name)
        except (NoSuchTableError, NoSuchNamespaceError):
            if not create:
                return None
        catalog.create_namespace_if_not_exists(NAMESPACE)
        try:
            return catalog.create_table(self.name, Schema(), location=f"{self.warehouse}/{NAMESPACE}/{TABLE}", properties=_PROPERTIES)
        except TableAlreadyExistsError:  # another publisher
            return catalog.load_table(self.name)

    def _open(self) -> Any:
        from pyiceberg.catalog.sql import SqlCatalog

        if self.uri.startswith("sqlite:///"):
            Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        cold, storage = self._settings.cold, {}
        if cold.kind != "local":
            storage = {
                "s3.endpoint": f"{'https' if cold.secure else 'http'}://{cold.endpoint}",
                "s3.region": cold.region,
                "s3.access-key-id": cold.access_key,
                "s3.secret-access-key": cold.secret_key.get_secret_value(),
            }
        return SqlCatalog(CATALOG, uri=self.uri, warehouse=self.warehouse, **storage)

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        """What pyiceberg, SQLAlchemy and Arrow raise, as our errors."""
        try:
            import sqlalchemy.exc
            from pyiceberg.exceptions import CommitStateUnknownException
        except ImportError as error:
            hint = "pip install 'tokentape[iceberg]'"
            raise UsageError(f"Iceberg needs the extra iceberg: {error.name} is missing", operation="publish", hint=hint) from None
        place = self.shown
        try:
            yield
        except (sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError) as error:
            hint = "a SQLAlchemy address such as sqlite:////folder/catalog.sqlite or postgresql+psycopg2://user@host/db"
            raise SettingsError(f"iceberg.catalog cannot be used: {error}", operation="publish", place=place, hint=hint) from error
        except sqlalchemy.exc.SQLAlchemyError as error:
            first = str(error).splitlines()[0]
            raise StoreUnavailable(f"the Iceberg catalog does not answer: {first}", operation="publish", place=place) from error
        except FileNotFoundError as error:
            hint = "`tokentape verify` names what is missing; the table stays as it was"
            raise CorruptStore(f"a segment is not there: {error}", operation="publish", place=place, hint=hint) from error
        except ValueError as error:
            hint = "the table stays as it was; `tokentape verify` says whether the segment was modified"
            raise CorruptStore(f"a segment does not fit the table: {error}", operation="publish", place=place, hint=hint) from error
        except (OSError, CommitStateUnknownException) as error:
            raise StoreUnavailable(str(error).splitlines()[0], operation="publish", place=self.warehouse) from error


def _files(table: Any) -> dict[str, Any]:
    """The table's data files by address."""
    return {task.file.file_path: task.file for task in table.scan().plan_files()}


def _widen(change: Any, table: Any, paths: list[str]) -> None:
    """Add columns that new segments have; older ones read as null there."""
    import pyarrow.parquet as pq
    from pyiceberg.table import TableProperties

    for path in paths:
        with table.io.new_input(path).open() as file:
            columns = pq.read_schema(file)
        with change.update_schema() as update:
            update.union_by_name(columns)
    # The segments carry no field ids: their columns are found by name.
    mapping = change.table_metadata.schema().name_mapping.model_dump_json()
    change.set_properties({TableProperties.DEFAULT_NAME_MAPPING: mapping})


def _expire(table: Any) -> None:
    """Forget every snapshot but the current one."""
    current = table.current_snapshot()
    old = [snapshot.snapshot_id for snapshot in table.snapshots() if current is None or snapshot.snapshot_id != current.snapshot_id]
    if old:
        table.maintenance.expire_snapshots().by_ids(old).commit()


def _published(table: Any, added: int, dropped: int) -> Published:
    snapshot = table.current_snapshot()
    facts: Mapping[str, str] = snapshot.summary.additional_properties if snapshot is not None else {}
    files, rows = int(facts.get("total-data-files", 0)), int(facts.get("total-records", 0))
    return Published(added, dropped, files, rows, table.metadata_location)
