// One session: its timeline as lanes with a scrubber that is time travel, the rows beside the conversation as it stood then.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type Comparison, type Environment, type Generation, type Problem, Refused, type Replay, type Response_, type Session, type Timeline, type TimelineRow, type Tokens, type Work, ask, job, query, token } from "../api";
import { Badge, Empty, Head, Table, Trouble, When, Whole } from "../parts/bits";
import { Diff } from "../parts/diff";
import { type Beside, Heat, Legend, type Measure } from "../parts/heat";
import { Lanes } from "../parts/lanes";
import { useAsk, useKeys } from "../parts/use";
import { Verdict } from "./compare";
import { clock, count, day, duration, iso, said, us, visible } from "../words";

export function SessionView({ id }: { id: string }) {
  const line = useAsk<Timeline>(`debug-sessions/${id}/timeline${query({ full: true })}`);
  const [at, setAt] = useState<number | null>(null);
  const [live, setLive] = useState(0);
  const rows = line.data?.rows ?? [];
  const last = line.data?.last_at ? us(line.data.last_at) : 0;
  const moment = at ?? last;
  const state = useTravel(id, at === null || at >= last ? null : iso(at), live);
  const [measure, setMeasure] = useState<Measure>("logprob");
  const replays = useAsk<{ replays: Replay[] }>(`debug-sessions/${id}/replays`);
  const scored = replays.data?.replays.find((replay) => replay.mode === "compare" && replay.tokens);
  const compared = useAsk<Comparison>(measure === "drift" && scored ? `debug-sessions/${scored.recorded_in}/comparison` : null);
  const beside = useMemo(() => besides(compared.data), [compared.data]);
  const measures: Measure[] = scored ? ["logprob", "gap", "drift", "plain"] : ["logprob", "gap", "plain"];
  useFollow(id, state.data?.of, () => {
    setLive((n) => n + 1);
    line.again();
  });
  const current = useMemo(() => rows.findLastIndex((row) => us(row.at) <= moment), [rows, moment]);
  const step = (by: number): void => {
    const row = rows[Math.min(rows.length - 1, Math.max(0, current + by))];
    if (row) setAt(us(row.at));
  };
  useKeys({ j: () => step(1), k: () => step(-1), Escape: () => setAt(null), h: () => setMeasure(measures[(measures.indexOf(measure) + 1) % measures.length]!) });
  const shown = state.data;
  if (line.problem && !line.data) {
    return (
      <>
        <Head title="Session" />
        <Trouble problem={line.problem} />
        <p><a href="#/sessions">all sessions</a></p>
      </>
    );
  }
  return (
    <>
      <Head title={visible(shown?.session.title ?? shown?.session.user ?? "Session")}>
        <Whole completeness={shown?.completeness} />
      </Head>
      {shown ? <About shown={shown} line={line.data} onReplayed={replays.again} /> : null}
      <Trouble problem={state.problem} />
      {rows.length ? <Lanes rows={rows} at={moment} onMove={(to) => setAt(Math.min(last, to))} /> : null}
      <div class="travel">
        <button type="button" onClick={() => step(-1)} title="One row back (k)">◂ back</button>
        <button type="button" onClick={() => step(1)} title="One row on (j)">on ▸</button>
        <span class="mono">{shown ? `event ${shown.position} of ${shown.of}` : ""}</span>
        {at !== null && at < last ? (
          <>
            <Badge level="warn">as it stood {duration(moment - us(line.data!.first_at!))} after the start</Badge>
            <button type="button" onClick={() => setAt(null)}>to the end (Esc)</button>
          </>
        ) : (
          <Badge level="good">as it stands</Badge>
        )}
        {rows[current]?.event_id ? <a class="small" href={`#/custody?event=${rows[current]!.event_id}`}>prove this event</a> : null}
        <span class="grow" />
        <label class="check">
          colour by{" "}
          <select value={measure} onChange={(event) => setMeasure(event.currentTarget.value as Measure)}>
            <option value="logprob">probability</option>
            <option value="gap">time since the token before</option>
            {scored ? <option value="drift">drift of the last replay</option> : null}
            <option value="plain">nothing</option>
          </select>
        </label>
        <Legend measure={measure} />
      </div>
      <div class="two">
        <Rows rows={rows} current={current} moved={at !== null} onPick={(row) => setAt(us(row.at))} />
        <section class="talk" aria-label="Conversation">
          {shown?.generations.map((generation, i) => (
            <One key={generation.request.generation_id} id={id} number={i + 1} generation={generation} before={shown.generations.slice(0, i)} measure={measure} beside={beside} moving={at !== null && at < last} />
          ))}
          {shown && !shown.generations.length ? <Empty title="No request had come yet" /> : null}
          {shown?.anomalies.length ? (
            <details class="card">
              <summary>{count(shown.anomalies.length, "unexpected event")}</summary>
              <ul>{shown.anomalies.map((odd) => <li>{odd.kind} {odd.what}: {visible(odd.text)}</li>)}</ul>
            </details>
          ) : null}
          {shown?.replays.map((replay) => (
            <div class="card"><b>replay</b> of <a href={`#/session/${replay.of}`}>{replay.of}</a> with {replay.engine}: <Verdict verdict={replay.verdict} /> {replay.reason} <a href={`#/compare/${id}`}>token by token</a></div>
          ))}
          {replays.data?.replays.length ? <Replays all={replays.data.replays} /> : null}
          {shown?.environments.length ? <Environments all={shown.environments} /> : null}
        </section>
      </div>
    </>
  );
}

