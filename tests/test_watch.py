"""What is watched: every surface tells the same numbers, and each alert begins and ends, told to a real receiver once each."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from ingest.recorder import Recorder
from lifecycle.alerts import Alerts, alerts_of
from lifecycle.blobs import UnreferencedBlobs
from lifecycle.runs import RunLedger
from lifecycle.scheduler import Job, run_job
from lifecycle.watch import Watch
from schemas import clock
from schemas.errors import LogUnavailable, ProofError, Unavailable
from schemas.events import ReplayFinished, ReplayStarted, SessionAnnotated
from schemas.settings import ApiSettings, LogSettings, Settings, WatchSettings
from schemas.sink import SessionContext, new_id
from store.blobs import BlobStore
from store.crashpoints import VARIABLE
from store.indexer import Indexer
from store.log import open_log
from store.reader import EventReader
from tests.api_rig import serving
from tests.eventgen import Producer, conversation
from tests.program import ROOT, invoke, to_toml
from tests.tiered import Tiered, tiered
from tokentape.cli import main
from tokentape.installation import Installation

SECRET = "whsec_" + base64.b64encode(b"a key of the receiver's").decode()


def watching(rig: Tiered, encoding: Sequence[dict[str, int]] = (), **watch: Any) -> Watch:
    """What measures an installation, with thresholds of its own."""
    settings = rig.settings.model_copy(update={"watch": WatchSettings(**{"storage_share": 0.8, **watch})})
    runs = RunLedger(settings.data / "jobs.sqlite")
    reader = EventReader(settings, rig.catalog, rig.objects)
    return Watch(settings, rig.catalog, runs, reader, lambda: encoding, lambda: open_log(settings.log, settings.data, create=False))


def alerts(watch: Watch) -> set[str]:
    """Names of what is not well. How full the disk of the machine is is not the tests'."""
    return {alert.name for alert in alerts_of(watch.measure(), watch.settings) if not alert.name.startswith("disk:")}


def talk(rig: Tiered) -> list[Any]:
    """One more conversation."""
    return list(conversation(rig.producer, chunks=3))


def failing(_: bool) -> dict[str, Any]:
    """A job's work that fails."""
    raise ProofError("something was modified")


