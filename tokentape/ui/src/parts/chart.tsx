// Lines over time or over numbers: of a result of SQL, of an engine's steps, of drift.
import { useEffect, useMemo, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

export interface Column {
  name: string;
  type: string;
}

export interface Line {
  label: string;
  values: (number | null)[];
  color: "accent" | "warn" | "violet" | "bad" | "dim";
  kind?: "line" | "dashed" | "step" | "area" | "points";
}

const number = (type: string): boolean => /int|double|float|decimal/.test(type);

export const drawable = (columns: Column[]): boolean =>
  columns.length > 1 && (number(columns[0]!.type) || columns[0]!.type.startsWith("timestamp") || columns[0]!.type.startsWith("date")) && columns.slice(1).some((column) => number(column.type));

// At most six powers of ten between two values.
function decades(low: number, high: number): number[] {
  const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const every = Math.ceil((to - from + 1) / 6);
  return Array.from({ length: Math.floor((to - from) / every) + 1 }, (_, i) => Number(`1e${from + i * every}`)).filter((value) => value >= low && value <= high);
}

// Steps of an axis that counts: there is nothing between two tokens.
const WHOLE = Array.from({ length: 28 }, (_, i) => [1, 2, 5][i % 3]! * 10 ** Math.floor(i / 3));

interface Drawn {
  name: string;
  label: string;
  x: number[];
  lines: Line[];
  time?: boolean;
  log?: boolean;
  unit?: string;
  height?: number;
  at?: number;
  onPick?: (x: number) => void;
}

// `at` marks a place on the x axis, and a click picks one; `log` is for what spans orders of magnitude.
export function Plot({ name, label, x, lines, time = false, log = false, unit = "", height = 220, at, onPick }: Drawn) {
  const box = useRef<HTMLDivElement>(null);
  const drawn = useRef<uPlot | null>(null);
  const mark = useRef(at);
  mark.current = at;
  const pick = useRef(onPick);
  pick.current = onPick;
  useEffect(() => {
    const host = box.current;
    if (!host) return;
    const make = (): uPlot => {
      const color = getComputedStyle(host);
      const of = (wanted: string): string => color.getPropertyValue(`--${wanted}`).trim();
      const axes = { stroke: of("dim"), grid: { stroke: of("line"), width: 1 }, ticks: { stroke: of("line"), width: 1 } };
      const said = (values: (number | null)[]): string[] => values.map((value) => (value === null ? "" : `${Number(value.toPrecision(6)).toLocaleString("en", { maximumFractionDigits: 9 })}${unit}`));
      const series = lines.map((line) => ({
        label: line.label,
        stroke: of(line.color),
        fill: line.kind === "area" ? of("accent-soft") : undefined,
        width: line.kind === "points" ? 0 : line.kind === "dashed" ? 1.5 : 2,
        dash: line.kind === "dashed" ? [6, 4] : undefined,
        paths: line.kind === "step" || line.kind === "area" ? uPlot.paths.stepped!({ align: 1 }) : line.kind === "points" ? (): null => null : undefined,
        points: { show: line.kind === "points" || (line.kind !== "dashed" && x.length < 80), size: line.kind === "points" ? 4 : 6, fill: of(line.color) },
        value: (_: uPlot, value: number | null) => said([value])[0] || "–",
      }));
      return new uPlot(
        {
          width: host.clientWidth,
          height,
          scales: { x: { time }, y: log ? { distr: 3 } : { range: (_, low, high) => [Math.min(0, low), high > 0 ? high * 1.08 : 1] } },
          tzDate: (ts) => uPlot.tzDate(new Date(ts * 1000), "UTC"),
          axes: [!time && x.every(Number.isInteger) ? { ...axes, incrs: WHOLE } : axes, { ...axes, size: 70, ...(log ? { splits: (_, __, low, high) => decades(low, high), filter: (_, splits) => splits, values: (_, splits) => splits.map((value) => `${value >= 0.001 && value < 10_000 ? value : value.toExponential(0)}${unit}`) } : { values: (_, splits) => said(splits) }) }],
          series: [{ label, value: (_, value) => (value === null ? "–" : time ? new Date(value * 1000).toISOString().slice(0, 19) : value.toLocaleString("en")) }, ...series],
          cursor: { drag: { x: false, y: false } },
          hooks: {
            ready: [(plot) => plot.over.addEventListener("click", () => plot.cursor.idx != null && pick.current?.(plot.data[0]![plot.cursor.idx]!))],
            draw: [
              (plot) => {
                if (mark.current === undefined) return;
                const place = Math.round(plot.valToPos(mark.current, "x", true)) + 0.5;
                plot.ctx.fillStyle = of("bad");
                plot.ctx.fillRect(place - 1, plot.bbox.top, 2, plot.bbox.height);
              },
            ],
          },
        },
        [x, ...lines.map((line) => line.values)] as uPlot.AlignedData,
        host,
      );
    };
    drawn.current = make();
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const again = (): void => {
      drawn.current?.destroy();
      drawn.current = make();
    };
    const watch = new ResizeObserver(() => drawn.current?.setSize({ width: host.clientWidth, height }));
    watch.observe(host);
    scheme.addEventListener("change", again);
    return () => {
      watch.disconnect();
      scheme.removeEventListener("change", again);
      drawn.current?.destroy();
    };
  }, [x, lines, time, log, unit, height]);
  const before = useRef(at);
  useEffect(() => {
    if (before.current !== at) drawn.current?.redraw(false); // a fresh one draws itself, and is not ready for this yet
    before.current = at;
  }, [at]);
  return <div class={`chart${onPick ? " picks" : ""}`} ref={box} role="img" aria-label={name} />;
}

// A result whose first column is a time or a number and others are numbers.
export function Chart({ columns, rows }: { columns: Column[]; rows: unknown[][] }) {
  const time = !number(columns[0]!.type);
  const { x, lines } = useMemo(() => {
    const at = (value: unknown): number => (time ? Date.parse(String(value).endsWith("Z") || String(value).includes("+") ? String(value) : `${String(value)}Z`) / 1000 : Number(value));
    const sorted = [...rows].filter((row) => row[0] !== null).sort((a, b) => at(a[0]) - at(b[0]));
    const drawn = columns.map((column, i) => ({ column, i })).filter(({ column, i }) => i > 0 && number(column.type));
    const colors = ["accent", "warn", "violet", "bad"] as const;
    return {
      x: sorted.map((row) => at(row[0])),
      lines: drawn.map(({ column, i }, k): Line => ({ label: column.name, color: colors[k % colors.length]!, values: sorted.map((row) => (row[i] === null ? null : Number(row[i]))) })),
    };
  }, [columns, rows]);
  return <Plot name={`Chart of ${lines.map((line) => line.label).join(", ")} by ${columns[0]!.name}`} label={columns[0]!.name} x={x} lines={lines} time={time} height={260} />;
}
