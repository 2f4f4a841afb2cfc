// Written after a build: from which sources it was made, so that a test finds a bundle that is not theirs.
import { writeFileSync } from "node:fs";
import { digest } from "./sources.mjs";

writeFileSync("dist/sources.sha256", `${digest()}\n`);
