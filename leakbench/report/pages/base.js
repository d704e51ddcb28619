"use strict";
const leakbench = (() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

  /** An element with properties, attributes (those in `set`) and children; text stays text. */
  function element(tag, properties = {}, ...children) {
    const { set = {}, ...rest } = properties;
    const made = Object.assign(document.createElement(tag), rest);
    for (const [name, value] of Object.entries(set)) if (value !== null) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null));
    return made;
  }

  /** What the page was given as data, or null. */
  function data() {
    const script = $("#data");
    return script === null ? null : JSON.parse(script.textContent);
  }

  // The theme: as the system says, or as the reader chose; a browser that keeps nothing forgets the choice.
  const THEMES = ["auto", "light", "dark"];
  const remembered = {
    get: () => { try { return localStorage.getItem("leakbench-theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("leakbench-theme", value); } catch { /* not kept */ } },
  };
  function theme(name) {
    document.documentElement.dataset.theme = name;
    const button = $("#theme");
    $("span", button).textContent = name;
    button.setAttribute("aria-label", `Theme: ${name === "auto" ? "as the system" : name}`);
  }
  theme(THEMES.includes(remembered.get()) ? remembered.get() : "auto");
  $("#theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
    theme(next);
    remembered.set(next);
  });

  // table.sortable: each th with a button sorts by its column; a cell's data-value comes before its text.
  function value(row, column) {
    const cell = row.cells[column];
    const text = cell.dataset.value ?? cell.textContent.trim();
    const number = text === "" ? NaN : Number(text);
    return Number.isNaN(number) ? text : number;
  }
  /** Order of two values: numbers before texts, what is missing ("" or null) always last. */
  function compare(a, b, down) {
    const gone = (x) => x === "" || x === null || x === undefined;
    if (gone(a) || gone(b)) return gone(a) - gone(b);
    const mixed = (typeof a === "string") - (typeof b === "string");
    const order = mixed || (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    return down ? -order : order;
  }
  /** Mark in a table's head by which column it is sorted, and return whether that is downwards. */
  function direction(heading, first = "ascending") {
    const other = { ascending: "descending", descending: "ascending" };
    const next = other[heading.getAttribute("aria-sort")] ?? first;
    for (const one of heading.parentElement.children) one.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", next);
    return next === "descending";
  }
  for (const table of $$("table.sortable")) {
    for (const heading of $$("th", table.tHead)) {
      $("button", heading)?.addEventListener("click", () => {
        const down = direction(heading);
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => compare(value(a, heading.cellIndex), value(b, heading.cellIndex), down));
        table.tBodies[0].append(...rows);
      });
    }
  }

  // button.copy copies the text of the element that its data-from names.
  async function copy(button) {
    const source = document.getElementById(button.dataset.from);
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(source);
      button.textContent = "selected: press Ctrl+C";
    }
    setTimeout(() => { button.textContent = before; }, 2000);
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("button.copy");
    if (button) copy(button);
  });

  return { $, $$, element, data, compare, direction };
})();
