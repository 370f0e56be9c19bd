// Markdown of the model as elements of the page. Nothing in it is loaded or run.

import { marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const TAGS = [
  "a", "b", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i",
  "li", "ol", "p", "pre", "s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
];

// Shown as the model wrote them: HTML, the places of images, which are not loaded, the boxes of
// tasks, and the brackets of formulas, as in \(x\).
const AS_WRITTEN = ["html", "image", "checkbox"];
const FORMULA = /^\\[()[\]]$/;

/** The elements of a text in Markdown, or the text itself if it is nested too deeply to be laid out. */
export function markdown(text) {
  let html;
  try {
    html = marked.parse(text, { breaks: true, walkTokens: showAsWritten });
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // the stack is full
    return document.createTextNode(text);
  }
  const made = DOMPurify.sanitize(html, {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ["href", "start", "align"],
    RETURN_DOM_FRAGMENT: true,
  });
  for (const link of made.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  return made;
}

function showAsWritten(token) {
  if (!AS_WRITTEN.includes(token.type) && !FORMULA.test(token.raw)) return;
  token.type = "text";
  token.text = token.raw;
  token.escaped = false;
  delete token.tokens;
}
