// Custody: what is held, what goes next, who asked to be forgotten, whether the record verifies, and where it lies.
import { useEffect, useState } from "preact/hooks";
import { type Me, type Problem, Refused, type Work, ask, job } from "../api";
import { Badge, Head, Table, Trouble, When } from "../parts/bits";
import { type Checked, type Proof, check } from "../parts/proof";
import { useAsk } from "../parts/use";
import { bytes, count, visible } from "../words";
import { download } from "./session";

const AT = 15_000;

interface LedgerKey {
  key_id: string;
  how: "first" | "rotated" | "lost";
  entry: number | null;
  since: string | null;
  public_key: string;
}

interface Ledger {
  entries: any[];
  checkpoint: string | null;
  public_key: string;
  keys: LedgerKey[];
}

export function Custody() {
  const me = useAsk<Me>("me");
  const custodian = me.data?.keyed === true && me.data.roles.some((role) => role === "custodian" || role === "admin");
  return (
    <>
      <Head title="Custody">
        <span class="whole">{custodian ? `acts are signed by ${me.data!.name}` : "acts of custody need a key with the role custodian"}</span>
      </Head>
      <div class="grid">
        <OneEvent />
        <Verify may={custodian} />
        <Tiers />
        <Holds may={custodian} />
        <Erasures may={custodian} me={me.data} />
        <Retention />
        <Coverage />
      </div>
    </>
  );
}

function useAct(after: () => void): [Problem | undefined, (path: string, body?: unknown) => Promise<boolean>] {
  const [problem, setProblem] = useState<Problem>();
  return [
    problem,
    async (path, body) => {
      setProblem(undefined);
      try {
        await ask(path, { method: "POST", body });
        after();
        return true;
      } catch (error) {
        if (error instanceof Refused) setProblem(error.problem);
        return false;
      }
    },
  ];
}

function Verify({ may }: { may: boolean }) {
  const ledger = useAsk<Ledger>("custody/ledger", AT);
  const jobs = useAsk<{ runs: any[] }>("jobs", AT);
  const [work, setWork] = useState<Work>();
  const [problem, setProblem] = useState<Problem>();
  const last = jobs.data?.runs.find((run) => run.job === "verify" && run.finished_at);
  const run = async (): Promise<void> => {
    setProblem(undefined);
    try {
      const begun = await ask<Work>("custody/verify", { body: {} });
      setWork(begun);
      const done = await job(begun);
      setWork(done);
      setProblem(done.problem ?? undefined);
    } catch (error) {
      if (error instanceof Refused) setProblem(error.problem);
    }
  };
  const result = work?.result;
  return (
    <section class="card" aria-labelledby="proof">
      <header>
        <h2 id="proof">Ledger</h2>
        <span class="grow" />
        {may ? <button type="button" disabled={work?.ended_at === null} onClick={run}>{work?.ended_at === null ? `verifying, ${work.progress.done} segments` : "Verify everything"}</button> : null}
      </header>
      <Trouble problem={problem ?? ledger.problem} />
      <dl class="facts">
        <dt>verified now</dt>
        <dd>{result ? <><Badge level={result.outcome === "good" ? "good" : "bad"}>{result.outcome}</Badge> {count((result.findings ?? []).length, "finding")}</> : <span class="dim">not in this sitting</span>}</dd>
        <dt>last job</dt>
        <dd>{last ? <><Badge level={last.outcome === "ok" ? "good" : "bad"}>{last.outcome}</Badge> <When iso={new Date(last.finished_at * 1000).toISOString()} /></> : <span class="dim">has not run yet</span>}</dd>
        <dt>ledger</dt>
        <dd>{count(ledger.data?.entries[0] ? ledger.data.entries[0].number + 1 : 0, "entry").replace("entrys", "entries")}</dd>
        <dt>signs now</dt>
        <dd class="mono wrap">{ledger.data?.keys.at(-1)?.public_key}</dd>
        {ledger.data && ledger.data.keys.length > 1 ? (
          <>
            <dt>keys so far</dt>
            <dd>
              <ol class="chain">
                {ledger.data.keys.map((one) => (
                  <li>
                    <span class="mono">{one.key_id}</span>{" "}
                    {one.how === "first" ? <span class="dim">the first one, which proves all that follow</span> : <span class={one.how === "lost" ? "warn-text" : "dim"}>{one.how === "lost" ? "begun again after a loss" : "handed over to"} in entry {one.entry} <When iso={one.since} /></span>}
                  </li>
                ))}
              </ol>
            </dd>
          </>
        ) : null}
        <dt>checkpoint</dt>
        <dd>{ledger.data?.checkpoint ? <pre class="mono" tabIndex={0} aria-label="Newest checkpoint">{ledger.data.checkpoint}</pre> : <span class="dim">none is signed yet</span>}</dd>
      </dl>
    </section>
  );
}

