// Tokens as people read them, each coloured by how sure the model was or how long it took; point at one, or walk with the arrows.
import { useMemo, useState } from "preact/hooks";
import type { Tokens } from "../api";
import { duration, visible } from "../words";

export type Measure = "logprob" | "gap" | "plain";

// More than this at once is paged: a page of text is what a person reads.
const PAGE = 3000;
const STEPS = 7;

const unsure = (logprob: number): number => Math.min(STEPS, Math.floor(Math.min(6, -logprob) * 1.3));

function slow(gap: number, median: number): number {
  if (gap <= 1.3 * median) return 0;
  return Math.min(STEPS, 1 + Math.floor(Math.log2(gap / median)));
}

export function Heat({ tokens, measure }: { tokens: Tokens; measure: Measure }) {
  const [page, setPage] = useState(0);
  const [at, setAt] = useState<number | null>(null);
  const gaps = useMemo(() => (tokens.offset_us ?? []).map((value, i, all) => (i ? value - all[i - 1]! : 0)), [tokens]);
  const median = useMemo(() => [...gaps.slice(1)].sort((a, b) => a - b)[Math.floor((gaps.length - 1) / 2)] ?? 1, [gaps]);
  const pages = Math.ceil(tokens.tokens / PAGE);
  const first = page * PAGE;
  const shown = Math.min(PAGE, tokens.tokens - first);
  const level = (i: number): number => {
    if (measure === "logprob") return tokens.logprob?.[i] == null ? 0 : unsure(tokens.logprob[i]!);
    return measure === "gap" ? slow(gaps[i]!, Math.max(median, 1)) : 0;
  };
  const move = (step: number): void => setAt((now) => Math.min(tokens.tokens - 1, Math.max(0, (now ?? first - 1) + step)));
  const point = (event: Event): void => {
    const found = (event.target as HTMLElement).closest<HTMLElement>("[data-i]");
    if (found) setAt(Number(found.dataset.i));
  };
  return (
    <div class="heat">
      <p
        class={`tokens ${measure}`}
        tabIndex={0}
        aria-label="Tokens; walk with the arrow keys"
        role="application"
        onMouseOver={point}
        onClick={point}
        onKeyDown={(event) => {
          if (event.key === "ArrowRight") move(1);
          else if (event.key === "ArrowLeft") move(-1);
          else return;
          event.preventDefault();
          event.stopPropagation();
        }}
      >
        {Array.from({ length: shown }, (_, k) => {
          const i = first + k;
          const text = tokens.text?.[i] ?? "▒";
          return (
            <span key={i} data-i={i} class={`h${level(i)}${i === at ? " on" : ""}${tokens.channel[i] === "content" ? "" : ` ch-${tokens.channel[i]}`}`}>
              {visible(text) || "·"}
            </span>
          );
        })}
      </p>
      <div class={`token-facts mono${at === null ? " resting" : ""}`} aria-live="polite">
        {at === null ? (
          <span class="dim">{tokens.token_id ? "point at a token, or walk with the arrows" : "no token ids were recorded"}</span>
        ) : (
          <>
            <b>{JSON.stringify(visible(tokens.text?.[at] ?? "erased"))}</b> · token {at} · id {tokens.token_id?.[at] ?? "?"} ·{" "}
            {tokens.logprob?.[at] == null ? "logprob unknown" : `p ${(100 * Math.exp(tokens.logprob[at]!)).toFixed(1)} % (logprob ${tokens.logprob[at]!.toFixed(3)})`} · at{" "}
            {duration(tokens.offset_us?.[at] ?? 0)} · +{duration(gaps[at] ?? 0)} · {tokens.channel[at]}
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

export const Legend = ({ measure }: { measure: Measure }) =>
  measure === "plain" ? null : (
    <span class={`legend tokens ${measure}`}>
      {measure === "logprob" ? "sure" : "usual pace"}
      {Array.from({ length: STEPS + 1 }, (_, i) => (
        <i class={`h${i}`} />
      ))}
      {measure === "logprob" ? "unlikely" : "late"}
    </span>
  );
