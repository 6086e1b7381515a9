"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const { nuclei, scans, measures, columns, values, design, curves } = data;
  const K = nuclei.length;
  const N = scans.name.length;
  const HUES = data.palette;
  const GREY = "#6b7280";
  const SHAPES = ["circle", "square", "triangle", "diamond", "cross"];
  const INK = "#1b2430";
  const FONT = "12px system-ui, 'DejaVu Sans', sans-serif";

  // --- access to the data: a row is a nucleus of a scan, number scan * K + nucleus ---

  const byKey = Object.fromEntries(columns.map((column) => [column.key, column]));
  const raw = (column, scan) =>
    column.levels ? (column.codes[scan] < 0 ? null : column.levels[column.codes[scan]]) : column.numbers[scan];
  const flag = (row) => data.flags.levels[data.flags.codes[row]] ?? null;
  const rating = (row) => (data.ratings ? data.ratings.levels[data.ratings.codes[row]] ?? null : null);
  const person = (row) => byKey.participant_id.codes[Math.floor(row / K)];
  const link = (row) => {
    const page = scans.page[Math.floor(row / K)];
    if (!page) return "";
    const scan = scans.name[Math.floor(row / K)];
    return page + "#" + encodeURIComponent(values.volume[row] === null ? scan : scan + "_" + nuclei[row % K].abbreviation);
  };
  const outlying = new Set(data.outliers.map((one) => one.row));
  const format = (value, digits) =>
    value === null || value === undefined ? "n/a"
      : Number(value).toFixed(digits).replace("-", "−");

  // --- state ---

  const state = { measure: measures[0]?.key, by: design.group || "", covariate: "", find: "", only: "", rating: "" };
  let selected = []; // rows
  let ofNucleus = nuclei.map(() => []); // the same by nucleus
  let groups = []; // {name, colour, shape}

  const option = (select, value, text) => select.append(new Option(text, value));
  for (const one of measures) option($("measure"), one.key, one.title + (one.unit ? ` (${one.unit})` : ""));
  option($("by"), "", "none");
  for (const column of columns) if (column.groups) option($("by"), column.key, column.title);
  $("by").value = state.by;
  for (const column of columns) if (column.numbers) option($("covariate"), column.key, column.title);
  if (byKey[design.age]?.numbers) $("covariate").value = design.age;
  state.covariate = $("covariate").value;
  if (data.ratings) {
    $("rating-label").hidden = false;
    option($("rating"), "", "any");
    for (const level of data.ratings.levels) option($("rating"), level, level);
    option($("rating"), "not bad", "all but bad");
    option($("rating"), "none", "not rated");
  }

  const texts = [];
  const searchable = (scan) => {
    texts[scan] ??= [scans.name[scan], ...columns.filter((column) => column.levels).map((column) => raw(column, scan))]
      .filter((text) => text !== null).join(" ").toLowerCase();
    return texts[scan];
  };

  function select() {
    const words = state.find.toLowerCase().split(/\s+/).filter(Boolean);
    const kept = [];
    let count = 0;
    ofNucleus = nuclei.map(() => []);
    for (let scan = 0; scan < N; scan++) {
      const before = kept.length;
      for (let k = 0; k < K; k++) {
        const row = scan * K + k;
        if (words.length) {
          const text = searchable(scan) + " " + nuclei[k].abbreviation.toLowerCase() + " " + nuclei[k].name.toLowerCase();
          if (!words.every((word) => text.includes(word))) continue;
        }
        if (state.only === "ok" && flag(row) !== "ok") continue;
        if (state.only === "flag" && (flag(row) === null || flag(row) === "ok")) continue;
        if (state.only === "outlier" && !outlying.has(row)) continue;
        if (state.rating) {
          const said = rating(row);
          if (state.rating === "none" ? said !== null
            : state.rating === "not bad" ? said === "bad" : said !== state.rating) continue;
        }
        kept.push(row);
        ofNucleus[k].push(row);
      }
      if (kept.length > before) count++;
    }
    selected = kept;
    $("shown").textContent = `${count} of ${N} scans`;
  }

  // The place of a row's group among the groups; those without a value come last.
  function groupOf(row) {
    const column = byKey[state.by];
    if (!column) return 0;
    const code = column.codes[Math.floor(row / K)];
    return code < 0 ? column.levels.length : code;
  }

  function colourGroups() {
    const column = byKey[state.by];
    const missing = column?.codes.some((code) => code < 0);
    groups = (column ? column.levels : ["all"]).map((name, k) => ({
      name: String(name), colour: HUES[k % HUES.length], shape: SHAPES[k % SHAPES.length],
    }));
    if (missing) groups.push({ name: "n/a", colour: GREY, shape: "circle" });
    for (const legend of document.querySelectorAll(".legend")) {
      legend.replaceChildren(...(column ? groups : []).map((style) => {
        const item = document.createElement("span");
        const swatch = document.createElement("canvas");
        swatch.width = swatch.height = 14;
        swatch.setAttribute("aria-hidden", "true");
        marker(swatch.getContext("2d"), style, 7, 7, 4.5, 1);
        item.append(swatch, style.name);
        return item;
      }));
    }
  }

  // --- drawing ---

  function marker(g, style, x, y, r, alpha) {
    g.globalAlpha = alpha;
    g.fillStyle = g.strokeStyle = style.colour;
    g.beginPath();
    if (style.shape === "circle") g.arc(x, y, r, 0, 2 * Math.PI);
    else if (style.shape === "square") g.rect(x - r * 0.9, y - r * 0.9, 1.8 * r, 1.8 * r);
    else if (style.shape === "triangle") { g.moveTo(x, y - 1.2 * r); g.lineTo(x + 1.1 * r, y + 0.8 * r); g.lineTo(x - 1.1 * r, y + 0.8 * r); g.closePath(); }
    else if (style.shape === "diamond") { g.moveTo(x, y - 1.3 * r); g.lineTo(x + 1.3 * r, y); g.lineTo(x, y + 1.3 * r); g.lineTo(x - 1.3 * r, y); g.closePath(); }
    else { g.lineWidth = 1.8; g.moveTo(x - r, y - r); g.lineTo(x + r, y + r); g.moveTo(x + r, y - r); g.lineTo(x - r, y + r); g.stroke(); g.globalAlpha = 1; return; }
    g.fill();
    g.globalAlpha = 1;
  }

  // A marker is drawn once and copied, which is much faster for thousands of points.
  function stamp(style, r, alpha, scale) {
    const size = Math.ceil(4 * r);
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = size * scale;
    const g = canvas.getContext("2d");
    g.scale(scale, scale);
    marker(g, style, size / 2, size / 2, r, alpha);
    return { canvas, size };
  }

  function ticks(low, high, about) {
    const rough = (high - low) / about || 1;
    const size = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((f) => f * size).find((s) => s >= 0.7 * rough);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    return found.map((value) => [value, value.toFixed(digits).replace("-", "−")]);
  }

  function extent(numbers) {
    let low = Infinity, high = -Infinity;
    for (const value of numbers) if (value !== null) { if (value < low) low = value; if (value > high) high = value; }
    if (low > high) return [0, 1];
    const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [low - margin, high + margin];
  }

  const quantile = (sorted, q) => {
    const place = (sorted.length - 1) * q, low = Math.floor(place);
    return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (place - low);
  };

  // A scatter of a panel: points are {x, y, row}; x and y are in the axes' units.
  function draw(panel) {
    const { canvas, make } = panel;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    const scale = window.devicePixelRatio || 1;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const g = canvas.getContext("2d");
    g.scale(scale, scale);
    g.font = FONT;
    const plot = make();
    canvas.setAttribute("aria-label", plot.about);
    const yTicks = ticks(...plot.y.range, 5);
    const left = 12 + 16 + Math.max(...yTicks.map(([, text]) => g.measureText(text).width));
    const right = width - 8, top = 8, base = height - (plot.x.categories ? 44 : 40);
    const toX = (x) => left + (x - plot.x.range[0]) / (plot.x.range[1] - plot.x.range[0]) * (right - left);
    const toY = (y) => base - (y - plot.y.range[0]) / (plot.y.range[1] - plot.y.range[0]) * (base - top);
    g.strokeStyle = "#e3e7ec";
    g.fillStyle = "#3d4856";
    g.textAlign = "right";
    g.textBaseline = "middle";
    for (const [value, text] of yTicks) {
      g.beginPath(); g.moveTo(left, toY(value)); g.lineTo(right, toY(value)); g.stroke();
      g.fillText(text, left - 5, toY(value));
    }
    g.textAlign = "center";
    g.textBaseline = "top";
    if (plot.x.categories) {
      const room = (right - left) / plot.x.categories.length;
      plot.x.categories.forEach((name, k) => {
        let text = String(name);
        while (text.length > 1 && g.measureText(text).width > room - 4) text = text.slice(0, -2) + "…";
        g.fillText(text, toX(k), base + 6);
        g.fillText("n " + plot.counts[k], toX(k), base + 22);
      });
    } else {
      for (const [value, text] of ticks(...plot.x.range, Math.max(2, Math.floor((right - left) / 60)))) {
        g.beginPath(); g.moveTo(toX(value), top); g.lineTo(toX(value), base); g.stroke();
        g.fillText(text, toX(value), base + 5);
      }
      g.fillText(plot.x.title, (left + right) / 2, base + 22);
    }
    g.save();
    g.translate(10, (top + base) / 2);
    g.rotate(-Math.PI / 2);
    g.textBaseline = "middle";
    g.fillText(plot.y.title, 0, 0);
    g.restore();
    g.save();
    g.beginPath(); g.rect(left, top, right - left, base - top); g.clip();
    if (plot.equal) {
      g.strokeStyle = "#55606e"; g.setLineDash([5, 4]);
      const [low, high] = plot.x.range;
      g.beginPath(); g.moveTo(toX(low), toY(low)); g.lineTo(toX(high), toY(high)); g.stroke(); g.setLineDash([]);
    }
    if (plot.zero) {
      g.strokeStyle = "#55606e"; g.setLineDash([5, 4]);
      g.beginPath(); g.moveTo(left, toY(0)); g.lineTo(right, toY(0)); g.stroke(); g.setLineDash([]);
    }
    if (plot.curve) {
      const { age } = plot.curve;
      const line = (name, backwards) => {
        const order = age.map((_, k) => (backwards ? age.length - 1 - k : k));
        order.forEach((k, i) => g[i || backwards ? "lineTo" : "moveTo"](toX(age[k]), toY(plot.curve[name][k])));
      };
      for (const [low, high, alpha] of [["p05", "p95", 0.12], ["p25", "p75", 0.16]]) {
        g.beginPath(); line(low, false); line(high, true); g.closePath();
        g.fillStyle = `rgba(27,36,48,${alpha})`; g.fill();
      }
    }
    const many = plot.points.length > 600;
    const radius = many ? 2.2 : plot.points.length > 100 ? 3 : 4, alpha = many ? 0.45 : 0.75;
    const stamps = groups.map((style) => stamp(style, radius, alpha, scale));
    if (plot.joined) {
      // A participant's scans follow each other.
      g.globalAlpha = 0.6;
      plot.points.forEach((point, i) => {
        const before = plot.points[i - 1];
        if (!before || before.x === point.x || person(before.row) !== person(point.row)) return;
        g.strokeStyle = groups[groupOf(point.row)].colour;
        g.beginPath(); g.moveTo(toX(before.x), toY(before.y)); g.lineTo(toX(point.x), toY(point.y)); g.stroke();
      });
      g.globalAlpha = 1;
    }
    panel.hits = [];
    for (const point of plot.points) {
      const x = toX(point.x), y = toY(point.y);
      const one = stamps[groupOf(point.row)];
      g.drawImage(one.canvas, x - one.size / 2, y - one.size / 2, one.size, one.size);
      panel.hits.push([x, y, point]);
    }
    if (plot.curve) {
      for (const [name, wide, dash] of [["p05", 1.2, [4, 3]], ["p50", 2, []], ["p95", 1.2, [4, 3]]]) {
        g.beginPath();
        plot.curve.age.forEach((age, k) => g[k ? "lineTo" : "moveTo"](toX(age), toY(plot.curve[name][k])));
        g.strokeStyle = INK; g.lineWidth = wide; g.setLineDash(dash); g.stroke();
      }
      g.lineWidth = 1; g.setLineDash([]);
    }
    for (const box of plot.boxes || []) {
      const half = Math.min(0.3, 26 / ((right - left) / plot.x.categories.length));
      const [a, b] = [toX(box.at - half), toX(box.at + half)];
      g.strokeStyle = INK; g.lineWidth = 1.4;
      g.strokeRect(a, toY(box.q3), b - a, toY(box.q1) - toY(box.q3));
      g.beginPath();
      g.moveTo(toX(box.at), toY(box.q3)); g.lineTo(toX(box.at), toY(box.high));
      g.moveTo(toX(box.at), toY(box.q1)); g.lineTo(toX(box.at), toY(box.low)); g.stroke();
      g.lineWidth = 3; g.beginPath(); g.moveTo(a, toY(box.median)); g.lineTo(b, toY(box.median)); g.stroke(); g.lineWidth = 1;
    }
    g.restore();
    g.strokeStyle = "#8a94a1"; g.strokeRect(left, top, right - left, base - top);
    if (!plot.points.length) {
      g.fillStyle = "#4a5563"; g.textAlign = "center"; g.fillText("no values", (left + right) / 2, (top + base) / 2);
    }
  }

  // Spread points sideways, the same at each drawing.
  const jitter = (row) => (((row * 2654435761) >>> 0) / 2 ** 32 - 0.5) * 0.5;

  function strip(rows, valueOf, title, digits, unit, about, zero) {
    const names = groups.map((one) => one.name);
    const numbersOf = groups.map(() => []);
    const points = [];
    for (const row of rows) {
      const value = valueOf(row);
      if (value === null || value === undefined) continue;
      const k = groupOf(row);
      numbersOf[k].push(value);
      points.push({ x: k + jitter(row), y: value, row, text: `${title} ${format(value, digits)} ${unit}` });
    }
    const boxes = numbersOf.map((numbers, at) => {
      if (!numbers.length) return null;
      numbers.sort((a, b) => a - b);
      const [q1, middle, q3] = [0.25, 0.5, 0.75].map((q) => quantile(numbers, q));
      const reach = 1.5 * (q3 - q1);
      return { at, q1, median: middle, q3, low: numbers.find((v) => v >= q1 - reach),
        high: numbers.findLast((v) => v <= q3 + reach) };
    }).filter(Boolean);
    const range = extent(points.map((point) => point.y).concat(zero ? [0] : []));
    const words = boxes.map((box) => `${names[box.at]}: n ${numbersOf[box.at].length}, median ${format(box.median, digits)}`);
    return { x: { range: [-0.6, names.length - 0.4], categories: names }, y: { range, title: unit ? `${title} (${unit})` : title },
      counts: numbersOf.map((numbers) => numbers.length), points, boxes, zero, about: `${about}. ${words.join("; ") || "no values"}` };
  }

  function scatter(rows, xOf, yOf, x, y, about, more = {}) {
    const points = [];
    for (const row of rows) {
      const a = xOf(row), b = yOf(row);
      if (a === null || a === undefined || b === null || b === undefined) continue;
      points.push({ x: a, y: b, row, text: `${y.title} ${format(b, y.digits)}, ${x.title} ${format(a, x.digits)}` });
    }
    const ranges = more.equal
      ? Array(2).fill(extent(points.flatMap((point) => [point.x, point.y])))
      : [extent(points.map((point) => point.x)),
         extent(points.map((point) => point.y).concat(more.curve ? more.curve.p05.concat(more.curve.p95) : []))];
    return { x: { range: ranges[0], title: x.title }, y: { range: ranges[1], title: y.title }, points,
      about: `${about}: ${points.length} points`, ...more };
  }

  const rowsOf = (k) => ofNucleus[k];
  const measureOf = (key) => measures.find((one) => one.key === key);
  const named = (one) => (one.unit ? `${one.title} (${one.unit})` : one.title);

  const structures = [...new Set(nuclei.map((one) => one.structure))].map((structure) => ({
    structure,
    title: nuclei.find((one) => one.structure === structure).name.replace(/ (left|right)$/i, ""),
    left: nuclei.findIndex((one) => one.structure === structure && one.side === "L"),
    right: nuclei.findIndex((one) => one.structure === structure && one.side === "R"),
  })).filter((one) => one.left >= 0 && one.right >= 0);

  const byName = { measure: () => measureOf(state.measure) };
  const kinds = {
    groups: () => nuclei.map((one, k) => [one.name, () => {
      const m = byName.measure();
      return strip(rowsOf(k), (row) => values[m.key][row], m.title, m.digits, m.unit, `${m.title} of ${one.name} by ${byKey[state.by]?.title || "nothing"}`);
    }]),
    age: () => (byKey[state.covariate] ? nuclei.map((one, k) => [one.name, () => {
      const m = byName.measure(), column = byKey[state.covariate];
      const curve = state.covariate === design.age
        ? curves.find((c) => c.abbreviation === one.abbreviation && c.measure === m.key) : undefined;
      return scatter(rowsOf(k), (row) => column.numbers[Math.floor(row / K)], (row) => values[m.key][row],
        { title: column.title, digits: 1 }, { ...m, title: named(m) }, `${m.title} of ${one.name} against ${column.title}`,
        { joined: true, ...(curve ? { curve } : {}) });
    }]) : []),
    sides: () => structures.map((one) => [one.title, () => {
      const m = byName.measure();
      return scatter(rowsOf(one.left), (row) => values[m.key][row], (row) => values[m.key][row - one.left + one.right],
        { title: `left, ${named(m)}`, digits: m.digits }, { title: `right, ${named(m)}`, digits: m.digits },
        `${m.title} of the ${one.title}, right against left`, { equal: true });
    }]),
    asymmetry: () => structures.map((one) => [one.title, () => {
      const m = byName.measure();
      const of = (row) => {
        const a = values[m.key][row], b = values[m.key][row - one.left + one.right];
        return a === null || b === null || a + b === 0 ? null : 200 * (a - b) / (a + b);
      };
      return strip(rowsOf(one.left), of, `asymmetry`, 1, "%", `Asymmetry in ${m.title} of the ${one.title}`, true);
    }]),
    iron: () => (values.qsm_mean && values.r2star_mean ? nuclei.map((one, k) => [one.name, () => {
      const [q, r] = [measureOf("qsm_mean"), measureOf("r2star_mean")];
      return scatter(rowsOf(k), (row) => values.r2star_mean[row], (row) => values.qsm_mean[row],
        { title: named(r), digits: r.digits }, { title: named(q), digits: q.digits }, `QSM against R2* in ${one.name}`);
    }]) : []),
  };

  const panels = [];
  const visible = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const panel = panels.find((one) => one.canvas === entry.target);
      if (entry.isIntersecting) visible.add(panel);
      else visible.delete(panel);
    }
    later();
  }, { rootMargin: "200px" });

  for (const place of document.querySelectorAll("[data-plot]")) {
    for (const [title, make] of kinds[place.dataset.plot]()) {
      const figure = document.createElement("figure");
      const caption = document.createElement("figcaption");
      const canvas = document.createElement("canvas");
      caption.textContent = title;
      canvas.setAttribute("role", "img");
      figure.append(caption, canvas);
      place.append(figure);
      const panel = { canvas, make, stale: true, hits: [] };
      panels.push(panel);
      listen(panel);
      watcher.observe(canvas);
    }
  }
  $("no-covariate").hidden = Boolean(state.covariate);
  document.querySelector(".controls-small").hidden = !state.covariate;
  $("no-iron").hidden = Boolean(values.qsm_mean && values.r2star_mean);

  function nearest(panel, event) {
    const box = panel.canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    let best = null, distance = 12 ** 2;
    for (const hit of panel.hits) {
      const d = (hit[0] - x) ** 2 + (hit[1] - y) ** 2;
      if (d < distance) { distance = d; best = hit; }
    }
    return best;
  }

  function listen(panel) {
    const tip = $("tip");
    panel.canvas.addEventListener("mousemove", (event) => {
      const hit = nearest(panel, event);
      tip.hidden = !hit;
      panel.canvas.style.cursor = hit && link(hit[2].row) ? "pointer" : "default";
      if (!hit) return;
      const row = hit[2].row;
      tip.textContent = `${scans.name[Math.floor(row / K)]} ${nuclei[row % K].abbreviation}: ${hit[2].text}` +
        (state.by ? ` · ${byKey[state.by].title} ${groups[groupOf(row)].name}` : "") +
        (flag(row) && flag(row) !== "ok" ? ` · ${flag(row).replaceAll(";", ", ")}` : "");
      tip.style.left = Math.min(event.clientX + 12, innerWidth - 310) + "px";
      tip.style.top = (event.clientY + 14) + "px";
    });
    panel.canvas.addEventListener("mouseleave", () => { tip.hidden = true; });
    panel.canvas.addEventListener("click", (event) => {
      const hit = nearest(panel, event);
      if (!hit || !link(hit[2].row)) return;
      const anchor = document.createElement("a");
      anchor.href = link(hit[2].row);
      anchor.target = "_blank";
      anchor.rel = "noopener";
      anchor.click();
    });
  }

  // --- tables: a page of rows at a time ---

  const SIZE = 50;
  function pager(table, count, page, go) {
    const place = document.querySelector(`.pager[data-for=${table}]`);
    const last = Math.max(0, Math.ceil(count / SIZE) - 1);
    const words = document.createElement("span");
    words.setAttribute("role", "status");
    words.textContent = count ? `${page * SIZE + 1} to ${Math.min(count, (page + 1) * SIZE)} of ${count}` : "none";
    const button = (text, to) => {
      const one = document.createElement("button");
      one.type = "button";
      one.textContent = text;
      one.disabled = to < 0 || to > last || to === page;
      one.addEventListener("click", () => go(to));
      return one;
    };
    place.replaceChildren(words, ...(last ? [button("‹ previous", page - 1), button("next ›", page + 1)] : []));
  }

  function cellOf(tag, text, number) {
    const cell = document.createElement(tag);
    if (number) cell.className = "number";
    cell.append(text);
    return cell;
  }

  function anchorOf(row, text) {
    const href = link(row);
    if (!href) return text;
    const anchor = document.createElement("a");
    anchor.href = href;
    anchor.textContent = text;
    return anchor;
  }

  let outlierPage = 0;
  function drawOutliers() {
    const kept = new Set(selected);
    const found = data.outliers.filter((one) => kept.has(one.row));
    outlierPage = Math.min(outlierPage, Math.max(0, Math.ceil(found.length / SIZE) - 1));
    $("outlier-table").tBodies[0].replaceChildren(...found.slice(outlierPage * SIZE, (outlierPage + 1) * SIZE).map((one) => {
      const tr = document.createElement("tr");
      const m = measureOf(one.measure);
      const scan = cellOf("th", anchorOf(one.row, scans.name[Math.floor(one.row / K)]));
      scan.scope = "row";
      tr.append(scan, cellOf("td", nuclei[one.row % K].name), cellOf("td", named(m)),
        cellOf("td", format(values[m.key][one.row], m.digits), true),
        cellOf("td", format(one.median, m.digits), true),
        cellOf("td", (one.z > 0 ? "+" : "") + format(one.z, 1), true));
      return tr;
    }));
    pager("outlier-table", found.length, outlierPage, (to) => { outlierPage = to; drawOutliers(); });
  }

  const tableColumns = [
    { title: "Scan", text: (row) => scans.name[Math.floor(row / K)], link: true },
    { title: "Nucleus", text: (row) => nuclei[row % K].abbreviation },
    ...columns.filter((column) => column.key === "status").map((column) => ({
      title: column.title, text: (row) => raw(column, Math.floor(row / K)) })),
    { title: "Flag", text: (row) => flag(row)?.replaceAll(";", ", ") ?? null },
    ...(data.ratings ? [{ title: "Rating", text: rating }] : []),
    ...measures.map((m) => ({ title: named(m), number: (row) => values[m.key][row], digits: m.digits })),
    ...columns.filter((column) => column.key !== "status" && column.table).map((column) =>
      (column.levels
        ? { title: column.title, text: (row) => raw(column, Math.floor(row / K)) }
        : { title: column.title, number: (row) => column.numbers[Math.floor(row / K)], digits: column.digits })),
  ];
  const table = { page: 0, sort: -1, up: true, filters: tableColumns.map(() => "") };
  const collator = new Intl.Collator("en", { numeric: true });

  function makeTable() {
    const heads = document.createElement("tr"), fields = document.createElement("tr");
    tableColumns.forEach((column, k) => {
      const th = document.createElement("th");
      th.scope = "col";
      if (column.number) th.className = "number";
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = column.title;
      button.addEventListener("click", () => {
        table.up = table.sort === k ? !table.up : true;
        table.sort = k;
        table.page = 0;
        drawTable();
      });
      th.append(button);
      heads.append(th);
      const td = document.createElement("td");
      const input = document.createElement("input");
      input.type = "text";
      input.setAttribute("aria-label", `Filter ${column.title}`);
      input.addEventListener("input", () => { table.filters[k] = input.value; table.page = 0; drawTable(); });
      td.append(input);
      fields.append(td);
    });
    $("rows").tHead.append(heads, fields);
  }

  function passes(column, filter, row) {
    const text = filter.trim();
    if (!text) return true;
    const comparison = column.number && text.match(/^([<>=])\s*(-?[\d.]+(?:e-?\d+)?)$/i);
    const value = column.number ? column.number(row) : column.text(row);
    if (value === null || value === undefined) return "n/a".startsWith(text.toLowerCase());
    if (comparison) {
      const bound = Number(comparison[2]);
      return { "<": value < bound, ">": value > bound, "=": value === bound }[comparison[1]];
    }
    const shown = column.number ? format(value, column.digits) : String(value);
    return shown.toLowerCase().includes(text.toLowerCase());
  }

  function drawTable() {
    let rows = selected;
    tableColumns.forEach((column, k) => {
      if (table.filters[k].trim()) rows = rows.filter((row) => passes(column, table.filters[k], row));
    });
    if (table.sort >= 0) {
      const column = tableColumns[table.sort], sign = table.up ? 1 : -1;
      const keyed = rows.map((row) => [column.number ? column.number(row) : column.text(row), row]);
      const missing = (value) => value === null || value === undefined;
      keyed.sort(([a, i], [b, j]) =>
        missing(a) || missing(b) ? missing(a) - missing(b) || i - j
          : sign * (column.number ? a - b : collator.compare(a, b)) || i - j);
      rows = keyed.map(([, row]) => row);
    }
    [...$("rows").tHead.rows[0].cells].forEach((th, k) => {
      if (k === table.sort) th.setAttribute("aria-sort", table.up ? "ascending" : "descending");
      else th.removeAttribute("aria-sort");
    });
    table.page = Math.min(table.page, Math.max(0, Math.ceil(rows.length / SIZE) - 1));
    $("rows").tBodies[0].replaceChildren(...rows.slice(table.page * SIZE, (table.page + 1) * SIZE).map((row) => {
      const tr = document.createElement("tr");
      tableColumns.forEach((column, k) => {
        const value = column.number ? column.number(row) : column.text(row);
        const text = column.number ? format(value, column.digits) : value ?? "n/a";
        const cell = cellOf(k ? "td" : "th", column.link ? anchorOf(row, text) : text, Boolean(column.number));
        if (!k) cell.scope = "row";
        tr.append(cell);
      });
      return tr;
    }));
    pager("rows", rows.length, table.page, (to) => { table.page = to; drawTable(); });
  }

  // --- changes ---

  function refresh() {
    select();
    colourGroups();
    for (const panel of panels) panel.stale = true;
    later();
    drawOutliers();
    drawTable();
  }
  // Those in view come first, then the others; a few each frame, so that the page answers meanwhile.
  const FRAME = 40;
  function drawSome() {
    const start = performance.now();
    while (performance.now() - start < FRAME) {
      const next = panels.find((panel) => panel.stale && visible.has(panel))
        || panels.find((panel) => panel.stale);
      if (!next) return;
      next.stale = false;
      draw(next);
    }
    later();
  }
  let waiting = false;
  function later() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      drawSome();
    });
  }
  const bind = (id, key, event) => $(id).addEventListener(event, () => {
    state[key] = $(id).value;
    table.page = outlierPage = 0;
    refresh();
  });
  for (const [id, event] of [["measure", "change"], ["by", "change"], ["covariate", "change"], ["find", "input"], ["only", "change"], ["rating", "change"]]) bind(id, id, event);
  $("reset").addEventListener("click", () => {
    for (const id of ["find", "only", "rating"]) { state[id] = ""; $(id).value = ""; }
    table.filters.fill("");
    for (const input of $("rows").tHead.querySelectorAll("input")) input.value = "";
    table.sort = -1;
    refresh();
  });
  let pending = 0;
  addEventListener("resize", () => {
    clearTimeout(pending);
    pending = setTimeout(() => { for (const panel of panels) panel.stale = true; later(); }, 120);
  });
  addEventListener("beforeprint", () => panels.forEach(draw));
  makeTable();
  refresh();
  drawSome();
  document.documentElement.dataset.ready = "true";
})();
