// The page of `prag serve`. It inserts everything from the server or the user as text, never as HTML.

const MODES = {
  combine: "Passages in weights and prompt",
  prag: "Passages in the weights",
  rag: "Passages in the prompt",
  closed: "Bare model, no passages",
  auto: "One of these, as the search decides",
};
const MOST_RECENT = 10;

const byId = (id) => document.getElementById(id);

// The key is kept only here: in no storage, cookie or URL.
let key = "";

/** An error to show to the user. `waitS`: seconds after which another try may succeed. */
class Problem extends Error {
  constructor(message, { needsKey = false, waitS = 0 } = {}) {
    super(/[.!?…]$/.test(message) ? message : `${message}.`);
    this.needsKey = needsKey;
    this.waitS = waitS;
  }
}

/** Send a request, and throw a Problem unless it succeeds. */
async function send(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Problem("The server cannot be reached.");
  }
  if (response.ok) return response;
  if (response.status === 401 && response.headers.has("WWW-Authenticate")) {
    throw new Problem(key ? "The server does not accept this key." : "The server needs an API key.", { needsKey: true });
  }
  // A proxy may answer without the server's JSON.
  const reply = await response.json().catch(() => null);
  throw new Problem(reply?.error?.message ?? `The server answered with status ${response.status}.`, {
    waitS: Number.parseInt(response.headers.get("Retry-After") ?? "", 10) || 0,
  });
}

/** Yield the server-sent events of a response as {name, data}. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { name: "", data: null };
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) event.name = line.slice(7);
        if (line.startsWith("data: ")) event.data = JSON.parse(line.slice(6));
      }
      yield event;
    }
  }
}

/** A time as people write it: 0.04 s, 1.2 s, 14 s. */
const inSeconds = (ms) => `${(ms / 1000).toFixed(ms < 1000 ? 2 : ms < 10000 ? 1 : 0)} s`;

