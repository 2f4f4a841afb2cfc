// Health: what runs, how far the index is behind, what is missing, and what the jobs did.
import { type Completeness } from "../api";
import { Badge, Head, Table, Trouble, When, Whole } from "../parts/bits";
import { useAsk } from "../parts/use";
import { ago, bytes, count, visible } from "../words";

interface Status {
  running: { part: string; pid: number; url?: string; started_at: number }[];
  log: any;
  storage: Record<string, any>;
  watch: Record<string, any>;
  alerts: Record<string, string>;
  missing: Record<string, number>;
  object_store: any;
  checkpoint: any;
  upstreams: { name: string; url: string; answers: boolean; detail: string }[];
  completeness: Completeness;
}

const PARTS = ["gateway", "api", "indexer", "scheduler"];

export function Health() {
  const status = useAsk<Status>("status", 3000);
  const jobs = useAsk<{ jobs: any[]; runs: any[]; work: any[] }>("jobs", 3000);
  const found = status.data;
  const runs = jobs.data?.runs ?? [];
  return (
    <>
      <Head title="Health">
        <Whole completeness={found?.completeness} />
      </Head>
      <Trouble problem={status.problem} />
      <div class="tiles">
        {PARTS.map((part) => {
          const up = found?.running.find((one) => one.part === part);
          return (
            <div class="tile">
              <span class="dim">{part}</span>
              <b>{up ? <Badge level="good">runs</Badge> : <Badge level="plain">not here</Badge>}</b>
              <span class="dim small">{up ? `since ${ago(new Date(up.started_at * 1000).toISOString()).replace(" ago", "")}${up.url ? ` · ${up.url.replace("http://", "")}` : ""}` : "commands do its work"}</span>
            </div>
          );
        })}
        <Figure name="behind the log" value={found?.log.error ? "?" : count(found?.log.lag ?? 0, "event")} bad={Boolean(found?.log.error)} note={found?.log.error ?? `${found?.log.kind ?? ""}, ${found?.log.partitions?.length ?? 0} partitions`} />
        <Figure name="lost in gaps" value={String(found?.missing.lost_in_gaps ?? "…")} bad={(found?.missing.lost_in_gaps ?? 0) > 0} note="numbered by producers, never seen" />
        <Figure name="quarantined" value={String(found?.missing.quarantined ?? "…")} bad={(found?.missing.quarantined ?? 0) > 0} note="no known schema explains them" />
        <Figure name="on the tape" value={bytes((found?.storage.hot?.bytes ?? 0) + (found?.storage.cold?.bytes ?? 0))} bad={false} note={count((found?.storage.hot?.events ?? 0) + (found?.storage.cold?.events ?? 0), "event")} />
      </div>
      {Object.entries(found?.alerts ?? {}).map(([name, detail]) => (
        <div class="trouble" role="alert">
          <strong>{visible(name)}</strong> {visible(detail)}
        </div>
      ))}
      {(found?.upstreams ?? []).filter((one) => !one.answers).map((one) => (
        <div class="trouble" role="alert">
          <strong>{one.name === "upstream" ? "the upstream" : `the upstream ${visible(one.name)}`} is dead</strong> {visible(one.url)}: {visible(one.detail)}
        </div>
      ))}
      <div class="grid">
        <section class="card" aria-labelledby="upstreams">
          <h2 id="upstreams">Upstreams</h2>
          <Table
            label="Upstreams"
            columns={["upstream", "address", "state"]}
            rows={(found?.upstreams ?? []).map((one) => [<b>{visible(one.name)}</b>, <span class="mono wrap">{visible(one.url)}</span>, <><Badge level={one.answers ? "good" : "bad"}>{one.answers ? "answers" : "dead"}</Badge> <span class="dim small">{visible(one.detail)}</span></>])}
          />
        </section>
        <section class="card" aria-labelledby="watched">
          <h2 id="watched">Watched</h2>
          <Table label="What is watched" columns={["what", "now"]} rows={found ? watched(found.watch) : []} />
          <h2>Storage</h2>
          <Table label="Storage by tier" columns={["tier", "takes", "of what it may", "its disk"]} rows={found ? tiers(found.storage) : []} />
        </section>
        <section class="card" aria-labelledby="jobs">
          <h2 id="jobs">Jobs</h2>
          <Trouble problem={jobs.problem} />
          <Table
            label="Jobs"
            columns={["job", "does", "last run", "outcome"]}
            rows={(jobs.data?.jobs ?? []).map((job) => {
              const last = runs.find((run) => run.job === job.name);
              return [
                <b>{job.name}</b>,
                job.does,
                last ? <When iso={new Date(last.started_at * 1000).toISOString()} /> : <span class="dim">—</span>,
                last ? <Badge level={last.outcome === "ok" ? "good" : last.outcome === "running" ? "plain" : "bad"}>{last.outcome}</Badge> : <span class="dim nowrap">has not run</span>,
              ];
            })}
          />
        </section>
        <section class="card" aria-labelledby="partitions">
          <h2 id="partitions">Partitions</h2>
          <Table label="Partitions" columns={["partition", "end of the log", "indexed", "behind"]} rows={(found?.log.partitions ?? []).map((row: any) => [row.partition, row.end.toLocaleString("en"), row.indexed.toLocaleString("en"), row.lag.toLocaleString("en")])} />
          <h2>Object store</h2>
          <p class="small">{found?.object_store.detail ?? found?.object_store.error}</p>
          <h2>Work asked for here</h2>
          {jobs.data?.work.length ? <Table label="Work" columns={["what", "by", "state"]} rows={jobs.data.work.map((work) => [work.kind, work.by, <Badge level={work.state === "done" ? "good" : work.state === "failed" ? "bad" : "plain"}>{work.state}</Badge>])} /> : <p class="dim">none</p>}
        </section>
      </div>
    </>
  );
}

