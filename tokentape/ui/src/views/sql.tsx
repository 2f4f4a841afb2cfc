// SQL over everything recorded: an editor beside the schema, the result as a table or a chart, and how complete it is.
import { useRef, useState } from "preact/hooks";
import { type Completeness, type Problem, Refused, ask, send } from "../api";
import { Empty, Head, Trouble, Whole } from "../parts/bits";
import { Chart, type Column, drawable } from "../parts/chart";
import { useAsk } from "../parts/use";
import { count, visible } from "../words";
import { download } from "./session";

interface Result {
  columns: Column[];
  rows: unknown[][];
  row_count: number;
  completeness: Completeness;
}

interface View {
  name: string;
  purpose: string;
  columns: Column[];
}

const START = "SELECT outcome, count(*) AS generations, round(avg(first_token_ms), 1) AS first_token_ms\nFROM generations\nGROUP BY outcome";
const HISTORY = "tokentape.sql";
const KEPT = 30;
// Rows drawn at once; all of them are in the export.
const PAGE = 200;

const asked = (): string[] => JSON.parse(sessionStorage.getItem(HISTORY) ?? "[]");

export function Sql() {
  const [text, setText] = useState(asked()[0] ?? START);
  const [history, setHistory] = useState(asked());
  const [result, setResult] = useState<Result>();
  const [problem, setProblem] = useState<Problem>();
  const [busy, setBusy] = useState(false);
  const [took, setTook] = useState(0);
  const [chart, setChart] = useState(false);
  const [page, setPage] = useState(0);
  const [open, setOpen] = useState<string | null>(null);
  const views = useAsk<{ views: View[] }>("sql/views");
  const editor = useRef<HTMLTextAreaElement>(null);
  const run = async (): Promise<void> => {
    setBusy(true);
    setProblem(undefined);
    const began = performance.now();
    try {
      setResult(await ask<Result>("sql", { body: { query: text } }));
      setPage(0);
      const kept = [text, ...history.filter((other) => other !== text)].slice(0, KEPT);
      sessionStorage.setItem(HISTORY, JSON.stringify(kept));
      setHistory(kept);
    } catch (error) {
      setResult(undefined);
      setProblem(error instanceof Refused ? error.problem : { status: 0, title: "Error", detail: String(error) });
    }
    setTook(performance.now() - began);
    setBusy(false);
  };
  const save = async (format: "csv" | "arrow"): Promise<void> => {
    try {
      const answer = await send("sql", { body: { query: text, format }, accept: "*/*" });
      download(`answer.${format}`, await answer.blob());
    } catch (error) {
      if (error instanceof Refused) setProblem(error.problem);
    }
  };
  const insert = (word: string): void => {
    const box = editor.current!;
    const [from, to] = [box.selectionStart, box.selectionEnd];
    setText(text.slice(0, from) + word + text.slice(to));
    box.focus();
  };
  const rows = result?.rows.slice(page * PAGE, (page + 1) * PAGE) ?? [];
  const draws = result !== undefined && drawable(result.columns);
  return (
    <>
      <Head title="SQL">
        <Whole completeness={result?.completeness} />
      </Head>
      <div class="sql">
        <aside aria-label="Views">
          <ul class="schema">
            {views.data?.views.map((view) => (
              <li>
                <button type="button" aria-expanded={open === view.name} title={view.purpose} onClick={() => setOpen(open === view.name ? null : view.name)}>
                  {view.name}
                </button>
                {open === view.name ? (
                  <>
                    <p class="dim small">{view.purpose}</p>
                    <ul>
                      {view.columns.map((column) => (
                        <li>
                          <button type="button" class="column mono" title={column.type} onClick={() => insert(column.name)}>
                            {column.name} <span class="dim">{column.type.split("(")[0]!.toLowerCase()}</span>
                          </button>
                        </li>
                      ))}
                    </ul>
                  </>
                ) : null}
              </li>
            ))}
          </ul>
        </aside>
        <section aria-label="Query">
          <textarea
            ref={editor}
            class="mono query"
            spellcheck={false}
            aria-label="SQL statement"
            value={text}
            onInput={(event) => setText(event.currentTarget.value)}
            onKeyDown={(event) => {
              if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
                event.preventDefault();
                void run();
              }
            }}
          />
          <div class="row">
            <button type="button" class="main" disabled={busy || !text.trim()} onClick={run}>{busy ? "running …" : "Run"}</button>
            <span class="dim small">Ctrl + Enter</span>
            {history.length ? (
              <select aria-label="Earlier statements" value="" onChange={(event) => setText(event.currentTarget.value || text)}>
                <option value="">earlier statements</option>
                {history.map((statement) => (
                  <option value={statement}>{statement.replace(/\s+/g, " ").slice(0, 80)}</option>
                ))}
              </select>
            ) : null}
            <span class="grow" />
            {result ? (
              <>
                <span class="mono dim">{count(result.row_count, "row")} in {Math.round(took)} ms</span>
                {draws ? <button type="button" aria-pressed={chart} onClick={() => setChart(!chart)}>Chart</button> : null}
                <button type="button" onClick={() => save("csv")}>CSV</button>
                <button type="button" onClick={() => save("arrow")}>Arrow</button>
              </>
            ) : null}
          </div>
          <Trouble problem={problem} />
          {result && chart && draws ? <Chart columns={result.columns} rows={result.rows} /> : null}
          {result ? (
            result.row_count ? (
              <div class="scroll result" tabIndex={0} role="region" aria-label="Result">
                <table>
                  <thead>
                    <tr>{result.columns.map((column) => <th scope="col" title={column.type} class={/int|double|float|decimal/.test(column.type) ? "number" : ""}>{column.name}</th>)}</tr>
                  </thead>
                  <tbody>
                    {rows.map((row) => (
                      <tr>{row.map((value, i) => <td class={/int|double|float|decimal/.test(result.columns[i]!.type) ? "number" : ""} title={typeof value === "string" && value.length > 40 ? value.slice(0, 2000) : undefined}>{cell(value)}</td>)}</tr>
                    ))}
                  </tbody>
                </table>
              </div>
            ) : (
              <Empty title="No row" />
            )
          ) : problem ? null : (
            <Empty title="One statement over everything on the tape">
              <p>Views are on the left; a name puts itself into the statement.</p>
            </Empty>
          )}
          {result && result.row_count > PAGE ? (
            <div class="pager">
              <button type="button" disabled={!page} onClick={() => setPage(page - 1)}>before</button>
              <span>rows {page * PAGE + 1}–{Math.min(result.row_count, (page + 1) * PAGE)} of {result.row_count.toLocaleString("en")}</span>
              <button type="button" disabled={(page + 1) * PAGE >= result.row_count} onClick={() => setPage(page + 1)}>after</button>
            </div>
          ) : null}
        </section>
      </div>
    </>
  );
}

function cell(value: unknown) {
  if (value === null || value === undefined) return <span class="dim">∅</span>;
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : Number(value.toPrecision(8)).toString();
  const text = typeof value === "string" ? value : JSON.stringify(value);
  if (/^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}$/.test(text)) return <span class="mono">{text}</span>;
  return visible(text.length > 200 ? `${text.slice(0, 200)}…` : text);
}
