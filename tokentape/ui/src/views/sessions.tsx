// Sessions: searched, filtered, and what is happening now.
import { useEffect, useRef, useState } from "preact/hooks";
import { type Completeness, type SessionRow, query } from "../api";
import { Badge, Empty, Head, Trouble, Whole } from "../parts/bits";
import { useAsk, useKeys, useNow, useSettled } from "../parts/use";
import { ago, count, visible } from "../words";

interface Page {
  sessions: SessionRow[];
  total: number;
  completeness: Completeness;
}

const LIMIT = 50;
const SPANS: Record<string, number> = { "any time": 0, "last hour": 3600, "last day": 86_400, "last week": 604_800 };
const KINDS: Record<string, string[]> = { conversations: [], "engine runs": ["engine"], "KV operations": ["kv"], replays: ["replay"], "of every kind": ["conversation", "engine", "kv", "replay"] };
const NAMES: Record<SessionRow["kind"], string> = { conversation: "conversation", engine: "engine run", kv: "KV operations", replay: "replay" };
const VERDICTS = ["", "identical", "numeric_drift", "sampling_differs", "model_differs", "inconclusive"];

// What is asked for stands in the address, so that it can be kept and passed on.
interface Asked {
  q: string;
  tags: string[];
  failed: boolean;
  under_way: boolean;
  model: string;
  verdict: string;
  span: string;
  kind: string;
  offset: number;
}

function read(search = location.hash.split("?")[1] ?? ""): Asked {
  const given = new URLSearchParams(search);
  return {
    q: given.get("q") ?? "",
    tags: given.getAll("tag"),
    failed: given.get("failed") === "true",
    under_way: given.get("under_way") === "true",
    model: given.get("model") ?? "",
    verdict: given.get("verdict") ?? "",
    span: given.get("span") ?? "any time",
    kind: Object.keys(KINDS).find((name) => name === given.get("kind")) ?? "conversations",
    offset: Number(given.get("offset") ?? 0),
  };
}

// A request of which nothing was heard for so long is no news, whether or not it has an end.
const NEWS_MS = 600_000;

const least = (row: SessionRow): string => (row.final ? "" : "≥ ");

const current = (row: SessionRow, now: number): boolean => row.under_way > 0 && now - Date.parse(row.last_event_at) < NEWS_MS;

// What is happening now: newest sessions come first, so that those under way stand on the first page.
function Now({ rows, now, asked, onOnly }: { rows: SessionRow[]; now: number; asked: boolean; onOnly: () => void }) {
  const busy = rows.filter((row) => current(row, now));
  if (asked || !busy.length) return null;
  return (
    <p class="now" role="status">
      <Badge level="live">now</Badge> {count(busy.reduce((all, row) => all + row.under_way, 0), "request")} under way in {count(busy.length, "session")}{" "}
      <button type="button" class="quiet" onClick={onOnly}>show only these</button>
    </p>
  );
}

// After a start the newest sessions are listed while the older ones are still read; figures of a session that may stand there too are a least.
const Filling = ({ unread }: { unread: number }) =>
  unread ? (
    <p class="now" role="status">
      <Badge level="warn">filling up</Badge> Older sessions are still missing here: {count(unread, "event")} left to read. Figures with ≥ may grow. A search waits for all of them.
    </p>
  ) : null;

const SAVED = "tokentape.saved";

