// Sessions: searched, filtered, and what is happening now.
import { useEffect, useRef, useState } from "preact/hooks";
import { type Completeness, type SessionRow, query } from "../api";
import { Badge, Empty, Head, Trouble, Whole } from "../parts/bits";
import { useAsk, useKeys, useNow, useSettled } from "../parts/use";
import { ago, visible } from "../words";

interface Page {
  sessions: SessionRow[];
  total: number;
  completeness: Completeness;
}

const LIMIT = 50;
const SPANS: Record<string, number> = { "any time": 0, "last hour": 3600, "last day": 86_400, "last week": 604_800 };
const VERDICTS = ["", "identical", "numeric_drift", "sampling_differs", "model_differs", "inconclusive"];

// What is asked for stands in the address, so that it can be kept and passed on.
function read(): { q: string; tags: string[]; failed: boolean; model: string; verdict: string; span: string; offset: number } {
  const given = new URLSearchParams(location.hash.split("?")[1] ?? "");
  return {
    q: given.get("q") ?? "",
    tags: given.getAll("tag"),
    failed: given.get("failed") === "true",
    model: given.get("model") ?? "",
    verdict: given.get("verdict") ?? "",
    span: given.get("span") ?? "any time",
    offset: Number(given.get("offset") ?? 0),
  };
}

export function Sessions() {
  const [wanted, setWanted] = useState(read);
  const [at, setAt] = useState(0);
  const search = useRef<HTMLInputElement>(null);
  const settled = useSettled(wanted, 180);
  const now = useNow(5000);
  const since = SPANS[settled.span] ? new Date(Math.floor(now / 60_000) * 60_000 - SPANS[settled.span]! * 1000).toISOString() : undefined;
  const { q, tags, failed, model, verdict, offset } = settled;
  const page = useAsk<Page>(`debug-sessions${query({ q, tag: tags, failed, model, verdict, since, offset, limit: LIMIT })}`, 3000);
  useEffect(() => {
    const next = `#/sessions${query({ q, tag: tags, failed, model, verdict, span: settled.span === "any time" ? "" : settled.span, offset: offset || "" })}`;
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
        <input class="narrow" placeholder="model" aria-label="Model" value={wanted.model} onInput={(event) => change({ model: event.currentTarget.value })} />
        <select aria-label="Verdict of the last replay" value={wanted.verdict} onChange={(event) => change({ verdict: event.currentTarget.value })}>
          {VERDICTS.map((name) => (
            <option value={name}>{name ? name.replace("_", " ") : "any verdict"}</option>
          ))}
        </select>
        <label class="check">
          <input type="checkbox" checked={wanted.failed} onChange={(event) => change({ failed: event.currentTarget.checked })} /> failed
        </label>
        {wanted.tags.map((tag) => (
          <button type="button" class="tag on" aria-label={`Without the tag ${tag}`} onClick={() => change({ tags: wanted.tags.filter((other) => other !== tag) })}>
            {tag} ×
          </button>
        ))}
      </div>
      <Trouble problem={page.problem} />
      {page.data && !rows.length ? (
        <Empty title={q || tags.length || failed || model || verdict || since ? "No session is like that" : "Nothing is on the tape yet"}>
          {q || tags.length ? <p>Fewer words or filters find more.</p> : <p>Point a client at the gateway, and its sessions appear here.</p>}
        </Empty>
      ) : (
        <ul class="sessions" aria-label="Sessions" aria-busy={page.busy && !page.data}>
          {rows.map((row, i) => (
            <li class={`${i === at ? "on" : ""}${row.tags.length ? " tagged" : ""}`} key={row.session_id}>
              <a href={`#/session/${row.session_id}`} onFocus={() => setAt(i)}>
                <span class="session-title">{visible(row.title ?? (row.user || row.owner || "session"))}</span>
                <span class="session-id mono dim">{row.session_id.slice(-12)}</span>
                <span class="session-facts">
                  <span>{[row.user ?? row.owner, row.workflow, ...row.models].filter(Boolean).map((part) => visible(String(part))).join(" · ") || "—"}</span>
                </span>
                <span class="figures mono">
                  <span title="requests">{row.requests} req</span>
                  <span title="tokens">{row.tokens.toLocaleString("en")} tok</span>
                </span>
                <span class="session-marks">
                  {Date.now() - Date.parse(row.last_event_at) < 10_000 ? <Badge level="live">live</Badge> : null}
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
          <span>{wanted.offset + 1}–{Math.min(total, wanted.offset + LIMIT)} of {total.toLocaleString("en")}</span>
          <button type="button" disabled={wanted.offset + LIMIT >= total} onClick={() => change({ offset: wanted.offset + LIMIT })}>older</button>
        </div>
      ) : null}
    </>
  );
}