class TestAlerts:
    """Each begins when it is so and ends when it is not."""

    def test_storage(self, local: Tiered) -> None:
        """A tier that takes over 80 % of what it may, until it takes less."""
        local.ingest(talk(local))
        taken = watching(local).measure()["storage"]["hot"]["bytes"]
        hot = watching(local, hot_bytes_max=int(taken / 0.8))
        roomy = watching(local, hot_bytes_max=int(taken / 0.8) + taken)
        before = alerts(hot), alerts(roomy)
        local.tier()

        assert before == ({"storage:hot"}, set())
        assert alerts(hot) == set()
        assert alerts(watching(local, cold_bytes_max=1, log_bytes_max=1)) == {"storage:cold", "storage:log"}
        assert alerts(watching(local, cold_bytes_max=1, log_bytes_max=1, storage_share=0)) == set()

    def test_what_the_log_takes(self, deployment: Settings) -> None:
        """The log is a tier of both deployments: SQLite's files, or the topic's bytes on its brokers."""
        with tiered(deployment) as rig:
            rig.ingest(talk(rig))
            held = watching(rig, log_bytes_max=1).measure()["storage"]["log"]

            assert held["share"] == held["bytes"] > 1000
            assert "storage:log" in alerts(watching(rig, log_bytes_max=1))
            assert "storage:log" not in alerts(watching(rig, log_bytes_max=1 << 40))

    def test_blobs(self, local: Tiered) -> None:
        """What the job that looks at all of them counted last, until they are fewer."""
        BlobStore(local.objects, local.settings.data).put("acme", b"large " * 9000, "application/json")
        work = UnreferencedBlobs(local.settings, local.catalog, local.objects).run
        job, watch = Job("blobs", "", 0, lambda dry: work(dry_run=dry)), watching(local, blob_bytes_max=1)
        uncounted = alerts(watch)
        run_job(job, watch.runs, trigger="hand")
        found, before = watch.measure()["storage"]["blobs"], alerts(watch)
        for info in list(local.objects.list("blobs/")):
            local.objects.delete(info.key)
        run_job(job, watch.runs, trigger="hand")

        assert (uncounted, before, alerts(watch)) == (set(), {"storage:blobs"}, set())
        assert (found["files"], found["bytes"] > 0) == (1, True)

    def test_the_disk_of_local_tiers_counts_once(self, local: Tiered) -> None:
        """However many tiers lie on it."""
        watch = watching(local, storage_share=1e-9)
        found = [alert.name for alert in alerts_of(watch.measure(), watch.settings)]

        assert found == ["disk:hot"]

    def test_events_that_no_query_sees(self, local: Tiered) -> None:
        """Appended and not indexed, until they are."""
        watch = watching(local, unsealed_s=1e-9)
        local.log.append(talk(local))
        waiting, before = watch.measure()["log"], alerts(watch)
        Indexer(local.settings, local.log, local.registry).run_once()

        assert (before, waiting["unsealed_events"]) == ({"unsealed"}, 10)
        assert alerts(watch) == set()
        assert watch.measure()["log"]["unsealed_s"] == 0

    def test_a_job_that_failed(self, local: Tiered) -> None:
        """Until its next run ends well; the job that tells is left out, since it fails when nobody can be told."""
        watch = watching(local)
        for name in ("merge", "alerts"):
            with pytest.raises(ProofError):
                run_job(Job(name, "", 0, failing), watch.runs, trigger="hand")
        before = alerts(watch)
        run_job(Job("merge", "", 0, lambda _: {}), watch.runs, trigger="hand")

        assert before == {"job:merge"}
        assert alerts(watch) == set()

    def test_no_good_verification_for_long(self, local: Tiered) -> None:
        """Counted from the first run of any job, then from the last good verification."""
        watch, hour = watching(local, verify_h=48), 3_600_000_000
        never = alerts(watch)
        run_job(Job("merge", "", 0, lambda _: {}), watch.runs, trigger="hand")
        then = clock.now_us() + 49 * hour
        with clock.driven_by(lambda: then):
            late = alerts(watch)
            with pytest.raises(ProofError):
                run_job(Job("verify", "", 0, failing), watch.runs, trigger="hand")
            bad = alerts(watch)
            run_job(Job("verify", "", 0, lambda _: {}), watch.runs, trigger="hand")
            good = alerts(watch)

        assert (never, late, bad, good) == (set(), {"verify"}, {"verify", "job:verify"}, set())

    def test_encoding_and_saving_that_take_long(self, local: Tiered) -> None:
        """A real recorder's times, and those that a run of the job `snapshots` noted."""
        recorder = Recorder(local.log, local.settings.recorder)
        recorder.record(SessionContext(new_id(), "acme", "api"), SessionAnnotated(tags_added=["slow"]))
        recorder.flush(30)
        times = recorder.encoding.to_json()
        recorder.close()
        run_job(Job("snapshots", "", 0, lambda _: {"versions": 1, "save_us": {"5000": 3}}), watching(local).runs, trigger="hand")
        found = watching(local, [times]).measure()["latency"]

        assert sum(times.values()) >= 1
        assert (found["encode"]["count"], found["snapshot"]) == (sum(times.values()), {"count": 3, "p95_s": 0.005, "p99_s": 0.005})
        assert alerts(watching(local, [times], p95_s=1e-9)) == {"latency:encode", "latency:snapshot"}
        assert alerts(watching(local, [], p95_s=1e-9, p99_s=1e-9)) == {"latency:snapshot"}
        assert alerts(watching(local, [times], p95_s=0, p99_s=0)) == set()

    def test_replays_that_come_to_no_verdict(self, local: Tiered) -> None:
        """One without an end after an hour has failed; it has not once its end is there."""
        producer = Producer(seed=3, clock_us=clock.now_us() - 2 * 3_600_000_000)
        session, watch = producer.session(), watching(local)
        started = [ReplayStarted(replay_id=name, subject_session=bytes(16), mode="compare", engine="e") for name in (b"a" * 16, b"b" * 16)]
        local.ingest([producer.entry(session, payload) for payload in (*started, ReplayFinished(replay_id=b"a" * 16, verdict="identical"))])
        found, before = watch.measure()["replays"], alerts(watch)
        local.ingest([producer.entry(session, ReplayFinished(replay_id=b"b" * 16, verdict="model_differs"))])

        assert (found["ended"], found["failed"], found["success"], before) == (2, 1, 0.5, {"replays"})
        assert (alerts(watch), watch.measure()["replays"]["success"]) == (set(), 1.0)

    def test_a_partition_that_waits_for_a_newer_program(self, local: Tiered) -> None:
        """As the indexer notes it."""
        local.catalog.alarm(2, "a schema of a newer version")
        before = alerts(watching(local))
        local.catalog.alarm(2, None)

        assert (before, alerts(watching(local))) == ({"waits:2"}, set())

    def test_tiering_behind_the_logs_retention(self, deployment: Settings) -> None:
        """Before the log forgets what is not cold. Kafka is asked what it keeps, whatever the settings say."""
        kept = LogSettings(**{**dict(deployment.log), "retention_h": 0.1} if deployment.log.kind == "kafka" else {"retention_days": 1e-9})
        with tiered(deployment.model_copy(update={"log": kept})) as rig:
            rig.settings = rig.settings.model_copy(update={"log": kept.model_copy(update={"retention_h": 24.0})})
            rig.ingest(talk(rig))
            watch = watching(rig, tiering_share=1e-9)
            found, before = watch.measure()["log"], alerts(watch)
            rig.tier()
            after = watch.measure()["log"]

            assert found["retention_s"] == pytest.approx(360 if kept.kind == "kafka" else 86_400e-9)
            assert (before, found["tiering_lag_s"] > 0) == ({"tiering"}, True)
            assert (alerts(watch), after["tiering_lag_s"]) == (set(), 0)


