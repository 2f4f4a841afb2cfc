// Tokens as people read them, each coloured by how sure the model was, how long it took or how far it moved; point at one, or walk with the arrows.
import { useEffect, useMemo, useState } from "preact/hooks";
import type { Alternative, Tokens } from "../api";
import { duration, visible } from "../words";

export type Measure = "logprob" | "gap" | "drift" | "plain";

// What a replay or another generation says of the same tokens. `floor` is the drift that noise explains; `telling` the token that tells.
export interface Beside {
  drift: (number | null)[];
  present: (number | null)[];
  rank?: (number | null)[];
  floor: number | null;
  telling: number | null;
  parted?: number;
  alternatives?: Alternatives;
}

// What else might have stood at each place, here and there; `names` says whose they are. A replay keeps what it thinks of the token that was said alone.
export interface Alternatives {
  there: Alternative[][] | null | undefined;
  said: { text?: (string | null)[]; token_id?: (number | null)[] };
  names: [string, string];
  kept: boolean;
}

// More than this at once is paged: a page of text is what a person reads.
const PAGE = 3000;
const STEPS = 7;

const unsure = (logprob: number): number => Math.min(STEPS, Math.floor(Math.min(6, -logprob) * 1.3));

function slow(gap: number, median: number): number {
  if (gap <= 1.3 * median) return 0;
  return Math.min(STEPS, 1 + Math.floor(Math.log2(gap / median)));
}

// An eighth of the floor is nothing, the floor itself the third of seven steps, eight floors the sixth.
const far = (drift: number, floor: number): number => (drift <= floor / 8 ? 0 : Math.min(STEPS, Math.max(1, Math.ceil(Math.log2(drift / floor) + 3))));

const chance = (logprob: number | null | undefined): string => (logprob == null ? "logprob unknown" : `p ${(100 * Math.exp(logprob)).toFixed(1)} % (logprob ${logprob.toFixed(3)})`);

// What else might have stood there, the most likely first; which of them does is marked. One whose text is unknown is told by its id.
function Among({ said, chosen, id, whose }: { said: Alternative[]; chosen: string; id: number | null | undefined; whose?: string }) {
  const found = [...said].sort((a, b) => b.logprob - a.logprob);
  return (
    <div class="alternatives">
      {whose ? `${whose}: among` : "among"}
      {found.map((one) => (
        <span class={(one.text ? one.text === chosen : one.token_id !== null && one.token_id === id) ? "chosen" : undefined} title={chance(one.logprob)}>
          {one.text || one.token_id === null ? JSON.stringify(visible(one.text)) : `id ${one.token_id}`}
          <i style={{ "--part": `${(100 * Math.exp(one.logprob)).toFixed(1)}%` }} />
          {(100 * Math.exp(one.logprob)).toFixed(1)} %
        </span>
      ))}
    </div>
  );
}

// The other side of a comparison. Where both have parted, what stood there followed upon other words and is not put beside.
function There({ alternatives, at, parted, here }: { alternatives: Alternatives; at: number; parted: number | undefined; here: boolean }) {
  const { there, said, names, kept } = alternatives;
  if (parted !== undefined && at > parted) return null;
  if (there?.[at]?.length) return <Among said={there[at]!} chosen={said.text?.[at] ?? ""} id={said.token_id?.[at]} whose={names[1]} />;
  const none = kept ? "no alternatives were recorded" : "only what it thinks of this token was kept, no alternatives";
  return <div class="alternatives">{here ? `${names[1]}: ${none}` : "no alternatives were recorded"}</div>;
}

interface Looked {
  tokens: Tokens;
  measure: Measure;
  beside?: Beside;
  label?: string;
  atEnd?: boolean;
}

