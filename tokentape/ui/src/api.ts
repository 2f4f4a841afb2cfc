// The one way to the REST API: adds the token, reads problems, and tells when a key is asked for.

export interface Problem {
  status: number;
  title: string;
  detail: string;
  hint?: string;
}

export class Refused extends Error {
  constructor(readonly problem: Problem) {
    super(problem.detail);
  }
}

const TOKEN = "tokentape.token";
const listeners = new Set<() => void>();

export const token = {
  get: (): string => sessionStorage.getItem(TOKEN) ?? "",
  set(value: string): void {
    if (value) sessionStorage.setItem(TOKEN, value);
    else sessionStorage.removeItem(TOKEN);
    listeners.forEach((listener) => listener());
  },
  listen(listener: () => void): () => void {
    listeners.add(listener);
    return () => listeners.delete(listener);
  },
};

// randomUUID is there on https and on this machine only; a page that is looked at over plain http has this.
const unique = (): string => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

export interface Options {
  method?: string;
  body?: unknown;
  accept?: string;
  signal?: AbortSignal;
}

export async function send(path: string, options: Options = {}): Promise<Response> {
  const headers: Record<string, string> = { accept: options.accept ?? "application/json" };
  if (token.get()) headers.authorization = `Bearer ${token.get()}`;
  const method = options.method ?? (options.body === undefined ? "GET" : "POST");
  if (options.body !== undefined) headers["content-type"] = "application/json";
  if (method !== "GET") headers["idempotency-key"] = unique();
  let answer: Response;
  try {
    answer = await fetch(`api/v1/${path}`, { method, headers, body: options.body === undefined ? undefined : JSON.stringify(options.body), signal: options.signal });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Refused({ status: 0, title: "Not reachable", detail: "tokentape does not answer", hint: "see whether `tokentape up` runs" });
  }
  if (!answer.ok) {
    const problem: Problem = await answer.json().catch(() => ({ status: answer.status, title: answer.statusText, detail: answer.statusText }));
    if (answer.status === 401) window.dispatchEvent(new CustomEvent("tokentape:key", { detail: problem }));
    throw new Refused(problem);
  }
  return answer;
}

export async function ask<T>(path: string, options: Options = {}): Promise<T> {
  const answer = await send(path, options);
  return (answer.status === 204 ? undefined : await answer.json()) as T;
}

export const query = (fields: Record<string, string | number | boolean | undefined | string[]>): string => {
  const parts = new URLSearchParams();
  for (const [name, value] of Object.entries(fields)) {
    if (Array.isArray(value)) value.forEach((one) => parts.append(name, one));
    else if (value !== undefined && value !== "" && value !== false) parts.set(name, String(value));
  }
  const text = parts.toString();
  return text ? `?${text}` : "";
};

// A job until it ends.
export async function job(work: Work): Promise<Work> {
  while (work.ended_at === null) {
    await new Promise((resolve) => setTimeout(resolve, 400));
    work = await ask<Work>(`jobs/${work.job}`);
  }
  return work;
}

export interface Work {
  job: string;
  kind: string;
  subject: string;
  by: string;
  state: string;
  progress: { done: number; total: number | null };
  made_at: number;
  ended_at: number | null;
  result: any;
  problem: Problem | null;
}

export interface Completeness {
  fresh_to: string | null;
  gaps: number;
  lost: number;
  quarantined: number;
  duplicates: number;
  erased: number | null;
  sampled_out: number;
  unread: number;
}

export interface Me {
  name: string;
  roles: string[];
  tenant: string | null;
  keyed: boolean;
  version: string;
  auth: string;
}

export interface SessionRow {
  session_id: string;
  kind: "conversation" | "engine" | "kv" | "replay";
  started_at: string;
  last_event_at: string;
  tenant: string;
  events: number;
  requests: number;
  failures: number;
  edits: number;
  stops: number;
  replays: number;
  tokens: number;
  owner: string | null;
  user: string | null;
  workflow: string | null;
  purpose: string | null;
  client: string | null;
  title: string | null;
  models: string[];
  visibility: string;
  tags: string[];
  verdict: string | null;
  replayed: number | null;
  under_way: number;
  first_message: string | null;
  final: boolean;
}

export interface TimelineRow {
  at: string;
  until: string | null;
  who: string;
  what: string;
  text: string;
  level: "plain" | "good" | "dim" | "warn" | "bad";
  lane: string;
  quote: string | null;
  generation: string | null;
  index: number | null;
  event_id: string | null;
  events: number;
}

export interface Timeline {
  first_at: string | null;
  last_at: string | null;
  stalls: number;
  failures: number;
  anomalies: number;
  rows: TimelineRow[];
}