const OUTCOME = { proven: ["good", "proven"], unsigned: ["warn", "hashes hold, signatures unchecked"], refuted: ["bad", "not proven"] } as const;

// The proof comes from the API; that it holds is found out here.
function OneEvent() {
  const wanted = new URLSearchParams(location.hash.split("?")[1] ?? "").get("event") ?? "";
  const ledger = useAsk<Ledger>("custody/ledger");
  const [event, setEvent] = useState(wanted);
  const [handed, setHanded] = useState("");
  const [proof, setProof] = useState<Proof>();
  const [checked, setChecked] = useState<Checked>();
  const [problem, setProblem] = useState<Problem>();
  const run = async (): Promise<void> => {
    setProblem(undefined);
    setChecked(undefined);
    try {
      const found = await ask<Proof>(`custody/proofs/${encodeURIComponent(event)}`);
      setProof(found);
      setChecked(await check(found, handed.trim() || ledger.data?.public_key || found.public_key));
    } catch (error) {
      if (error instanceof Refused) setProblem(error.problem);
    }
  };
  useEffect(() => {
    if (wanted && ledger.data) void run();
  }, [wanted, ledger.data !== undefined]);
  return (
    <section class="card" aria-labelledby="one-event">
      <h2 id="one-event">Proof of one event</h2>
      <p class="small dim">Fetched as a document and checked in this browser: SHA-256 from the event to the checkpoint, Ed25519 on the checkpoint and the entries.</p>
      <form class="row" onSubmit={(submitted) => { submitted.preventDefault(); void run(); }}>
        <input class="grow mono" required placeholder="event id" aria-label="Event to prove" value={event} onInput={(typed) => setEvent(typed.currentTarget.value.trim())} />
        <button type="submit">Check</button>
      </form>
      <details class="small">
        <summary>by the key that you were handed, instead of the first one that this installation names</summary>
        <textarea class="mono" rows={2} aria-label="Public key" placeholder="NAME+HASH+BASE64" value={handed} onInput={(typed) => setHanded(typed.currentTarget.value)} />
      </details>
      <Trouble problem={problem} />
      {checked && proof ? (
        <div aria-live="polite" class="checked">
          <p><Badge level={OUTCOME[checked.outcome][0]}>{OUTCOME[checked.outcome][1]}</Badge></p>
          <ol class="steps">{checked.steps.map((step, i) => <li class={checked.outcome === "refuted" && i === checked.steps.length - 1 ? "bad-text" : ""}>{visible(step)}</li>)}</ol>
          {checked.outcome === "unsigned" ? <p class="warn-text">This browser has no Ed25519. <code>tokentape verify --proof proof.json</code> checks the signatures, too.</p> : null}
          <button type="button" onClick={() => download("proof.json", JSON.stringify(proof))}>Save the proof</button>
        </div>
      ) : null}
    </section>
  );
}

function Tiers() {
  const tiers = useAsk<{ hot: any[]; cold: any[] }>("custody/tiers", AT);
  const sum = (rows: any[] | undefined, name: string): number => (rows ?? []).reduce((all, row) => all + row[name], 0);
  const status = useAsk<{ object_store: { conditional_create?: boolean; locks_enforced?: boolean; detail?: string; error?: string } }>("status", AT);
  const probe = status.data?.object_store;
  const most = Math.max(1, sum(tiers.data?.hot, "bytes"), sum(tiers.data?.cold, "bytes"));
  return (
    <section class="card" aria-labelledby="tiers">
      <h2 id="tiers">Storage by tier</h2>
      <Trouble problem={tiers.problem} />
      {(["hot", "cold"] as const).map((tier) => (
        <div class="tier">
          <b>{tier}</b>
          <span class="bar" role="img" aria-label={`${tier}: ${bytes(sum(tiers.data?.[tier], "bytes"))}`}>
            <i style={{ width: `${(100 * sum(tiers.data?.[tier], "bytes")) / most}%` }} />
          </span>
          <span class="mono">{bytes(sum(tiers.data?.[tier], "bytes"))}</span>
          <span class="dim">{count(sum(tiers.data?.[tier], "rows"), "event")} in {count(tiers.data?.[tier].length ?? 0, "file")}</span>
        </div>
      ))}
      <h2>What the store was found to do</h2>
      {probe ? (
        <>
          <p class="marks">
            <Badge level={probe.conditional_create ? "good" : "bad"}>{probe.conditional_create ? "creates an object once" : "does not create once"}</Badge>
            <Badge level={probe.locks_enforced ? "good" : "warn"}>{probe.locks_enforced ? "locks hold" : "locks do not hold"}</Badge>
          </p>
          <p class="small dim">{probe.detail ?? probe.error}</p>
        </>
      ) : null}
    </section>
  );
}