// `atEnd` keeps to the page with the last token, which moves while somebody travels in time.
export function Heat({ tokens, measure, beside, label = "Tokens", atEnd = false }: Looked) {
  const telling = beside?.telling ?? null;
  const [turned, setPage] = useState(Math.floor((telling ?? 0) / PAGE));
  const page = atEnd ? Math.max(0, Math.ceil(tokens.tokens / PAGE) - 1) : Math.min(turned, Math.max(0, Math.ceil(tokens.tokens / PAGE) - 1));
  const [at, setAt] = useState<number | null>(null);
  useEffect(() => setPage(Math.floor((telling ?? 0) / PAGE)), [telling]);
  const gaps = useMemo(() => (tokens.offset_us ?? []).map((value, i, all) => (i ? value - all[i - 1]! : 0)), [tokens]);
  const median = useMemo(() => [...gaps.slice(1)].sort((a, b) => a - b)[Math.floor((gaps.length - 1) / 2)] ?? 1, [gaps]);
  const pages = Math.ceil(tokens.tokens / PAGE);
  const first = page * PAGE;
  const shown = Math.max(0, Math.min(PAGE, tokens.tokens - first));
  const level = (i: number): number => {
    if (measure === "logprob") return tokens.logprob?.[i] == null ? 0 : unsure(tokens.logprob[i]!);
    if (measure === "drift") return beside?.drift[i] == null ? 0 : far(beside.drift[i]!, beside.floor ?? 0.1);
    return measure === "gap" && gaps.length ? slow(gaps[i]!, Math.max(median, 1)) : 0;
  };
  const move = (step: number): void => setAt((now) => Math.min(tokens.tokens - 1, Math.max(0, (now ?? first - 1) + step)));
  const point = (event: Event): void => {
    const found = (event.target as HTMLElement).closest<HTMLElement>("[data-i]");
    if (found) setAt(Number(found.dataset.i));
  };
  // The spans of a page are made once for what they show; which of them is pointed at is drawn by the place's own rule.
  const spans = useMemo(
    () =>
      Array.from({ length: shown }, (_, k) => {
        const i = first + k;
        const channel = tokens.channel[i] ?? "content";
        const marks = `${i === telling ? " telling" : ""}${beside?.parted !== undefined && i >= beside.parted ? " parted" : ""}${channel === "content" ? "" : ` ch-${channel}`}`;
        return (
          <span key={i} data-i={i} class={`h${level(i)}${marks}`}>
            {visible(tokens.text?.[i] ?? "▒") || "·"}
          </span>
        );
      }),
    [tokens, measure, beside, first, shown],
  );
  const text = at === null ? undefined : (tokens.text?.[at] ?? "erased");
  return (
    <div class="heat">
      <p
        class={`tokens ${measure}`}
        tabIndex={0}
        aria-label={`${label}; walk with the arrow keys`}
        role="application"
        ref={(box) => {
          box?.querySelector(".on")?.classList.remove("on");
          if (at !== null) box?.querySelector(`[data-i="${at}"]`)?.classList.add("on");
        }}
        onMouseOver={point}
        onClick={point}
        onKeyDown={(event) => {
          if (event.key === "ArrowRight") move(1);
          else if (event.key === "ArrowLeft") move(-1);
          else if (event.key === "t" && telling !== null) setAt(telling);
          else return;
          event.preventDefault();
          event.stopPropagation();
        }}
      >
        {spans}
      </p>
      <div class={`token-facts mono${beside?.alternatives ? " taller" : tokens.alternatives ? " tall" : ""}${at === null ? " resting" : ""}`} aria-live="polite">
        {at === null ? (
          <span class="dim">{tokens.token_id ? "point at a token, or walk with the arrows" : "no token ids were recorded"}</span>
        ) : (
          <>
            <b>{JSON.stringify(visible(text!))}</b> · token {at} · id {tokens.token_id?.[at] ?? "?"} · {chance(tokens.logprob?.[at])}
            {tokens.offset_us?.[at] != null ? ` · at ${duration(tokens.offset_us[at]!)} · +${duration(gaps[at] ?? 0)}` : ""}
            {tokens.channel[at] && tokens.channel[at] !== "content" ? ` · ${tokens.channel[at]}` : ""}
            {beside?.present[at] != null ? <span class="then"> · there {chance(beside.present[at])}{beside.rank?.[at] != null ? `, choice ${beside.rank[at]}` : ""}</span> : null}
            {beside?.drift[at] != null ? <b> · drift {beside.drift[at]!.toPrecision(2)} nats{beside.floor ? `, ${(beside.drift[at]! / beside.floor).toPrecision(2)} floors` : ""}</b> : null}
            {tokens.alternatives?.[at]?.length ? <Among said={tokens.alternatives[at]!} chosen={text!} id={tokens.token_id?.[at]} whose={beside?.alternatives?.names[0]} /> : null}
            {beside?.alternatives ? <There alternatives={beside.alternatives} at={at} parted={beside.parted} here={Boolean(tokens.alternatives?.[at]?.length)} /> : null}
          </>
        )}
      </div>
      {pages > 1 ? (
        <div class="pager">
          <button type="button" disabled={page === 0} onClick={() => setPage(page - 1)}>
            earlier
          </button>
          <span>
            tokens {first.toLocaleString("en")}–{(first + shown - 1).toLocaleString("en")} of {tokens.tokens.toLocaleString("en")}
          </span>
          <button type="button" disabled={page === pages - 1} onClick={() => setPage(page + 1)}>
            later
          </button>
        </div>
      ) : null}
    </div>
  );
}

const ENDS: Record<Exclude<Measure, "plain">, [string, string]> = { logprob: ["sure", "unlikely"], gap: ["usual pace", "late"], drift: ["noise", "8 floors"] };

export const Legend = ({ measure }: { measure: Measure }) =>
  measure === "plain" ? null : (
    <span class={`legend tokens ${measure}`}>
      {ENDS[measure][0]}
      {Array.from({ length: STEPS + 1 }, (_, i) => (
        <i class={`h${i}`} />
      ))}
      {ENDS[measure][1]}
    </span>
  );
