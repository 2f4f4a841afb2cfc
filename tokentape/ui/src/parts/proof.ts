// A proof of one event, checked here and by nobody else: the steps of docs/ledger.md with the browser's own SHA-256, HMAC and Ed25519.

export interface Proof {
  format: string;
  public_key: string;
  event: { id: string; metadata: string; content: string | null; salt: string | null; commitment: string | null; schema: string };
  segment: { key: string; rows: number; row: number; path: string[] };
  entry: { number: number; json: string; path: string[] };
  checkpoint: string;
  rotations?: { number: number; json: string; path: string[] }[];
}

export interface Checked {
  // proven: every step held. unsigned: all but the signatures, which this browser cannot check. refuted: `steps` ends with what did not hold.
  outcome: "proven" | "unsigned" | "refuted";
  steps: string[];
}

interface Key {
  name: string;
  hash: Uint8Array;
  raw: Uint8Array;
}

type Bytes = Uint8Array<ArrayBuffer>;

class Refuted extends Error {}

const text = new TextEncoder();
const EMPTY = new Uint8Array(32);

const bytes = (base64: string): Bytes => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const hex = (value: Uint8Array): string => [...value].map((byte) => byte.toString(16).padStart(2, "0")).join("");
const joined = (...parts: Uint8Array[]): Bytes => {
  const whole = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  return whole;
};
const same = (a: Uint8Array, b: Uint8Array): boolean => a.length === b.length && a.every((byte, i) => byte === b[i]);
const sha256 = async (...parts: Uint8Array[]): Promise<Bytes> => new Uint8Array(await crypto.subtle.digest("SHA-256", joined(...parts)));
const leaf = (data: Uint8Array): Promise<Bytes> => sha256(Uint8Array.of(0), data);
const node = (left: Uint8Array, right: Uint8Array): Promise<Bytes> => sha256(Uint8Array.of(1), left, right);

function demand(holds: boolean, otherwise: string): asserts holds {
  if (!holds) throw new Refuted(otherwise);
}

// RFC 9162, section 2.1.3.2. Numbers stay exact up to 2^53, so they are halved and not shifted.
export async function included(hash: Uint8Array, index: number, size: number, path: Uint8Array[], root: Uint8Array): Promise<boolean> {
  if (!(Number.isSafeInteger(index) && index >= 0 && index < size)) return false;
  let [fn, sn, found] = [index, size - 1, hash];
  for (const step of path) {
    if (sn === 0) return false;
    if (fn % 2 || fn === sn) {
      found = await node(step, found);
      while (fn % 2 === 0 && fn !== 0) [fn, sn] = [fn / 2, Math.floor(sn / 2)];
    } else found = await node(found, step);
    [fn, sn] = [Math.floor(fn / 2), Math.floor(sn / 2)];
  }
  return sn === 0 && same(found, root);
}

// RFC 8785: members by name, numbers and strings as JavaScript writes them.
export const canonical = (value: unknown): string =>
  Array.isArray(value)
    ? `[${value.map(canonical).join(",")}]`
    : typeof value === "object" && value !== null
      ? `{${Object.keys(value).sort().map((name) => `${JSON.stringify(name)}:${canonical((value as Record<string, unknown>)[name])}`).join(",")}}`
      : JSON.stringify(value);