// By generation and sequence what a replay says of its tokens.
const besides = (compared: Comparison | undefined): Map<string, Beside> =>
  new Map((compared?.sequences ?? []).map((one) => [`${one.generation_id}.${one.index}`, { drift: one.drift, present: one.second.logprob, rank: one.second.rank, floor: one.noise_floor, telling: one.first_telling }]));

function Replays({ all }: { all: Replay[] }) {
  return (
    <section class="card" aria-labelledby="replays">
      <h2 id="replays">Replays of this session</h2>
      <Table
        label="Replays of this session"
        columns={["when", "verdict", "engine", "largest drift", ""]}
        rows={all.slice(0, 20).map((replay) => [
          <When iso={replay.at} />,
          <Verdict verdict={replay.verdict} />,
          <span class="wrap">{visible(replay.engine ?? replay.mode ?? "?")}{replay.run ? <> · run <a href={`#/compare/run/${encodeURIComponent(replay.run)}`}>{visible(replay.run)}</a></> : null}</span>,
          <span class="mono">{replay.drift_max === null ? "–" : replay.drift_max.toPrecision(2)}</span>,
          <a href={`#/compare/${replay.recorded_in}`} aria-label={`Compare with the replay of ${replay.at.slice(0, 19)}`}>compare</a>,
        ])}
      />
    </section>
  );
}

// The state at a moment; while the scrubber moves, the latest moment that was asked for wins.
function useTravel(id: string, at: string | null, live: number): { data: Session | undefined; problem: Problem | undefined } {
  const [state, setState] = useState<{ data?: Session; problem?: Problem }>({});
  const under = useRef<AbortController | null>(null);
  useEffect(() => {
    const timer = setTimeout(async () => {
      under.current?.abort();
      const gone = (under.current = new AbortController());
      try {
        setState({ data: await ask<Session>(`debug-sessions/${id}${query({ at: at ?? undefined })}`, { signal: gone.signal }) });
      } catch (error) {
        if (!gone.signal.aborted) setState((before) => ({ ...before, problem: error instanceof Refused ? error.problem : { status: 0, title: "Error", detail: String(error) } }));
      }
    }, 40);
    return () => clearTimeout(timer);
  }, [id, at, live]);
  return { data: state.data, problem: state.problem };
}

// News of the session: read as a stream with the token in a header, which EventSource cannot send.
function useFollow(id: string, from: number | undefined, news: () => void): void {
  const latest = useRef(news);
  latest.current = news;
  const known = from !== undefined;
  useEffect(() => {
    if (from === undefined) return;
    const gone = new AbortController();
    const run = async (): Promise<void> => {
      const headers: Record<string, string> = { accept: "text/event-stream" };
      if (token.get()) headers.authorization = `Bearer ${token.get()}`;
      const answer = await fetch(`api/v1/debug-sessions/${id}/events?follow=true&offset=${from}`, { headers, signal: gone.signal });
      const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
      let timer = 0;
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        if (value.includes("id: ")) {
          clearTimeout(timer);
          timer = window.setTimeout(() => latest.current(), 250);
        }
      }
    };
    run().catch(() => undefined);
    return () => gone.abort();
  }, [id, known]);
}