const share = (value: number | null | undefined) => (value == null ? <span class="dim">—</span> : `${Math.round(value * 100)} %`);
const span = (seconds: number | null | undefined) => (seconds == null ? "never" : seconds < 120 ? `${Math.round(seconds)} s` : seconds < 7200 ? `${Math.round(seconds / 60)} min` : seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${Math.round(seconds / 86400)} days`);
const slow = (times: any) => (times?.p99_s == null ? <span class="dim">none measured</span> : `P95 ${(times.p95_s * 1e3).toPrecision(2)} ms, P99 ${(times.p99_s * 1e3).toPrecision(2)} ms`);

// What one part of the measurement says, or why it says nothing.
const part = (of: any, says: () => any) => (of?.error ? <span class="bad-text">{visible(of.error)}</span> : says());

function watched(watch: Record<string, any>) {
  const { log, verify, latency, replays } = watch;
  return [
    ["oldest event that no query sees yet", part(log, () => `${span(log.unsealed_s)}, ${count(log.unsealed_events, "event")} wait`)],
    ["oldest event that is not cold", part(log, () => <>{span(log.tiering_lag_s)}{log.retention_s ? <span class="dim"> of {span(log.retention_s)} that the log keeps</span> : null}</>)],
    ["last good verification", part(verify, () => (verify.good_at == null ? "never" : <When iso={new Date(verify.good_at * 1000).toISOString()} />))],
    ["encoding an event", part(latency, () => slow(latency.encode))],
    ["saving a session's snapshots", part(latency, () => slow(latency.snapshot))],
    ["replays that came to a verdict", part(replays, () => (replays.success == null ? <span class="dim">none of late</span> : <>{share(replays.success)} <span class="dim">of {replays.ended}</span></>))],
  ];
}

function tiers(storage: Record<string, any>) {
  if (storage.error) return [[<span class="bad-text">{visible(storage.error)}</span>, "", "", ""]];
  return Object.entries(storage).map(([name, tier]) => [<b>{name}</b>, bytes(tier.bytes), tier.allowed_bytes ? <>{share(tier.share)} <span class="dim">of {bytes(tier.allowed_bytes)}</span></> : share(null), share(tier.disk_share)]);
}

const Figure = ({ name, value, bad, note }: { name: string; value: string; bad: boolean; note: string }) => (
  <div class="tile">
    <span class="dim">{name}</span>
    <b class={bad ? "bad-text" : ""}>{value}</b>
    <span class="dim small">{note}</span>
  </div>
);
