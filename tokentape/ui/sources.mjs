// The digest of everything that the bundle is built from. tests/test_page.py computes the same.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";

const SINGLE = ["index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.mjs"];

export function digest() {
  const files = readdirSync("src", { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name).replaceAll("\\", "/"));
  const hash = createHash("sha256");
  for (const name of [...SINGLE, ...files].sort()) hash.update(`${name}\n`).update(readFileSync(name)).update("\n");
  return hash.digest("hex");
}