@dataclass
class Post:
    """What a receiver got."""

    headers: dict[str, str]
    body: bytes

    @property
    def said(self) -> dict[str, Any]:
        """The document."""
        document: dict[str, Any] = json.loads(self.body)
        return document

    @property
    def line(self) -> tuple[str, str]:
        """What of which alert."""
        return self.said["type"], self.said["data"]["alert"]


@dataclass
class Receiver:
    """A webhook's receiver on a port of its own, which may be closed and opened again."""

    port: int = 0
    answer: Callable[[Post], int] = lambda _: 204
    posts: list[Post] = field(default_factory=list)

    @contextlib.contextmanager
    def open(self) -> Iterator[Receiver]:
        """Listen while the block runs."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                post = Post(
                    {name.lower(): value for name, value in self.headers.items()}, self.rfile.read(int(self.headers["content-length"]))
                )
                status = outer.answer(post)
                outer.posts += [post] if status == 204 else []
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Nothing on the terminal."""

        with ThreadingHTTPServer(("127.0.0.1", self.port), Handler) as server:
            self.port = server.server_port
            thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()

    @property
    def lines(self) -> list[tuple[str, str]]:
        """What was taken, without what the disk of this machine says."""
        return [post.line for post in self.posts if not post.line[1].startswith("disk:")]


def telling(rig: Tiered, receiver: Receiver, *, userinfo: str = "", **watch: Any) -> Alerts:
    """The job that tells a receiver."""
    url = SecretStr(f"http://{userinfo}127.0.0.1:{receiver.port}/hooks/T0KEN")
    found = watching(rig, webhook=url, secret=SecretStr(SECRET), timeout_s=60, **watch)
    return Alerts(found, found.runs)