function Holds({ may }: { may: boolean }) {
  const holds = useAsk<{ holds: any[] }>("custody/holds", AT);
  const [problem, act] = useAct(holds.again);
  const [what, setWhat] = useState("");
  const [reason, setReason] = useState("");
  return (
    <section class="card" aria-labelledby="holds">
      <h2 id="holds">Legal holds</h2>
      <Trouble problem={holds.problem ?? problem} />
      {holds.data?.holds.length ? (
        <Table
          label="Legal holds"
          columns={["what", "by", "since", "why", ...(may ? [""] : [])]}
          rows={holds.data.holds.map((hold) => [
            visible(hold.what),
            visible(hold.by),
            <When iso={hold.since} />,
            visible(hold.reason ?? "—"),
            ...(may ? [<button type="button" class="quiet" onClick={() => { const why = prompt("What allows the release?"); if (why) void act(`custody/holds/${hold.hold}/release`, { reason: why }); }}>release</button>] : []),
          ])}
        />
      ) : (
        <p class="dim">Nothing is held.</p>
      )}
      {may ? (
        <form class="row" onSubmit={async (event) => { event.preventDefault(); if (await act("custody/holds", what.startsWith("#") ? { tag: what.slice(1), reason } : { sessions: [what], reason })) { setWhat(""); setReason(""); } }}>
          <input class="grow mono" required placeholder="session id, or #tag" aria-label="What to hold" value={what} onInput={(event) => setWhat(event.currentTarget.value.trim())} />
          <input class="grow" required placeholder="why" aria-label="Why to hold it" value={reason} onInput={(event) => setReason(event.currentTarget.value)} />
          <button type="submit">Hold</button>
        </form>
      ) : null}
    </section>
  );
}

interface Foreseen {
  sessions: string[];
  events: number;
  contents: number;
  first_at: string;
  last_at: string;
  held: { hold: string; events: number }[];
}

// Asked in two steps: what would go, and only then for it. A subject that was changed is looked at anew.
function AskErasure({ after }: { after: () => void }) {
  const [of, setOf] = useState<"sessions" | "actor">("sessions");
  const [what, setWhat] = useState("");
  const [reason, setReason] = useState("");
  const [foreseen, setForeseen] = useState<Foreseen>();
  const [problem, act] = useAct(() => { after(); setWhat(""); setReason(""); setForeseen(undefined); });
  const [trouble, setTrouble] = useState<Problem>();
  const subject = of === "actor" ? { actor: what.trim() } : { sessions: what.split(/[\s,]+/).filter(Boolean) };
  const look = async (): Promise<void> => {
    setTrouble(undefined);
    try {
      setForeseen(await ask<Foreseen>("custody/erasures/preview", { body: subject }));
    } catch (error) {
      if (error instanceof Refused) setTrouble(error.problem);
    }
  };
  const changed = (set: () => void): void => { set(); setForeseen(undefined); };
  return (
    <form class="asking" onSubmit={(event) => { event.preventDefault(); void (foreseen ? act("custody/erasures", { ...subject, reason }) : look()); }}>
      <div class="row">
        <select aria-label="Erase by" value={of} onChange={(event) => { const by = event.currentTarget.value as "sessions" | "actor"; changed(() => setOf(by)); }}>
          <option value="sessions">sessions</option>
          <option value="actor">all of an actor</option>
        </select>
        <input class="grow mono" required placeholder={of === "actor" ? "actor, as events name it" : "session id, or several"} aria-label="What to erase" value={what} onInput={(event) => { const text = event.currentTarget.value; changed(() => setWhat(text)); }} />
        {foreseen ? null : <button type="submit">What would go</button>}
      </div>
      <Trouble problem={trouble ?? problem} />
      {foreseen ? (
        <>
          <p aria-live="polite">
            The content of {count(foreseen.contents, "event")} in {count(foreseen.sessions.length, "session")}, recorded <When iso={foreseen.first_at} /> to <When iso={foreseen.last_at} />; what stays of {count(foreseen.events, "event")} is metadata and every proof.
          </p>
          {foreseen.held.map((one) => <p class="warn-text">Hold <span class="mono">…{one.hold.slice(-8)}</span> keeps {count(one.events, "event")} of them: it has to be released first.</p>)}
          <div class="row">
            <input class="grow" required placeholder="why" aria-label="Why to erase it" value={reason} onInput={(event) => setReason(event.currentTarget.value)} />
            <button type="submit" disabled={foreseen.held.length > 0}>Ask for the erasure</button>
          </div>
        </>
      ) : null}
    </form>
  );
}