export interface Response_ {
  index: number;
  content?: string;
  reasoning?: string;
  refusal?: string;
  tool_calls: ({ call_id: string | null; name: string | null; arguments: string } | null)[];
  finish_reason: string | null;
  tokens: number;
  erased: boolean;
}

export interface Edit {
  edit_id: string;
  at: string;
  actor: string;
  reason: string | null;
  undo_of: string | null;
  before: unknown;
  after: unknown;
}

export interface Generation {
  request: { generation_id: string; status: string; endpoint: string | null; model: string | null; messages: any; tools: any[]; parameters: Record<string, unknown>; document: string };
  submitted_at: string | null;
  actor: string;
  edits: Edit[];
  pauses: { breakpoint: string; at: string; released_at: string | null; by: string; action: string | null; reason: string | null }[];
  response: Response_[];
  environment_id: string | null;
  source: string | null;
  zero_at: string | null;
  first_token_us?: number | null;
  duration_us?: number | null;
  prompt_tokens?: number | null;
  failures: { at: string; type: string; origin: string; position: number; retryable: boolean; message: string | null }[];
}

export interface Environment {
  environment_id: string;
  at: string;
  origin: string;
  semantic: string | null;
  numeric: string | null;
  scheduling: string | null;
  items: Record<string, string>;
  unknown: string[];
}

export interface Session {
  session: SessionRow;
  at: string | null;
  event_id: string | null;
  of: number;
  position: number;
  tokens: number;
  lost: number;
  erased: number;
  first_at: string | null;
  environments: Environment[];
  generations: Generation[];
  notes: { at: string; actor: string; text: string }[];
  anomalies: { what: string; kind: string; text: string }[];
  replays: any[];
  completeness: Completeness;
}

export interface Tokens {
  index: number;
  tokens: number;
  position: number[];
  channel: string[];
  offset_us: number[] | null;
  token_id: (number | null)[] | null;
  logprob: (number | null)[] | null;
  text: (string | null)[] | null;
  alternatives: Alternative[][] | null;
}

export interface Alternative {
  text: string;
  token_id: number | null;
  logprob: number;
}

export interface Replay {
  replay: string;
  recorded_in: string;
  session_id: string;
  at: string;
  run: string | null;
  engine: string | null;
  mode: string | null;
  verdict: string | null;
  reason: string | null;
  tokens: number | null;
  drift_max: number | null;
  noise_floor: number | null;
}

export interface Run {
  run: string;
  sessions: number;
  verdicts: Record<string, number>;
  engines: string[];
  begun_at: string;
  ended_at: string;
}

interface Side {
  session_id: string | null;
  generation_id?: string;
  model?: string | null;
  environment_id: string | null;
}

export interface Compared {
  generation_id: string;
  index: number;
  verdict: string;
  reason: string | null;
  tokens: number;
  scored: number;
  common?: number;
  first_telling: number | null;
  drift_mean: number | null;
  drift_p99: number | null;
  drift_max: number | null;
  noise_floor: number | null;
  first: { text: (string | null)[]; token_id: (number | null)[]; logprob: (number | null)[]; alternatives: Alternative[][] | null };
  second: { text?: (string | null)[]; token_id?: (number | null)[]; logprob: (number | null)[]; rank?: number[]; alternatives?: Alternative[][] | null };
  drift: (number | null)[];
}

export interface Comparison {
  kind: "replay" | "generations";
  engine?: string;
  run?: string | null;
  first: Side;
  second: Side;
  verdict: string | null;
  reason: string | null;
  environment: { known: boolean; differences: { key: string; class: string; words: string }[]; lines: string[] };
  sequences: Compared[];
}

export interface EngineRun {
  engine_run: string;
  began: string;
  ended: string;
  generations: number;
  steps: number;
  running_max: number;
  preempted: number;
  model: string | null;
}

export interface Overview {
  engine_run: string;
  every: number;
  last: number;
  step: number[];
  at: string[];
  steps: number[];
  duration_ms: number[];
  batch_max: number[];
  waiting: number[];
  running: number[];
  kv_used: (number | null)[];
  preempted: number[];
  tokens: (number | null)[];
}

export interface Steps {
  steps: { step: number; at: string; duration_ms: number; waiting: number; running: number; preempted: number; kv_used: number | null; entries: { generation_id: string; index: number; tokens: number }[] }[];
  sessions: Record<string, string>;
}

export interface KvReport {
  connector: string;
  requests: { request: string; generation_id: string | null; tokens: number; local: number; matched: number; rate: number | null; duration_ms: number; why: string }[];
  rate: number | null;
  lookup_p50_ms: number | null;
  lookup_p99_ms: number | null;
  saved_bytes: number;
  save_rate: number | null;
  loaded_bytes: number;
  load_rate: number | null;
  flags: string[];
}