function element(tag, text, className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

/** The answer of one mode. */
class Column {
  #control = null;
  #timer = 0;
  body = null;

  constructor(mode) {
    this.mode = mode;
    this.problem = null;
    this.snapshot = "";
    this.root = byId("column").content.firstElementChild.cloneNode(true);
    const find = (selector) => this.root.querySelector(selector);
    this.answer = find(".answer");
    this.shownProblem = find(".problem");
    this.why = find(".why");
    this.times = find(".times");
    this.button = find("button");
    this.passages = find(".passages");
    this.steps = find(".steps");
    const heading = find("h2");
    heading.textContent = mode;
    heading.id = `mode-${mode}`;
    this.root.setAttribute("aria-labelledby", heading.id);
    find(".description").textContent = MODES[mode];
    this.badge = find(".badge");
    this.button.addEventListener("click", () => {
      if (this.#control) this.stop();
      else follow([this], this.body);
    });
    byId("answers").append(this.root);
  }

  stop() {
    this.#control?.abort();
  }

  /** Ask, and show the answer as it comes. */
  async ask(body) {
    this.clear();
    const control = new AbortController();
    this.#control = control;
    this.body = body;
    this.#offer("Stop");
    this.root.setAttribute("aria-busy", "true");
    const start = performance.now();
    let first = 0;
    try {
      const response = await send("v1/answer", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ ...body, mode: this.mode, stream: true, details: true }),
        signal: control.signal,
      });
      let whole = null;
      for await (const { name, data } of eventsOf(response)) {
        control.signal.throwIfAborted();
        if (name === "error") throw new Problem(data.error.message);
        if (name === "answer") whole = data;
        else {
          first ||= performance.now() - start;
          this.answer.append(data.text);
        }
      }
      if (!whole) throw new Error("the stream ended early");
      this.#show(whole, first, performance.now() - start);
    } catch (error) {
      // If the user has asked again, the column belongs to the later question.
      if (this.#control === control) this.#fail(error, control.signal.aborted);
    } finally {
      if (this.#control === control) {
        this.#control = null;
        this.root.setAttribute("aria-busy", "false");
      }
    }
  }

  /** Drop the question: nothing more of its answer is shown. */
  clear() {
    this.stop();
    this.#control = null;
    clearTimeout(this.#timer);
    this.root.setAttribute("aria-busy", "false");
    this.button.hidden = true;
    this.problem = null;
    this.answer.textContent = "";
    this.answer.classList.remove("none");
    for (const part of [this.shownProblem, this.why, this.times, this.passages, this.steps]) part.hidden = true;
  }

  #offer(label) {
    this.button.hidden = false;
    this.button.disabled = false;
    this.button.textContent = label;
    this.button.setAttribute("aria-label", `${label}: ${this.mode}`);
  }

  #show(whole, first, total) {
    this.answer.textContent = whole.answer || "(an empty answer)";
    this.answer.classList.toggle("none", !whole.answer);
    this.times.textContent = `${inSeconds(total)}${first ? `, first text after ${inSeconds(first)}` : ""}`;
    this.times.hidden = false;
    this.why.textContent = whole.why;
    this.why.hidden = !whole.why;
    if (this.button === document.activeElement) byId("question").focus();
    this.button.hidden = true;

    const count = whole.passages.length;
    this.passages.querySelector("summary").textContent = count === 1 ? "1 passage" : `${count || "No"} passages`;
    this.passages.querySelector("ol").replaceChildren(...whole.passages.map(passageItem));
    this.passages.hidden = count === 0;
    const rows = [
      ...Object.entries(whole.timings_ms).map(([step, ms]) => [step, inSeconds(ms)]),
      ["tokens of the prompt", whole.tokens.prompt],
      ["tokens of the answer", whole.tokens.new],
      ["ended by", whole.finish],
    ];
    this.steps.querySelector("dl").replaceChildren(
      ...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value)]),
    );
    this.snapshot = whole.snapshot;
    this.steps.hidden = false;
    say(`${this.mode}: ${this.answer.textContent}`);
  }

  #fail(error, stopped) {
    let problem = error;
    if (stopped) problem = new Problem("Stopped.");
    else if (!(error instanceof Problem)) problem = new Problem("The connection broke before the answer was complete.");
    this.problem = problem;
    this.shownProblem.textContent = problem.message;
    this.#offer("Ask again");
    if (problem.waitS) {
      const at = new Date(Date.now() + problem.waitS * 1000).toLocaleTimeString();
      this.shownProblem.textContent += ` Try again in ${problem.waitS} s, at ${at}.`;
      this.button.disabled = true;
      this.#timer = setTimeout(() => { this.button.disabled = false; }, problem.waitS * 1000);
    }
    this.shownProblem.hidden = false;
    if (!stopped) say(`${this.mode}: ${this.shownProblem.textContent}`);
  }
}

function passageItem(passage) {
  const item = document.createElement("li");
  const uses = passage.used.map((use) => (use === "weights" ? `weights × ${+passage.weight.toFixed(3)}` : use));
  const used = uses.length ? `used in: ${uses.join(", ")}` : "not used";
  item.append(
    element("bdi", passage.title || "(no title)"),
    element("span", used, "use"),
    element("span", `${passage.id} · score ${passage.score.toFixed(2)}`, "use quiet"),
  );
  if (passage.adapter) {
    const { tokens, last_loss: loss, seconds } = passage.adapter;
    const trained = `adapter: trained on ${tokens} tokens in ${inSeconds(1000 * seconds)}, last loss ${loss}`;
    item.append(element("span", trained, "use quiet"));
  }
  if (passage.text) {
    const details = document.createElement("details");
    details.append(element("summary", "Text"), element("span", passage.text, "text"));
    item.append(details);
  }
  if (passage.fallback) {
    item.append(element("span", "Its adapter was missing or late, so it went into the prompt.", "use problem"));
  }
  return item;
}

/** Let screen readers read a text. */
function say(text) {
  byId("spoken").append(element("p", text));
}

const columns = Object.keys(MODES).map((mode) => new Column(mode));
const chosen = new Map();
let stopping = new AbortController();
let following = 0;

for (const { mode, root } of columns) {
  const box = document.createElement("input");
  box.type = "checkbox";
  // `auto` repeats the answer of another column, so it is asked where the user or the server's default wants it.
  box.checked = mode !== "auto";
  root.hidden = !box.checked;
  const label = document.createElement("label");
  label.append(box, ` ${mode}`);
  byId("modes").append(label);
  chosen.set(mode, box);
}

