// The timeline as lanes under a scrubber: one per sequence, tokens as bars, waits and failures marked. Silences are drawn shorter.
import { useMemo, useRef, useState } from "preact/hooks";
import type { TimelineRow } from "../api";
import { clock, duration, us } from "../words";
import { penOf, useDrawn } from "./canvas";

const LANE = 15;
const TOP = 20;
const LEFT = 44;
const RIGHT = 12;
const WHOLE_US = 1_000_000;
// Lanes that are drawn; a session with more is read in the rows below.
const LANES_MAX = 14;

export interface Axis {
  first: number;
  last: number;
  x: (at: number) => number;
  at: (x: number) => number;
}

// Piecewise linear: what lasts up to a second is drawn to scale, what lasts longer grows with its logarithm.
export function axis(rows: TimelineRow[]): Axis {
  const times = [...new Set(rows.flatMap((row) => [us(row.at), ...(row.until ? [us(row.until)] : [])]))].sort((a, b) => a - b);
  const first = times[0] ?? 0;
  const last = times.at(-1) ?? first;
  const places = [0];
  for (let i = 1; i < times.length; i++) {
    const gap = times[i]! - times[i - 1]!;
    places.push(places[i - 1]! + (gap <= WHOLE_US ? gap : WHOLE_US * (1 + 0.35 * Math.log2(gap / WHOLE_US))));
  }
  const whole = places.at(-1) || 1;
  const find = (list: number[], value: number): number => {
    let low = 0;
    let high = list.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (list[middle]! <= value) low = middle;
      else high = middle - 1;
    }
    return low;
  };
  const between = (from: number[], to: number[], value: number): number => {
    const i = find(from, value);
    if (i >= from.length - 1) return to[i]!;
    return to[i]! + ((value - from[i]!) / (from[i + 1]! - from[i]! || 1)) * (to[i + 1]! - to[i]!);
  };
  return {
    first,
    last,
    x: (at) => between(times, places, Math.min(last, Math.max(first, at))) / whole,
    at: (x) => between(places, times, Math.min(1, Math.max(0, x)) * whole),
  };
}

function paint(canvas: HTMLCanvasElement, rows: TimelineRow[], lanes: string[], scale: Axis): void {
  const width = canvas.clientWidth;
  const height = TOP + lanes.length * LANE + 6;
  const { pen, of } = penOf(canvas, height);
  const x = (at: number): number => LEFT + scale.x(at) * (width - LEFT - RIGHT);
  ticks(pen, scale, x, width, height, of);
  lanes.forEach((lane, i) => {
    const y = TOP + i * LANE;
    pen.fillStyle = of("dim");
    pen.textAlign = "right";
    pen.fillText(lane, LEFT - 8, y + 11);
    pen.fillStyle = of("line");
    pen.fillRect(LEFT, y + 7, width - LEFT - RIGHT, 1);
  });
  for (const row of rows) {
    const from = x(us(row.at));
    const to = row.until ? x(us(row.until)) : from;
    const mine = lanes.map((lane, i) => [lane, i] as const).filter(([lane]) => lane === row.lane || (row.lane !== "" && lane.startsWith(`${row.lane}.`)));
    for (const [, i] of mine) {
      const y = TOP + i * LANE;
      if (row.what === "tokens") {
        pen.fillStyle = of("accent");
        pen.fillRect(from, y + 3, Math.max(2, to - from), 9);
      } else if (row.what === "stall" || row.what === "SILENCE" || row.what === "quiet") {
        pen.fillStyle = of(row.what === "quiet" ? "wait" : "warn-soft");
        pen.fillRect(from, y + 5, Math.max(2, to - from), 5);
      } else if (row.level === "bad") {
        pen.strokeStyle = of("bad");
        pen.lineWidth = 2;
        pen.beginPath();
        pen.moveTo(from - 4, y + 3.5);
        pen.lineTo(from + 4, y + 11.5);
        pen.moveTo(from + 4, y + 3.5);
        pen.lineTo(from - 4, y + 11.5);
        pen.stroke();
      } else if (row.what === "edited" || row.what === "stopped" || row.what === "released") {
        pen.fillStyle = of("warn");
        pen.beginPath();
        pen.moveTo(from, y + 2.5);
        pen.lineTo(from + 5, y + 7.5);
        pen.lineTo(from, y + 12.5);
        pen.lineTo(from - 5, y + 7.5);
        pen.fill();
      } else {
        pen.fillStyle = row.what === "request" ? of("text") : of("dim");
        pen.fillRect(from - 0.5, y + 3, 1.5, 9);
      }
    }
  }
}

