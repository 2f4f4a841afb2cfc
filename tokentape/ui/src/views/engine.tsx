// Engine: a recorded run step by step: how full batches and the cache were, who shared a step with whom, what the KV connector found.
import { useMemo, useRef, useState } from "preact/hooks";
import type { EngineRun, KvReport, Me, Overview, Steps } from "../api";
import { Badge, Empty, Head, Table, Trouble } from "../parts/bits";
import { penOf, useDrawn } from "../parts/canvas";
import { type Line, Plot } from "../parts/chart";
import { useAsk, useKeys } from "../parts/use";
import { bytes, clock, count, visible } from "../words";

const WINDOW = 120;
const LANES_MAX = 48;
const LANE = 15;
const LEFT = 84;
const TOP = 18;

export function Engine({ id }: { id: string }) {
  const me = useAsk<Me>("me");
  const runs = useAsk<{ runs: EngineRun[] }>("engine-runs", 10_000);
  const chosen = id || runs.data?.runs[0]?.engine_run || "";
  const run = runs.data?.runs.find((one) => one.engine_run === chosen);
  return (
    <>
      <Head title="Engine">
        {runs.data && runs.data.runs.length > 1 ? (
          <select aria-label="Run" value={chosen} onChange={(event) => (location.hash = `#/engine/${event.currentTarget.value}`)}>
            {runs.data.runs.map((one) => <option value={one.engine_run}>{String(one.began).slice(0, 19).replace("T", " ")} · {visible(one.model ?? "engine")} · {one.steps.toLocaleString("en")} steps</option>)}
          </select>
        ) : null}
      </Head>
      <Trouble problem={runs.problem} />
      {runs.data && !runs.data.runs.length && !id ? (
        <Empty title="No run of an engine is on the tape">
          {me.data?.tenant ? <p>Steps are of all tenants at once: a key that is bound to one does not see them.</p> : <p>Start vLLM with <code>TOKENTAPE_ENGINE__CAPTURE=on</code>, and each step of its scheduler appears here.</p>}
        </Empty>
      ) : null}
      {run ? (
        <div class="tiles">
          <Tile name="steps" value={run.steps.toLocaleString("en")} note={`began ${String(run.began).slice(0, 19).replace("T", " ")}`} />
          <Tile name="requests" value={run.generations.toLocaleString("en")} note={visible(run.model ?? "")} />
          <Tile name="at once" value={String(run.running_max)} note="sequences, at most" />
          <Tile name="preempted" value={String(run.preempted)} note="had to give their blocks back" bad={run.preempted > 0} />
        </div>
      ) : null}
      {chosen ? <OneRun key={chosen} run={chosen} /> : null}
    </>
  );
}

const Tile = ({ name, value, note, bad = false }: { name: string; value: string; note: string; bad?: boolean }) => (
  <div class="tile">
    <span class="dim">{name}</span>
    <b class={bad ? "warn-text" : ""}>{value}</b>
    <span class="dim small">{note}</span>
  </div>
);

function OneRun({ run }: { run: string }) {
  const whole = useAsk<Overview>(`engine-runs/${run}`, 10_000);
  const [step, setStep] = useState<number | null>(null);
  const last = whole.data?.last ?? 0;
  const at = Math.min(last, step ?? 0);
  const first = Math.max(0, Math.min(last - WINDOW + 1, Math.floor(at / (WINDOW / 2)) * (WINDOW / 2)));
  const some = useAsk<Steps>(whole.data ? `engine-runs/${run}?first=${first}&limit=${WINDOW}` : null);
  const by = (n: number): void => setStep(Math.max(0, Math.min(last, at + n)));
  useKeys({ j: () => by(1), k: () => by(-1) });
  const charts = useMemo(() => {
    const found = whole.data;
    if (!found) return null;
    const line = (label: string, color: Line["color"], values: (number | null)[], kind: Line["kind"] = "step"): Line => ({ label, color, values, kind });
    return {
      batch: [line("in a step", "accent", found.batch_max, "area"), line("running", "violet", found.running), line("waiting", "warn", found.waiting), line("preempted", "bad", found.preempted.map((n) => n || null), "points")],
      kv: [line("KV cache used", "accent", found.kv_used.map((value) => (value === null ? null : 100 * value)))],
      time: [line("time of a step", "accent", found.duration_ms.map((ms, i) => ms / found.steps[i]!))],
    };
  }, [whole.data]);
  if (!whole.data || !charts) return <Trouble problem={whole.problem} />;
  const label = whole.data.every > 1 ? `step, in stretches of ${whole.data.every}` : "step";
  const shared = { label, x: whole.data.step, at, onPick: (x: number) => setStep(x), height: 190 };
  return (
    <>
      <div class="halves charts">
        <section class="card" aria-labelledby="batches">
          <h2 id="batches">Batches: in a step, running, waiting</h2>
          <Plot name="Sequences in a step, running and waiting over steps" lines={charts.batch} {...shared} />
        </section>
        <section class="card" aria-labelledby="cache">
          <h2 id="cache">KV cache</h2>
          <Plot name="KV cache used over steps" lines={charts.kv} unit=" %" {...shared} />
        </section>
      </div>
      <section class="card" aria-labelledby="times">
        <h2 id="times">Time of a step</h2>
        <Plot name="Time of a step over steps" lines={charts.time} unit=" ms" {...shared} height={130} />
      </section>
      <section class="card" aria-labelledby="shared">
        <header>
          <h2 id="shared">Who shared a step with whom</h2>
          <span class="grow" />
          <button type="button" onClick={() => by(-1)} title="One step back (k)">◂ back</button>
          <input type="range" min={0} max={last} value={at} aria-label="Step" onInput={(event) => setStep(Number(event.currentTarget.value))} />
          <button type="button" onClick={() => by(1)} title="One step on (j)">on ▸</button>
          <span class="mono nowrap">step {at.toLocaleString("en")} of {last.toLocaleString("en")}</span>
        </header>
        <Trouble problem={some.problem} />
        {some.data ? <Shared steps={some.data} at={at} onPick={setStep} /> : null}
      </section>
      <Connector run={run} />
    </>
  );
}