/** Ask in these columns, and show the outcome once no question is under way. */
async function follow(asked, body) {
  const { signal } = stopping;
  following++;
  byId("status").textContent = "Asking …";
  byId("stop").disabled = false;
  if (byId("in-turn").checked) {
    for (const column of asked) if (!signal.aborted) await column.ask(body);
  } else {
    await Promise.all(asked.map((column) => column.ask(body)));
  }
  if (--following) return;
  if (byId("stop") === document.activeElement) byId("question").focus();
  byId("stop").disabled = true;
  const failed = columns.filter((column) => column.problem);
  const snapshots = new Set(columns.map(({ root, snapshot }) => (root.hidden ? "" : snapshot)).filter(Boolean));
  byId("status").textContent = failed.length
    ? `Not answered: ${failed.map(({ mode }) => mode).join(", ")}.`
    : `Answered from snapshot ${[...snapshots].join(", ")}.`;
  // One message for all columns that failed alike.
  const [first] = failed;
  if (failed.length > 1 && failed.every(({ problem }) => problem.message === first.problem.message && !problem.waitS)) {
    byId("status").textContent += ` ${first.problem.message}`;
    for (const column of failed) column.shownProblem.hidden = true;
  }
  const keyless = failed.find(({ problem }) => problem.needsKey);
  if (keyless) askForKey(keyless.problem.message);
}

/** Offer a question again while it is typed. Like the key, it is kept in this page's memory only. */
function remember(question) {
  const list = byId("asked");
  for (const option of list.children) if (option.value === question) option.remove();
  const option = document.createElement("option");
  option.value = question;
  list.prepend(option);
  if (list.children.length > MOST_RECENT) list.lastChild.remove();
}

/** Stop the questions under way and those that wait for them. */
function stopAll() {
  stopping.abort();
  stopping = new AbortController();
  for (const column of columns) column.stop();
}

function askForKey(message) {
  byId("key-form").hidden = false;
  byId("status").textContent = message;
  byId("key").focus();
}

/** Ask the server what it answers with. This also shows whether a key is needed. */
async function greet() {
  try {
    const about = await (await send("v1/about")).json();
    for (const [mode, box] of chosen) {
      box.disabled = !about.modes.includes(mode);
      box.checked = about.modes.includes(mode) && (box.checked || mode === about.mode);
    }
    for (const column of columns) {
      column.badge.hidden = column.mode !== about.mode;
      column.root.hidden = !chosen.get(column.mode).checked;
    }
    byId("service").textContent = `${about.model}: one question, answered in each mode side by side.`;
    const examples = about.example_questions.map((question) => {
      const button = element("button", question);
      button.type = "button";
      button.addEventListener("click", () => {
        byId("question").value = question;
        byId("ask-form").requestSubmit();
      });
      return button;
    });
    byId("examples").replaceChildren("Try:", ...examples);
    byId("examples").hidden = examples.length === 0;
    byId("key-form").hidden = true;
    byId("status").textContent = "";
    return true;
  } catch (problem) {
    if (problem.needsKey) askForKey(problem.message);
    else byId("status").textContent = problem.message;
    return false;
  }
}

byId("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const body = { question: byId("question").value };
  remember(body.question);
  if (byId("top-k").value) body.top_k = byId("top-k").valueAsNumber;
  if (byId("max-tokens").value) body.max_tokens = byId("max-tokens").valueAsNumber;
  if (byId("weights").value) body.weights = byId("weights").value;
  stopAll();
  byId("spoken").replaceChildren();
  const asked = columns.filter(({ mode }) => chosen.get(mode).checked);
  for (const column of columns) {
    column.clear();
    column.root.hidden = !asked.includes(column);
  }
  follow(asked, body);
});

byId("stop").addEventListener("click", stopAll);

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = byId("key").value.trim();
  byId("key").value = "";
  byId("status").textContent = "Trying the key …";
  if (!(await greet())) return;
  byId("question").focus();
  // Ask again the questions that were refused without a valid key.
  const refused = columns.filter(({ problem }) => problem?.needsKey);
  if (refused.length) follow(refused, refused[0].body);
});

// Not the attribute `autofocus`: the key's field may have the focus before the browser comes to it.
if ((await greet()) && document.activeElement === document.body) byId("question").focus();
