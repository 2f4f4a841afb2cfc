// The debug console: requests that stopped, edited with validation, let go or refused, with the deadline ticking.
import { useEffect, useState } from "preact/hooks";
import { type Problem, Refused, ask } from "../api";
import { Empty, Head, Trouble } from "../parts/bits";
import { Diff } from "../parts/diff";
import { fault, patch } from "../parts/patch";
import { useAsk, useKeys, useNow } from "../parts/use";
import { count, visible } from "../words";

interface Stopped {
  generation: string;
  session: string;
  state: string;
  model: string | null;
  messages: number;
  edits: number;
  actor: string;
  breakpoint: any;
  stopped_at: number;
  deadline_at: number;
  default_action: string;
}

interface Shown {
  generation: string;
  session: string;
  request: string;
  submitted: string;
  version: number;
  edits: { edit_id: string; actor: string; reason: string | null; undo_of: string | null }[];
}

interface Breakpoint {
  breakpoint_id: string;
  tag: string | null;
  model: string | null;
  where: string | null;
  key: string | null;
  deadline_s: number | null;
  default_action: string | null;
  created_by: string;
  reason: string | null;
}

export function Debug() {
  const list = useAsk<{ stopped: Stopped[] }>("stopped", 1000);
  const points = useAsk<{ breakpoints: Breakpoint[] }>("breakpoints", 5000);
  const [chosen, setChosen] = useState<string | null>(null);
  const waiting = (list.data?.stopped ?? []).filter((row) => row.state === "stopped");
  const current = waiting.find((row) => row.generation === chosen) ?? waiting[0];
  const move = (by: number): void => {
    const i = waiting.findIndex((row) => row.generation === current?.generation);
    setChosen(waiting[Math.min(waiting.length - 1, Math.max(0, i + by))]?.generation ?? null);
  };
  useKeys({ j: () => move(1), k: () => move(-1) });
  return (
    <>
      <Head title="Debug console">
        <span class="whole">{waiting.length ? `${waiting.length} ${waiting.length === 1 ? "waits" : "wait"} for a decision` : "nothing waits"}</span>
      </Head>
      <Trouble problem={list.problem} />
      <div class="console">
        <section aria-label="Stopped requests">
          <h2>Stopped requests</h2>
          {waiting.length ? (
            <ul class="stopped">
              {waiting.map((row) => (
                <li>
                  <button type="button" class={row.generation === current?.generation ? "on" : ""} aria-pressed={row.generation === current?.generation} onClick={() => setChosen(row.generation)}>
                    <span class="mono">…{row.generation.slice(-8)}</span> <b>{visible(row.model ?? "?")}</b>
                    <span class="dim">{visible(row.actor)} · {count(row.messages, "message")}</span>
                    <Deadline row={row} />
                  </button>
                </li>
              ))}
            </ul>
          ) : (
            <Empty title="No request is stopped">
              <p>Set a breakpoint below. A request that it means waits here until somebody decides, or its deadline passes.</p>
            </Empty>
          )}
          <Breakpoints all={points.data?.breakpoints ?? []} changed={points.again} problem={points.problem} />
        </section>
        <section aria-label="Editor">{current ? <Editor key={current.generation} row={current} decided={list.again} /> : null}</section>
      </div>
    </>
  );
}

function Deadline({ row }: { row: Stopped }) {
  const now = useNow(250);
  const left = Math.max(0, row.deadline_at - now / 1000);
  const whole = Math.max(1, row.deadline_at - row.stopped_at);
  return (
    <span class={`deadline${left < 15 ? " soon" : ""}`}>
      <progress max={whole} value={left} aria-label="Time left" />
      <span class="mono">{left.toFixed(left < 10 ? 1 : 0)} s</span> <span class="dim">then {row.default_action.replace("_", " ")}</span>
    </span>
  );
}