function ticks(pen: CanvasRenderingContext2D, scale: Axis, x: (at: number) => number, width: number, height: number, of: (name: string) => string): void {
  pen.textAlign = "center";
  const many = Math.max(2, Math.floor(width / 130));
  for (let i = 0; i <= many; i++) {
    const at = scale.at(i / many);
    const place = Math.round(x(at)) + 0.5;
    pen.fillStyle = of("line");
    pen.fillRect(place, TOP - 4, 1, height - TOP);
    pen.fillStyle = of("dim");
    pen.textAlign = i === 0 ? "left" : i === many ? "right" : "center";
    pen.fillText(clock(new Date(at / 1000).toISOString()).slice(0, scale.last - scale.first < 20_000_000 ? 12 : 10), place, 11);
  }
}

export function Lanes({ rows, at, onMove }: { rows: TimelineRow[]; at: number; onMove: (at: number) => void }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [width, setWidth] = useState(0);
  const scale = useMemo(() => axis(rows), [rows]);
  const lanes = useMemo(() => {
    const named = [...new Set(rows.map((row) => row.lane).filter((lane) => lane && !lane.includes("–")))];
    return named.filter((lane) => !named.some((other) => other.startsWith(`${lane}.`))).slice(0, LANES_MAX);
  }, [rows]);
  const draw = (host: HTMLCanvasElement): void => {
    setWidth(host.clientWidth);
    paint(host, rows, lanes, scale);
  };
  useDrawn(canvas, draw, [rows, lanes, scale]);
  const height = TOP + lanes.length * LANE + 6;
  const place = LEFT + scale.x(at) * Math.max(0, width - LEFT - RIGHT);
  const to = (event: PointerEvent): void => {
    const box = canvas.current!.getBoundingClientRect();
    onMove(scale.at((event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT)));
  };
  const stops = useMemo(() => [...new Set(rows.map((row) => us(row.at)))].sort((a, b) => a - b), [rows]);
  const press = (event: KeyboardEvent): void => {
    const next = stops.find((stop) => stop > at);
    const before = stops.filter((stop) => stop < at).at(-1);
    const goal = { ArrowRight: next, ArrowLeft: before, Home: scale.first, End: scale.last }[event.key];
    if (goal === undefined) return;
    event.preventDefault();
    onMove(goal);
  };
  return (
    <div
      class="lanes"
      role="slider"
      tabIndex={0}
      aria-label="Moment of the session"
      aria-valuemin={0}
      aria-valuemax={Math.round((scale.last - scale.first) / 1000)}
      aria-valuenow={Math.round((at - scale.first) / 1000)}
      aria-valuetext={`${duration(at - scale.first)} after the start`}
      onKeyDown={press}
      onPointerDown={(event) => {
        (event.currentTarget as HTMLElement).setPointerCapture(event.pointerId);
        to(event);
      }}
      onPointerMove={(event) => {
        if (event.buttons & 1) to(event);
      }}
    >
      <canvas ref={canvas} style={{ height: `${height}px` }} aria-hidden="true" />
      <div class={`playhead${place > width - 60 ? " late" : place < 60 ? " early" : ""}`} style={{ transform: `translateX(${place}px)` }}>
        <span class="mono">{clock(new Date(at / 1000).toISOString())}</span>
      </div>
    </div>
  );
}
