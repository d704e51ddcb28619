(() => {
  const { $, $$, element, data: read, compare, direction } = leakbench;
  const data = read();
  if (data === null || !data.trials || data.trials.id.length === 0) return;

  const AXES = ["dataset", "model", "threat", "defense", "attack"];
  const HEAD = AXES.length, FLOOR = HEAD, N = HEAD + 1, STATUS = HEAD + 2, VALUES = STATUS + data.statuses.length, PER = 8;
  const { axes, metrics, trials, cells } = data;
  const PAGE = { matrix: 100, gallery: 8, trials: 48 };
  const NONE = -1;

  // ---- numbers ----

  const infinite = { inf: Infinity, "-inf": -Infinity };
  const plain = (value) => (value in infinite ? infinite[value] : value);
  function number(value, places, sign = false) {
    if (value === null || value === undefined) return "–";
    value = plain(value);
    if (!Number.isFinite(value)) return value > 0 ? (sign ? "+∞" : "∞") : "−∞";
    let text = places === null ? value.toExponential(2) : value.toFixed(places);
    if (Number(text) === 0) text = text.replace("-", "");
    return (sign && !text.startsWith("-") ? "+" : "") + text.replace("-", "−");
  }
  function interval(low, high, places, sign = false) {
    return low === null || high === null ? "[–]" : `[${number(low, places, sign)}, ${number(high, places, sign)}]`;
  }
  const arrow = (metric) => `${metric.name} ${metric.higher ? "↑" : "↓"}`;
  const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

  // ---- pictures: tiles of sheets, drawn when their sheet has been decoded ----

  const sheets = new Map();
  function sheet(index) {
    if (!sheets.has(index)) {
      const image = new Image();
      const ready = new Promise((resolve) => { image.onload = () => resolve(image); image.onerror = () => resolve(null); });
      image.src = document.getElementById(`sheet-${index}`).textContent;
      sheets.set(index, ready);
    }
    return sheets.get(index);
  }
  function tile(place, label, why) {
    if (place < 0) return element("span", { className: "none", textContent: place === NONE ? why : "picture not in this page" });
    const [width, height] = data.sheets[place >> 8];
    const canvas = element("canvas", { width, height, className: "tile", set: { role: "img", "aria-label": label } });
    const at = place & 255;
    sheet(place >> 8).then((image) => {
      if (image === null) return;
      const x = (at % data.sheetColumns) * width, y = Math.floor(at / data.sheetColumns) * height;
      canvas.getContext("2d").drawImage(image, x, y, width, height, 0, 0, width, height);
    });
    return canvas;
  }
  const status = (i) => data.statuses[trials.status[i]];
  const spec = (i, axis) => axes[axis][trials[axis][i]];
  const truth = (i) => tile(trials.truth[i], `private image ${trials.image[i]}`, "no picture");
  const made = (i) => tile(trials.picture[i], `reconstruction of image ${trials.image[i]} by ${spec(i, "attack")}`, status(i) === "ok" ? "no picture" : status(i));

  /** Truth and reconstruction on each other, and a range input that moves the edge between them. */
  function slider(i) {
    const top = truth(i), below = made(i);
    if (top.tagName !== "CANVAS" || below.tagName !== "CANVAS") return pair(i);
    const edge = element("span", { className: "edge" });
    const input = element("input", {
      type: "range", min: 0, max: 100, value: 50,
      set: { "aria-label": `How much of the private image ${trials.image[i]} lies over its reconstruction, in per cent` },
    });
    const move = () => {
      top.style.clipPath = `inset(0 ${100 - input.value}% 0 0)`;
      edge.style.left = `calc(${input.value}% - 1px)`;
    };
    input.addEventListener("input", move);
    move();
    return element("div", { className: "slider" },
      element("div", { className: "compare" }, below, top, edge), input,
      element("div", { className: "ends", set: { "aria-hidden": "true" } }, element("span", { textContent: "private image" }), element("span", { textContent: "reconstruction" })));
  }
  const pair = (i) => element("span", { className: `pair${status(i) === "failed" ? " diverged" : ""}` }, truth(i), made(i));

  function figure(i, lead, slides = false) {
    const ranked = data.ranked === null ? null : metrics[data.ranked];
    const score = ranked === null ? null : trials.scores[data.ranked][i];
    const words = [`image ${trials.image[i]}${trials.seed[i] ? `, seed ${trials.seed[i]}` : ""}`];
    if (score !== null) words.push(`${ranked.name} ${number(score, ranked.places)}`);
    if (status(i) !== "ok") words.push(status(i) === "failed" ? "diverged" : status(i));
    if (trials.aligned[i]) words.push("aligned");
    const open = element("button", { type: "button", className: "open", onclick: () => show(i), set: { "aria-label": `Open the trial: ${words.join(", ")}, ${spec(i, "attack")} behind ${spec(i, "defense")}` } });
    open.append(slides ? element("span", { textContent: "Open this trial" }) : pair(i));
    const caption = element("figcaption", {}, ...(lead ? [element("strong", { textContent: lead }), ` · `] : []), words.join(" · "));
    return element("figure", {}, ...(slides ? [slider(i)] : []), open, caption);
  }

  // ---- filters, shared by the matrix, the galleries and the trials ----

  const filter = { text: "", status: null };
  for (const axis of AXES) filter[axis] = null;
  function fits(at, state = null) {
    if (filter.status !== null && state !== null && state !== filter.status) return false;
    for (let k = 0; k < HEAD; k++) if (filter[AXES[k]] !== null && at[k] !== filter[AXES[k]]) return false;
    if (filter.text === "") return true;
    const words = AXES.map((axis, k) => axes[axis][at[k]]).join(" ").toLowerCase();
    return filter.text.split(/\s+/).every((part) => words.includes(part));
  }
  function filters() {
    const form = $("#filters");
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    const text = element("input", { type: "search", id: "filter-text", placeholder: "part of a name" });
    text.addEventListener("input", () => { filter.text = text.value.trim().toLowerCase(); changed(); });
    form.append(element("label", {}, "Search", text));
    const choice = (name, label, options) => {
      const select = element("select", { id: `filter-${name}` }, element("option", { value: "", textContent: "all" }));
      options.forEach(([value, word]) => select.append(element("option", { value, textContent: word })));
      select.addEventListener("change", () => { filter[name] = select.value === "" ? null : Number(select.value); changed(); });
      form.append(element("label", {}, label, select));
    };
    for (const axis of AXES) if (axes[axis].length > 1) choice(axis, axis === "threat" ? "threat model" : axis, axes[axis].map((word, k) => [k, word]));
    const seen = data.statuses.map((word, k) => [k, word]).filter(([k]) => trials.status.includes(k));
    if (seen.length > 1) choice("status", "status of trials", seen);
    const clear = element("button", { type: "button", textContent: "Clear" });
    clear.addEventListener("click", () => {
      for (const name of Object.keys(filter)) filter[name] = name === "text" ? "" : null;
      $$("select, input", form).forEach((one) => { one.value = ""; });
      changed();
    });
    form.append(clear);
  }
  const pages = { matrix: 0, gallery: 0, trials: 0 };
  function changed() {
    for (const name of Object.keys(pages)) pages[name] = 0;
    matrix(); gallery(); list();
  }
  /** Buttons to turn the pages of a section, and the part of its items that the page shows. */
  function paged(name, items, again) {
    const last = Math.max(0, Math.ceil(items.length / PAGE[name]) - 1);
    pages[name] = Math.min(pages[name], last);
    const place = $(`#${name}-pages`);
    place.replaceChildren();
    if (last > 0) {
      const turn = (to, word) => element("button", { type: "button", textContent: word, disabled: to < 0 || to > last || to === pages[name], onclick: () => { pages[name] = to; again(); } });
      const at = pages[name];
      place.append(turn(0, "⇤ first"), turn(at - 1, "← previous"), element("span", { textContent: `page ${at + 1} of ${last + 1}` }), turn(at + 1, "next →"), turn(last, "last ⇥"));
    }
    return items.slice(pages[name] * PAGE[name], (pages[name] + 1) * PAGE[name]);
  }

  // ---- the matrix ----

  const shownAxes = ["attack", "defense", ...["dataset", "model", "threat"].filter((axis) => axes[axis].length > 1)];
  const unscored = (row) => row[STATUS + 2] + row[STATUS + 3];
  const value = (row, m, part) => row[VALUES + PER * m + part];
  let order = null; // { key(row), down }
  function columns() {
    const found = shownAxes.map((axis) => ({
      name: axis === "threat" ? "threat model" : axis,
      key: (row) => axes[axis][row[AXES.indexOf(axis)]],
      cell: (row, key) => element("td", { className: "spec", textContent: key + (axis === "attack" && row[FLOOR] ? " (floor)" : "") }),
    }));
    metrics.forEach((metric, m) => {
      if (!metric.shown) return;
      found.push({
        name: arrow(metric), number: true, first: metric.higher ? "descending" : "ascending", title: metric.convention, key: (row) => plain(value(row, m, 0)),
        cell: (row) => {
          const got = value(row, m, 3), all = row[STATUS] + row[STATUS + 1];
          return element("td", { className: "number" }, number(value(row, m, 0), metric.places), element("small", { textContent: interval(value(row, m, 1), value(row, m, 2), metric.places) + (got !== all && got ? ` n=${got}` : "") }));
        },
      });
      if (!cells.some((row) => value(row, m, 4) !== null)) return;
      found.push({
        name: "gain", number: true, first: "descending", title: `gain in ${metric.name} over the best floor`, label: `gain in ${metric.name} over the best floor`, key: (row) => plain(value(row, m, 4)),
        cell: (row) => {
          if (row[FLOOR]) return element("td", { className: "number", textContent: "floor" });
          const [low, high, step] = [plain(value(row, m, 5)), plain(value(row, m, 6)), value(row, m, 7)];
          const sure = step !== 0 && low !== null && high !== null && (low > 0 || high < 0);
          const colour = step === 0 ? "" : ` gain-${step < 0 ? "below" : step}${sure ? "" : " unsure"}`;
          return element("td", { className: `number${colour}` }, number(value(row, m, 4), metric.places, true), element("small", { textContent: value(row, m, 4) === null ? "" : interval(value(row, m, 5), value(row, m, 6), metric.places, true) }));
        },
      });
    });
    const counts = [["n", (row) => row[N]], ["diverged", (row) => row[STATUS + 1]]];
    if (cells.some(unscored)) counts.push(["no score", unscored]);
    for (const [name, key] of counts) found.push({ name, key, number: true, cell: (row, k) => element("td", { className: "number", textContent: String(k) }) });
    return found;
  }
  function heads() {
    const row = element("tr");
    for (const column of columns()) {
      const button = element("button", { type: "button", textContent: column.name, set: { "aria-label": column.label ?? null } });
      const th = element("th", { className: column.number ? "number" : "", title: column.title ?? "", set: { scope: "col" } }, button);
      button.addEventListener("click", () => {
        order = { key: column.key, down: direction(th, column.first ?? "ascending") };
        pages.matrix = 0;
        matrix();
      });
      row.append(th);
    }
    $("#matrix-table").tHead.replaceChildren(row);
  }
  function matrix(all = false) {
    const rows = cells.filter((row) => fits(row));
    if (order !== null) {
      const keys = new Map(rows.map((row) => [row, order.key(row)]));
      rows.sort((a, b) => compare(keys.get(a), keys.get(b), order.down));
    }
    $("#matrix-count").textContent = rows.length === cells.length ? count(rows.length, "cell") : `${rows.length.toLocaleString("en")} of ${count(cells.length, "cell")}`;
    const shown = all ? rows.slice(0, 2000) : paged("matrix", rows, matrix);
    const made = columns();
    $("#matrix-table").tBodies[0].replaceChildren(...shown.map((row) => element("tr", { className: row[FLOOR] ? "floor" : "" }, ...made.map((column) => column.cell(row, column.key(row))))));
  }
  /** A tab for each metric, and one for the few that are shown together; the arrow keys move between them. */
  function chooser() {
    const main = metrics.map((metric) => metric.shown);
    const tab = (words, title, shown) => element("button", {
      type: "button", textContent: words, title, set: { role: "tab" },
      onclick: (event) => {
        metrics.forEach((metric, m) => { metric.shown = shown(m); });
        for (const one of tabs) {
          one.setAttribute("aria-selected", String(one === event.currentTarget));
          one.tabIndex = one === event.currentTarget ? 0 : -1;
        }
        order = null;
        heads();
        matrix();
      },
    });
    const tabs = metrics.map((metric, k) => tab(arrow(metric), metric.convention, (m) => m === k));
    if (metrics.length > 1) tabs.push(tab("several", "the main metrics beside each other", (m) => main[m]));
    const place = $("#columns");
    place.append(...tabs);
    place.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const to = tabs[(tabs.indexOf(event.target) + step + tabs.length) % tabs.length];
      if (step && to) { to.focus(); to.click(); }
    });
    (tabs[data.ranked ?? 0] ?? place).click();
  }
  const fold = $("#matrix-fold");

  // ---- the galleries ----

  function gallery() {
    const place = $("#gallery-list");
    if (place === null) return;
    const strongest = $("#gallery-which").value === "1" && filter.attack === null;
    const slides = $("#gallery-view").value === "slider";
    const found = data.galleries.filter((one) => fits(one) && (!strongest || one[HEAD + 1]));
    $("#gallery-count").textContent = count(found.length, "cell");
    place.replaceChildren(...paged("gallery", found, gallery).map((one) => {
      const names = AXES.map((axis, k) => axes[axis][one[k]]);
      const where = ["dataset", "model", "threat"].filter((axis) => axes[axis].length > 1).map((axis) => axes[axis][one[AXES.indexOf(axis)]]).join(" · ");
      const leads = { 1: ["the only one"], 2: ["best", "worst"], 3: ["best", "median", "worst"] }[one[HEAD].length];
      const title = element("h3", {}, element("span", { className: "spec", textContent: names[3] }), element("span", { className: "muted", textContent: ` attacked by ` }), element("span", { className: "spec", textContent: names[4] }), ...(where ? [element("span", { className: "muted", textContent: ` · ${where}` })] : []));
      return element("section", { className: "cell card" }, title, element("div", { className: "tiles" }, ...one[HEAD].map((i, k) => figure(i, leads[k], slides))));
    }));
  }

  // ---- every trial ----

  let listed = [];
  function list() {
    const by = $("#trials-order").value;
    listed = [];
    for (let i = 0; i < trials.id.length; i++) if (fits(AXES.map((axis) => trials[axis][i]), trials.status[i])) listed.push(i);
    if (by !== "") {
      const scores = trials.scores[Number(by)], down = metrics[Number(by)].higher;
      listed.sort((a, b) => compare(plain(scores[a]), plain(scores[b]), down));
    }
    $("#trials-count").textContent = listed.length === trials.id.length ? count(listed.length, "trial") : `${listed.length.toLocaleString("en")} of ${count(trials.id.length, "trial")}`;
    $("#trials-list").replaceChildren(...paged("trials", listed, list).map((i) => figure(i, `${spec(i, "attack")} · ${spec(i, "defense")}`)));
  }

  // ---- one trial ----

  const dialog = $("#trial");
  function facts(pairs) {
    return element("dl", { className: "facts" }, ...pairs.flatMap(([name, ...words]) => [element("dt", { textContent: name }), element("dd", {}, ...words)]));
  }
  /** A trial's objective over its evaluations, both by their logarithms (values by themselves where one is not positive). */
  function course(at, values) {
    const svg = (name, set, ...inside) => {
      const one = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(set)) one.setAttribute(key, value);
      one.append(...inside);
      return one;
    };
    const log = Math.min(...values) > 0;
    const xs = at.map((place) => Math.log(place)), ys = values.map((value) => log ? Math.log(value) : value);
    const span = (all) => [Math.min(...all), Math.max(...all)];
    const scale = ([low, high], from, to) => (value) => from + (to - from) * (high > low ? (value - low) / (high - low) : 0.5);
    const x = scale(span(xs), 8, 312), y = scale(span(ys), 100, 16);
    const text = (place, height, anchor, words) => svg("text", { x: place, y: height, "text-anchor": anchor }, words);
    const [low, high] = span(values);
    const label = `Objective over evaluations: ${number(values[0], null)} at ${at[0]}, ${number(values.at(-1), null)} at ${at.at(-1)}`;
    return svg("svg", { class: "course", viewBox: "0 0 320 120", role: "img", "aria-label": label },
      svg("line", { x1: 8, x2: 312, y1: 104, y2: 104 }),
      svg("polyline", { points: xs.map((place, k) => `${x(place).toFixed(1)},${y(ys[k]).toFixed(1)}`).join(" ") }),
      text(8, 11, "start", `objective ${number(high, null)} to ${number(low, null)}${log ? ", logarithmic" : ""}`),
      text(8, 117, "start", at[0].toLocaleString("en")), text(312, 117, "end", `${at.at(-1).toLocaleString("en")} evaluations`));
  }
  /** The scores of a trial, which stand beside its pictures. */
  function scored(i) {
    const rows = metrics.map((metric, m) => [metric, trials.scores[m][i]]).filter(([, score]) => score !== null);
    if (!rows.length) return element("p", { className: "muted", textContent: "It has no score." });
    return element("table", { className: "scores" }, element("tbody", {}, ...rows.map(([metric, score]) => element("tr", { title: metric.convention },
      element("th", { className: "spec", textContent: arrow(metric), set: { scope: "row" } }), element("td", { className: "number", textContent: number(score, metric.places) })))));
  }
  /** What the picture and the scores of a trial of several images are; nothing for one of one image. */
  function first(i) {
    const own = trials.members[i];
    return own === null ? null : element("p", { className: "muted small", textContent: `The first of ${count(own.length, "image")}. Scores are means over all of them; each image's own are below.` });
  }
  /** Every image of a batch beside what was assigned to it, with its scores; nothing for a trial of one image. */
  function batch(i) {
    const own = trials.members[i];
    if (own === null) return null;
    const figures = own.map(([image, label, real, guess, aligned, scores]) => {
      const words = [`image ${image}`, ...(label < 0 ? [] : [`label ${label}`]), ...(aligned ? ["aligned"] : [])];
      const values = metrics.map((metric, m) => [metric, scores[m]]).filter(([metric, score]) => metric.shown && score !== null);
      return element("figure", {},
        element("span", { className: "pair" }, tile(real, `private image ${image}`, "no picture"), tile(guess, `reconstruction of image ${image}`, "not returned")),
        element("figcaption", {}, words.join(" · "), ...values.map(([metric, score]) => element("div", { className: "muted", title: metric.convention, textContent: `${arrow(metric)} ${number(score, metric.places)}` }))));
    });
    return element("div", { className: "wide members" }, element("h3", { textContent: `The ${count(own.length, "image")} of the batch` }), element("div", { className: "tiles" }, ...figures));
  }
  function show(i) {
    const at = listed.indexOf(i);
    const step = (to, word, label) => element("button", { type: "button", textContent: word, disabled: at < 0 || to < 0 || to >= listed.length, onclick: () => show(listed[to]), set: { "aria-label": label } });
    const name = `${spec(i, "attack")} behind ${spec(i, "defense")}`;
    const words = status(i) === "ok" ? "ok" : `${status(i) === "failed" ? "failed: it diverged" : status(i)}${trials.reasons[trials.reason[i]] ? `: ${trials.reasons[trials.reason[i]]}` : ""}`;
    const settings = AXES.map((axis) => {
      const own = axis === "threat" ? null : Object.entries(data.options[axis][trials[axis][i]]);
      const options = own === null ? data.words[trials.threat[i]][trials.dataset[i]] : own.map(([key, v]) => `${key}=${JSON.stringify(v)}`).join(", ");
      const said = axis === "defense" ? data.statements[trials.defense[i]][trials.threat[i]] : [];
      const lines = [options, ...said].map((text) => element("div", { className: "muted small", textContent: text }));
      return [axis === "threat" ? "threat model" : axis, element("span", { className: "spec", textContent: spec(i, axis) }), ...lines];
    });
    const objective = trials.objective[i], evaluations = trials.evaluations[i], path = trials.paths[trials.path[i]];
    const cost = [
      ["time", `${number(trials.seconds[i], 2)} s (its share of the chunk it ran in)`],
      ["evaluations", evaluations === null ? "the attack counts none" : evaluations.toLocaleString("en")],
      ["gradients", path || "none"],
      ["loss", objective === null ? "the attack has none" : `${number(objective, null)} at the end`, ...(trials.curve[i] ? [course(trials.marks[trials.curve[i][0]], trials.curve[i].slice(1))] : [])],
    ];
    const [head, tail, note] = trials.commands[trials.again[i]];
    const command = head + tail.replaceAll("{image}", trials.image[i]).replaceAll("{seed}", trials.seed[i]).replaceAll("{trial}", trials.id[i]);
    dialog.replaceChildren(
      element("div", { className: "bar" },
        element("h2", { id: "trial-head", textContent: name }),
        step(at - 1, "←", "Previous trial"), step(at + 1, "→", "Next trial"),
        element("button", { type: "button", id: "trial-close", textContent: "Close", onclick: () => dialog.close() })),
      element("div", { className: "body" },
        element("div", {}, pair(i), slider(i), first(i), scored(i), trials.aligned[i] ? element("p", { className: "muted small", textContent: "The reconstruction is drawn after the best fit of brightness and contrast to the private image; as the attack returned it, the picture would show nothing." }) : null),
        element("div", {},
          facts([["trial", element("code", { textContent: trials.id[i] })], [trials.members[i] === null ? "image, seed" : "first image, seed", `${trials.image[i]}, ${trials.seed[i]}`], ["status", words]]),
          element("h3", { textContent: "Settings and threat model" }), facts(settings)),
        batch(i),
        element("div", { className: "wide" },
          element("h3", { textContent: "The command that makes it again" }),
          element("pre", { id: "trial-command", textContent: command }),
          element("p", {}, element("button", { type: "button", className: "copy", textContent: "Copy", set: { "data-from": "trial-command" } }), note ? element("span", { className: "muted small", textContent: ` ${note}` }) : null),
          element("h3", { textContent: "Cost" }), facts(cost))));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    history.replaceState(null, "", `#trial=${trials.id[i]}`);
  }
  dialog.addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    const label = { ArrowLeft: "Previous trial", ArrowRight: "Next trial" }[event.key];
    if (label && event.target.type !== "range") { $(`button[aria-label="${label}"]`, dialog).click(); $("#trial-close").focus(); }
  });
  function linked() {
    if (location.hash === "#matrix") fold.open = true;
    const index = trials.id.indexOf(new URLSearchParams(location.hash.slice(1)).get("trial"));
    if (index >= 0) show(index);
  }

  // ---- start ----

  if ($("#gallery-which") !== null) {
    if (!data.galleries.some((one) => one[HEAD + 1])) $("#gallery-which").value = "0";
    for (const id of ["#gallery-which", "#gallery-view"]) $(id).addEventListener("change", () => { pages.gallery = 0; gallery(); });
  }
  $("#trials-order").append(element("option", { value: "", textContent: "as planned" }), ...metrics.map((metric, m) => element("option", { value: m, textContent: `most leakage first, by ${metric.name}` })));
  $("#trials-order").addEventListener("change", () => { pages.trials = 0; list(); });
  filters(); heads(); matrix(); chooser(); gallery(); list(); linked();
  addEventListener("hashchange", linked);
  let folded = false;
  addEventListener("beforeprint", () => { folded = !fold.open; fold.open = true; matrix(true); });
  addEventListener("afterprint", () => { fold.open = !folded; matrix(); });
  for (const link of $$('a[href="#matrix"]')) link.addEventListener("click", () => { fold.open = true; });
})();
