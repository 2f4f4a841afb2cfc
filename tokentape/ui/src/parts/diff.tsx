// Two documents side by side, line by line, with what changed marked; long stretches that are alike are folded.
import { visible } from "../words";

type Line = { left: string | null; right: string | null; same: boolean };

const AROUND = 2;

// Longest common subsequence; documents of requests are short enough for the plain table.
function lines(a: string[], b: string[]): Line[] {
  const width = b.length + 1;
  // A comma comes and goes with the line after it, and is no change of its own.
  const alike = (i: number, j: number): boolean => a[i]!.replace(/,$/, "") === b[j]!.replace(/,$/, "");
  const table = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      table[i * width + j] = alike(i, j) ? table[(i + 1) * width + j + 1]! + 1 : Math.max(table[(i + 1) * width + j]!, table[i * width + j + 1]!);
  const found: Line[] = [];
  let i = 0;
  let j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && alike(i, j)) found.push({ left: a[i++]!, right: b[j++]!, same: true });
    else if (i < a.length && (j === b.length || table[(i + 1) * width + j]! >= table[i * width + j + 1]!)) found.push({ left: a[i++]!, right: null, same: false });
    else found.push({ left: null, right: b[j++]!, same: false });
  }
  return paired(found);
}

// A line taken away and one put in its place stand beside each other.
function paired(found: Line[]): Line[] {
  const out: Line[] = [];
  for (let i = 0; i < found.length; ) {
    const gone: string[] = [];
    const come: string[] = [];
    while (i < found.length && !found[i]!.same) {
      if (found[i]!.left !== null) gone.push(found[i]!.left!);
      else come.push(found[i]!.right!);
      i++;
    }
    for (let k = 0; k < Math.max(gone.length, come.length); k++) out.push({ left: gone[k] ?? null, right: come[k] ?? null, same: false });
    if (i < found.length) out.push(found[i++]!);
  }
  return out;
}

export function Diff({ before, after, label }: { before: unknown; after: unknown; label: string }) {
  if (before === null || after === null) return <p class="dim">what was changed is erased, or cannot be told</p>;
  const text = (value: unknown): string[] => JSON.stringify(value, null, 2).split("\n");
  const all = lines(text(before).slice(0, 2000), text(after).slice(0, 2000));
  const near = all.map((_, i) => all.slice(Math.max(0, i - AROUND), i + AROUND + 1).some((line) => !line.same));
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label={label}>
      <table class="diff mono">
        <thead>
          <tr>
            <th scope="col">before</th>
            <th scope="col">after</th>
          </tr>
        </thead>
        <tbody>
          {all.map((line, i) =>
            near[i] ? (
              <tr class={line.same ? "" : "changed"}>
                <td class={line.same || line.left === null ? "" : "gone"}>{visible(line.left ?? "")}</td>
                <td class={line.same || line.right === null ? "" : "come"}>{visible(line.right ?? "")}</td>
              </tr>
            ) : near[i - 1] || i === 0 ? (
              <tr class="fold">
                <td>⋯</td>
                <td>⋯</td>
              </tr>
            ) : null,
          )}
        </tbody>
      </table>
    </div>
  );
}
