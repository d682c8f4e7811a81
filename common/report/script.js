"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const classTable = byId("class-table");
  const filter = byId("class-filter");
  const showCount = () => {
    const wanted = filter.value.trim().toLowerCase();
    let shown = 0;
    closeDetails(classTable);
    for (const row of classTable.tBodies[0].rows) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
      shown += !row.hidden;
    }
    byId("class-count").textContent = `${shown} of ${classTable.tBodies[0].rows.length} classes.`;
  };
  filter.addEventListener("input", showCount);
  showCount();

  classTable.tBodies[0].addEventListener("click", (event) => {
    const button = event.target.closest(".more");
    if (button) toggleClass(button.closest("tr"));
  });

  function toggleClass(row, open = null) {
    const button = row.querySelector(".more");
    const isOpen = button.getAttribute("aria-expanded") === "true";
    if (open === isOpen) return;
    button.setAttribute("aria-expanded", String(!isOpen));
    if (isOpen) row.nextElementSibling.remove();
    else row.after(detailRow(row));
  }

  function detailRow(row) {
    const entry = data.classes[row.dataset.class];
    const cell = make("td", { colspan: row.cells.length });
    const heads = ["", "AP", "score", "recall", "precision", ...data.errors];
    const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col", class: "num" }, text)));
    const lines = entry.tables.map((table, number) => {
      const judged = table.found + table.wrong;
      const values = [
        table.ap.toFixed(3), table.score.toFixed(2), (table.found / entry.truth).toFixed(2),
        judged ? (table.found / judged).toFixed(2) : "–", ...table.errors,
      ];
      const name = make("th", { scope: "row" }, key(number), data.tables[number]);
      return make("tr", {}, name, ...values.map((v) => make("td", { class: "num" }, String(v))));
    });
    const table = make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines));
    const notes = entry.tables.flatMap((each, number) => [
      partners(number, "Objects of this class detected as:", each.takenFor),
      partners(number, "Detections of this class that really are:", each.reallyIs),
    ]);
    const grid = make("div", { class: "detail-grid" }, curve(entry, row),
      make("div", {}, ...notes.filter(Boolean)));
    cell.append(make("div", { class: "detail-body" }, make("div", { class: "scroll" }, table), grid));
    return make("tr", { class: "detail" }, cell);
  }

  const key = (number) => make("i", { class: `key t${number % 6}` });

  function partners(number, text, list) {
    if (!list.length) return null;
    const names = list.map(([index, count]) => `${data.names[index]} (${count})`).join(", ");
    return make("p", {}, key(number), `${text} ${names}`);
  }

  function svg(tag, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function curve(entry, row) {
    const [width, height, left, bottom] = [420, 270, 40, 34];
    const x = (v) => left + v * (width - left - 10);
    const y = (v) => height - bottom - v * (height - bottom - 10);
    const name = row.querySelector(".more").textContent;
    const chart = svg("svg", {
      class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img",
      "aria-label": `Precision over recall of ${name}`,
    });
    for (const v of [0, 0.25, 0.5, 0.75, 1]) {
      chart.append(
        svg("path", { class: "grid", d: `M${left} ${y(v)}H${width - 10}M${x(v)} 10V${y(0)}` }),
        svg("text", { x: left - 5, y: y(v) + 4, "text-anchor": "end" }, String(v)),
        svg("text", { x: x(v), y: y(0) + 15, "text-anchor": "middle" }, String(v)));
    }
    chart.append(svg("text", { x: x(0.5), y: height - 3, "text-anchor": "middle" }, "recall"));
    entry.tables.forEach((table, number) => {
      if (!table.curve.length) return;
      const step = 1 / (data.recalls - 1);
      const points = table.curve.map((p, i) => `${x(i * step).toFixed(1)},${y(p / 1000).toFixed(1)}`);
      const last = x((table.curve.length - 1) * step).toFixed(1);
      points.push(`${last},${y(0)}`);
      chart.append(svg("polyline", { class: `line t${number % 6}`, points: points.join(" ") }));
      const judged = table.found + table.wrong;
      if (judged)
        chart.append(svg("circle", {
          class: `dot t${number % 6}`, r: 5, cx: x(table.found / entry.truth),
          cy: y(table.found / judged),
        }, svg("title", {}, `${data.tables[number]}: judged above ${table.score}`)));
    });
    return chart;
  }

  // Pictures: which, whose boxes, which boxes.
  const gallery = byId("gallery");
  const viewer = byId("viewer");
  if (gallery) {
    const press = (group, chosen) => {
      for (const button of byId(group).querySelectorAll("button"))
        button.setAttribute("aria-pressed", String(button === chosen));
    };
    const figures = [...gallery.children];
    let kind = "";
    let layer = "0";
    // Worst and best are those of the table whose boxes are shown; confusions are of any.
    const arrange = () => {
      const rank = new Map(figures.map((figure, place) => {
        if (!kind) return [figure, place];
        const ranks = JSON.parse(figure.dataset[kind] ?? "{}");
        return [figure, kind === "confusion" ? Math.min(...Object.values(ranks)) : ranks[layer] ?? Infinity];
      }));
      for (const figure of figures)
        figure.hidden = !Number.isFinite(rank.get(figure));
      gallery.append(...[...figures].sort((a, b) => rank.get(a) - rank.get(b) || 0));
      for (const part of gallery.querySelectorAll("[data-table]"))
        part.toggleAttribute("hidden", part.dataset.table !== layer);
    };
    byId("kinds").addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      press("kinds", button);
      kind = button.dataset.kind;
      arrange();
    });
    byId("layers")?.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      press("layers", button);
      layer = button.dataset.table;
      arrange();
    });
    const showBoxes = () => {
      for (const input of byId("boxes").querySelectorAll("input"))
        for (const place of [gallery, viewer])
          place.classList.toggle(`hide-${input.value}`, !input.checked);
    };
    byId("boxes").addEventListener("change", showBoxes);
    showBoxes();
    gallery.addEventListener("click", (event) => {
      const button = event.target.closest(".enlarge");
      if (button) enlarge(button.closest("figure"), null);
    });
  }

  function enlarge(figure, pair) {
    const source = figure.querySelector(".enlarge");
    const [, , width, height] = source.querySelector("svg").getAttribute("viewBox").split(" ");
    const captions = [...figure.querySelectorAll("figcaption span")];
    const views = captions.map((caption, number) => {
      const photo = source.firstElementChild.cloneNode(true);
      photo.removeAttribute("loading");
      const drawing = source.querySelector("svg").cloneNode(false);
      const layer = source.querySelector(`.layer[data-table="${number}"]`).cloneNode(true);
      layer.removeAttribute("hidden");
      drawing.append(layer);
      let unverified = false;
      if (pair !== null) {
        const chosen = [...layer.querySelectorAll(`[data-pair="${pair}"]`)];
        for (const part of chosen) part.classList.add("chosen");
        drawing.classList.toggle("focus", chosen.length > 0);
        unverified = chosen.some((part) => part.classList.contains("unverified"));
      }
      const box = byId("boxes").querySelector('[value="unverified"]');
      if (unverified && !box.checked) box.click();
      const frame = make("div", { class: "frame" }, photo, drawing);
      const ratio = width / height;
      frame.style.aspectRatio = `${width} / ${height}`;
      frame.style.maxWidth = `calc(78vh * ${ratio})`;
      return make("figure", {}, frame,
        make("figcaption", {}, key(number), `${data.tables[number]}: ${caption.textContent}`));
    });
    const close = make("button", { type: "button" }, "Close");
    close.addEventListener("click", () => viewer.close());
    const head = make("div", { class: "viewer-head" },
      make("b", {}, figure.querySelector("figcaption b").textContent), close);
    viewer.replaceChildren(head, make("div", { class: "views" }, ...views));
    if (!viewer.open) viewer.showModal();
  }
  viewer.addEventListener("click", (event) => {
    if (event.target === viewer) viewer.close();
  });

  document.addEventListener("click", (event) => {
    const link = event.target.closest("a.example");
    if (!link) return;
    event.preventDefault();
    enlarge(byId(link.getAttribute("href").slice(1)), link.dataset.pair);
  });

  const followHash = () => {
    const row = /^#class-\d+$/.test(location.hash) && byId(location.hash.slice(1));
    if (!row) return;
    row.hidden = false;
    toggleClass(row, true);
    row.scrollIntoView({ block: "center" });
  };
  addEventListener("hashchange", followHash);
  followHash();
})();
