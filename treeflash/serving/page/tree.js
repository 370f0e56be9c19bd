// Draws draft trees: depth from left to right, the accepted path filled.

const NAMESPACE = "http://www.w3.org/2000/svg";
const COLUMN = 96;
const ROW = 24;
const MAX_LABEL = 11; // characters

/** Replace what `place` shows by a tree: `nodes` (texts), `parents` and `path` (indices). */
export function drawTree(place, { nodes, parents, path }) {
  const { columns, rows, height } = layout(parents);
  const accepted = new Set(path);
  const width = (Math.max(...columns) + 1) * COLUMN + 8;
  const svg = element("svg", { width, height: height * ROW + 8 });
  const x = (node) => 8 + columns[node] * COLUMN;
  const y = (node) => ROW / 2 + 8 + rows[node] * ROW;
  parents.forEach((parent, node) => {
    if (parent < 0) return;
    const from = x(parent) + 6;
    const middle = x(node) - 12;
    const d = `M${from} ${y(parent)}H${middle}V${y(node)}H${x(node)}`;
    svg.append(element("path", { d, class: kind("edge", accepted.has(node)) }));
  });
  // Accepted edges last, so that they are on top.
  svg.append(...svg.querySelectorAll(".accepted"));
  nodes.forEach((text, node) => {
    const name = accepted.has(node);
    svg.append(element("circle", { cx: x(node), cy: y(node), r: 4.5, class: kind("node", name) }));
    const label = element("text", { x: x(node) + 8, y: y(node) - 6, class: kind("label", name) });
    label.textContent = short(text);
    const title = element("title", {});
    title.textContent = JSON.stringify(text);
    label.append(title);
    svg.append(label);
  });
  place.replaceChildren(svg);
}

/** The column and the row of each node; a node stands in the row of its first child. */
function layout(parents) {
  const columns = [];
  const children = parents.map(() => []);
  parents.forEach((parent, node) => {
    columns[node] = parent < 0 ? 0 : columns[parent] + 1;
    if (parent >= 0) children[parent].push(node);
  });
  const rows = [];
  let height = 0;
  const visit = (node) => {
    children[node].forEach(visit);
    rows[node] = children[node].length ? rows[children[node][0]] : height++;
  };
  visit(0);
  return { columns, rows, height };
}

function kind(name, accepted) {
  return accepted ? `${name} accepted` : name;
}

function short(text) {
  const shown = text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
  return shown.length > MAX_LABEL ? `${shown.slice(0, MAX_LABEL - 1)}…` : shown;
}

function element(name, attributes) {
  const made = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
