// Compare: a replay beside what it replayed, two generations, and runs of many replays that lead to both.
import { useEffect, useMemo, useState } from "preact/hooks";
import { type Comparison, type Compared, type Replay, type Run, type Tokens, query } from "../api";
import { Badge, Empty, Head, Table, Trouble, When } from "../parts/bits";
import { type Line, Plot } from "../parts/chart";
import { type Beside, Heat, Legend } from "../parts/heat";
import { useAsk } from "../parts/use";
import { count, visible } from "../words";

const LIMIT = 100;
const SEVERITY = ["model_differs", "sampling_differs", "inconclusive", "numeric_drift", "identical", "unfinished"];
const LEVEL: Record<string, string> = { identical: "good", numeric_drift: "good", model_differs: "bad", sampling_differs: "warn", inconclusive: "warn" };

export const Verdict = ({ verdict }: { verdict: string | null }) => <Badge level={LEVEL[verdict ?? ""] ?? "plain"}>{(verdict ?? "unfinished").replace("_", " ")}</Badge>;

const short = (id: string | null | undefined): string => (id ? `…${id.slice(-8)}` : "?");
const nats = (value: number | null | undefined): string => (value == null ? "–" : value === 0 ? "0" : value >= 9999 ? "∞" : value.toPrecision(2));

export function Compare({ rest }: { rest: string }) {
  const [kind, ...more] = rest.split("/");
  if (!rest) return <Begin />;
  if (kind === "run") return <OneRun name={decodeURIComponent(more.join("/"))} />;
  return <Pair id={kind!} asked={location.hash.split("?")[1] ?? ""} />;
}

function Begin() {
  const runs = useAsk<{ runs: Run[] }>("replay-runs", 5000);
  return (
    <>
      <Head title="Compare" />
      <section class="card" aria-labelledby="two">
        <h2 id="two">A replay, or two generations</h2>
        <Choose />
      </section>
      <section class="card" aria-labelledby="runs">
        <h2 id="runs">Runs of many replays</h2>
        <Trouble problem={runs.problem} />
        {runs.data?.runs.length ? (
          <Table
            label="Runs of many replays"
            columns={["run", "began", "sessions", "verdicts", "engines"]}
            rows={runs.data.runs.map((run) => [
              <a href={`#/compare/run/${encodeURIComponent(run.run)}`}>{visible(run.run)}</a>,
              <When iso={run.begun_at} />,
              run.sessions.toLocaleString("en"),
              <Shares verdicts={run.verdicts} of={run.sessions} />,
              <span class="wrap">{run.engines.map(visible).join(", ")}</span>,
            ])}
          />
        ) : runs.data ? (
          <p class="dim">None yet. <code>tokentape replay-batch --where … --run NAME</code> makes one; a single replay is begun from its session.</p>
        ) : null}
      </section>
    </>
  );
}

function Choose() {
  const [first, setFirst] = useState("");
  const [second, setSecond] = useState("");
  const go = (event: Event): void => {
    event.preventDefault();
    location.hash = `#/compare/${first}${query({ with_session: second })}`;
  };
  return (
    <form class="row" onSubmit={go}>
      <input class="grow mono" required placeholder="session, or session of a replay" aria-label="First session" value={first} onInput={(event) => setFirst(event.currentTarget.value.trim())} />
      <input class="grow mono" placeholder="with the last generation of this session" aria-label="Second session" value={second} onInput={(event) => setSecond(event.currentTarget.value.trim())} />
      <button type="submit" class="main">Compare</button>
    </form>
  );
}

function Shares({ verdicts, of }: { verdicts: Record<string, number>; of: number }) {
  const there = SEVERITY.filter((verdict) => verdicts[verdict]);
  const told = there.map((verdict) => `${verdicts[verdict]!.toLocaleString("en")} ${verdict.replace("_", " ")}`).join(" · ");
  return (
    <span class="shares">
      <span class="bar" aria-hidden="true">{there.map((verdict) => <i class={LEVEL[verdict] ?? "plain"} style={{ width: `${(100 * verdicts[verdict]!) / of}%` }} />)}</span>
      <span class="small">{told}</span>
    </span>
  );
}

