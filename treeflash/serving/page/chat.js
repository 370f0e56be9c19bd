// The chat. Text of the model is only ever set as text, never as HTML.

import { complete, reason } from "./stream.js";
import { drawTree } from "./tree.js";

const BUDGETS = ["auto", 1, 4, 8, 16, 32, 64, 128, 256];
const SHADES = 6;
const byId = (id) => document.getElementById(id);
const [log, form, prompt, send, stop] = ["log", "form", "prompt", "send", "stop"].map(byId);
const messages = [];
let shown = null; // the answer whose iterations can be chosen
let request = null;

/** What was measured of one answer. The first iteration is the prefill, which is not counted. */
class Answer {
  constructor(place) {
    this.place = place;
    this.iterations = [];
    this.text = "";
    this.content = "";
    this.tokens = 0;
    this.seconds = 0;
  }

  add({ delta, draft_tree: tree }) {
    this.content += delta.content ?? "";
    const text = (delta.reasoning_content ?? "") + (delta.content ?? "");
    this.text += text;
    if (!tree) return;
    if (tree.iteration > 0) {
      this.iterations.push(tree);
      this.tokens += tree.tokens.length;
      this.seconds += tree.seconds;
    }
    if (this.place) this.#show(text, tree, Boolean(delta.reasoning_content));
  }

  #show(text, tree, thought) {
    const parts = tree.tokens.join("") === text ? tree.tokens : [text];
    for (const part of parts) {
      const span = document.createElement("span");
      span.className = `token shade-${tree.iteration % SHADES}${thought ? " thought" : ""}`;
      span.dataset.iteration = tree.iteration;
      span.title = `iteration ${tree.iteration}, ${tree.tokens.length} tokens`;
      span.textContent = part;
      this.place.append(span);
    }
  }

  get speed() {
    return this.seconds ? this.tokens / this.seconds : 0;
  }

  get efficiency() {
    return this.iterations.length ? this.tokens / this.iterations.length : 0;
  }
}

function turn(who, text = "") {
  const made = document.createElement("div");
  made.className = `turn ${who}`;
  made.dataset.who = who === "user" ? "You" : who === "error" ? "Error" : "Model";
  made.textContent = text;
  log.append(made);
  log.scrollTop = log.scrollHeight;
  return made;
}

function body(extra) {
  return {
    messages,
    stream: true,
    stream_options: { include_draft_trees: true },
    temperature: Number(byId("temperature").value),
    max_tokens: Number(byId("length").value),
    ...extra,
  };
}

/** Read one answer, and keep what is shown up to date. */
async function read(answer, name, extra) {
  for await (const chunk of complete(body(extra), byId("key").value, request.signal)) {
    for (const choice of chunk.choices) {
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
      answer.add(choice);
      byId(`${name}-speed`).textContent = answer.speed.toFixed(1);
      byId(`${name}-efficiency`).textContent = answer.efficiency.toFixed(2);
      if (!answer.place) continue;
      choose(answer.iterations.length);
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  }
}

async function ask(text) {
  request = new AbortController();
  busy(true);
  for (const name of ["tree-speed", "tree-efficiency", "plain-speed", "plain-efficiency"]) {
    byId(name).textContent = "–";
  }
  const verdict = byId("verdict");
  verdict.textContent = "";
  log.querySelector(".hint")?.remove();
  turn("user", text);
  messages.push({ role: "user", content: text });
  const answer = new Answer(turn("assistant"));
  shown = answer;
  const seed = Math.floor(Math.random() * 2 ** 31);
  try {
    await read(answer, "tree", { seed, budget: BUDGETS[byId("budget").value] });
    if (byId("compare").checked) {
      verdict.textContent = "Decoding the same answer plainly …";
      const plain = new Answer(null);
      await read(plain, "plain", { seed, method: "ar" });
      const times = plain.speed ? answer.speed / plain.speed : 0;
      const same = plain.text === answer.text ? "the same text" : "another text";
      verdict.textContent = `Plain decoding gives ${same}; draft trees are ${times.toFixed(2)} times as fast.`;
    }
  } catch (error) {
    if (error.status === 401) askForKey();
    verdict.textContent = "";
    if (error.name !== "AbortError") turn("error", error.message);
  }
  messages.push({ role: "assistant", content: answer.content });
  busy(false);
}

/** Show an iteration's tree, and mark its tokens. */
function choose(number) {
  const slider = byId("iteration");
  const count = shown?.iterations.length ?? 0;
  slider.disabled = !count;
  slider.max = Math.max(1, count);
  slider.value = number;
  log.querySelectorAll(".shown").forEach((span) => span.classList.remove("shown"));
  if (!count) return;
  const tree = shown.iterations[Number(slider.value) - 1];
  shown.place
    .querySelectorAll(`[data-iteration="${tree.iteration}"]`)
    .forEach((span) => span.classList.add("shown"));
  const drafted = tree.nodes.length - 1;
  byId("caption").textContent =
    `Draft tree of iteration ${tree.iteration}: ${tree.path.length - 1} of ${drafted} drafted ` +
    "tokens accepted, and one token of the target";
  drawTree(byId("tree"), tree);
}

function busy(yes) {
  send.hidden = yes;
  stop.hidden = !yes;
  (yes ? stop : prompt).focus();
}

function askForKey() {
  byId("key-field").hidden = false;
  byId("key").focus();
}

function label() {
  byId("budget-value").textContent = BUDGETS[byId("budget").value];
  byId("temperature-value").textContent = Number(byId("temperature").value).toFixed(1);
  byId("length-value").textContent = `${byId("length").value} tokens`;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || !stop.hidden) return;
  prompt.value = "";
  ask(text);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
stop.addEventListener("click", () => request.abort());
byId("clear").addEventListener("click", () => {
  request?.abort();
  messages.length = 0;
  shown = null;
  log.replaceChildren();
  byId("tree").replaceChildren();
  byId("caption").textContent = "Draft tree";
  byId("verdict").textContent = "";
  choose(1);
  prompt.focus();
});
byId("iteration").addEventListener("input", (event) => choose(event.target.value));
log.addEventListener("click", (event) => {
  const number = event.target.dataset?.iteration;
  if (shown && shown.place.contains(event.target) && number > 0) choose(number);
});
for (const id of ["budget", "temperature", "length"]) byId(id).addEventListener("input", label);
byId("key").addEventListener("change", nameModel);

async function nameModel() {
  const key = byId("key").value;
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch("v1/models", { headers });
  if (response.status === 401) askForKey();
  byId("model").textContent = response.ok
    ? (await response.json()).data[0].id
    : await reason(response);
}

label();
nameModel();
prompt.focus();
