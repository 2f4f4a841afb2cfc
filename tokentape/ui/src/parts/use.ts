// Data of the API in components: asked for once, again, or again and again while the page is looked at.
import { useEffect, useRef, useState } from "preact/hooks";
import { type Problem, Refused, ask } from "../api";

export interface Asked<T> {
  data: T | undefined;
  problem: Problem | undefined;
  busy: boolean;
  again: () => void;
}

export function useAsk<T>(path: string | null, everyMs = 0): Asked<T> {
  const [state, setState] = useState<{ path: string | null; data?: T; problem?: Problem; busy: boolean }>({ path, busy: true });
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    if (path === null) return;
    const gone = new AbortController();
    let timer = 0;
    const look = async (): Promise<void> => {
      try {
        const data = await ask<T>(path, { signal: gone.signal });
        setState({ path, data, busy: false });
      } catch (error) {
        if (gone.signal.aborted) return;
        const problem = error instanceof Refused ? error.problem : { status: 0, title: "Error", detail: String(error) };
        setState((before) => ({ path, data: before.path === path ? before.data : undefined, problem, busy: false }));
      }
      if (everyMs && !gone.signal.aborted) timer = window.setTimeout(document.hidden ? wait : look, everyMs);
    };
    const wait = (): void => {
      timer = window.setTimeout(document.hidden ? wait : look, everyMs);
    };
    setState((before) => ({ ...before, busy: true }));
    void look();
    return () => {
      gone.abort();
      clearTimeout(timer);
    };
  }, [path, everyMs, turn]);
  return { data: state.data, problem: state.problem, busy: state.busy, again: () => setTurn((n) => n + 1) };
}

// The time, every so often, for what ticks.
export function useNow(everyMs = 1000): number {
  const [now, setNow] = useState(Date.now());
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now()), everyMs);
    return () => clearInterval(timer);
  }, [everyMs]);
  return now;
}

// A value that has come to rest.
export function useSettled<T>(value: T, ms: number): T {
  const [settled, setSettled] = useState(value);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(value), ms);
    return () => clearTimeout(timer);
  }, [value, ms]);
  return settled;
}

const typed = (at: HTMLElement): boolean => (at.tagName === "INPUT" ? !["range", "checkbox"].includes((at as HTMLInputElement).type) : /^(TEXTAREA|SELECT)$/.test(at.tagName));

// Keys that a view listens to, but not while something is typed.
export function useKeys(keys: Record<string, () => void>): void {
  const latest = useRef(keys);
  latest.current = keys;
  useEffect(() => {
    const press = (event: KeyboardEvent): void => {
      const at = event.target as HTMLElement;
      if (event.metaKey || event.ctrlKey || event.altKey || typed(at)) return;
      const act = latest.current[event.key];
      if (act) {
        event.preventDefault();
        act();
      }
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  }, []);
}
