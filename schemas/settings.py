"""Settings models: every knob, its default and its meaning, each written once. Loading is `tokentape.config`'s."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

Seconds = Annotated[float, Field(gt=0)]


def _listed(value: Any) -> Any:
    """A list as it may stand in a variable or flag: comma-separated."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class _Section(BaseModel):
    """A section of the settings file; unknown keys are refused so that a typo is never silent."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LogSettings(_Section):
    """Where events are appended."""

    kind: Literal["embedded", "kafka", "confluent"] = Field(default="embedded", description="SQLite file, kafka-python or confluent-kafka.")
    bootstrap_servers: str = Field(default="127.0.0.1:9092", description="host:port, comma-separated")
    topic: str = Field(default="tokentape.events", description="created when missing")
    partitions: int = Field(default=4, ge=1, le=1024, description="used when the log is created; fixed after that")
    replication: int = Field(default=1, ge=1, description="Kafka replication factor when the topic is created")
    retention_h: float = Field(default=0, ge=0, description="how long Kafka keeps a topic that is created; 0: as the broker says")
    group: str = Field(default="tokentape.indexer", description="Kafka consumer group of the indexers")
    timeout_s: Seconds = Field(default=30.0, description="how long an append may take before it counts as failed")
    retention_days: float = Field(
        default=30.0, ge=0, description="how long a record that is cold stays in the log; Kafka: retention.ms of a topic made here"
    )


class SamplingRule(_Section):
    """A share of the sessions that match: each field given is a shell pattern (`*`, `?`, `[abc]`), and all must match.

    What a session is like is read from its first request. `key` is the id under which the tape has an API key.
    """

    rate: float = Field(ge=0, le=1)
    tenant: str | None = None
    model: str | None = None
    tag: str | None = None
    key: str | None = None

    @model_validator(mode="after")
    def _says_when(self) -> SamplingRule:
        if not self.model_fields_set & {"tenant", "model", "tag", "key"}:
            raise ValueError("a sampling rule needs tenant, model, tag or key; for all sessions set recorder.sample_rate")
        return self


class RecorderSettings(_Section):
    """How events travel from the request path to the log."""

    mode: Literal["shed", "block", "strict"] = Field(default="block", description="what a full queue or an absent log does to requests.")
    queue_max: int = Field(default=65_536, ge=16, description="events waiting in memory before shed or block acts")
    coalesce_ms: float = Field(default=50.0, ge=0, description="longest time that a token waits for company")
    coalesce_tokens: int = Field(default=64, ge=1, description="tokens of one sequence in one event at most")
    heartbeat_s: Seconds = Field(default=10.0, description="how often a producer says how far it is")
    spool_bytes_max: int = Field(default=8 << 30, ge=1 << 20, description="bytes the spool may hold on disk")
    sample_rate: float = Field(default=1.0, ge=0, le=1, description="share of sessions recorded")
    sampling: list[SamplingRule] = Field(
        default=[], description="[[recorder.sampling]]: rate, and tenant, model, tag or key; the first that matches beats sample_rate"
    )


BUILTIN_RULES = ("email", "phone", "iban", "credit_card", "ip")
"""Names of the patterns that redaction knows by itself."""


class RedactionRule(_Section):
    """A rule of one's own: a pattern (RE2 syntax) searched for in every text, or a field whose value goes whatever it is."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")
    pattern: str | None = None
    field: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> RedactionRule:
        if (self.pattern is None) == (self.field is None):
            raise ValueError("a redaction rule has either a pattern or a field")
        return self


class RedactionPolicy(_Section):
    """What of one tenant is recorded."""

    content: Literal["full", "none"] = Field(default="full", description="none: metadata and digests only.")
    builtin: Annotated[list[Literal["email", "phone", "iban", "credit_card", "ip"]], BeforeValidator(_listed)] = Field(
        default=[], description=f"patterns taken out of every text. Valid: {', '.join(BUILTIN_RULES)}."
    )
    rules: list[RedactionRule] = Field(
        default=[], description="[[redaction.rules]]: name, and pattern (RE2) or field (a name, or a path such as $.metadata.email)"
    )
    output: Literal["redacted", "exact"] = Field(default="redacted", description="answers: under the rules too, or token for token.")