async function key(line: string): Promise<Key> {
  const [, name, hash, encoded] = /^([^\s+{][^\s+]*)\+([0-9a-f]{8})\+(\S+)$/.exec(line.trim()) ?? [];
  demand(name !== undefined, "this is no public key: NAME+HASH+BASE64 is due");
  const raw = bytes(encoded!);
  demand(raw.length === 33 && raw[0] === 1, "this is no Ed25519 key");
  const own = (await sha256(text.encode(`${name}\n`), raw)).slice(0, 4);
  demand(hex(own) === hash, "the public key does not fit its own hash");
  return { name, hash: own, raw: raw.slice(1) };
}

const named = (one: Key): string => `${one.name}+${hex(one.hash)}`;

// Whether a signature holds; null where the browser knows no Ed25519.
async function signed(one: Key, data: Uint8Array, signature: Uint8Array): Promise<boolean | null> {
  let imported: CryptoKey;
  try {
    imported = await crypto.subtle.importKey("raw", one.raw as Bytes, { name: "Ed25519" }, false, ["verify"]);
  } catch {
    return null;
  }
  return crypto.subtle.verify({ name: "Ed25519" }, imported, signature as Bytes, data as Bytes);
}

export async function check(proof: Proof, publicKey: string): Promise<Checked> {
  const steps: string[] = [];
  if (!globalThis.crypto?.subtle) return { outcome: "refuted", steps: ["this browser lends its cryptography to https and to this machine only: nothing was checked; `tokentape verify --proof` checks the file"] };
  try {
    demand(proof.format === "tokentape-event-proof/1", `a proof of the format ${String(proof.format).slice(0, 40)} is not known here`);
    const known = await holds(proof, publicKey, steps);
    return { outcome: known ? "proven" : "unsigned", steps };
  } catch (error) {
    return { outcome: "refuted", steps: [...steps, error instanceof Refuted ? error.message : `not a proof: ${String(error).slice(0, 200)}`] };
  }
}

async function holds(proof: Proof, publicKey: string, steps: string[]): Promise<boolean> {
  const keys = await Promise.all(publicKey.trim().split(/\n/).map(key));
  let force = keys[0]!;
  let all = true;
  const vouch = async (one: Key, data: Uint8Array, signature: Uint8Array, what: string): Promise<void> => {
    const found = await signed(one, data, signature);
    demand(found !== false, `${what}: the signature is not by ${named(one)}`);
    all &&= found !== null;
  };
  const entry = async (number: number, json: string): Promise<any> => {
    const found = JSON.parse(json);
    demand(canonical(found) === json && found.sequence === number, `entry ${number} is not the one spelling of itself`);
    // Where the key before was lost a fresh one signs for itself, and counts only for who was handed it.
    const by = found.type === "key_lost" ? keys.slice(1).find((one) => `${named(one)}` === found.key_id) : force;
    demand(by !== undefined && found.key_id === named(by), `entry ${number} is signed by ${String(found.key_id).slice(0, 80)}, not by the key in force`);
    demand(found.origin === by.name, `entry ${number} belongs to the ledger ${String(found.origin).slice(0, 80)}`);
    const { signature, ...rest } = found;
    await vouch(by, text.encode(canonical(rest)), bytes(signature), `entry ${number}`);
    return found;
  };
  const size = Number(proof.checkpoint.split("\n")[1]);
  // The entry's own signature is checked by the key that was in force when it was written.
  let committed: any;
  const turns = proof.rotations ?? [];
  for (const turn of turns) {
    if (committed === undefined && turn.number >= proof.entry.number) committed = await entry(proof.entry.number, proof.entry.json);
    const handed = await entry(turn.number, turn.json);
    demand(["key_rotated", "key_lost"].includes(handed.type) && turn.number < size, `entry ${turn.number} hands over to no key before the checkpoint`);
    force = await key(handed.body.key);
    steps.push(`entry ${turn.number} ${handed.type === "key_lost" ? "begins again with" : "hands over to"} the key ${named(force)}`);
  }
  committed ??= await entry(proof.entry.number, proof.entry.json);

  const cut = proof.checkpoint.lastIndexOf("\n\n");
  const [note, lines] = [proof.checkpoint.slice(0, cut + 1), proof.checkpoint.slice(cut + 2).split("\n").filter(Boolean)];
  const [origin, , encoded, ...more] = note.split("\n");
  demand(cut > 0 && origin === force.name && Number.isSafeInteger(size), "the checkpoint is no checkpoint of this ledger");
  const mine = lines.map((line) => /^— (\S+) (\S+)$/.exec(line)).filter((line) => line && line[1] === force.name && same(bytes(line[2]!).slice(0, 4), force.hash));
  demand(mine.length > 0, `the checkpoint has no signature by ${named(force)}`);
  for (const line of mine) await vouch(force, text.encode(note), bytes(line![2]!).slice(4), "the checkpoint");
  const root = bytes(encoded!);
  const at = more.find((line) => line.startsWith("at "))?.slice(3);
  steps.push(`the checkpoint over ${size.toLocaleString("en")} entries${at ? `, of ${new Date(Number(at) / 1000).toISOString().slice(0, 19)} UTC,` : ""} is signed by ${named(force)}`);
  for (const turn of turns) demand(await included(await leaf(text.encode(turn.json)), turn.number, size, turn.path.map(bytes), root), `the rotation of entry ${turn.number} is not under the checkpoint`);

  demand(await included(await leaf(text.encode(proof.entry.json)), proof.entry.number, size, proof.entry.path.map(bytes), root), `entry ${proof.entry.number} is not among those that the checkpoint covers`);
  steps.push(`entry ${proof.entry.number} of ${String(committed.recorded_at).slice(0, 19).replace("T", " ")} UTC is one of them`);

  const segment = (committed.body.segments ?? []).find((one: any) => one.key === proof.segment.key && one.rows === proof.segment.rows);
  demand(segment !== undefined, `entry ${proof.entry.number} commits no such segment`);
  steps.push(`it commits the segment ${proof.segment.key} of ${proof.segment.rows.toLocaleString("en")} rows`);

  const { event } = proof;
  demand((event.content === null) === (event.salt === null) && !(event.content !== null && event.commitment !== null), "content and salt stand together, and without a commitment");
  const metadata = bytes(event.metadata);
  demand(hex(metadata.slice(10, 26)) === event.id, "the event's bytes carry another id");
  const data = joined(metadata, await commitment(event));
  const rooted = Uint8Array.from(segment.root.match(/../g) ?? [], (pair: string) => parseInt(pair, 16));
  demand(await included(await leaf(data), proof.segment.row, proof.segment.rows, proof.segment.path.map(bytes), rooted), `the event is not row ${proof.segment.row} of it`);
  const what = event.content !== null ? "with its content" : event.commitment !== null ? "whose content was erased and whose commitment stands" : "which has no content";
  steps.push(`the event is row ${proof.segment.row.toLocaleString("en")} of it, ${what}`);

  const schema = text.encode(event.schema);
  const wanted = { key: `schemas/${hex(metadata.slice(2, 10))}.avsc`, bytes: schema.length, sha256: hex(await sha256(schema)) };
  demand((committed.body.objects ?? []).some((one: any) => canonical(one) === canonical(wanted)), "the entry names another schema for these bytes");
  steps.push("the schema that reads its bytes is the one that the entry names");
  return all;
}

async function commitment(event: Proof["event"]): Promise<Uint8Array> {
  if (event.content === null) return event.commitment === null ? EMPTY : bytes(event.commitment);
  const salted = await crypto.subtle.importKey("raw", bytes(event.salt!), { name: "HMAC", hash: "SHA-256" }, false, ["sign"]);
  return new Uint8Array(await crypto.subtle.sign("HMAC", salted, bytes(event.content)));
}