function Editor({ row, decided }: { row: Stopped; decided: () => void }) {
  const shown = useAsk<Shown>(`stopped/${row.generation}`, 2000);
  const [text, setText] = useState<string | null>(null);
  const [base, setBase] = useState<Shown>();
  const [reason, setReason] = useState("");
  const [problem, setProblem] = useState<Problem>();
  useEffect(() => {
    if (shown.data && (!base || (text === null && shown.data.version !== base.version))) setBase(shown.data);
  }, [shown.data]);
  if (!base) return <Trouble problem={shown.problem} />;
  const pretty = JSON.stringify(JSON.parse(base.request), null, 2);
  const value = text ?? pretty;
  const wrong = fault(value);
  const changed = text !== null && !wrong && patch(JSON.parse(base.request), JSON.parse(value)).length > 0;
  const overtaken = shown.data && shown.data.version !== base.version;
  const act = async (what: () => Promise<unknown>): Promise<boolean> => {
    setProblem(undefined);
    try {
      await what();
      return true;
    } catch (error) {
      setProblem(error instanceof Refused ? error.problem : { status: 0, title: "Error", detail: String(error) });
      return false;
    }
  };
  const why = reason.trim() ? { reason: reason.trim() } : {};
  const save = (): Promise<boolean> =>
    act(async () => {
      await ask(`stopped/${row.generation}/edits`, { body: { patch: patch(JSON.parse(base.request), JSON.parse(value)), version: base.version, ...why } });
      setText(null);
      setBase(undefined);
      shown.again();
    });
  const decide = async (verb: string): Promise<void> => {
    if (verb === "release" && changed && !(await save())) return;
    if (await act(() => ask(`stopped/${row.generation}/${verb}`, { body: why }))) decided();
  };
  const others = base.edits.filter((edit) => !edit.undo_of);
  return (
    <div class="card editor">
      <header>
        <h2>Request …{row.generation.slice(-8)}</h2>
        <a href={`#/session/${row.session}`}>its session</a>
        <span class="grow" />
        <Deadline row={row} />
      </header>
      {overtaken ? (
        <div class="trouble warn-box" role="status">
          Somebody else has edited this request meanwhile.{" "}
          <button type="button" onClick={() => { setText(null); setBase(shown.data); }}>take theirs</button>
        </div>
      ) : null}
      <textarea
        class="mono"
        spellcheck={false}
        aria-label="The request as JSON"
        aria-invalid={wrong !== null}
        value={value}
        onInput={(event) => setText(event.currentTarget.value)}
        onKeyDown={(event) => {
          if ((event.ctrlKey || event.metaKey) && event.key === "s") {
            event.preventDefault();
            if (changed) void save();
          }
        }}
      />
      <div class={wrong ? "bad-text small" : "dim small"} role="status">{wrong ?? (changed ? "valid; not saved yet" : "as it stands now")}</div>
      {changed ? <Diff before={JSON.parse(base.request)} after={JSON.parse(value)} label="What would change" /> : null}
      <div class="row">
        <input class="grow" placeholder="why (it is recorded; a refused client is told)" aria-label="Reason" value={reason} onInput={(event) => setReason(event.currentTarget.value)} />
        <button type="button" disabled={!changed} onClick={save}>Save edit</button>
        {base.edits.length ? <button type="button" onClick={() => act(async () => { await ask(`stopped/${row.generation}/undo`, { body: why }); setText(null); setBase(undefined); shown.again(); })}>Undo last</button> : null}
        <button type="button" class="danger" onClick={() => decide("refuse")}>Refuse</button>
        <button type="button" class="main" disabled={wrong !== null} onClick={() => decide("release")}>{changed ? "Save and release" : "Release"}</button>
      </div>
      <Trouble problem={problem} />
      {others.length ? <p class="dim small">edits so far: {base.edits.map((edit) => `${edit.actor}${edit.undo_of ? " undid one" : ""}${edit.reason ? ` (${edit.reason})` : ""}`).map(visible).join(", ")}</p> : null}
    </div>
  );
}

function Breakpoints({ all, changed, problem }: { all: Breakpoint[]; changed: () => void; problem: Problem | undefined }) {
  const [kind, setKind] = useState("where");
  const [value, setValue] = useState("");
  const [wrong, setWrong] = useState<Problem>();
  const act = async (what: Promise<unknown>): Promise<void> => {
    setWrong(undefined);
    try {
      await what;
      setValue("");
      changed();
    } catch (error) {
      if (error instanceof Refused) setWrong(error.problem);
    }
  };
  const means = (point: Breakpoint): string => ["tag", "model", "key", "where"].map((name) => [name, (point as any)[name]]).filter(([, set]) => set).map(([name, set]) => `${name} ${set}`).join(" and ") || "every request";
  return (
    <>
      <h2>Breakpoints</h2>
      <Trouble problem={problem} />
      <ul class="points">
        {all.map((point) => (
          <li>
            <b>{visible(point.breakpoint_id)}</b> <span class="mono small">{visible(means(point))}</span>
            <span class="dim small"> by {visible(point.created_by)}</span>
            <button type="button" class="quiet" aria-label={`Remove ${point.breakpoint_id}`} onClick={() => act(ask(`breakpoints/${encodeURIComponent(point.breakpoint_id)}`, { method: "DELETE" }))}>remove</button>
          </li>
        ))}
        {all.length ? null : <li class="dim">none is set</li>}
      </ul>
      <form class="row" onSubmit={(event) => { event.preventDefault(); void act(ask("breakpoints", { body: kind === "every" ? {} : { [kind]: value } })); }}>
        <select class="narrow" aria-label="Stops" value={kind} onChange={(event) => setKind(event.currentTarget.value)}>
          <option value="where">where</option>
          <option value="tag">tag</option>
          <option value="model">model</option>
          <option value="every">every request</option>
        </select>
        {kind === "every" ? <span class="grow dim">stops all that come</span> : <input class="grow mono" aria-label="Condition" placeholder={kind === "where" ? 'contains(last, "refund")' : kind} value={value} required onInput={(event) => setValue(event.currentTarget.value)} />}
        <button type="submit">Add</button>
      </form>
      <Trouble problem={wrong} />
    </>
  );
}