function About({ shown, line, onReplayed }: { shown: Session; line: Timeline | undefined; onReplayed: () => void }) {
  const row = shown.session;
  const facts = [row.user ?? row.owner, row.client, row.workflow, row.purpose, row.tenant && `tenant ${row.tenant}`].filter(Boolean).map((fact) => visible(String(fact)));
  return (
    <div class="about">
      <div>
        <span class="mono">{row.session_id}</span> <span class="dim">{day(row.started_at)} {clock(row.started_at)} UTC</span>
      </div>
      <div class="dim">{facts.join(" · ")}</div>
      <div class="marks">
        {row.tags.map((tag) => <a class="tag" href={`#/sessions${query({ tag: [tag] })}`}>{visible(tag)}</a>)}
        <Badge level="plain">{row.visibility}</Badge>
        <Badge level="plain">{count(row.requests, "request")}</Badge>
        <Badge level="plain">{count(row.tokens, "token")}</Badge>
        {line?.failures ? <Badge level="bad">{count(line.failures, "failure")}</Badge> : null}
        {line?.stalls ? <Badge level="warn">{count(line.stalls, "stall")}</Badge> : null}
        {shown.lost ? <Badge level="bad">{count(shown.lost, "event")} lost</Badge> : null}
        {shown.erased ? <Badge level="warn">{count(shown.erased, "event")} erased</Badge> : null}
        <Actions id={row.session_id} onReplayed={onReplayed} />
      </div>
      {shown.notes.map((note) => <blockquote class="note"><b>{visible(note.actor || "somebody")}</b> {visible(note.text)}</blockquote>)}
    </div>
  );
}

function Actions({ id, onReplayed }: { id: string; onReplayed: () => void }) {
  const [replay, setReplay] = useState<Work | null>(null);
  const [problem, setProblem] = useState<Problem>();
  const run = async (): Promise<void> => {
    setProblem(undefined);
    try {
      const begun = await ask<Work>(`debug-sessions/${id}/replay`, { body: { mode: "compare" } });
      setReplay(begun);
      const done = await job(begun);
      setReplay(done);
      onReplayed();
      if (done.problem) setProblem(done.problem);
    } catch (error) {
      if (error instanceof Refused) setProblem(error.problem);
    }
  };
  const save = async (): Promise<void> => {
    try {
      download(`session-${id}.json`, JSON.stringify(await ask(`debug-sessions/${id}/export`)));
    } catch (error) {
      if (error instanceof Refused) setProblem(error.problem);
    }
  };
  return (
    <>
      <span class="grow" />
      <button type="button" onClick={run} disabled={replay !== null && replay.ended_at === null}>
        {replay && replay.ended_at === null ? `replaying ${replay.progress.done}/${replay.progress.total ?? "…"}` : "Replay against the upstream"}
      </button>
      <button type="button" onClick={save}>Export</button>
      {replay?.result ? (
        <div class="verdict">
          <Verdict verdict={replay.result.verdict} /> {replay.result.reason} <a href={`#/compare/${replay.result.recorded_in}`}>token by token</a>
        </div>
      ) : null}
      <Trouble problem={problem} />
    </>
  );
}

export function download(name: string, data: BlobPart): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([data]));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

// Rows that are in view are drawn; the list may have a hundred thousand.
const ROW = 46;

