"use strict";
// The table of all neurons, and what one of them reads and writes when it is chosen.

const atlas = decoded("atlas"), place = id => document.getElementById(id), nothing = "–";
const names = atlas.layer.map((layer, i) => `L${layer}N${atlas.neuron[i]}`);
const lower = atlas.rule.map((rule, i) => `${names[i]} ${rule}`.toLowerCase().replaceAll(",", ""));
const shown = (value, n = 3) => value === null ? nothing : digits(value, n);
const PAGE = 100;

function unpacked({scale, base64}) {
  const bytes = Uint8Array.from(atob(base64), letter => letter.charCodeAt(0)), view = new DataView(bytes.buffer);
  return Float64Array.from({length: bytes.length / 2}, (_, i) => view.getInt16(2 * i, true) * scale);
}
const boards = unpacked(atlas.boards), logits = unpacked(atlas.logits);

// Each column: its title, its value for sorting, its words.
const columns = [
  ["neuron", i => i, i => names[i]],
  ["rule", i => atlas.rule[i], i => atlas.rule[i]],
  ["F1", i => atlas.f1[i], i => atlas.f1[i].toFixed(2)],
  ["explained", i => atlas.explained[i], i => `${(100 * atlas.explained[i]).toFixed(0)}%`],
  ["acts on it", i => atlas.check[i] ? Number(atlas.check[i][3]) : -1,
   i => atlas.check[i] ? (atlas.check[i][3] ? "yes" : "not shown") : nothing],
  ...["std", "kurtosis", "selectivity"].map(name =>
    [name, i => atlas.statistics[name][i] ?? -Infinity, i => shown(atlas.statistics[name][i])]),
];
let sorted = {column: 2, ascending: false}, matching = [], limit = PAGE;

function select() {
  const words = place("search").value.toLowerCase().split(/[,\s]+/).filter(Boolean).join(" ");
  const layer = place("layer").value, quality = Number(place("quality").value), acts = place("acts").checked;
  const named = names.findIndex(name => name.toLowerCase() === words);  // a whole name is that neuron alone
  matching = names.map((_, i) => i).filter(i =>
    (layer === "" || atlas.layer[i] === Number(layer)) && atlas.f1[i] > quality &&
    (!acts || (atlas.check[i] && atlas.check[i][3])) &&
    (named >= 0 ? i === named : lower[i].includes(words)));
  const value = columns[sorted.column][1], sign = sorted.ascending ? 1 : -1;
  matching.sort((a, b) => { const x = value(a), y = value(b); return x < y ? -sign : x > y ? sign : a - b; });
  limit = PAGE;
  draw();
}

function draw() {
  place("head").innerHTML = columns.map(([title], c) => {
    const order = c === sorted.column ? (sorted.ascending ? "ascending" : "descending") : "none";
    const arrow = {ascending: " ▲", descending: " ▼", none: ""}[order];
    return `<th aria-sort="${order}"><button data-column="${c}">${title}${arrow}</button></th>`;
  }).join("");
  place("rows").innerHTML = matching.slice(0, limit).map(i => `<tr tabindex="0" data-neuron="${i}" ` +
    `aria-selected="${names[i] === location.hash.slice(1)}">` +
    columns.map(([, , words]) => `<td>${escaped(words(i))}</td>`).join("") + "</tr>").join("");
  place("count").textContent = `${matching.length} neurons`;
  place("more").hidden = matching.length <= limit;
}

function detail(i) {
  const part = k => [...boards.slice(256 * i + 64 * k, 256 * i + 64 * k + 64)], weights = [...logits.slice(64 * i, 64 * i + 64)];
  const cosines = largest([0, 1, 2, 3].flatMap(part));
  const drawn = ["reads blank", "reads mine (+) and theirs", "writes blank", "writes mine (+) and theirs"].map((title, k) =>
    drawBoard({title, cells: valueCells(part(k), cosines)}));
  drawn.push(drawBoard({title: "adds to the logits", cells: valueCells(weights, largest(weights))}));
  for (const [last, mover, discs, activation] of atlas.top[i]) {
    const cells = [...discs].map(disc => ["var(--felt)", {b: "black", w: "white", ".": "empty"}[disc]]);
    drawn.push(drawBoard({title: `${mover > 0 ? "black" : "white"} to move: ${shown(activation)}`, cells, discs, last}));
  }
  const check = atlas.check[i], statistics = Object.entries(atlas.words).map(([name, words]) =>
    `<li title="${escaped(words)}">${name.replaceAll("_", " ")} ${shown(atlas.statistics[name][i])}</li>`);
  place("detail").innerHTML = `<h2 style="margin-top:0">${names[i]}</h2><p><b>${escaped(atlas.rule[i])}</b>. On other games: ` +
    `precision ${atlas.precision[i].toFixed(2)}, recall ${atlas.recall[i].toFixed(2)}, F1 ${atlas.f1[i].toFixed(2)}; it leaves ` +
    `${(100 * (1 - atlas.explained[i])).toFixed(0)}% of the activation's variance unexplained.</p><p>` +
    (check ? `It adds ${digits(check[1], 3)} to the logit of ${check[0]} where it should fire, ${digits(check[2], 3)} at other ` +
             `positions of the same plies: ${check[3] ? "it acts on its rule" : "not shown to act on it"}.`
           : "Too few positions to check what it does.") +
    `</p><div class="boards">${drawn.join("")}</div><ul class="chips">${statistics.join("")}</ul>`;
  place("detail").hidden = false;
}

function choose(i) {
  history.replaceState(null, "", "#" + names[i]);
  for (const row of place("rows").children) row.setAttribute("aria-selected", Number(row.dataset.neuron) === i);
  detail(i);
  place("detail").scrollIntoView({block: "nearest"});
}

for (const id of ["search", "layer", "quality", "acts"]) place(id).addEventListener("input", select);
place("more").addEventListener("click", () => { limit += PAGE; draw(); });
place("head").addEventListener("click", event => {
  const button = event.target.closest("button");
  if (!button) return;
  const column = Number(button.dataset.column), same = column === sorted.column;
  sorted = {column, ascending: same ? !sorted.ascending : column < 2};
  select();
  place("head").querySelector(`[data-column="${column}"]`).focus();
});
const rowOf = event => event.target.closest("tr[data-neuron]");
place("rows").addEventListener("click", event => rowOf(event) && choose(Number(rowOf(event).dataset.neuron)));
place("rows").addEventListener("keydown", event => {
  if (!rowOf(event) || !["Enter", " "].includes(event.key)) return;
  event.preventDefault();
  choose(Number(rowOf(event).dataset.neuron));
});
const linked = () => { const i = names.indexOf(location.hash.slice(1)); if (i >= 0) detail(i); };
addEventListener("hashchange", () => { linked(); draw(); });
select();
linked();
