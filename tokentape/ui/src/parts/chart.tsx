// A result as a chart, where its first column is a time or a number and others are numbers.
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

export interface Column {
  name: string;
  type: string;
}

const number = (type: string): boolean => /int|double|float|decimal/.test(type);

export const drawable = (columns: Column[]): boolean =>
  columns.length > 1 && (number(columns[0]!.type) || columns[0]!.type.startsWith("timestamp") || columns[0]!.type.startsWith("date")) && columns.slice(1).some((column) => number(column.type));

export function Chart({ columns, rows }: { columns: Column[]; rows: unknown[][] }) {
  const box = useRef<HTMLDivElement>(null);
  useEffect(() => {
    const host = box.current;
    if (!host) return;
    const time = !number(columns[0]!.type);
    const at = (value: unknown): number => (time ? Date.parse(String(value).endsWith("Z") || String(value).includes("+") ? String(value) : `${String(value)}Z`) / 1000 : Number(value));
    const sorted = [...rows].filter((row) => row[0] !== null).sort((a, b) => at(a[0]) - at(b[0]));
    const drawn = columns.map((column, i) => ({ column, i })).filter(({ column, i }) => i > 0 && number(column.type));
    const color = getComputedStyle(host);
    const of = (name: string): string => color.getPropertyValue(`--${name}`).trim();
    const strokes = ["accent", "warn", "violet", "bad"];
    const axes = { stroke: of("dim"), grid: { stroke: of("line"), width: 1 }, ticks: { stroke: of("line"), width: 1 } };
    const plot = new uPlot(
      {
        width: host.clientWidth,
        height: 260,
        scales: { x: { time } },
        tzDate: (ts) => uPlot.tzDate(new Date(ts * 1000), "UTC"),
        axes: [axes, { ...axes, size: 70 }],
        series: [{ label: columns[0]!.name }, ...drawn.map(({ column }, k) => ({ label: column.name, stroke: of(strokes[k % strokes.length]!), width: 2, points: { show: sorted.length < 80 } }))],
      },
      [sorted.map((row) => at(row[0])), ...drawn.map(({ i }) => sorted.map((row) => (row[i] === null ? null : Number(row[i]))))] as uPlot.AlignedData,
      host,
    );
    const watch = new ResizeObserver(() => plot.setSize({ width: host.clientWidth, height: 260 }));
    watch.observe(host);
    return () => {
      watch.disconnect();
      plot.destroy();
    };
  }, [columns, rows]);
  return <div class="chart" ref={box} role="img" aria-label={`Chart of ${columns.slice(1).map((column) => column.name).join(", ")} by ${columns[0]!.name}`} />;
}
