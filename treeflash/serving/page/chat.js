// The chat. Text of the model is only ever set as text, or as Markdown without HTML.

import { NextImages, imageFiles, thumbnail } from "./images.js";
import { markdown } from "./markdown.js";
import { complete, fetchPath } from "./stream.js";
import { drawTree } from "./tree.js";

const BUDGETS = ["auto", 1, 4, 8, 16, 32, 64, 128, 256];
const SHADES = 6;
const byId = (id) => document.getElementById(id);
const [log, form, prompt, send, stop] = ["log", "form", "prompt", "send", "stop"].map(byId);
const SETTINGS = [
  "models", "budget", "temperature", "length", "seed", "system", "compare", "markdown",
];
const STORED = "treeflash";
const STORE_AFTER_MS = 1000; // how much of an answer a crash may cost
const messages = []; // each with a turn of the log
const nextImages = new NextImages(byId("images"), tell);
let models = []; // what the server tells of each
let takesImages = false; // whether the chosen model does
let shown = null; // the answer whose iterations can be chosen
let request = null;
let comparison = null; // the request of the plain answer
let marked = []; // the tokens of the chosen iteration
let edited = null; // the index of the message that the next one replaces
let draft = ""; // the content of the next message before that
let unanswered = null; // what was sent, until it is answered, and the messages before
let storing = null; // the timer of the next `store`

/**
 * One answer: its message, which is stopped until it is complete, and what was measured. The first
 * iteration is the prefill, which is not counted.
 */
class Answer {
  constructor(place) {
    this.place = place;
    this.message = { role: "assistant", content: "", thoughts: "", stopped: true };
    this.iterations = [];
    this.spans = []; // of the tokens of each iteration
    this.tokens = 0;
    this.seconds = 0;
    this.reading = element("p", "note"); // how much of the prompt has run, before the first token
  }

  showPrompt({ processed, total }) {
    this.reading.textContent = `Reading the prompt: ${processed} of ${total} tokens`;
    this.place?.after(this.reading);
  }