function Rows({ rows, current, moved, onPick }: { rows: TimelineRow[]; current: number; moved: boolean; onPick: (row: TimelineRow) => void }) {
  const box = useRef<HTMLDivElement>(null);
  const [top, setTop] = useState(0);
  const height = box.current?.clientHeight ?? 800;
  const first = Math.max(0, Math.floor(top / ROW) - 5);
  const shown = rows.slice(first, first + Math.ceil(height / ROW) + 10);
  useEffect(() => {
    const list = box.current;
    if (!list || current < 0 || !moved) return;
    const place = current * ROW;
    if (place < list.scrollTop || place > list.scrollTop + list.clientHeight - 2 * ROW) list.scrollTo({ top: Math.max(0, place - list.clientHeight / 2) });
  }, [current]);
  return (
    <section class="rows-box" aria-label="Timeline">
      <div class="rows scroll" ref={box} tabIndex={0} role="region" aria-label="Timeline rows" onScroll={(event) => setTop(event.currentTarget.scrollTop)}>
        <ol style={{ height: `${rows.length * ROW}px` }}>
          {shown.map((row, k) => {
            const i = first + k;
            return (
              <li key={i} style={{ transform: `translateY(${i * ROW}px)` }} class={`${row.level}${i === current ? " on" : ""}${i > current ? " ahead" : ""}`}>
                <button type="button" onClick={() => onPick(row)} aria-current={i === current ? "step" : undefined}>
                  <span class="mono dim">{clock(row.at)}</span>
                  <span class="lane mono">{row.lane}</span>
                  <span class="what">{row.what}</span>
                  <span class="text">{visible(row.text)}</span>
                  <span class="quote">{row.quote ? visible(row.quote) : visible(row.who)}</span>
                </button>
              </li>
            );
          })}
        </ol>
      </div>
    </section>
  );
}

const STATUS: Record<string, string> = { finished: "good", failed: "bad", paused: "warn" };

interface Shown {
  id: string;
  generation: Generation;
  measure: Measure;
  beside: Map<string, Beside>;
  moving: boolean;
}

function One({ id, number, generation, before, measure, beside, moving }: Shown & { number: number; before: Generation[] }) {
  const { request } = generation;
  const messages: any[] = Array.isArray(request.messages) ? request.messages : request.messages ? [{ role: "user", content: request.messages }] : [];
  const held = new Set(before.flatMap((other) => (Array.isArray(other.request.messages) ? other.request.messages : []).map((message: unknown) => JSON.stringify(message))));
  const fresh = messages.filter((message) => !held.has(JSON.stringify(message)));
  const again = messages.length ? before.findLastIndex((other) => JSON.stringify(other.request.messages) === JSON.stringify(request.messages)) : -1;
  const parameters = Object.entries(request.parameters ?? {}).filter(([name]) => name !== "stream");
  return (
    <article class="card generation" aria-label={`Generation ${number}`}>
      <header>
        <h2>{number}</h2>
        <Badge level={STATUS[request.status] ?? "plain"}>{request.status}</Badge>
        <b>{visible(request.model ?? "?")}</b>
        <span class="dim">{clock(generation.submitted_at)} · {visible(generation.actor || "client")}</span>
        <span class="grow" />
        {again >= 0 ? <a class="small" href={`#/compare/${id}${query({ generation: before[again]!.request.generation_id, with_generation: request.generation_id })}`}>beside {again + 1}, which was asked the same</a> : null}
        <span class="mono dim">
          {generation.first_token_us != null ? `first token ${duration(generation.first_token_us)}` : ""}
          {generation.duration_us != null ? ` · ${duration(generation.duration_us)}` : ""}
        </span>
      </header>
      {messages.length > fresh.length ? <p class="dim small">{count(messages.length - fresh.length, "message")} as before</p> : null}
      {fresh.map((message) => <Message message={message} />)}
      {parameters.length ? <p class="parameters mono">{request.document === "as edited" ? <span>after the edits:</span> : null}{parameters.map(([name, value]) => <span>{name}={JSON.stringify(value)}</span>)}</p> : null}
      {generation.pauses.map((pause) => (
        <p class="event warn-text">
          stopped at <b>{visible(pause.breakpoint)}</b> {clock(pause.at)}
          {pause.released_at ? `, ${String(pause.action).replace("_", " ")} by ${visible(pause.by || "the deadline")} after ${duration(us(pause.released_at) - us(pause.at))}` : " and waits"}
          {pause.reason ? `: ${visible(pause.reason)}` : ""}
        </p>
      ))}
      {generation.edits.map((edit) => (
        <figure class="edit">
          <figcaption>
            <b>{visible(edit.actor || "somebody")}</b> {edit.undo_of ? "undid an edit" : "edited the request"} at <span class="mono">{clock(edit.at)}</span>
            {edit.reason ? <>: <q>{visible(edit.reason)}</q></> : " and gave no reason"}
          </figcaption>
          <Diff before={edit.before} after={edit.after} label={`Edit by ${edit.actor}`} />
        </figure>
      ))}
      {generation.response.map((response) => (
        <Answer key={response.index} id={id} generation={request.generation_id} response={response} several={generation.response.length > 1} measure={measure} beside={beside.get(`${request.generation_id}.${response.index}`)} moving={moving} />
      ))}
      {generation.failures.map((failure) => (
        <div class="trouble">
          <strong>{failure.type.replaceAll("_", " ")}</strong> at the {failure.origin}'s end after {count(failure.position, "token")}, {clock(failure.at)}
          {failure.retryable ? " · may be tried again" : ""}
          {failure.message ? <div class="mono small">{visible(failure.message)}</div> : null}
        </div>
      ))}
    </article>
  );
}