function OneRun({ name }: { name: string }) {
  const [verdict, setVerdict] = useState("");
  const [offset, setOffset] = useState(0);
  const runs = useAsk<{ runs: Run[] }>("replay-runs", 5000);
  const page = useAsk<{ replays: Replay[]; total: number }>(`replay-runs/${encodeURIComponent(name)}${query({ verdict, offset, limit: LIMIT })}`, 5000);
  const run = runs.data?.runs.find((one) => one.run === name);
  const most = Math.max(1e-9, ...(page.data?.replays ?? []).map((row) => row.drift_max ?? 0));
  return (
    <>
      <Head title={`Run ${visible(name)}`}>
        <a href="#/compare">all runs</a>
      </Head>
      <Trouble problem={page.problem} />
      <div class="filters" role="group" aria-label="Verdicts">
        <button type="button" aria-pressed={!verdict} onClick={() => { setVerdict(""); setOffset(0); }}>all {run?.sessions ?? ""}</button>
        {SEVERITY.filter((one) => run?.verdicts[one]).map((one) => (
          <button type="button" aria-pressed={verdict === one} onClick={() => { setVerdict(one); setOffset(0); }}>
            {one.replace("_", " ")} {run!.verdicts[one]!.toLocaleString("en")}
          </button>
        ))}
      </div>
      {page.data?.replays.length ? (
        <section class="card" aria-label="Replays of the run">
          <Table
            label="Replays of the run"
            columns={["session", "verdict", "largest drift", "tokens", "why", ""]}
            rows={page.data.replays.map((row) => [
              <a class="mono" href={`#/session/${row.session_id}`}>{short(row.session_id)}</a>,
              <Verdict verdict={row.verdict} />,
              <span class="moved mono">
                <span class="bar" aria-hidden="true"><i class={(row.drift_max ?? 0) > (row.noise_floor ?? Infinity) ? "bad" : ""} style={{ width: `${(100 * (row.drift_max ?? 0)) / most}%` }} /></span>
                {nats(row.drift_max)}
              </span>,
              <span class="mono">{row.tokens?.toLocaleString("en") ?? "–"}</span>,
              <span class="wrap small">{visible(row.reason ?? "")}</span>,
              <a href={`#/compare/${row.recorded_in}`} aria-label={`Compare session ${row.session_id} with its replay`}>compare</a>,
            ])}
          />
        </section>
      ) : page.data ? (
        <Empty title="No session of the run is like that" />
      ) : null}
      {page.data && page.data.total > LIMIT ? (
        <div class="pager">
          <button type="button" disabled={!offset} onClick={() => setOffset(Math.max(0, offset - LIMIT))}>before</button>
          <span>{offset + 1}–{Math.min(page.data.total, offset + LIMIT)} of {page.data.total.toLocaleString("en")}</span>
          <button type="button" disabled={offset + LIMIT >= page.data.total} onClick={() => setOffset(offset + LIMIT)}>after</button>
        </div>
      ) : null}
    </>
  );
}

function Pair({ id, asked }: { id: string; asked: string }) {
  const found = useAsk<Comparison>(`debug-sessions/${encodeURIComponent(id)}/comparison${asked ? `?${asked}` : ""}`);
  const one = found.data;
  return (
    <>
      <Head title={one?.kind === "generations" ? "Two generations" : "A replay and what it replayed"}>
        {one?.run ? <a href={`#/compare/run/${encodeURIComponent(one.run)}`}>run {visible(one.run)}</a> : <a href="#/compare">compare others</a>}
      </Head>
      <Trouble problem={found.problem} />
      {one ? (
        <>
          <section class="card verdict-card" aria-label="Verdict">
            <p class="verdict-line"><Verdict verdict={one.verdict} /> <span class="wrap">{visible(one.reason ?? "")}</span></p>
            <dl class="facts">
              <dt>{one.kind === "replay" ? "recorded" : "first"}</dt>
              <dd><Where side={one.first} /></dd>
              <dt>{one.kind === "replay" ? "replayed" : "second"}</dt>
              <dd><Where side={one.second} />{one.engine ? <span class="dim"> by {visible(one.engine)}</span> : null}</dd>
            </dl>
          </section>
          <section class="card" aria-labelledby="differs">
            <h2 id="differs">What differs around them</h2>
            <ul class="lines">{one.environment.lines.map((line) => <li class={line.startsWith("  ") ? "sub" : ""}>{visible(line.trim())}</li>)}</ul>
          </section>
          {one.sequences.map((sequence, i) => <OnePair key={`${sequence.generation_id}.${sequence.index}`} kind={one.kind} sequence={sequence} number={i + 1} />)}
          {!one.sequences.length ? <Empty title="No tokens to compare" /> : null}
        </>
      ) : null}
    </>
  );
}

const Where = ({ side }: { side: Comparison["first"] }) => (
  <>
    session <a class="mono" href={`#/session/${side.session_id}`}>{short(side.session_id)}</a>
    {side.generation_id ? <span class="dim"> · generation <span class="mono">{short(side.generation_id)}</span>{side.model ? ` of ${visible(side.model)}` : ""}</span> : null}
    {side.environment_id ? <span class="dim"> · environment <span class="mono">{side.environment_id.slice(0, 8)}</span></span> : null}
  </>
);

const tokens = (index: number, column: Compared["first"]): Tokens => ({
  index,
  tokens: column.text.length,
  position: [],
  channel: [],
  offset_us: null,
  token_id: column.token_id,
  logprob: column.logprob,
  text: column.text,
  alternatives: column.alternatives,
});