  add({ delta, draft_tree: tree }) {
    const { reasoning_content: thought, content } = delta;
    this.message.thoughts += thought ?? "";
    this.message.content += content ?? "";
    if (!tree) return;
    this.reading.remove();
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
      const kind = `token shade-${tree.iteration % SHADES}${thought ? " thought" : ""}`;
      const span = element("span", kind, part);
      span.dataset.iteration = tree.iteration;
      span.title = `iteration ${tree.iteration}, ${tree.tokens.length} tokens`;
      return span;
    });
    this.place.append(...this.spans[tree.iteration]);
  }

  get text() {
    return this.message.thoughts + this.message.content;
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

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function turn(who, text = "") {
  const made = element("div", `turn ${who}`, text);
  made.dataset.who = who === "user" ? "You" : who === "error" ? "Error" : "Model";
  log.append(made);
  log.scrollTop = log.scrollHeight;
  return made;
}

/** The turns of the messages, in their order. */
function turns() {
  return [...log.querySelectorAll(".user, .assistant")];
}

function button(className, label, act) {
  const made = element("button", className, label);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

/** Add a message of the user: its images, its text, and a button that edits it. */
function userTurn(content) {
  const { text, urls } = partsOf(content);
  const made = turn("user");
  const images = element("div", "images");
  images.append(...urls.map(thumbnail));
  const change = button("edit", "", () => {
    edit(turns().indexOf(made));
    prompt.focus();
  });
  change.setAttribute("aria-label", "Edit"); // it has no text, which would be copied with the message
  made.append(images, text, change);
  log.scrollTop = log.scrollHeight;
}

/** The content of a message: a text or, after images, parts. */
function contentOf(text, urls) {
  if (!urls.length) return text;
  const images = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  return [...images, { type: "text", text }];
}

/** The text and the images of a message's content. */
function partsOf(content) {
  if (typeof content === "string") return { text: content, urls: [] };
  const images = content.slice(0, -1);
  return { text: content.at(-1).text, urls: images.map((part) => part.image_url.url) };
}

/** Change the log; if its end is in view, it stays in view. */
function follow(change) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

/** Add an answer, first as its tokens; `finishTurn` adds the rest. */
function answerTurn({ thoughts = "", content = "" } = {}) {
  const made = turn("assistant");
  const tokens = element("div", "tokens");
  tokens.append(element("span", "thought", thoughts), content);
  made.append(tokens);
  return tokens;
}

/**
 * Add the same text as Markdown, whether it was stopped, and buttons: one that copies it, without
 * the thoughts before it, and one that replaces it.
 */
function finishTurn(tokens, { content, thoughts = "", stopped = false }) {
  const formatted = element("div", "formatted");
  formatted.append(element("div", "thought", thoughts), markdown(content));
  const copy = button("copy", "Copy", async () => {
    copy.textContent = (await copyText(content || thoughts)) ? "Copied" : "Not copied";
    copy.focus();
  });
  const again = button("regenerate", "Regenerate", () => {
    const index = turns().indexOf(tokens.parentElement) - 1;
    endEdit();
    ask(messages[index].content, index);
    stop.focus();
  });
  again.title = "Replace this answer; with temperature 0 or a seed its text stays the same";
  const note = element("p", "note", stopped ? "Stopped" : "");
  follow(() => tokens.after(formatted, note, copy, again));
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
  clearTimeout(storing);
  storing = null;
  const field = (id) => (byId(id).type === "checkbox" ? byId(id).checked : byId(id).value);
  const settings = Object.fromEntries(SETTINGS.map((id) => [id, field(id)]));
  keep({ messages, ...unanswered, settings }) || keep({ settings });
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
    else finishTurn(answerTurn(message), message);
  }
  if (stored.index !== undefined) giveBack(stored);
}

function body(conversation, extra) {
  const system = byId("system").value.trim();
  return {
    model: byId("models").value,
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      ...conversation.map(({ role, content }) => ({ role, content })),
    ],
    stream: true,
    stream_options: { include_draft_trees: true },
    return_progress: true,
    temperature: Number(byId("temperature").value),
    max_tokens: Number(byId("length").value),
    ...extra,
  };
}