interface Member {
  key: string;
  generation: string;
  index: number;
  cells: Map<number, number>;
}

const name = (member: Member): string => `…${member.generation.slice(-8)}${member.index ? `.${member.index}` : ""}`;

// More than one token of a sequence in a step are its prompt; afterwards each step gives one.
const isPrompt = (tokens: number): boolean => tokens > 1;

function Shared({ steps, at, onPick }: { steps: Steps; at: number; onPick: (step: number) => void }) {
  const members = useMemo(() => {
    const found = new Map<string, Member>();
    for (const step of steps.steps)
      for (const entry of step.entries) {
        const key = `${entry.generation_id}.${entry.index}`;
        if (!found.has(key)) found.set(key, { key, generation: entry.generation_id, index: entry.index, cells: new Map() });
        found.get(key)!.cells.set(step.step, entry.tokens);
      }
    return [...found.values()];
  }, [steps]);
  const step = steps.steps.find((one) => one.step === at);
  const inside = members.filter((member) => member.cells.has(at));
  const together = (one: Member, other: Member): number => [...one.cells.keys()].filter((number) => other.cells.has(number)).length;
  return (
    <>
      <Grid steps={steps} members={members.slice(0, LANES_MAX)} at={at} onPick={onPick} />
      {members.length > LANES_MAX ? <p class="dim small">{count(members.length - LANES_MAX, "more sequence")} in these steps are in the table only</p> : null}
      <p class="legend-line small dim"><span><i class="prompt" /> prompt</span><span><i class="decode" /> one token</span><span><i class="absent" /> between, not in the step</span><span><i class="preempts" /> preempted somebody</span></p>
      {step ? (
        <>
          <p aria-live="polite">
            <b>Step {at.toLocaleString("en")}</b> <span class="dim mono">{clock(step.at)}</span> · {count(inside.length, "sequence")}, {count(inside.reduce((all, member) => all + member.cells.get(at)!, 0), "token")} in{" "}
            {step.duration_ms.toFixed(1)} ms · {step.running} running, {step.waiting} waiting{step.kv_used === null ? "" : ` · ${(100 * step.kv_used).toFixed(1)} % of the cache`}
            {step.preempted ? <> · <Badge level="bad">{step.preempted} preempted</Badge></> : null}
          </p>
          {inside.length ? (
            <Table
              label={`Sequences in step ${at}`}
              columns={["sequence", "session", "in this step", "with whom, in how many of these steps"]}
              rows={inside.map((member) => [
                <span class="mono">{name(member)}</span>,
                steps.sessions[member.generation] ? <a class="mono" href={`#/session/${steps.sessions[member.generation]}`}>…{steps.sessions[member.generation]!.slice(-8)}</a> : <span class="dim">not on this tape</span>,
                isPrompt(member.cells.get(at)!) ? `${member.cells.get(at)} tokens of its prompt` : "one token",
                <span class="mono small">{inside.filter((other) => other !== member).map((other) => `${name(other)} ${together(member, other)}`).join(", ") || "alone"}</span>,
              ])}
            />
          ) : (
            <p class="dim">Nobody computed in this step.</p>
          )}
        </>
      ) : null}
    </>
  );
}