// Searches kept under a name, in this browser.
function Saved({ here, onPick }: { here: string; onPick: (search: string) => void }) {
  const [kept, setKept] = useState<Record<string, string>>(() => JSON.parse(localStorage.getItem(SAVED) ?? "{}"));
  const [name, setName] = useState<string | null>(null);
  const keep = (next: Record<string, string>): void => {
    localStorage.setItem(SAVED, JSON.stringify(next));
    setKept(next);
  };
  const known = Object.entries(kept).find(([, search]) => search === here)?.[0];
  if (name !== null)
    return (
      <form class="row" onSubmit={(event) => { event.preventDefault(); if (name.trim()) keep({ ...kept, [name.trim()]: here }); setName(null); }}>
        <input class="narrow" autofocus placeholder="its name" aria-label="Name of the search" value={name} onInput={(event) => setName(event.currentTarget.value)} />
        <button type="submit">Keep</button>
      </form>
    );
  return (
    <>
      {Object.keys(kept).length ? (
        <select aria-label="Saved searches" value={known ?? ""} onChange={(event) => onPick(kept[event.currentTarget.value] ?? here)}>
          <option value="">saved searches</option>
          {Object.keys(kept).sort().map((one) => <option value={one}>{one}</option>)}
        </select>
      ) : null}
      {known ? (
        <button type="button" class="quiet" onClick={() => keep(Object.fromEntries(Object.entries(kept).filter(([one]) => one !== known)))}>forget “{known}”</button>
      ) : here ? (
        <button type="button" class="quiet" onClick={() => setName("")}>save this search</button>
      ) : null}
    </>
  );
}

