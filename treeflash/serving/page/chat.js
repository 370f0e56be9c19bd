// The chat. Text of the model is only ever set as text, or as Markdown without HTML.

import { NextImages, imageFiles, thumbnail } from "./images.js";
import { markdown } from "./markdown.js";
import { complete, fetchPath } from "./stream.js";
import { drawTree } from "./tree.js";

const BUDGETS = ["auto", 1, 4, 8, 16, 32, 64, 128, 256];
const SHADES = 6;
const byId = (id) => document.getElementById(id);
const [log, form, prompt, send, stop] = ["log", "form", "prompt", "send", "stop"].map(byId);
const SETTINGS = ["budget", "temperature", "length", "seed", "system", "compare", "markdown"];
const STORED = "treeflash";
const messages = [];
const nextImages = new NextImages(byId("images"), tell);
let takesImages = false; // whether the model does
let shown = null; // the answer whose iterations can be chosen
let request = null;
let comparison = null; // the request of the plain answer
let marked = []; // the tokens of the chosen iteration

/** What was measured of one answer. The first iteration is the prefill, which is not counted. */
class Answer {
  constructor(place) {
    this.place = place;
    this.iterations = [];
    this.spans = []; // of the tokens of each iteration
    this.thoughts = "";
    this.content = "";
    this.tokens = 0;
    this.seconds = 0;
  }

  add({ delta, draft_tree: tree }) {
    const { reasoning_content: thought, content } = delta;
    this.thoughts += thought ?? "";
    this.content += content ?? "";
    if (!tree) return;
    if (tree.iteration > 0) {
      this.iterations.push(tree);
      this.tokens += tree.tokens.length;
      this.seconds += tree.seconds;
    }
    if (this.place) this.#show((thought ?? "") + (content ?? ""), tree, Boolean(thought));
  }

  #show(text, tree, thought) {
    const parts = tree.tokens.join("") === text ? tree.tokens : [text];
    this.spans[tree.iteration] = parts.map((part) => {
      const span = document.createElement("span");
      span.className = `token shade-${tree.iteration % SHADES}${thought ? " thought" : ""}`;
      span.dataset.iteration = tree.iteration;
      span.title = `iteration ${tree.iteration}, ${tree.tokens.length} tokens`;
      span.textContent = part;
      return span;
    });
    this.place.append(...this.spans[tree.iteration]);
  }

  get text() {
    return this.thoughts + this.content;
  }

  get speed() {
    return this.seconds ? this.tokens / this.seconds : 0;
  }

  /** Iterations without a draft, because drafts would have cost more time than they save. */
  get paused() {
    return this.iterations.filter((tree) => tree.paused).length;
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

/** Add a message of the user: its images and its text. */
function userTurn(content) {
  if (typeof content === "string") return turn("user", content);
  const made = turn("user");
  const images = document.createElement("div");
  images.className = "images";
  images.append(...content.slice(0, -1).map((part) => thumbnail(part.image_url.url)));
  made.append(images, content.at(-1).text);
  log.scrollTop = log.scrollHeight;
  return made;
}

/** The content of a message: a text or, after images, parts. */
function contentOf(text, urls) {
  if (!urls.length) return text;
  const images = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  return [...images, { type: "text", text }];
}

/** Change the log; if its end is in view, it stays in view. */
function follow(change) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/** Add an answer, first as its tokens; `finishTurn` adds the rest. */
function answerTurn(text = "") {
  const made = turn("assistant");
  const tokens = document.createElement("div");
  tokens.className = "tokens";
  tokens.textContent = text;
  made.append(tokens);
  return tokens;
}

/** Add the same text as Markdown, and a button that copies it, without the thoughts before it. */
function finishTurn(tokens, text, thoughts = "") {
  const formatted = document.createElement("div");
  formatted.className = "formatted";
  const thought = document.createElement("div");
  thought.className = "thought";
  thought.textContent = thoughts;
  formatted.append(thought, markdown(text));
  const copy = document.createElement("button");
  copy.type = "button";
  copy.textContent = "Copy";
  copy.addEventListener("click", async () => {
    copy.textContent = (await copyText(text || thoughts)) ? "Copied" : "Not copied";
    copy.focus();
  });
  follow(() => tokens.after(formatted, copy));
}

/** Copy a text; returns whether the browser lets the page do it. */
async function copyText(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  // Browsers keep this interface from pages of other machines without TLS.
  const field = document.createElement("textarea");
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  return copied;
}

/** Keep the chat and the settings for a reload; the settings alone if images take too much room. */
function store() {
  const field = (id) => (byId(id).type === "checkbox" ? byId(id).checked : byId(id).value);
  const settings = Object.fromEntries(SETTINGS.map((id) => [id, field(id)]));
  keep({ messages, settings }) || keep({ settings });
}

/** Keep a value for this tab and for the next new one; returns whether the browser does so. */
function keep(value) {
  try {
    for (const storage of [sessionStorage, localStorage]) {
      storage.setItem(STORED, JSON.stringify(value));
    }
    return true;
  } catch {
    return false;
  }
}

function kept() {
  try {
    const [own, last] = [sessionStorage, localStorage].map((storage) => storage.getItem(STORED));
    return JSON.parse(own ?? last) ?? {};
  } catch {
    return {};
  }
}

function restore() {
  const stored = kept();
  for (const id of SETTINGS) {
    const value = stored.settings?.[id];
    if (value !== undefined) byId(id)[byId(id).type === "checkbox" ? "checked" : "value"] = value;
  }
  for (const message of stored.messages ?? []) {
    log.querySelector(".hint")?.remove();
    messages.push(message);
    if (message.role === "user") userTurn(message.content);
    else finishTurn(answerTurn(message.content), message.content);
  }
}

function body(conversation, extra) {
  const system = byId("system").value.trim();
  return {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...conversation],
    stream: true,
    stream_options: { include_draft_trees: true },
    temperature: Number(byId("temperature").value),
    max_tokens: Number(byId("length").value),
    ...extra,
  };
}