class RedactionSettings(RedactionPolicy):
    """What never reaches the log beside credentials, which never do."""

    tenants: dict[str, RedactionPolicy] = Field(default={}, description="[redaction.tenants.NAME]: in place of all of the above")

    def of(self, tenant: str) -> RedactionPolicy:
        """The policy of a tenant."""
        return self.tenants.get(tenant, self)


UpstreamKind = Literal["auto", "vllm", "openai", "anthropic", "gemini"]


class BlobSettings(_Section):
    """Where large bodies and attachments go: the store of [cold], beside the segments."""

    inline_bytes_max: int = Field(default=32 << 10, ge=0, description="a larger message goes to the blob store; 0: none does")
    wait_s: Seconds = Field(default=5.0, description="after this a body stays in its event instead")


class UpstreamSettings(_Section):
    """One upstream of several. `models` are served names or shell patterns (`*`, `?`, `[abc]`) that it may be asked for."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    url: str = Field(pattern=r"^https?://")
    kind: UpstreamKind = "auto"
    key: SecretStr | None = None
    models: list[str] = Field(default=["*"], min_length=1)
    weight: float = Field(default=1.0, gt=0)
    hardware: str = ""
    concurrency_max: int | None = Field(default=None, ge=1)
    queue_max: int | None = Field(default=None, ge=0)


class GatewaySettings(_Section):
    """The HTTP entry before one or several upstreams."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8400, ge=0, le=65535, description="0 picks a free port")
    upstream: str = Field(default="http://127.0.0.1:8000", description="base URL without /v1")
    upstream_kind: UpstreamKind = Field(default="auto", description="auto asks /version once; Anthropic and Gemini are never guessed.")
    upstream_key: SecretStr | None = Field(default=None, description="bearer token sent upstream; else the client's own")
    upstreams: list[UpstreamSettings] = Field(
        default=[], description="[[gateway.upstreams]] in place of upstream: name, url, kind, key, models, weight, hardware"
    )
    concurrency_max: int = Field(default=4096, ge=1, description="requests at work at one upstream; more wait their turn")
    queue_max: int = Field(default=4096, ge=0, description="requests that wait for one upstream; more are refused with 503")
    queue_timeout_s: Seconds = Field(default=300.0, description="longest wait for a turn, then 503")
    attempts_max: int = Field(default=2, ge=1, description="of several upstreams so many are tried for one request before its first byte")
    probe_s: Seconds = Field(default=2.0, description="how often each of several upstreams is asked whether it is well")
    connect_timeout_s: Seconds = Field(default=10.0, description="until the upstream accepts a connection")
    first_token_timeout_s: Seconds = Field(default=300.0, description="until the first byte of an answer")
    between_tokens_timeout_s: Seconds = Field(default=60.0, description="longest silence within an answer")
    total_timeout_s: Seconds = Field(default=3600.0, description="longest time for one whole answer")
    retries: int = Field(default=1, ge=0, le=5, description="how often the only upstream is asked again, before its answer began")
    body_bytes_max: int = Field(default=32 << 20, ge=1024, description="a larger request is refused with 413")
    request_timeout_s: Seconds = Field(default=120.0, description="until a request's head has come, and then its body; else 408")
    connections_max: int = Field(default=16_384, ge=1, description="open connections of clients; one more is refused with 503")
    auth: Literal["off", "required"] = Field(default="off", description="required: only requests with a key of `tokentape keys`.")

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> GatewaySettings:
        short = sorted(self.model_fields_set & {"upstream", "upstream_kind", "upstream_key"})
        if self.upstreams and any(getattr(self, name) != type(self).model_fields[name].default for name in short):
            raise ValueError(f"gateway.{short[0]} and gateway.upstreams are both set: keep one of them")
        names = [upstream.name for upstream in self.upstreams]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two of gateway.upstreams are called {twice[0]!r}: each needs a name of its own")
        return self

    @property
    def every_upstream(self) -> list[UpstreamSettings]:
        """The upstreams; the short form is one that is asked for any model."""
        short = UpstreamSettings.model_construct(name="upstream", url=self.upstream, kind=self.upstream_kind, key=self.upstream_key)
        return self.upstreams or [short]


