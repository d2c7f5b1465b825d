"use strict";
(() => {
  // A link to a point opens it, and the layer that holds it.
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target || !target.matches("details")) return;
    for (let at = target; at; at = at.parentElement) if (at.matches("details")) at.open = true;
    target.scrollIntoView({ block: "start" });
    target.querySelector("summary").focus({ preventScroll: true });
  };
  addEventListener("hashchange", reveal);
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#p-"]');
    if (link && link.hash === location.hash) reveal();
  });
  reveal();

  // The map is one stop of the Tab key; arrows move in it.
  const grid = document.querySelector(".grid");
  const readout = document.querySelector(".readout");
  const cells = [...grid.querySelectorAll("td a")];
  const rest = readout.textContent;
  cells.forEach((cell, index) => (cell.tabIndex = index ? -1 : 0));
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  grid.addEventListener("keydown", (event) => {
    const move = step[event.key];
    const cell = event.target.closest("td");
    if (!move || !cell) return;
    event.preventDefault();
    let row = cell.parentElement.rowIndex;
    let column = cell.cellIndex;
    for (;;) {
      row += move[0];
      column += move[1];
      const next = grid.rows[row] && grid.rows[row].cells[column];
      if (!next || next.matches("th")) return;
      const link = next.querySelector("a");
      if (!link) continue;
      event.target.tabIndex = -1;
      link.tabIndex = 0;
      link.focus();
      return;
    }
  });
  const show = (event) => {
    const cell = event.target.closest("td a");
    readout.textContent = cell ? cell.getAttribute("aria-label") : rest;
  };
  grid.addEventListener("pointerover", show);
  grid.addEventListener("focusin", show);
  grid.addEventListener("pointerleave", show);

  for (const button of document.querySelectorAll("[data-copy]")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.previousElementSibling.textContent);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
  }
})();