export function Sessions() {
  const [wanted, setWanted] = useState(() => read());
  const [at, setAt] = useState(0);
  const search = useRef<HTMLInputElement>(null);
  const settled = useSettled(wanted, 180);
  const now = useNow(5000);
  const since = SPANS[settled.span] ? new Date(Math.floor(now / 60_000) * 60_000 - SPANS[settled.span]! * 1000).toISOString() : undefined;
  const { q, tags, failed, under_way, model, verdict, offset } = settled;
  const page = useAsk<Page>(`debug-sessions${query({ q, tag: tags, failed, under_way, model, verdict, since, kind: KINDS[settled.kind]!, offset, limit: LIMIT })}`, 3000);
  const kept = { q, tag: tags, failed, under_way, model, verdict, span: settled.span === "any time" ? "" : settled.span, kind: settled.kind === "conversations" ? "" : settled.kind };
  const here = query(kept);
  useEffect(() => {
    const next = `#/sessions${query({ ...kept, offset: offset || "" })}`;
    if (location.hash !== next && /^#?\/?(sessions|$)/.test(location.hash.replace("#", ""))) history.replaceState(null, "", next);
  }, [settled]);
  useEffect(() => {
    const moved = (): void => {
      if (location.hash.startsWith("#/sessions")) setWanted(read());
    };
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  const rows = page.data?.sessions ?? [];
  const change = (fields: Partial<typeof wanted>): void => {
    setWanted({ ...wanted, offset: 0, ...fields });
    setAt(0);
  };
  useKeys({
    "/": () => search.current?.focus(),
    j: () => setAt(Math.min(rows.length - 1, at + 1)),
    k: () => setAt(Math.max(0, at - 1)),
    Enter: () => rows[at] && (location.hash = `#/session/${rows[at]!.session_id}`),
  });
  const total = page.data?.total ?? 0;
  return (
    <>
      <Head title="Sessions">
        <Whole completeness={page.data?.completeness} />
      </Head>
      <Now rows={rows} now={now} asked={Boolean(here)} onOnly={() => change({ under_way: true, span: "last hour" })} />
      <Filling unread={page.data?.completeness.unread ?? 0} />
      <div class="filters">
        <input
          ref={search}
          type="search"
          class="search"
          placeholder="Search messages, answers, tags, ids …   ( / )"
          aria-label="Search sessions"
          value={wanted.q}
          onInput={(event) => change({ q: event.currentTarget.value })}
        />
        <select aria-label="When" value={wanted.span} onChange={(event) => change({ span: event.currentTarget.value })}>
          {Object.keys(SPANS).map((name) => (
            <option value={name}>{name}</option>
          ))}
        </select>
        <select aria-label="Kind" value={wanted.kind} onChange={(event) => change({ kind: event.currentTarget.value })}>
          {Object.keys(KINDS).map((name) => (
            <option value={name}>{name}</option>
          ))}
        </select>
        <input class="narrow" placeholder="model" aria-label="Model" value={wanted.model} onInput={(event) => change({ model: event.currentTarget.value })} />
        <select aria-label="Verdict of the last replay" value={wanted.verdict} onChange={(event) => change({ verdict: event.currentTarget.value })}>
          {VERDICTS.map((name) => (
            <option value={name}>{name ? name.replace("_", " ") : "any verdict"}</option>
          ))}
        </select>
        <label class="check">
          <input type="checkbox" checked={wanted.failed} onChange={(event) => change({ failed: event.currentTarget.checked })} /> failed
        </label>
        <label class="check">
          <input type="checkbox" checked={wanted.under_way} onChange={(event) => change({ under_way: event.currentTarget.checked })} /> under way
        </label>
        <Saved here={here} onPick={(search) => setWanted(read(search))} />
        {wanted.tags.map((tag) => (
          <button type="button" class="tag on" aria-label={`Without the tag ${tag}`} onClick={() => change({ tags: wanted.tags.filter((other) => other !== tag) })}>
            {tag} ×
          </button>
        ))}
      </div>
      <Trouble problem={page.problem} />
      {page.data && !rows.length ? (
        <Empty title={page.data.completeness.unread ? "No session is like that among what is read so far" : q || tags.length || failed || under_way || model || verdict || since || settled.kind !== "conversations" ? "No session is like that" : "Nothing is on the tape yet"}>
          {q || tags.length ? <p>Fewer words or filters find more.</p> : <p>Point a client at the gateway, and its sessions appear here.</p>}
        </Empty>
      ) : (
        <ul class="sessions" aria-label="Sessions" aria-busy={page.busy && !page.data}>
          {rows.map((row, i) => (
            <li class={`${i === at ? "on" : ""}${row.tags.length ? " tagged" : ""}`} key={row.session_id}>
              <a href={`#/session/${row.session_id}`} onFocus={() => setAt(i)}>
                <span class="session-title">
                  {visible(row.title ?? row.first_message ?? (row.user || row.owner || "session"))}
                  {row.title && row.first_message ? <span class="said"> {visible(row.first_message)}</span> : null}
                </span>
                <span class="session-id mono dim">{row.session_id.slice(-12)}</span>
                <span class="session-facts">
                  <span>{[row.user ?? row.owner, row.workflow, ...row.models].filter(Boolean).map((part) => visible(String(part))).join(" · ") || "—"}</span>
                </span>
                <span class="figures mono">
                  <span title="requests">{least(row)}{row.requests} req</span>
                  <span title="tokens">{least(row)}{row.tokens.toLocaleString("en")} tok</span>
                </span>
                <span class="session-marks">
                  {row.kind !== "conversation" ? <Badge level="plain">{NAMES[row.kind]}</Badge> : null}
                  {current(row, now) ? <Badge level="live">{row.under_way} under way</Badge> : Date.now() - Date.parse(row.last_event_at) < 10_000 ? <Badge level="live">live</Badge> : null}
                  {row.failures ? <Badge level="bad">{row.failures} failed</Badge> : null}
                  {row.edits ? <Badge level="warn">{row.edits} edited</Badge> : null}
                  {row.verdict ? <Badge level={row.verdict === "identical" || row.verdict === "numeric_drift" ? "good" : "warn"}>{row.verdict.replace("_", " ")}</Badge> : null}
                  {row.visibility !== "team" ? <Badge level="plain">{row.visibility}</Badge> : null}
                </span>
                <time class="dim" dateTime={row.last_event_at} title={`${row.last_event_at} UTC`}>{ago(row.last_event_at, now)}</time>
              </a>
              <span class="session-tags">
                {row.tags.map((tag) => (
                  <button type="button" class="tag" onClick={() => change({ tags: [...new Set([...wanted.tags, tag])] })}>{visible(tag)}</button>
                ))}
              </span>
            </li>
          ))}
        </ul>
      )}
      {total > LIMIT ? (
        <div class="pager">
          <button type="button" disabled={!wanted.offset} onClick={() => change({ offset: Math.max(0, wanted.offset - LIMIT) })}>newer</button>
          <span>{wanted.offset + 1}–{Math.min(total, wanted.offset + LIMIT)} of {total.toLocaleString("en")}{page.data?.completeness.unread ? " so far" : ""}</span>
          <button type="button" disabled={wanted.offset + LIMIT >= total} onClick={() => change({ offset: wanted.offset + LIMIT })}>older</button>
        </div>
      ) : null}
    </>
  );
}