class EngineSettings(_Section):
    """Capture inside vLLM, for an engine that is started with these settings in its environment."""

    capture: Literal["off", "on"] = Field(default="off", description="on: vLLM's scheduler is recorded, whichever is in force.")


class WeightsSettings(_Section):
    """Models in an S3 store, and the folder of this machine in which they are kept."""

    endpoint: str = Field(default="127.0.0.1:9000", description="host:port of the S3 server")
    secure: bool = Field(default=False, description="https")
    region: str = "us-east-1"
    access_key: str = ""
    secret_key: SecretStr = SecretStr("")
    cache: Path = Field(default=Path("~/.cache/tokentape/weights"), description="one for all installations of a machine")
    bytes_max: int = Field(default=500_000_000_000, ge=1, description="of the cache; the model that was not used for longest goes first")
    connections: int = Field(default=8, ge=1, le=64, description="pieces fetched at once")
    timeout_s: Seconds = Field(default=30.0, description="how long the store may be silent")
    wait_s: Seconds = Field(default=21_600.0, description="how long to wait for another process that fetches the same model")


class DebugSettings(_Section):
    """Requests that stop at breakpoints, and who may decide about them over HTTP."""

    deadline_s: Seconds = Field(default=300.0, description="a stopped request waits at most this long; a breakpoint may say otherwise")
    default_action: Literal["release", "refuse"] = Field(default="release", description="what happens at the deadline.")
    stopped_max: int = Field(default=1000, ge=1, description="stopped in one worker at once; for one more the default action holds at once")
    keepalive_s: Seconds = Field(default=10.0, description="between two comments to a streaming client that waits")
    answer_timeout_s: Seconds = Field(default=10.0, description="how long a command waits for the worker that holds a request")
    token: SecretStr | None = Field(default=None, description="bearer token of /api/v1; without one only this machine may ask")


class ApiSettings(_Section):
    """The REST API and the page, in a process of their own: no look at the tape can slow a token."""

    host: str = Field(default="127.0.0.1", description="address to listen on; who may come in is gateway.auth's and debug.token's")
    port: int | None = Field(default=None, ge=0, le=65535, description="by default the gateway's and one; 0 picks a free port")


class SnapshotSettings(_Section):
    """Versions of sessions that stopped at breakpoints, derived from the tape."""

    session_bytes_max: int = Field(default=100 << 20, ge=1, description="of one session; beyond it the oldest versions are let go")


class BatchSettings(_Section):
    """Batch work: files of requests that wait in a log per model and go after interactive requests."""

    concurrency: int = Field(default=8, ge=0, description="batch requests of one model at work in one worker; 0: `up` works on none")
    attempts_max: int = Field(default=5, ge=1, description="a request that fails, or kills its worker, so often ends as an error")
    backoff_s: Seconds = Field(default=1.0, description="before the second attempt; doubled each time, a minute at most")
    window_h: float = Field(default=24.0, gt=0, le=720, description="what has not begun after this has expired; a batch may say less")
    file_bytes_max: int = Field(default=512 << 20, ge=1024, description="a larger file is refused")
    lines_max: int = Field(default=1_000_000, ge=1, description="a file with more requests is refused")
    keep_days: float = Field(default=30.0, gt=0, description="after this files and results are deleted")


class IndexSettings(_Section):
    """How the log becomes hot shards."""

    seal_s: Seconds = Field(default=5.0, description="how long after its first row a tail shard is sealed for readers")
    batch_events_max: int = Field(default=200_000, ge=1, description="events in one transaction")
    event_bytes_max: int = Field(default=64 << 20, ge=1024, description="a larger event is quarantined")