class TestWebhook:
    """Told once when it begins and once when it ends."""

    def test_an_alert_is_told_when_it_begins_and_when_it_ends(self, local: Tiered) -> None:
        """Once each, signed, with one id for both posts' alert, and credentials where HTTP has them."""
        with Receiver().open() as receiver:
            job = telling(local, receiver, userinfo="ann:pass%2Fword@", unsealed_s=1e-9)
            job.run()
            local.log.append(talk(local))
            first, again = job.run(), job.run()
            Indexer(local.settings, local.log, local.registry).run_once()
            job.run()
            job.run()
        began, ended = [post for post in receiver.posts if post.line[1] == "unsealed"]
        signed = f"{began.headers['webhook-id']}.{began.headers['webhook-timestamp']}.".encode() + began.body
        expected = base64.b64encode(hmac.digest(b"a key of the receiver's", signed, hashlib.sha256)).decode()

        assert receiver.lines == [("alert.began", "unsealed"), ("alert.ended", "unsealed")]
        assert ("unsealed" in first["alerts"], again["told"]) == (True, 0)
        assert began.headers["webhook-signature"] == f"v1,{expected}"
        assert base64.b64decode(began.headers["authorization"].removeprefix("Basic ")) == b"ann:pass/word"
        assert began.said["id"] == began.headers["webhook-id"] == ended.said["id"].replace("-ended", "-began")
        assert (began.said["data"]["ended_at"], ended.said["data"]["ended_at"] > began.said["data"]["began_at"]) == (None, True)

    def test_a_receiver_that_was_away_is_told_later(self, local: Tiered) -> None:
        """Nothing is lost, nothing told twice, and the run says that it waits without naming more than the host."""
        with Receiver().open() as receiver:
            pass
        job = telling(local, receiver, userinfo="ann:secret@", unsealed_s=1e-9)
        local.log.append(talk(local))
        with pytest.raises(Unavailable) as away:
            job.run()
        Indexer(local.settings, local.log, local.registry).run_once()
        with pytest.raises(Unavailable):
            job.run()
        with receiver.open():
            job.run()
            job.run()

        assert receiver.lines == [("alert.began", "unsealed"), ("alert.ended", "unsealed")]
        assert str(away.value) == "alerts: the webhook's receiver at 127.0.0.1 does not answer (NewConnectionError)"

    def test_one_that_is_refused_holds_up_no_other(self, local: Tiered) -> None:
        """It is told when it is taken, its beginning first."""
        refuse = {"unsealed"}
        receiver = Receiver(answer=lambda post: 500 if post.line[1] in refuse else 204)
        with receiver.open():
            job = telling(local, receiver, unsealed_s=1e-9)
            local.log.append(talk(local))
            with pytest.raises(ProofError):
                run_job(Job("merge", "", 0, failing), job.runs, trigger="hand")
            with pytest.raises(Unavailable, match="answered 500"):
                job.run()
            first = list(receiver.lines)
            Indexer(local.settings, local.log, local.registry).run_once()
            refuse.clear()
            job.run()

        assert first == [("alert.began", "job:merge")]
        assert receiver.lines[1:] == [("alert.began", "unsealed"), ("alert.ended", "unsealed")]

    def test_killed_between_a_post_and_its_note(self, local: Tiered) -> None:
        """It is posted again, with the same id, and not a third time."""
        with Receiver().open() as receiver:
            watch = WatchSettings(webhook=SecretStr(f"http://127.0.0.1:{receiver.port}/"), storage_share=0, timeout_s=60)
            file = local.settings.data.parent / "tokentape.toml"
            file.write_text(to_toml(local.settings.model_copy(update={"watch": watch})))
            local.catalog.alarm(0, "a newer schema")
            command = [sys.executable, "-m", "tokentape.cli", "--config", str(file), "jobs", "run", "alerts"]
            environment = {**os.environ, VARIABLE: "alerts.posted", "PYTHONPATH": str(ROOT)}
            killed = subprocess.run(command, env=environment, capture_output=True, timeout=120)
            job = telling(local, receiver, storage_share=0)
            told = job.run()["told"], job.run()["told"]
        ids = [post.said["id"] for post in receiver.posts]

        assert (killed.returncode, told) == (-signal.SIGKILL, (1, 0)), killed.stderr
        assert receiver.lines == [("alert.began", "waits:0")] * 2
        assert ids[0] == ids[1]

    def test_a_part_that_does_not_answer(self, local: Tiered) -> None:
        """Is an alert of its own, and what it showed before has not ended."""
        with Receiver().open() as receiver:
            job = telling(local, receiver, unsealed_s=1e-9)
            local.log.append(talk(local))
            job.run()
            folder = local.settings.data / "log"
            shutil.move(folder, folder.with_name("away"))
            job.run()
            away = list(receiver.lines)
            shutil.move(folder.with_name("away"), folder)
            job.run()

        assert away == [("alert.began", "unsealed"), ("alert.began", "unanswered:log")]
        assert receiver.lines[2:] == [("alert.ended", "unanswered:log")]


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("watch.webhook=ftp://ann:secret@example.org", "watch.webhook is no http:// or https:// URL"),
        ("watch.secret=secret", "watch.secret is set, and watch.webhook is not"),
        ("watch.storage_share=80", "Input should be less than or equal to 1"),
    ],
)
def test_settings_that_cannot_be(setting: str, fault: str, tmp_path: Path) -> None:
    """One line that shows no credential."""
    ran = CliRunner().invoke(main, ["--data", str(tmp_path / "data"), "--set", setting, "status"])

    assert (ran.exit_code, "secret@" in ran.stderr) == (2, False)
    assert fault in ran.stderr


