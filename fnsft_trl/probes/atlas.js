"use strict";
const body = document.querySelector("#table tbody");
const rows = [...body.rows];
const cards = new Map([...document.querySelectorAll("details")].map((card) => [card.dataset.network, card]));
const search = document.getElementById("search");
const count = document.getElementById("count");
const texts = new Map(rows.map((row) => {
  const card = cards.get(row.dataset.network);
  return [row, (row.textContent + " " + card.textContent).toLowerCase()];
}));

function show() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const row of rows) {
    const matches = words.every((word) => texts.get(row).includes(word));
    row.hidden = cards.get(row.dataset.network).hidden = !matches;
    found += matches;
  }
  count.textContent = words.length ? `${found} of ${rows.length}` : "";
}

function sortBy(header) {
  const place = header.cellIndex;
  const down = header.getAttribute("aria-sort") !== "descending";
  for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => {
    const text = row.cells[place].dataset.value;
    return text === "" ? -Infinity : Number(text);
  };
  rows.sort((a, b) => (down ? value(b) - value(a) : value(a) - value(b)));
  body.append(...rows);
}

function open() {
  const card = document.getElementById(location.hash.slice(1));
  if (card instanceof HTMLDetailsElement) card.open = true;
}

search.addEventListener("input", show);
for (const button of document.querySelectorAll("#table th button")) {
  button.addEventListener("click", () => sortBy(button.parentElement));
}
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== search) {
    event.preventDefault();
    search.focus();
  }
});
window.addEventListener("hashchange", open);
open();