/** Read one answer, and keep what is shown up to date. */
async function read(answer, name, sent, signal) {
  for await (const chunk of complete(sent, byId("key").value, signal)) {
    if (chunk.prompt_progress) {
      follow(() => answer.showPrompt(chunk.prompt_progress));
      continue;
    }
    for (const choice of chunk.choices) {
      follow(() => answer.add(choice));
      byId(`${name}-speed`).textContent = answer.speed.toFixed(1);
      byId(`${name}-efficiency`).textContent = answer.efficiency.toFixed(2);
      if (!answer.place) continue;
      if (answer.text) unanswered = null;
      choose(answer.iterations.length);
      storing ??= setTimeout(store, STORE_AFTER_MS);
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

/** Send a message, which replaces the messages from an index on once it is answered. */
async function ask(content, index = messages.length) {
  comparison?.abort();
  request = new AbortController();
  busy(true);
  blank();
  log.querySelector(".hint")?.remove();
  const nodes = [...log.childNodes];
  const before = shown;
  unanswered = { messages: [...messages], content, index };
  const replaced = turns()[index];
  while (replaced && log.contains(replaced)) log.lastChild.remove();
  userTurn(content);
  const answer = new Answer(answerTurn());
  shown = answer;
  messages.splice(index, messages.length, { role: "user", content });
  const seed = byId("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number(byId("seed").value);
  const plainBody = body(messages, { seed, method: "ar" });
  const treeBody = body(messages, { seed, budget: BUDGETS[byId("budget").value] });
  messages.push(answer.message);
  store();
  const { signal } = request;
  try {
    await read(answer, "tree", treeBody, signal);
    delete answer.message.stopped;
  } catch (error) {
    if (signal.reason === "new chat") return;
    if (!answer.text) {
      messages.splice(0, messages.length, ...unanswered.messages);
      log.replaceChildren(...nodes);
      shown = before;
      busy(false);
      giveBack(unanswered);
      store(); // with what was sent: a reload makes a request fail, too
      unanswered = null;
      return tell(error);
    }
    tell(error);
  }
  unanswered = null;
  finishTurn(answer.place, answer.message);
  store();
  busy(false);
  if (!answer.message.stopped && byId("compare").checked) await compare(answer, plainBody);
}

/** Put what was not answered in the next message, before what was typed since. */
function giveBack({ content, index }) {
  const replaced = messages[index];
  if (replaced?.content === content) return; // it is in the chat
  if (replaced) {
    edit(index);
    return compose(content);
  }
  const { text, urls } = partsOf(content);
  const typed = [text, prompt.value].filter(Boolean).join("\n");
  compose(contentOf(typed, [...urls, ...nextImages.urls]));
}

/** Put a content in the next message. */
function compose(content) {
  const { text, urls } = partsOf(content);
  prompt.value = text;
  nextImages.set(urls);
}

/** Let the next message replace a message and what follows it. */
function edit(index) {
  endEdit();
  draft = contentOf(prompt.value, nextImages.take());
  compose(messages[index].content);
  showEdited(index);
}

/** Let the next message follow the others again, and be what it was before. */
function endEdit() {
  if (edited === null) return;
  compose(draft);
  showEdited(null);
}

function showEdited(index) {
  edited = index;
  turns().forEach((made, i) => made.classList.toggle("replaced", i >= (index ?? Infinity)));
  byId("editing").textContent = index === null ? "" : "The next message replaces the faded ones.";
  byId("cancel").hidden = index === null;
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
  const sent = contentOf(text, nextImages.take());
  const index = edited ?? messages.length;
  compose("");
  endEdit();
  ask(sent, index);
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
  if (event.key !== "Escape" || isComposing(event)) return;
  if (stop.hidden) endEdit();
  else request.abort();
});
byId("cancel").addEventListener("click", () => {
  endEdit();
  prompt.focus();
});
byId("clear").addEventListener("click", () => {
  request?.abort("new chat");
  comparison?.abort();
  endEdit();
  messages.length = 0;
  unanswered = null;
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
addEventListener("pagehide", () => storing && store());
byId("markdown").addEventListener("change", showMarkdown);
byId("models").addEventListener("change", chooseModel);
byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!(await nameModel())) return;
  byId("key-form").hidden = true;
  log.querySelectorAll(".error").forEach((error) => error.remove());
  prompt.focus();
});

/** Show the models, or why there are none; returns whether the server accepts the key. */
async function nameModel() {
  const key = byId("key").value;
  try {
    models = (await (await fetchPath("v1/models", key)).json()).data;
    const [choice, names] = [byId("models"), models.map(({ id }) => id)];
    const last = kept().settings?.models;
    choice.replaceChildren(...names.map((name) => new Option(name)));
    if (names.includes(last)) choice.value = last;
    choice.hidden = names.length === 1;
    byId("model").textContent = names.length === 1 ? names[0] : "";
    chooseModel();
    return true;
  } catch (error) {
    const refused = error.status === 401;
    if (refused) askForKey();
    const reason = key ? "wrong API key" : "API key needed";
    byId("model").textContent = refused ? reason : error.message;
    return false;
  }
}

/** Obey the choice of a model, which the next message is for. */
function chooseModel() {
  const model = models.find(({ id }) => id === byId("models").value);
  takesImages = model.input_modalities.includes("image");
  byId("add-image").hidden = !takesImages;
}

function showMarkdown() {
  log.classList.toggle("as-markdown", byId("markdown").checked);
}

restore();
showMarkdown();
log.scrollTop = log.scrollHeight;
label();
nameModel();
prompt.focus();