/** Read one answer, and keep what is shown up to date. */
async function read(answer, name, sent, signal) {
  for await (const chunk of complete(sent, byId("key").value, signal)) {
    for (const choice of chunk.choices) {
      follow(() => answer.add(choice));
      byId(`${name}-speed`).textContent = answer.speed.toFixed(1);
      byId(`${name}-efficiency`).textContent = answer.efficiency.toFixed(2);
      if (answer.place) choose(answer.iterations.length);
    }
  }
  if (answer.place && answer.paused) {
    byId("pause").textContent =
      `Drafting was paused in ${answer.paused} of ${answer.iterations.length} iterations: ` +
      "drafts cost more time here than they save.";
  }
}

/** Remove what was measured of the last answer. */
function blank() {
  for (const name of ["tree-speed", "tree-efficiency", "plain-speed", "plain-efficiency"]) {
    byId(name).textContent = "–";
  }
  for (const name of ["verdict", "pause"]) byId(name).textContent = "";
}

async function ask(text, urls) {
  comparison?.abort();
  request = new AbortController();
  busy(true);
  blank();
  log.querySelector(".hint")?.remove();
  const content = contentOf(text, urls);
  const asked = userTurn(content);
  messages.push({ role: "user", content });
  const answer = new Answer(answerTurn());
  shown = answer;
  const seed = byId("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(byId("seed").value);
  const plainBody = body([...messages], { seed, method: "ar" });
  const treeBody = body([...messages], { seed, budget: BUDGETS[byId("budget").value] });
  const { signal } = request;
  let finished = false;
  try {
    await read(answer, "tree", treeBody, signal);
    finished = true;
  } catch (error) {
    if (signal.reason === "new chat") return;
    if (!answer.text) {
      // Nothing was answered: the message can be sent again, with what was typed since.
      asked.remove();
      answer.place.parentElement.remove();
      messages.pop();
      shown = null;
      prompt.value = [text, prompt.value].filter(Boolean).join("\n");
      nextImages.set([...urls, ...nextImages.urls]);
      busy(false);
      return tell(error);
    }
    tell(error);
  }
  messages.push({ role: "assistant", content: answer.content });
  finishTurn(answer.place, answer.content, answer.thoughts);
  store();
  busy(false);
  if (finished && byId("compare").checked) await compare(answer, plainBody);
}

/** Decode the same answer plainly. A new message ends this. */
async function compare(answer, sent) {
  const verdict = byId("verdict");
  comparison = new AbortController();
  verdict.textContent = "Decoding the same answer plainly …";
  try {
    const plain = new Answer(null);
    await read(plain, "plain", sent, comparison.signal);
    const times = plain.speed ? answer.speed / plain.speed : 0;
    const same = plain.text === answer.text ? "the same text" : "another text";
    verdict.textContent = `Plain decoding gives ${same}; draft trees are ${times.toFixed(2)} times as fast.`;
  } catch (error) {
    if (error.name === "AbortError") return;
    verdict.textContent = "";
    tell(error);
  }
}

function tell(error) {
  if (error.status === 401) askForKey();
  if (error.name !== "AbortError") turn("error", error.message);
}

/** Show an iteration's tree, and mark its tokens. */
function choose(number) {
  const slider = byId("iteration");
  const count = shown?.iterations.length ?? 0;
  slider.disabled = !count;
  slider.max = Math.max(1, count);
  slider.value = number;
  for (const span of marked) span.classList.remove("shown");
  marked = [];
  if (!count) return;
  const tree = shown.iterations[Number(slider.value) - 1];
  marked = shown.spans[tree.iteration];
  for (const span of marked) span.classList.add("shown");
  const drafted = tree.nodes.length - 1;
  byId("caption").textContent =
    `Draft tree of iteration ${tree.iteration}: ${tree.path.length - 1} of ${drafted} drafted ` +
    "tokens accepted, and one token of the target";
  drawTree(byId("tree"), tree);
}

/** Offer to stop, or to send. The focus moves only where its button disappears. */
function busy(yes) {
  const [before, after] = yes ? [send, stop] : [stop, prompt];
  const moves = document.activeElement === before;
  send.hidden = yes;
  stop.hidden = !yes;
  log.ariaBusy = yes; // screen readers read an answer when it is complete
  if (moves) after.focus();
}

function askForKey() {
  byId("key-form").hidden = false;
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
  ask(text, nextImages.take());
});
byId("add-image").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", async ({ target }) => {
  await nextImages.add(target.files);
  target.value = "";
  prompt.focus();
});
prompt.addEventListener("paste", (event) => {
  const files = imageFiles(event.clipboardData);
  if (!takesImages || !files.length) return;
  event.preventDefault();
  nextImages.add(files);
});
const chat = document.querySelector(".chat");
for (const name of ["dragover", "dragleave", "drop"]) {
  chat.addEventListener(name, (event) => {
    if (!takesImages || !event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    chat.classList.toggle("dropping", name === "dragover");
    if (name === "drop") nextImages.add(imageFiles(event.dataTransfer));
  });
}
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
  event.preventDefault();
  form.requestSubmit();
});
/** Whether a key belongs to an input method. Safari ends the composition before its last key. */
function isComposing(event) {
  return event.isComposing || event.keyCode === 229;
}
stop.addEventListener("click", () => request.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !stop.hidden && !isComposing(event)) request.abort();
});
byId("clear").addEventListener("click", () => {
  request?.abort("new chat");
  comparison?.abort();
  messages.length = 0;
  nextImages.set([]);
  store();
  busy(false);
  shown = null;
  log.replaceChildren();
  byId("tree").replaceChildren();
  byId("caption").textContent = "Draft tree";
  blank();
  choose(1);
  prompt.focus();
});
byId("iteration").addEventListener("input", (event) => choose(event.target.value));
log.addEventListener("click", (event) => {
  const number = event.target.dataset?.iteration;
  if (shown && shown.place.contains(event.target) && number > 0) choose(number);
});
for (const id of ["budget", "temperature", "length"]) byId(id).addEventListener("input", label);
for (const id of SETTINGS) byId(id).addEventListener("change", store);
byId("markdown").addEventListener("change", showMarkdown);
byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!(await nameModel())) return;
  byId("key-form").hidden = true;
  log.querySelectorAll(".error").forEach((error) => error.remove());
  prompt.focus();
});

/** Show the name of the model, or why there is none; returns whether the server accepts the key. */
async function nameModel() {
  const key = byId("key").value;
  try {
    const [model] = (await (await fetchPath("v1/models", key)).json()).data;
    byId("model").textContent = model.id;
    takesImages = model.input_modalities.includes("image");
    byId("add-image").hidden = !takesImages;
    return true;
  } catch (error) {
    const refused = error.status === 401;
    if (refused) askForKey();
    const reason = key ? "wrong API key" : "API key needed";
    byId("model").textContent = refused ? reason : error.message;
    return false;
  }
}

function showMarkdown() {
  log.classList.toggle("as-markdown", byId("markdown").checked);
}

restore();
showMarkdown();
label();
nameModel();
prompt.focus();