function Erasures({ may, me }: { may: boolean; me: Me | undefined }) {
  const erasures = useAsk<{ erasures: any[] }>("custody/erasures", AT);
  const [problem, act] = useAct(erasures.again);
  const mine = me?.name.replace(/^key:/, "");
  return (
    <section class="card" aria-labelledby="erasures">
      <h2 id="erasures">Erasures</h2>
      <Trouble problem={erasures.problem ?? problem} />
      {erasures.data?.erasures.length ? (
        <Table
          label="Erasures"
          columns={["erasure", "state", ...(may ? ["what", "why"] : []), "asked by", "approved by", "when"]}
          rows={erasures.data.erasures.map((one) => [
            <span class="mono">…{one.erasure.slice(-8)}</span>,
            <>
              <Badge level={one.state === "requested" ? "warn" : "plain"}>{one.state === "requested" ? "waits for a second custodian" : one.state}</Badge>{" "}
              {may && one.state === "requested" && one.requested_by !== mine ? <button type="button" onClick={() => act(`custody/erasures/${one.erasure}/approve`)}>approve</button> : null}
            </>,
            ...(may ? [visible(one.what ?? "—"), visible(one.reason ?? "—")] : []),
            visible(one.requested_by),
            visible(one.approved_by ?? "—"),
            <When iso={one.requested_at} />,
          ])}
        />
      ) : (
        <p class="dim">Nobody asked to be forgotten.</p>
      )}
      {may ? <AskErasure after={erasures.again} /> : null}
    </section>
  );
}

function Retention() {
  const found = useAsk<{ policies: any[]; due: any[] }>("custody/retention", AT * 4);
  const due = found.data?.due ?? [];
  return (
    <section class="card" aria-labelledby="retention">
      <h2 id="retention">Retention</h2>
      <Trouble problem={found.problem} />
      {found.data?.policies.length ? (
        <Table label="Policies" columns={["policy", "keeps at least", "at most", "content"]} rows={found.data.policies.map((policy) => [policy.name, `${policy.min_days} d`, policy.max_days === undefined ? "—" : `${policy.max_days} d`, policy.content_days === undefined ? "—" : `${policy.content_days} d`])} />
      ) : (
        <p class="dim">No policy is set: everything is kept.</p>
      )}
      {due.length ? <Table label="What goes next" columns={["day", "policy", "events go", "content goes", "held"]} rows={due.map((row) => [row.day, row.policy, row.events, row.contents, row.held])} /> : found.data ? <p class="dim">Nothing is due.</p> : null}
    </section>
  );
}

function Coverage() {
  const found = useAsk<{ coverage: any[] }>("custody/coverage", AT * 4);
  const days = new Map<string, { rows: number; signed: boolean; quarantined: number; spans: number; gap: number }>();
  for (const row of found.data?.coverage ?? []) {
    const kept = days.get(row.day) ?? { rows: 0, signed: true, quarantined: 0, spans: 0, gap: 0 };
    if (row.entry === null) kept.gap += row.offset_next - row.offset_first;
    days.set(row.day, { ...kept, rows: kept.rows + (row.rows ?? 0), quarantined: kept.quarantined + (row.quarantined ?? 0), signed: kept.signed && (row.entry === null || row.covered_by !== null), spans: kept.spans + 1 });
  }
  return (
    <section class="card" aria-labelledby="coverage">
      <h2 id="coverage">Coverage by day</h2>
      <Trouble problem={found.problem} />
      {days.size ? (
        <Table label="Coverage by day" columns={["day", "events", "quarantined", "in no entry", "checkpoint"]} rows={[...days].sort().reverse().map(([name, one]) => [name, one.rows.toLocaleString("en"), one.quarantined, one.gap, one.signed ? <Badge level="good">signed</Badge> : <Badge level="warn">next checkpoint</Badge>])} />
      ) : (
        <p class="dim">Nothing is in the ledger yet: a day is entered when it moves to the cold tier.</p>
      )}
    </section>
  );
}