function OnePair({ kind, sequence, number }: { kind: string; sequence: Compared; number: number }) {
  const { first, second, drift } = sequence;
  const parted = sequence.common !== undefined && sequence.common < Math.max(first.text.length, second.text?.length ?? 0) ? sequence.common : undefined;
  const beside: Beside = useMemo(
    () => ({ drift, present: second.logprob, rank: second.rank, floor: sequence.noise_floor, telling: sequence.first_telling, parted, alternatives: { there: second.alternatives, said: second, ...(kind === "replay" ? { names: ["recorded", "replayed"], kept: false } : { names: ["first", "second"], kept: true }) } }),
    [sequence],
  );
  const back: Beside = useMemo(() => ({ ...beside, present: first.logprob, rank: undefined, alternatives: { there: first.alternatives, said: first, names: ["second", "first"], kept: true } }), [beside]);
  const mine = useMemo(() => tokens(sequence.index, first), [sequence]);
  const theirs = useMemo(() => (second.text ? tokens(sequence.index, second as Compared["first"]) : null), [sequence]);
  const plain = LEVEL[sequence.verdict] === "good";
  const [open, setOpen] = useState(!plain || number === 1);
  return (
    <details class="card pair" open={open} onToggle={(event) => setOpen(event.currentTarget.open)}>
      <summary>
        <b>{`generation ${short(sequence.generation_id)}, answer ${sequence.index}`}</b> <Verdict verdict={sequence.verdict} />
        <span class="dim"> largest drift {nats(sequence.drift_max)} nats in {count(sequence.scored, "token")}</span>
      </summary>
      {open ? <Opened kind={kind} sequence={sequence} beside={beside} back={back} mine={mine} theirs={theirs} /> : null}
    </details>
  );
}

interface Shown {
  kind: string;
  sequence: Compared;
  beside: Beside;
  back: Beside;
  mine: Tokens;
  theirs: Tokens | null;
}

function Opened({ kind, sequence, beside, back, mine, theirs }: Shown) {
  return (
    <>
      <p class="wrap">{visible(sequence.reason ?? "")}</p>
      <dl class="figures-row">
        <div><dt>tokens compared</dt><dd>{sequence.scored.toLocaleString("en")} of {sequence.tokens.toLocaleString("en")}</dd></div>
        <div><dt>noise floor</dt><dd>{nats(sequence.noise_floor)} nats</dd></div>
        <div><dt>drift mean</dt><dd>{nats(sequence.drift_mean)}</dd></div>
        <div><dt>p99</dt><dd>{nats(sequence.drift_p99)}</dd></div>
        <div><dt>largest</dt><dd>{nats(sequence.drift_max)}</dd></div>
        <div><dt>first that tells</dt><dd>{sequence.first_telling === null ? "none" : `token ${sequence.first_telling}`}</dd></div>
      </dl>
      {sequence.drift.some((value) => value !== null) ? <Drift drift={sequence.drift} floor={sequence.noise_floor} telling={sequence.first_telling} /> : null}
      <div class={theirs ? "halves" : ""}>
        <div>
          {theirs ? <h3>first</h3> : null}
          <Heat tokens={mine} measure="drift" beside={beside} label={kind === "replay" ? "Recorded tokens" : "Tokens of the first"} />
        </div>
        {theirs ? (
          <div>
            <h3>second</h3>
            <Heat tokens={theirs} measure="drift" beside={back} label="Tokens of the second" />
          </div>
        ) : null}
      </div>
      <Legend measure="drift" />
    </>
  );
}

// What moved by nothing stands at the bottom of a logarithmic axis.
const LEAST = 1e-7;

function Drift({ drift, floor, telling }: { drift: (number | null)[]; floor: number | null; telling: number | null }) {
  const [all, setAll] = useState(false);
  useEffect(() => setAll(false), [drift]);
  const drawn = useMemo(() => {
    // A long answer is drawn by the largest drift of each stretch, so that nothing that tells is lost.
    const every = Math.ceil(drift.length / 2000);
    const x: number[] = [];
    const values: (number | null)[] = [];
    for (let i = 0; i < drift.length; i += every) {
      const known = drift.slice(i, i + every).filter((value): value is number => value !== null);
      x.push(i);
      values.push(known.length ? Math.max(LEAST, ...known) : null);
    }
    const lines: Line[] = [{ label: "drift", color: "accent", kind: "points", values }];
    if (floor) lines.push({ label: "noise floor", color: "warn", kind: "dashed", values: x.map(() => floor) });
    return { x, lines };
  }, [drift, floor]);
  const above = floor ? drift.flatMap((value, i) => (value !== null && value > floor ? [i] : [])) : [];
  return (
    <>
      <Plot name={`Drift per token, ${count(above.length, "token")} above the noise floor`} label="token" x={drawn.x} lines={drawn.lines} log height={170} at={telling ?? undefined} />
      {above.length ? (
        <p class="small dim">
          {count(above.length, "token")} above the floor: {(all ? above : above.slice(0, 24)).join(", ")}
          {above.length > 24 && !all ? <> … <button type="button" class="quiet" onClick={() => setAll(true)}>all</button></> : null}
        </p>
      ) : (
        <p class="small dim">no token above the floor</p>
      )}
    </>
  );
}
