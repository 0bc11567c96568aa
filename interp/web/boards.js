"use strict";
// Pictures as in interp/plots.py: a board is text, drawn anew when what it shows changes.

const label = square => "ABCDEFGH"[square >> 3] + (square & 7);
const escaped = words => String(words).replace(/[&<>"]/g, sign => `&#${sign.charCodeAt(0)};`);
const digits = (value, n = 4) => value === null ? "" : String(Number(value.toPrecision(n)));

// White at zero, blue above, red below, full at plus or minus the limit; grey where there is no value.
function colour(value, limit) {
  if (value === null) return "#bbbbbb";
  const share = Math.min(Math.abs(value), limit) / limit, full = value > 0 ? [5, 80, 160] : [178, 24, 43];
  return "#" + full.map(part => Math.round(255 - share * (255 - part)).toString(16).padStart(2, "0")).join("");
}

function readable(fill) {
  if (fill[0] !== "#") return "#111";
  const [r, g, b] = [1, 3, 5].map(i => parseInt(fill.slice(i, i + 2), 16));
  return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#111" : "#fff";
}

const text = (x, y, words, size, more = "") =>
  `<text x="${x}" y="${y}" font-size="${size}" text-anchor="middle" fill="var(--ink)" ${more}>${escaped(words)}</text>`;

// cells: 64 of [fill, words]; discs: "b", "w" or "." for each square; dots, rings: sets of squares.
function drawBoard({title, cells, discs = "", dots = [], rings = [], last = -1}) {
  const parts = [text(108, 12, title, 12)];
  for (let i = 0; i < 8; i++)
    parts.push(text(11, 44 + 22 * i, "ABCDEFGH"[i], 11), text(31 + 22 * i, 25, i, 11));
  cells.forEach(([fill, words], square) => {
    const x = 20 + 22 * (square & 7), y = 29 + 22 * (square >> 3), disc = discs[square], felt = fill[0] !== "#";
    parts.push(`<rect x="${x}" y="${y}" width="22" height="22" fill="${fill}" stroke="var(--line)" stroke-width=".5">` +
               `<title>${label(square)}: ${escaped(words)}</title></rect>`);
    if (disc === "b" || disc === "w")
      parts.push(`<circle cx="${x + 11}" cy="${y + 11}" r="${felt ? 8 : 5}" pointer-events="none" ` +
                 (disc === "b" ? 'fill="#111" stroke="#ddd"/>' : 'fill="#fff" stroke="#444"/>'));
    if (dots.includes(square))
      parts.push(`<circle cx="${x + 11}" cy="${y + 11}" r="2.5" fill="${readable(fill)}" pointer-events="none"/>`);
    for (const [mark, ink] of [[rings.includes(square), "#d5201a"], [square === last, "#e6a700"]])
      if (mark) parts.push(`<rect x="${x + 1}" y="${y + 1}" width="20" height="20" fill="none" stroke="${ink}" ` +
                           'stroke-width="2.5" pointer-events="none"/>');
  });
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 206 214" width="206" role="img" ` +
         `font-family="system-ui, sans-serif" style="max-width:100%;height:auto"><title>${escaped(title)}</title>` +
         parts.join("") + "</svg>";
}

const fixed = value => value.toFixed(2).replace(/^-(0\.00)$/, "$1");
const valueCells = (values, limit) => values.map(value => [colour(value, limit), value === null ? "none" : digits(value)]);
const largest = values => Math.max(...values.map(value => Math.abs(value || 0))) || 1;
const decoded = name => JSON.parse(document.getElementById(name).textContent);
