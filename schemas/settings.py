"""Settings models: every knob, its default and its meaning, each written once. Loading is `tokentape.config`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

Seconds = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    """A section of the settings file; unknown keys are refused so that a typo is never silent."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LogSettings(_Section):
    """Where events are appended."""

    kind: Literal["embedded", "kafka", "confluent"] = "embedded"
    bootstrap_servers: str = "127.0.0.1:9092"
    topic: str = "tokentape.events"
    partitions: int = Field(default=4, ge=1, le=1024, description="used when the log is created; fixed after that")
    replication: int = Field(default=1, ge=1, description="Kafka replication factor when the topic is created")
    group: str = Field(default="tokentape.indexer", description="Kafka consumer group of the indexers")
    timeout_s: Seconds = 30.0


class RecorderSettings(_Section):
    """How events travel from the request path to the log."""

    mode: Literal["shed", "block", "strict"] = "block"
    queue_max: int = Field(default=65_536, ge=16, description="events waiting in memory before shed or block acts")
    coalesce_ms: float = Field(default=50.0, ge=0, description="longest time that a token waits for company")
    coalesce_tokens: int = Field(default=64, ge=1, description="tokens of one sequence in one event at most")
    heartbeat_s: Seconds = 10.0
    spool_bytes_max: int = Field(default=8 << 30, ge=1 << 20, description="bytes the spool may hold on disk")
    sample_rate: float = Field(default=1.0, ge=0, le=1, description="share of sessions recorded")


class GatewaySettings(_Section):
    """The HTTP entry before an OpenAI-compatible upstream."""

    host: str = "127.0.0.1"
    port: int = Field(default=8400, ge=0, le=65535, description="0 picks a free port")
    upstream: str = Field(default="http://127.0.0.1:8000", description="base URL without /v1")
    upstream_kind: Literal["auto", "vllm", "openai"] = "auto"
    upstream_key: SecretStr | None = Field(default=None, description="bearer token sent upstream; else the client's own")
    connect_timeout_s: Seconds = 10.0
    first_token_timeout_s: Seconds = 300.0
    between_tokens_timeout_s: Seconds = 60.0
    body_bytes_max: int = Field(default=32 << 20, ge=1024)


class IndexSettings(_Section):
    """How the log becomes hot shards."""

    seal_s: Seconds = 5.0
    batch_events_max: int = Field(default=50_000, ge=1)
    event_bytes_max: int = Field(default=64 << 20, ge=1024, description="a larger event is quarantined")


class ColdSettings(_Section):
    """The object store of segments and ledger."""

    kind: Literal["local", "minio"] = "local"
    endpoint: str = "127.0.0.1:9000"
    secure: bool = False
    region: str = "us-east-1"
    bucket: str = "tokentape"
    access_key: str = ""
    secret_key: SecretStr = SecretStr("")
    lock: Literal["none", "governance", "compliance"] = Field(default="governance", description="object lock of segments")
    lock_days: int = Field(default=30, ge=1)
    timeout_s: Seconds = 30.0


class LedgerSettings(_Section):
    """The signed log of segments."""

    origin: str = Field(default="tokentape.local/ledger", description="name in checkpoints (C2SP tlog-checkpoint origin)")
    checkpoint_s: Seconds = 60.0


class SqlSettings(_Section):
    """Limits of the SQL sandbox."""

    memory_mb: int = Field(default=2048, ge=64)
    threads: int = Field(default=2, ge=1)
    rows_max: int = Field(default=1_000_000, ge=1)
    timeout_s: Seconds = 60.0


class JobsSettings(_Section):
    """How often lifecycle jobs run; 0 switches a job off."""

    merge_s: float = Field(default=60.0, ge=0)
    tier_s: float = Field(default=3600.0, ge=0)
    checkpoint_s: float = Field(default=60.0, ge=0)
    verify_s: float = Field(default=86_400.0, ge=0)
    tier_after_days: float = Field(default=1.0, ge=0, description="age at which a closed day goes to the cold tier")


class LoggingSettings(_Section):
    """Structured logs on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Settings(_Section):
    """All settings of one installation."""

    data: Path = Field(default=Path(".tokentape"), description="the data directory")
    tenant: str = Field(default="default", min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    retention_class: str = Field(default="standard", min_length=1, pattern=r"^[A-Za-z0-9_.-]+$")
    log: LogSettings = LogSettings()
    recorder: RecorderSettings = RecorderSettings()
    gateway: GatewaySettings = GatewaySettings()
    index: IndexSettings = IndexSettings()
    cold: ColdSettings = ColdSettings()
    ledger: LedgerSettings = LedgerSettings()
    sql: SqlSettings = SqlSettings()
    jobs: JobsSettings = JobsSettings()
    logging: LoggingSettings = LoggingSettings()
