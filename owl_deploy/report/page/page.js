"use strict";
// Everything on this page can be read without this script: it sorts tables, hides engines and explains points.
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const said = document.getElementById("said");
  document.documentElement.classList.add("script");

  // Sorting: a button in every heading; rows without a figure stay last either way.
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
  };
  const sort = (table, heading, column) => {
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    const body = table.tBodies[0];
    const value = (row) => row.cells[column].dataset.value ?? "";
    const rows = [...body.rows];
    const known = rows.filter((row) => value(row) !== "");
    const missing = rows.filter((row) => value(row) === "");
    known.sort((a, b) => (ascending ? 1 : -1) * compare(value(a), value(b)));
    body.append(...known, ...missing);
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    said.textContent = `Sorted by ${heading.textContent}, ${ascending ? "ascending" : "descending"}`;
  };
  for (const table of all("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      button.addEventListener("click", () => sort(table, heading, column));
      heading.append(button);
    });
  }

  // Hiding engines, in charts, tables and samples alike.
  for (const box of all("input[data-toggles]")) {
    box.addEventListener("change", () => {
      for (const part of all(`[data-series="${box.dataset.toggles}"]`)) {
        if (part instanceof SVGElement) part.style.display = box.checked ? "" : "none";
        else part.hidden = !box.checked;
      }
    });
  }

  // What a point is: on hover, and by keyboard, where a chart is one stop and arrows go from point to point.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true"); // the point's own label says the same
  document.body.append(tip);
  const hide = () => { tip.hidden = true; };
  const show = (point) => {
    tip.textContent = point.getAttribute("aria-label");
    tip.hidden = false;
    const at = point.querySelector(".marker").getBoundingClientRect();
    const left = Math.min(at.right + 8, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = at.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 0 ? above : at.bottom + 8}px`;
  };
  const across = (point) => point.querySelector(".marker").getBoundingClientRect().left;
  for (const chart of all("svg.chart")) {
    const points = all(".mark", chart);
    points.forEach((point, index) => {
      const title = point.querySelector("title");
      point.setAttribute("aria-label", title.textContent);
      title.remove(); // or the browser's own tooltip would cover this one
      point.setAttribute("tabindex", index ? "-1" : "0");
      point.addEventListener("pointerenter", () => show(point));
      point.addEventListener("pointerleave", hide);
      point.addEventListener("focus", () => show(point));
      point.addEventListener("blur", hide);
      point.addEventListener("keydown", (event) => {
        if (event.key === "Escape") return hide();
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (step === undefined) return undefined;
        event.preventDefault();
        const shown = points.filter((other) => other.style.display !== "none").sort((a, b) => across(a) - across(b));
        const next = shown[(shown.indexOf(point) + step + shown.length) % shown.length];
        point.setAttribute("tabindex", "-1");
        next.setAttribute("tabindex", "0");
        next.focus();
        return undefined;
      });
    });
  }
  // Focus may scroll its point into view: the explanation goes along.
  const follow = () => {
    const point = document.activeElement;
    if (!tip.hidden && point.matches(".mark")) show(point);
    else hide();
  };
  window.addEventListener("scroll", follow, { passive: true, capture: true });

  // A row's link opens its samples.
  const open = () => {
    const target = document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) target.open = true;
  };
  window.addEventListener("hashchange", open);
  open();

  document.getElementById("save").addEventListener("click", () => {
    const { rows } = JSON.parse(document.getElementById("data").textContent);
    const lines = rows.map((row) => `${JSON.stringify(row)}\n`).join("");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines], { type: "application/jsonl" }));
    link.download = "results.jsonl";
    link.click();
    URL.revokeObjectURL(link.href);
  });
})();
