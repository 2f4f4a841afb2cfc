// Small things that every view is made of.
import type { ComponentChildren } from "preact";
import type { Completeness, Problem } from "../api";
import { clock, count, day } from "../words";

export const Trouble = ({ problem }: { problem: Problem | undefined }) =>
  problem ? (
    <div class="trouble" role="alert">
      <strong>{problem.title}</strong> {problem.detail}
      {problem.hint ? <span class="hint"> {problem.hint}</span> : null}
    </div>
  ) : null;

export const Tag = ({ name, href }: { name: string; href?: string }) => (href ? <a class="tag" href={href}>{name}</a> : <span class="tag">{name}</span>);

export const Badge = ({ level, children }: { level: string; children: ComponentChildren }) => <span class={`badge ${level}`}>{children}</span>;

export const Empty = ({ title, children }: { title: string; children?: ComponentChildren }) => (
  <div class="empty">
    <p class="empty-title">{title}</p>
    {children}
  </div>
);

export const When = ({ iso }: { iso: string | null }) => (
  <time class="mono" dateTime={iso ?? ""} title={`${iso ?? ""} UTC`}>
    <span class="dim">{day(iso).slice(5)}</span> {clock(iso).slice(0, 8)}
  </time>
);

export function Whole({ completeness }: { completeness: Completeness | undefined }) {
  if (!completeness) return null;
  const missing = [
    [completeness.lost, "lost in gaps"],
    [completeness.quarantined, "quarantined"],
    [completeness.erased ?? 0, "erased"],
    [completeness.sampled_out, "sampled out"],
    [completeness.unread, "still being read"],
  ].filter(([n]) => Number(n) > 0);
  return (
    <span class="whole">
      fresh to {completeness.fresh_to ? `${clock(completeness.fresh_to).slice(0, 8)} UTC` : "nothing yet"} ·{" "}
      {missing.length ? <span class="warn-text">missing: {missing.map(([n, what]) => `${Number(n).toLocaleString("en")} ${what}`).join(", ")}</span> : "nothing missing"}
    </span>
  );
}

export const Head = ({ title, children }: { title: string; children?: ComponentChildren }) => (
  <header class="head">
    <h1>{title}</h1>
    <div class="head-side">{children}</div>
  </header>
);

export function Table({ columns, rows, label }: { columns: string[]; rows: ComponentChildren[][]; label: string }) {
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label={label}>
      <table>
        <thead>
          <tr>{columns.map((name) => <th scope="col">{name}</th>)}</tr>
        </thead>
        <tbody>
          {rows.map((row) => (
            <tr>{row.map((cell) => <td>{cell}</td>)}</tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

export const events = (n: number): string => count(n, "event");
