// What an editor changed, as an RFC 6902 patch: objects field by field, lists of one length item by item, all else as a whole.

export interface Operation {
  op: "add" | "remove" | "replace";
  path: string;
  value?: unknown;
}

const step = (name: string | number): string => `/${String(name).replaceAll("~", "~0").replaceAll("/", "~1")}`;
const plain = (value: unknown): value is Record<string, unknown> => typeof value === "object" && value !== null && !Array.isArray(value);

export function patch(before: unknown, after: unknown, path = ""): Operation[] {
  if (JSON.stringify(before) === JSON.stringify(after)) return [];
  if (Array.isArray(before) && Array.isArray(after) && before.length === after.length)
    return before.flatMap((item, i) => patch(item, after[i], path + step(i)));
  if (!plain(before) || !plain(after)) return [{ op: "replace", path, value: after }];
  const gone: Operation[] = Object.keys(before).filter((name) => !(name in after)).map((name) => ({ op: "remove", path: path + step(name) }));
  const rest = Object.keys(after).flatMap((name): Operation[] =>
    name in before ? patch(before[name], after[name], path + step(name)) : [{ op: "add", path: path + step(name), value: after[name] }],
  );
  return [...gone, ...rest];
}

// What is wrong with a request before the gateway is asked; it is the judge in the end.
export function fault(text: string): string | null {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    return (error as Error).message;
  }
  if (!plain(value)) return "the request is not an object";
  if (typeof value.model !== "string" || !value.model) return "model: a name is needed";
  for (const name of ["messages", "input", "contents"]) {
    const list = value[name];
    if (Array.isArray(list) && (list.length === 0 || !list.every(plain))) return `${name}: at least one, and each an object`;
  }
  if (Array.isArray(value.messages)) {
    const odd = value.messages.findIndex((message) => typeof message.role !== "string");
    if (odd >= 0) return `messages.${odd}.role: a text is needed`;
  }
  for (const [name, least] of [["temperature", 0], ["top_p", 0], ["max_tokens", 1], ["n", 1]] as const)
    if (name in value && value[name] !== null && (typeof value[name] !== "number" || value[name] < least)) return `${name}: a number from ${least} on`;
  return null;
}
