// Figures and times as people read them; the same words as on the command line.

export const count = (n: number, noun: string): string => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

export const clock = (iso: string | null): string => (iso ? iso.slice(11, 23) : "");

export const day = (iso: string | null): string => (iso ? iso.slice(0, 10) : "");

export const us = (iso: string): number => Date.parse(`${iso.slice(0, 23)}Z`) * 1000 + Number(iso.slice(23, 26).replace(/\D/g, "") || 0);

export const iso = (at: number): string => `${new Date(Math.floor(at / 1000)).toISOString().slice(0, 23)}${String(Math.round(at % 1000)).padStart(3, "0")}Z`;

export function duration(value: number): string {
  if (value < 1_000) return `${Math.round(value)} µs`;
  if (value < 1_000_000) return `${(value / 1_000).toFixed(value < 9_950 ? 1 : 0)} ms`;
  const seconds = value / 1_000_000;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.round(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function ago(iso: string, now: number = Date.now()): string {
  const seconds = Math.max(0, (now - Date.parse(iso)) / 1000);
  if (seconds < 5) return "now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129_600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86_400)} d ago`;
}

export function bytes(n: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) {
    n /= 1000;
    i += 1;
  }
  return `${n.toFixed(i && n < 100 ? 1 : 0)} ${units[i]}`;
}

export function said(content: unknown): string {
  if (content === null || content === undefined) return "";
  if (typeof content === "string") return content;
  if (Array.isArray(content)) return content.map((part) => (typeof part?.text === "string" ? part.text : `[${part?.type ?? typeof part}]`)).join(" ");
  return JSON.stringify(content);
}

// Characters that change direction or show nothing may not play tricks on a reader.
const TRICKS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g;

export const visible = (text: string): string => text.replace(TRICKS, (c) => `‹${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}›`);