function Message({ message }: { message: any }) {
  const text = said(message?.content ?? message?.parts);
  const calls: any[] = Array.isArray(message?.tool_calls) ? message.tool_calls : [];
  return (
    <div class={`message ${String(message?.role ?? "")}`}>
      <span class="role">{visible(String(message?.role ?? "?"))}</span>
      <div class="body">
        {text ? visible(text) : calls.length ? "" : "—"}
        {calls.map((call) => <code class="call">{visible(JSON.stringify(call))}</code>)}
      </div>
    </div>
  );
}

interface Answered {
  id: string;
  generation: string;
  response: Response_;
  several: boolean;
  measure: Measure;
  beside: Beside | undefined;
  moving: boolean;
}

// All tokens are asked for once; of them the first so many are what had been said at the moment that is looked at.
function Answer({ id, generation, response, several, measure, beside, moving }: Answered) {
  const tokens = useAsk<Tokens>(response.tokens ? `debug-sessions/${id}/tokens${query({ generation, index: response.index })}` : null);
  const asked = useRef(0);
  useEffect(() => {
    if (!tokens.data || tokens.data.tokens >= response.tokens || asked.current >= response.tokens) return;
    asked.current = response.tokens;
    tokens.again();
  }, [tokens.data, response.tokens]);
  const said = useMemo(() => tokens.data && { ...tokens.data, tokens: Math.min(response.tokens, tokens.data.tokens) }, [tokens.data, response.tokens]);
  return (
    <div class="message assistant answer">
      <span class="role">{several ? `answer ${response.index}` : "answer"}</span>
      <div class="body">
        {response.erased ? <span class="dim">its content is erased</span> : said ? <Heat tokens={said} measure={measure} beside={beside} atEnd={moving} /> : visible(response.content ?? "")}
        {response.tool_calls.map((call) => <code class="call">{call ? `${visible(call.name ?? "?")} ${visible(call.arguments)}` : "erased"}</code>)}
        <span class="dim small">{response.finish_reason ?? "unfinished"} · {count(response.tokens, "token")}</span>
      </div>
    </div>
  );
}

function Environments({ all }: { all: Environment[] }) {
  return (
    <details class="card">
      <summary>{count(new Set(all.map((one) => one.environment_id)).size, "environment")}: {all.map((one) => `${one.origin} ${one.environment_id.slice(0, 8)}`).join(", ")}</summary>
      {all.map((one) => (
        <dl class="facts">
          <dt>captured</dt>
          <dd>{clock(one.at)} · {one.origin}</dd>
          {(["semantic", "numeric", "scheduling"] as const).map((name) => (one[name] ? <><dt>{name}</dt><dd class="mono">{one[name]!.slice(0, 16)}</dd></> : null))}
          {Object.entries(one.items).map(([name, value]) => <><dt>{name}</dt><dd class="mono">{visible(value)}</dd></>)}
          {one.unknown.length ? <><dt>not told</dt><dd>{one.unknown.join(", ")}</dd></> : null}
        </dl>
      ))}
    </details>
  );
}
