// The page: which view is shown stands behind the # of its address, and everything in it is asked from the REST API.
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { type Me, type Problem, token } from "./api";
import { Trouble } from "./parts/bits";
import { useAsk, useKeys } from "./parts/use";
import { Compare } from "./views/compare";
import { Custody } from "./views/custody";
import { Debug } from "./views/debug";
import { Engine } from "./views/engine";
import { Health } from "./views/health";
import { SessionView } from "./views/session";
import { Sessions } from "./views/sessions";
import { Sql } from "./views/sql";

const VIEWS = [
  { path: "sessions", name: "Sessions", key: "1", roles: ["reader", "analyst", "debugger"] },
  { path: "compare", name: "Compare", key: "2", roles: ["reader", "analyst", "debugger"] },
  { path: "engine", name: "Engine", key: "3", roles: ["analyst"] },
  { path: "debug", name: "Debug", key: "4", roles: ["debugger"] },
  { path: "sql", name: "SQL", key: "5", roles: ["analyst"] },
  { path: "custody", name: "Custody", key: "6", roles: ["reader", "analyst", "debugger", "custodian"] },
  { path: "health", name: "Health", key: "7", roles: [] },
];

const here = (): string => location.hash.replace(/^#\/?/, "") || "sessions";

function App() {
  const [place, setPlace] = useState(here());
  const [asked, setAsked] = useState<Problem | null>(null);
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    const moved = (): void => setPlace(here());
    const needed = (event: Event): void => setAsked((event as CustomEvent<Problem>).detail);
    addEventListener("hashchange", moved);
    addEventListener("tokentape:key", needed);
    const stop = token.listen(() => {
      setAsked(null);
      setTurn((n) => n + 1);
    });
    return () => {
      removeEventListener("hashchange", moved);
      removeEventListener("tokentape:key", needed);
      stop();
    };
  }, []);
  useKeys(Object.fromEntries(VIEWS.map((view) => [view.key, () => (location.hash = `#/${view.path}`)])));
  const [path, rest] = [place.split(/[/?]/)[0]!, place.split("?")[0]!.split("/").slice(1).join("/")];
  useEffect(() => {
    document.title = `${VIEWS.find((view) => view.path === path)?.name ?? "Session"} · tokentape`;
  }, [path]);
  return (
    <Shell key={turn} path={path} asked={asked}>
      {path === "session" ? <SessionView id={rest} /> : path === "compare" ? <Compare key={place} rest={rest} /> : path === "engine" ? <Engine id={rest} /> : path === "debug" ? <Debug /> : path === "sql" ? <Sql /> : path === "custody" ? <Custody key={place} /> : path === "health" ? <Health /> : <Sessions />}
    </Shell>
  );
}

function Shell({ path, asked, children }: { path: string; asked: Problem | null; children: preact.ComponentChildren }) {
  const me = useAsk<Me>("me");
  const may = (roles: string[]): boolean => !roles.length || (me.data?.roles ?? []).some((role) => role === "admin" || roles.includes(role));
  const current = path === "session" ? "sessions" : VIEWS.some((view) => view.path === path) ? path : "sessions";
  return (
    <div class="shell">
      <a class="skip" href="#main" onClick={(event) => { event.preventDefault(); document.getElementById("main")?.focus(); }}>
        to the content
      </a>
      <nav class="rail" aria-label="Views">
        <a class="brand" href="#/sessions">
          <span class="mark" aria-hidden="true">
            <i /><i /><i />
          </span>
          tokentape
        </a>
        <ul>
          {VIEWS.filter((view) => !me.data || may(view.roles)).map((view) => (
            <li>
              <a href={`#/${view.path}`} aria-current={view.path === current ? "page" : undefined}>
                {view.name} <kbd aria-hidden="true">{view.key}</kbd>
              </a>
            </li>
          ))}
        </ul>
        <div class="rail-foot">
          {me.data ? (
            <>
              <div class="who" title={me.data.name}>{me.data.name}</div>
              <div class="dim">{me.data.roles.join(", ") || "no role"}</div>
              <div class="dim">{me.data.tenant ? `tenant ${me.data.tenant}` : "all tenants"} · {me.data.version}</div>
              {token.get() ? (
                <button type="button" class="quiet" onClick={() => token.set("")}>sign out</button>
              ) : (
                <details>
                  <summary>use a key</summary>
                  <SignIn />
                </details>
              )}
            </>
          ) : null}
        </div>
      </nav>
      <main id="main" tabIndex={-1}>
        {asked && !me.data ? (
          <section class="sign-in">
            <h1>Who is there?</h1>
            {token.get() ? (
              <p>This key is not taken. <button type="button" class="quiet" onClick={() => token.set("")}>go on without one</button></p>
            ) : (
              <p>This installation asks for a key. An administrator makes one with <code>tokentape keys create</code>.</p>
            )}
            <Trouble problem={asked} />
            <SignIn />
          </section>
        ) : (
          children
        )}
      </main>
    </div>
  );
}

function SignIn() {
  const [value, setValue] = useState("");
  return (
    <form class="row" onSubmit={(event) => { event.preventDefault(); token.set(value.trim()); }}>
      <input type="password" aria-label="Key" placeholder="tt-…" autocomplete="off" value={value} onInput={(event) => setValue(event.currentTarget.value)} />
      <button type="submit" class="main">come in</button>
    </form>
  );
}

render(<App />, document.getElementById("app")!);
