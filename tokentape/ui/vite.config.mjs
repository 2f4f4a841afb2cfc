import { defineConfig } from "vite";

// One script and one style sheet with names that change with their content; nothing inline, for the page's policy allows none.
export default defineConfig({
  base: "./",
  build: { outDir: "dist", assetsInlineLimit: 0, modulePreload: false, target: "es2022", cssCodeSplit: false },
  server: { proxy: { "/api": "http://127.0.0.1:8401" } },
});