function Grid({ steps, members, at, onPick }: { steps: Steps; members: Member[]; at: number; onPick: (step: number) => void }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const first = steps.steps[0]?.step ?? 0;
  const many = Math.max(1, (steps.steps.at(-1)?.step ?? first) - first + 1);
  const height = TOP + members.length * LANE + 4;
  const draw = (host: HTMLCanvasElement): void => {
    const { pen, of } = penOf(host, height);
    const wide = (host.clientWidth - LEFT - 8) / many;
    const x = (step: number): number => LEFT + (step - first) * wide;
    pen.fillStyle = of("accent-soft");
    pen.fillRect(x(at), TOP - 4, Math.max(2, wide), height - TOP);
    for (const step of steps.steps)
      if (step.preempted) {
        pen.fillStyle = of("bad");
        pen.fillRect(x(step.step), TOP - 4, Math.max(2, wide), 3);
      }
    const every = [1, 2, 5, 10, 20, 50, 100].find((n) => n * wide >= 56) ?? 100;
    pen.fillStyle = of("dim");
    for (let step = Math.ceil(first / every) * every; step < first + many; step += every) pen.fillText(String(step), x(step), 11);
    members.forEach((member, i) => {
      const y = TOP + i * LANE;
      pen.fillStyle = of("dim");
      pen.textAlign = "right";
      pen.fillText(name(member), LEFT - 8, y + 10);
      pen.textAlign = "left";
      const inside = [...member.cells.keys()];
      const [begins, ends] = [Math.min(...inside), Math.max(...inside)];
      pen.fillStyle = of("wait");
      pen.fillRect(x(begins), y + 6, (ends - begins + 1) * wide, 2);
      for (const [step, tokens] of member.cells) {
        pen.fillStyle = of(isPrompt(tokens) ? "violet" : "accent");
        pen.fillRect(x(step), y + (isPrompt(tokens) ? 1 : 3), Math.max(1, wide - (wide > 3 ? 1 : 0)), isPrompt(tokens) ? 12 : 8);
      }
    });
  };
  useDrawn(canvas, draw, [steps, members, at, first, many, height]);
  const pick = (event: MouseEvent): void => {
    const box = canvas.current!.getBoundingClientRect();
    const place = (event.clientX - box.left - LEFT) / (box.width - LEFT - 8);
    if (place >= 0 && place < 1) onPick(first + Math.floor(place * many));
  };
  return <canvas ref={canvas} class="grid-canvas" style={{ height: `${height}px` }} role="img" aria-label={`Which of ${members.length} sequences were in which of ${many} steps; the table below tells the chosen step`} onClick={pick} />;
}

const share = (rate: number | null): string => (rate === null ? "–" : `${Math.round(100 * rate)} %`);
const ms = (value: number | null): string => (value === null ? "–" : `${value.toPrecision(3)} ms`);

function Connector({ run }: { run: string }) {
  const found = useAsk<KvReport>(`engine-runs/${run}/kv`);
  const none = found.problem?.status === 404;
  return (
    <section class="card" aria-labelledby="connector">
      <h2 id="connector">KV connector</h2>
      {none ? <p class="dim">{visible(found.problem!.detail)}. {visible(found.problem!.hint ?? "")}</p> : <Trouble problem={found.problem} />}
      {found.data ? (
        <>
          <p class="mono small wrap">{visible(found.data.connector)}</p>
          <dl class="figures-row">
            <div><dt>hit rate</dt><dd>{share(found.data.rate)}</dd></div>
            <div><dt>lookup p50</dt><dd>{ms(found.data.lookup_p50_ms)}</dd></div>
            <div><dt>lookup p99</dt><dd>{ms(found.data.lookup_p99_ms)}</dd></div>
            <div><dt>offered to save</dt><dd>{bytes(found.data.saved_bytes)}{found.data.save_rate ? ` at ${bytes(found.data.save_rate)}/s` : ""}</dd></div>
            <div><dt>to load</dt><dd>{bytes(found.data.loaded_bytes)}{found.data.load_rate ? ` at ${bytes(found.data.load_rate)}/s` : ""}</dd></div>
          </dl>
          {found.data.flags.map((flag) => <p class="trouble warn-box">{visible(flag)}</p>)}
          <Table
            label="Lookups of the KV connector"
            columns={["request", "tokens", "in the engine", "found", "rate", "lookup", "why"]}
            rows={found.data.requests.slice(0, 200).map((one) => [
              <span class="mono">{visible(one.request)}</span>,
              one.tokens,
              one.local,
              one.matched,
              share(one.rate),
              ms(one.duration_ms),
              <span class="wrap">{visible(one.why) || "found"}</span>,
            ])}
          />
        </>
      ) : null}
    </section>
  );
}
