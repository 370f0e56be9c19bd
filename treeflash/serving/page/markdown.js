// Markdown of the model as elements of the page. Nothing in it is loaded or run.

import { marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const TAGS = [
  "a", "b", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i",
  "li", "ol", "p", "pre", "s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
];

/** The elements of a text in Markdown; HTML in the text is shown as text. */
export function markdown(text) {
  const html = marked.parse(text, { breaks: true, walkTokens: showHtml });
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

function showHtml(token) {
  if (token.type !== "html") return;
  token.type = "text";
  token.text = token.raw;
  token.escaped = false;
  delete token.tokens;
}
