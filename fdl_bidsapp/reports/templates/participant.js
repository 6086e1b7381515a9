"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);

  // Outlines: the figures hide them when they are shown under the fragment #plain.
  const outlines = $("outlines");
  const show = (on) => {
    outlines.setAttribute("aria-pressed", String(on));
    for (const image of document.querySelectorAll("img.overlay, img.overview")) {
      image.src = image.src.replace(/#.*$/, "") + (on ? "" : "#plain");
    }
  };
  outlines.addEventListener("click", () => show(outlines.getAttribute("aria-pressed") !== "true"));
  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches("input[type=text], textarea, select");
    if (event.key.toLowerCase() === "o" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      outlines.click();
    }
  });

  for (const group of document.querySelectorAll("[data-flicker]")) {
    const image = $(group.dataset.flicker).querySelector("img");
    group.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button || !image) return;
      for (const each of group.children) each.setAttribute("aria-pressed", String(each === button));
      const shown = button.dataset.show;
      image.src = image.src.replace(/#.*$/, "") + (shown ? "#" + shown : "");
    });
  }

  $("copy").addEventListener("click", async () => {
    const range = document.createRange();
    range.selectNodeContents($("methods-text"));
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    try {
      await navigator.clipboard.writeText($("methods-text").innerText);
      $("copied").textContent = "copied";
    } catch {
      $("copied").textContent = document.execCommand("copy") ? "copied" : "the text is selected: copy it";
    }
  });

  if (!$("export")) return;

  // Ratings of all pages of this folder share one place in the browser's own storage, where the
  // browser lets pages of a folder share it.
  const place = "fdl-bidsapp ratings " + location.pathname.replace(/[^/]*$/, "");
  let ratings = {};
  try {
    ratings = JSON.parse(localStorage.getItem(place)) || {};
  } catch { /* storage is off, or holds something else: start anew */ }
  const key = (field) => field.dataset.scan + " " + field.dataset.label;
  const keep = () => {
    try {
      localStorage.setItem(place, JSON.stringify(ratings));
    } catch { /* they stay on the page until it is closed */ }
  };
  const fields = [...document.querySelectorAll("fieldset.rating")];
  const count = () => {
    const here = fields.filter((field) => ratings[key(field)]?.rating).length;
    const all = Object.values(ratings).filter((one) => one.rating).length;
    $("rated").textContent = `${here} of ${fields.length} nuclei rated` +
      (all > here ? `, ${all} in this folder` : "");
  };
  for (const field of fields) {
    const comment = field.querySelector(".comment input");
    const mark = () => {
      const rating = field.querySelector("input[type=radio]:checked")?.value || "";
      if (rating || comment.value) {
        ratings[key(field)] = { rating, comment: comment.value, rater: $("rater").value };
      } else {
        delete ratings[key(field)];
      }
      field.classList.toggle("rated", Boolean(rating));
      keep();
      count();
    };
    const known = ratings[key(field)];
    if (known) {
      comment.value = known.comment || "";
      for (const radio of field.querySelectorAll("input[type=radio]")) {
        radio.checked = radio.value === known.rating;
      }
      field.classList.toggle("rated", Boolean(known.rating));
    }
    field.addEventListener("input", mark);
    field.querySelector(".withdraw").addEventListener("click", () => {
      for (const radio of field.querySelectorAll("input[type=radio]")) radio.checked = false;
      mark();
    });
  }
  count();
  try {
    $("rater").value = localStorage.getItem("fdl-bidsapp rater") || "";
    $("rater").addEventListener("input", () => localStorage.setItem("fdl-bidsapp rater", $("rater").value));
  } catch { /* storage is off */ }

  // Spreadsheets run cells that begin like a formula.
  const cell = (text) => {
    const line = String(text || "").replace(/\s+/g, " ").trim();
    return line === "" ? "n/a" : /^[=+\-@]/.test(line) ? "'" + line : line;
  };
  $("export").addEventListener("click", () => {
    const rows = Object.entries(ratings)
      .filter(([, one]) => one.rating)
      .sort(([a], [b]) => (a < b ? -1 : 1))
      .map(([name, one]) => {
        const [scan, label] = name.split(" ");
        return [scan, label, one.rating, cell(one.comment), cell(one.rater || $("rater").value)].join("\t");
      });
    const text = [data.columns.join("\t"), ...rows].join("\n") + "\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/tab-separated-values" }));
    link.download = data.file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
})();