def test_a_log_that_is_away_is_waited_for_once(settings_embedded: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command asks of it after that, its status included, is told the same at once."""
    monkeypatch.setattr("tokentape.installation.AWAY_S", 1000.0)  # however slow this machine is
    away = LogSettings(kind="kafka", bootstrap_servers="127.0.0.1:1", timeout_s=0.5)
    with Installation(settings_embedded.model_copy(update={"log": away})) as installation:
        with pytest.raises(LogUnavailable) as first:
            _ = installation.log
        with pytest.raises(LogUnavailable) as second:
            _ = installation.recorder
        told = installation.watch.measure()["log"]["error"]

    assert first.value is second.value
    assert told == str(first.value)


def test_all_tell_the_same(deployment: Settings) -> None:
    """Status as text and JSON, the API and its metrics: the numbers of one measurement."""
    settings = deployment.model_copy(update={"api": ApiSettings(port=0), "watch": WatchSettings(storage_share=0.9, hot_bytes_max=1 << 40)})
    with tiered(settings) as rig:
        rig.ingest(talk(rig))
        rig.tier()
        rig.ingest(talk(rig))
    runs = RunLedger(settings.data / "jobs.sqlite")
    with pytest.raises(ProofError):
        run_job(Job("verify", "", 0, failing), runs, trigger="hand")
    run_job(Job("snapshots", "", 0, lambda _: {"save_us": {"5000": 3}}), runs, trigger="hand")
    with serving(settings) as api:
        answered = api("GET", "status")
        families = text_string_to_metric_families(httpx.get(f"{api.url}/metrics", timeout=60).text)
        measured = {f"{each.name}{sorted(each.labels.values())}": each.value for family in families for each in family.samples}
    shown = json.loads(invoke(settings, "status", "--format", "json").stdout)
    text = invoke(settings, "status").stdout

    for part in ("jobs", "latency", "replays", "format"):
        assert answered["watch"][part] == shown["watch"][part]
    for tier, held in shown["storage"].items():
        assert measured[f"tokentape_tier_bytes['{tier}']"] > 0 or tier == "spool"
        assert answered["storage"][tier]["bytes"] == held["bytes"] or tier == "log"
    assert shown["storage"]["hot"]["events"] == measured["tokentape_tier_events['hot']"] == 10
    assert shown["storage"]["hot"]["allowed_bytes"] == measured["tokentape_tier_allowed_bytes['hot']"] == 1 << 40
    assert shown["watch"]["latency"]["snapshot"]["p99_s"] == measured["tokentape_serialisation_seconds['0.99', 'snapshot']"] == 0.005
    assert measured["tokentape_job_failed['verify']"] == measured["tokentape_alert['job:verify']"] == 1
    assert (measured["tokentape_job_failed['snapshots']"], measured["tokentape_unsealed_events[]"]) == (0, 0)
    assert shown["alerts"]["job:verify"] == answered["alerts"]["job:verify"] == "failed: something was modified"
    assert "verify failed: something was modified" in text
    assert "job:verify: failed: something was modified" in text