class ColdSettings(_Section):
    """The object store of segments and ledger."""

    kind: Literal["local", "minio"] = Field(default="local", description="a folder under the data directory, or any S3 server.")
    endpoint: str = Field(default="127.0.0.1:9000", description="host:port of the S3 server")
    secure: bool = Field(default=False, description="https")
    region: str = "us-east-1"
    bucket: str = Field(default="tokentape", description="created with object lock when missing")
    access_key: str = ""
    secret_key: SecretStr = SecretStr("")
    lock: Literal["none", "governance", "compliance"] = Field(default="governance", description="object lock of segments.")
    lock_days: int = Field(default=30, ge=1, description="how long segments and ledger entries are locked")
    timeout_s: Seconds = 30.0


class RetentionPolicy(_Section):
    """How long what it selects is kept, in days after the day of the event ended.

    `tenant` and `retention_class` are shell patterns, `kind` and `tag` words; what is not given matches all. Where several
    match, the longest `min_days` and the shortest `max_days` hold, and a minimum beats every maximum.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    tenant: str | None = None
    retention_class: str | None = None
    kind: str | None = None
    tag: str | None = None
    min_days: float = Field(default=0, ge=0)
    max_days: float | None = Field(default=None, ge=0)
    content_days: float | None = Field(default=None, ge=0)
    hot_days: float | None = Field(default=None, ge=0)
    lock: Literal["none", "governance", "compliance"] | None = None

    @property
    def selector(self) -> tuple[str | None, ...]:
        """What it is for."""
        return self.tenant, self.retention_class, self.kind, self.tag

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> RetentionPolicy:
        for name in ("content_days", "max_days"):
            days = getattr(self, name)
            if days is not None and days < self.min_days:
                raise ValueError(f"policy {self.name}: {name} {days:g} would delete under its own min_days {self.min_days:g}")
            if days is not None and self.hot_days is not None and days < self.hot_days:
                raise ValueError(f"policy {self.name}: {name} {days:g} is less than hot_days {self.hot_days:g}; rows go from the cold tier")
        if self.max_days is not None and self.content_days is not None and self.content_days > self.max_days:
            raise ValueError(f"policy {self.name}: content_days {self.content_days:g} is more than max_days {self.max_days:g}")
        if (self.kind or self.tag) and (self.lock or self.hot_days is not None):
            raise ValueError(f"policy {self.name}: lock and hot_days hold for whole segments: select by tenant or retention_class")
        return self


class RetentionSettings(_Section):
    """Which events go when. Without a policy everything is kept."""

    policies: list[RetentionPolicy] = Field(
        default=[],
        description="[[retention.policies]]: name; tenant, retention_class, kind, tag; min_days, max_days, content_days, hot_days, lock",
    )

    @model_validator(mode="after")
    def _agree(self) -> RetentionSettings:
        names: set[str] = set()
        selectors: dict[tuple[str | None, ...], str] = {}
        for policy in self.policies:
            if policy.name in names:
                raise ValueError(f"two policies are called {policy.name!r}: each needs a name of its own")
            if other := selectors.get(policy.selector):
                raise ValueError(f"policies {other} and {policy.name} contradict each other: both select the same events; keep one of them")
            names.add(policy.name)
            selectors[policy.selector] = policy.name
        return self


class CustodySettings(_Section):
    """Who places holds, releases them and erases."""

    key: SecretStr | None = Field(default=None, description="token of a key with the role custodian (`tokentape keys create`)")


class WitnessSettings(_Section):
    """Where copies of signed checkpoints go: somewhere that who runs this installation cannot rewrite."""

    kind: Literal["off", "folder", "minio"] = Field(default="off", description="a folder on another disk, or a bucket of its own.")
    folder: Path | None = Field(default=None, description="the folder, for kind folder")
    endpoint: str = Field(default="127.0.0.1:9000", description="host:port of the S3 server, for kind minio")
    secure: bool = Field(default=False, description="https")
    region: str = "us-east-1"
    bucket: str = Field(default="tokentape-witness", description="created with object lock when missing")
    access_key: str = Field(default="", description="not the one of cold.access_key, or the witness proves little")
    secret_key: SecretStr = SecretStr("")
    lock_days: int = Field(default=0, ge=0, description="how long each copy is locked in compliance mode; 0 for not at all")


class LedgerSettings(_Section):
    """The signed log of segments."""

    origin: str = Field(default="tokentape.local/ledger", description="name in checkpoints (C2SP tlog-checkpoint origin)")
    checkpoint_s: Seconds = Field(default=60.0, description="a signed checkpoint at least this often while events flow")


class IcebergSettings(_Section):
    """The cold tier as an Apache Iceberg table for other engines; needs the extra `iceberg`."""

    publish: Literal["off", "on"] = Field(default="off", description="on: after each seal, rewrite and every jobs.iceberg_s.")
    catalog: str = Field(default="", description="SQLAlchemy address of its catalog; empty: SQLite in the data directory")
    warehouse: str = Field(default="", description="where its metadata lies; empty: iceberg/ beside the cold tier")


class SqlSettings(_Section):
    """Limits of the SQL sandbox."""

    memory_mb: int = Field(default=2048, ge=64, description="memory of one query")
    threads: int = Field(default=2, ge=1, description="threads of one query")
    rows_max: int = Field(default=1_000_000, ge=1, description="a larger answer is refused")
    timeout_s: Seconds = Field(default=60.0, description="a longer query is stopped")


class JobsSettings(_Section):
    """How often lifecycle jobs run; 0 switches a job off."""

    merge_s: float = Field(default=60.0, ge=0)
    tier_s: float = Field(default=3600.0, ge=0)
    verify_s: float = Field(default=86_400.0, ge=0)
    retention_s: float = Field(default=86_400.0, ge=0)
    compact_s: float = Field(default=86_400.0, ge=0)
    erasure_s: float = Field(default=3600.0, ge=0)
    witness_s: float = Field(default=3600.0, ge=0)
    blobs_s: float = Field(default=86_400.0, ge=0)
    snapshots_s: float = Field(default=60.0, ge=0)
    iceberg_s: float = Field(default=300.0, ge=0)
    alerts_s: float = Field(default=60.0, ge=0)
    blobs_after_days: float = Field(default=30.0, ge=1, description="a blob that no event names goes when unused for so long")
    tier_after_days: float = Field(default=1.0, ge=0, description="age at which a closed day goes to the cold tier")


class WatchSettings(_Section):
    """What is not well, and who is told: each alert is logged and posted once when it begins and once when it ends; 0 switches one off."""

    storage_share: float = Field(default=0.8, ge=0, le=1, description="of what a tier may take, and of the disk that a local one lies on")
    hot_bytes_max: int = Field(default=0, ge=0, description="what hot shards may take; 0: what the disk has")
    cold_bytes_max: int = Field(default=0, ge=0, description="what cold segments may take; 0: what the disk has, without end in a bucket")
    blob_bytes_max: int = Field(default=0, ge=0, description="what blobs may take, as the job `blobs` counts them; 0: as for cold")
    log_bytes_max: int = Field(default=0, ge=0, description="what the log may take, all copies of a topic; 0: what the disk has")
    unsealed_s: float = Field(default=60.0, ge=0, description="age of the oldest event that no query sees yet")
    tiering_share: float = Field(default=0.8, ge=0, description="age of the oldest event that is not cold, of the log's retention")
    failed_jobs: bool = Field(default=True, description="a job whose last run failed")
    verify_h: float = Field(default=48.0, ge=0, description="hours since the last good verification")
    p95_s: float = Field(default=0.5, ge=0, description="encoding an event, saving a session's snapshots: 95 of 100 within this")
    p99_s: float = Field(default=1.0, ge=0, description="the same, 99 of 100")
    replay_success: float = Field(default=0.999, ge=0, le=1, description="of the replays that began within replay_h; less is an alert")
    replay_h: float = Field(default=24.0, gt=0, description="hours of replays looked at; one without an end after an hour has failed")
    webhook: SecretStr | None = Field(default=None, description="http(s) URL that alerts are posted to; credentials in it are never shown")
    secret: SecretStr | None = Field(default=None, description="key of the signature in the header webhook-signature (HMAC-SHA256)")
    timeout_s: Seconds = Field(default=10.0, description="how long the webhook's receiver may take")

    @model_validator(mode="after")
    def _goes_somewhere(self) -> WatchSettings:
        if self.webhook is not None and not re.match(r"https?://[^/\s]", self.webhook.get_secret_value()):
            raise ValueError("watch.webhook is no http:// or https:// URL")
        if self.secret is not None and self.webhook is None:
            raise ValueError("watch.secret is set, and watch.webhook is not: nothing would be signed")
        return self


class LoggingSettings(_Section):
    """Structured logs on stderr."""

    level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least severity printed.")
    format: Literal["auto", "console", "json"] = Field(default="auto", description="auto is console on a terminal, else json.")


class TelemetrySettings(_Section):
    """OpenTelemetry spans of what passes through the gateway. They never hold content."""

    otlp_endpoint: str = Field(default="", pattern=r"^(https?://.+)?$", description="base URL of an OTLP/HTTP collector; empty: no spans")
    service_name: str = Field(default="tokentape", min_length=1, description="service.name of the spans")
    sample_ratio: float = Field(default=1.0, ge=0, le=1, description="of requests that come without a trace; else the client decides")
    queue_max: int = Field(default=8192, ge=1, description="spans that may wait for the collector; more are dropped and counted")
    timeout_s: Seconds = Field(default=10.0, description="how long the collector may take for a batch, new attempts included")


class Settings(_Section):
    """All settings of one installation."""

    data: Path = Field(default=Path(".tokentape"), description="the data directory")
    tenant: str = Field(default="default", min_length=1, pattern=r"^[A-Za-z0-9_.-]+$", description="owner of what is recorded here")
    retention_class: str = Field(default="standard", min_length=1, pattern=r"^[A-Za-z0-9_.-]+$", description="which retention rules apply")
    log: LogSettings = LogSettings()
    recorder: RecorderSettings = RecorderSettings()
    redaction: RedactionSettings = RedactionSettings()
    blobs: BlobSettings = BlobSettings()
    gateway: GatewaySettings = GatewaySettings()
    engine: EngineSettings = EngineSettings()
    weights: WeightsSettings = WeightsSettings()
    debug: DebugSettings = DebugSettings()
    api: ApiSettings = ApiSettings()
    snapshots: SnapshotSettings = SnapshotSettings()
    batch: BatchSettings = BatchSettings()
    index: IndexSettings = IndexSettings()
    cold: ColdSettings = ColdSettings()
    retention: RetentionSettings = RetentionSettings()
    custody: CustodySettings = CustodySettings()
    ledger: LedgerSettings = LedgerSettings()
    witness: WitnessSettings = WitnessSettings()
    iceberg: IcebergSettings = IcebergSettings()
    sql: SqlSettings = SqlSettings()
    jobs: JobsSettings = JobsSettings()
    watch: WatchSettings = WatchSettings()
    logging: LoggingSettings = LoggingSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @property
    def api_port(self) -> int:
        """Where the API listens: what is set, else beside the gateway."""
        if self.api.port is not None:
            return self.api.port
        return self.gateway.port + 1 if 0 < self.gateway.port < 65535 else 0

    @model_validator(mode="after")
    def _locks_end(self) -> Settings:
        for policy in self.retention.policies:
            least = min((days for days in (policy.max_days, policy.content_days) if days is not None), default=None)
            if self.cold.lock == "compliance" and policy.lock is None and least is not None and least < self.cold.lock_days:
                fault = f"policy {policy.name} deletes after {least:g} days, cold.lock = compliance forbids it for {self.cold.lock_days}"
                raise ValueError(f"{fault}: lower cold.lock_days or give the policy a lock of its own")
        return self
