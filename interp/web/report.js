"use strict";
// The slider: every picture of the section is drawn anew for the move that it stands on.

const story = decoded("story"), slider = document.getElementById("move"), place = id => document.getElementById(id);
const relative = (state, mover) => [...state].map(disc => disc === "." ? 0 : (disc === "b") === (mover > 0) ? 1 : -1);
let timer = null;

function show(ply) {
  const mover = story.to_move[ply], discs = story.state[ply], last = story.moves[ply], legal = story.legal[ply];
  const side = mover > 0 ? "black" : "white", values = story.probabilities[ply];
  const words = `After move ${ply + 1}, ${label(last)}: ${side} to move`;
  slider.value = ply;
  slider.setAttribute("aria-valuetext", words);
  place("status").textContent = words;

  const names = {b: "black", w: "white", ".": "empty"};
  const cells = [...discs].map((disc, s) => ["var(--felt)", names[disc] + (legal.includes(s) ? ", legal" : "")]);
  place("board").innerHTML = drawBoard({title: `the board, ${side} to move`, cells, discs, dots: legal, last});
  place("predicted").innerHTML = drawBoard({title: "the model's next move", cells: valueCells(values, largest(values)),
                                            discs, dots: legal, last});
  const order = values.map((p, s) => [p, s]).filter(([p]) => p !== null).sort((a, b) => b[0] - a[0]).slice(0, legal.length);
  const right = order.filter(([, s]) => legal.includes(s)).length;
  const missed = legal.filter(s => !order.some(([, other]) => other === s));
  place("legality").textContent = `${right} of the ${legal.length} legal moves are among its first ${legal.length}` +
    (missed.length ? `; it misses ${missed.map(label).join(", ")}.` : ".");
  place("moves").innerHTML = order.map(([p, s]) =>
    `<li class="${legal.includes(s) ? "legal" : "illegal"}">${label(s)} ${(100 * p).toFixed(1)}%</li>`).join("");

  const truth = relative(discs, mover);
  place("truth").innerHTML = drawBoard({title: "the truth", cells: valueCells(truth, 1), discs, last});
  place("believed").innerHTML = story.believed[ply].map((believed, i) => {
    const wrong = story.wrong[ply][i];
    const title = `${story.believers[i]}: ` + (wrong.length ? `${wrong.length} wrong` : "all right");
    return drawBoard({title, cells: valueCells(believed, 1), discs, rings: wrong, last});
  }).join("");

  const move = story.explained[ply], parts = story.parts[ply];
  place("explained").textContent = label(move);
  place("parts").innerHTML = drawBars(story.labels, parts);
  place("heads").innerHTML = drawGrid(story.heads[ply]);
}

function drawBars(names, values) {
  const limit = largest(values), bars = names.map((name, i) => {
    const y = 8 + 20 * i, width = 110 * Math.abs(values[i]) / limit, up = values[i] >= 0;
    const x = up ? 190 : 190 - width, end = up ? 194 + width : 186 - width;
    return `<text x="76" y="${y + 13}" font-size="12" text-anchor="end" fill="var(--ink)">${name}</text>` +
      `<rect x="${x}" y="${y + 2}" width="${width}" height="15" fill="${up ? "#0072b2" : "#d55e00"}">` +
      `<title>${name}: ${digits(values[i])}</title></rect><text x="${end}" y="${y + 13}" font-size="12" fill="var(--ink)" ` +
      `text-anchor="${up ? "start" : "end"}">${fixed(values[i])}</text>`;
  });
  return `<svg viewBox="0 0 360 ${16 + 20 * names.length}" width="360" role="img" style="max-width:100%;height:auto" ` +
    `font-family="system-ui, sans-serif"><title>contributions by component</title>${bars.join("")}` +
    `<line x1="190" x2="190" y1="6" y2="${10 + 20 * names.length}" stroke="var(--line)"/></svg>`;
}

function drawGrid(rows) {
  const limit = largest(rows.flat()), n = rows[0].length, parts = [];
  for (let head = 0; head < n; head++) parts.push(text(70 + 44 * head, 16, head, 12));
  rows.forEach((row, layer) => {
    parts.push(text(22, 40 + 24 * layer, `layer ${layer}`, 12));
    row.forEach((value, head) => {
      const x = 48 + 44 * head, y = 24 + 24 * layer, fill = colour(value, limit);
      parts.push(`<rect x="${x}" y="${y}" width="44" height="24" fill="${fill}" stroke="var(--line)" stroke-width=".5">` +
        `<title>layer ${layer}, head ${head}: ${digits(value)}</title></rect><text x="${x + 22}" y="${y + 16}" ` +
        `font-size="11" text-anchor="middle" pointer-events="none" fill="${readable(fill)}">${fixed(value)}</text>`);
    });
  });
  return `<svg viewBox="0 0 ${56 + 44 * n} ${32 + 24 * rows.length}" width="${56 + 44 * n}" role="img" ` +
    `style="max-width:100%;height:auto" font-family="system-ui, sans-serif"><title>contributions by head</title>` +
    parts.join("") + "</svg>";
}

function step(by) { show(Math.min(Math.max(Number(slider.value) + by, 0), story.moves.length - 1)); }

function play() {
  const running = timer !== null;
  clearInterval(timer);
  timer = running ? null : setInterval(() => Number(slider.value) + 1 < story.moves.length ? step(1) : play(), 700);
  place("play").textContent = running ? "Play" : "Pause";
}

slider.addEventListener("input", () => show(Number(slider.value)));
place("back").addEventListener("click", () => step(-1));
place("forward").addEventListener("click", () => step(1));
place("play").addEventListener("click", play);
document.addEventListener("keydown", event => {  // arrows move through the game wherever they mean nothing else
  if (event.target.closest("input, select, textarea")) return;
  const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (by && !event.altKey && !event.ctrlKey && !event.metaKey) { step(by); event.preventDefault(); }
});
show(Number(slider.value));
