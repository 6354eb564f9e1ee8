"use strict";
// What a page does: tables sort, and curves are drawn once they come into view.
(() => {
  // --- tables ---

  // Numbers are written "=1.5", texts "'1.5", see lm/reports/page.py. What is empty or not a number
  // stays last.
  function compare(first, second, sign) {
    const isNumber = first.startsWith("=") && second.startsWith("=");
    if (!isNumber) {
      if (!first || !second) return !first - !second;
      return sign * first.localeCompare(second, undefined, { numeric: true });
    }
    const [a, b] = [first, second].map((text) => Number(text.slice(1).replace("inf", "Infinity")));
    if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b);
    return a === b ? 0 : sign * (a < b ? -1 : 1);
  }

  function sortBy(head) {
    const table = head.closest("table");
    const column = [...head.parentElement.children].indexOf(head);
    const isAscending = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", isAscending ? "ascending" : "descending");

    const key = (row) => row.children[column].dataset.sort;
    const sign = isAscending ? 1 : -1;
    const rows = [...table.tBodies[0].rows];
    rows.sort((first, second) => compare(key(first), key(second), sign));
    table.tBodies[0].append(...rows);
  }

  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => sortBy(button.closest("th")));
  }

  // --- curves ---

  const COLOURS = [
    "#1f77b4", "#e07b00", "#2a9d3a", "#d62728", "#8a5cc7",
    "#8c564b", "#d957b0", "#6b7280", "#a8a000", "#12a5b5",
  ];
  const DASHES = [["solid", "solid"], ["dashed", "dashed"], ["dotted", "dotted"],
    ["dotdash", "dashed"], ["dashdot", "dotted"]]; // Bokeh's name, CSS's name
  const FEW = 30; // points of a curve that are drawn as points too
  const colour = (number) => COLOURS[number % COLOURS.length];
  const dash = (number) => DASHES[Math.floor(number / COLOURS.length) % DASHES.length];

  function makeCurves(root) {
    const data = JSON.parse(root.querySelector("script").textContent);
    const isOn = data.names.map(() => true);
    const drawn = new Map(); // element of a figure -> function that shows what is on
    let scale = "linear";

    // A null among the values is a gap: what is no number, and on a logarithmic axis what is not
    // above 0.
    const values = (y) => y.map((v) => (v === null || (scale === "log" && v <= 0) ? NaN : v));

    function draw(element) {
      const figure = data.figures[Number(element.dataset.figure)];
      const style = getComputedStyle(document.body);
      const ink = style.getPropertyValue("--ink").trim();
      const faint = style.getPropertyValue("--line").trim();
      const plot = Bokeh.Plotting.figure({
        // Bokeh takes what stands between two pairs of dollars for TeX.
        title: figure.title.replaceAll("$$", "$\u200b$"), height: 320, sizing_mode: "stretch_width", y_axis_type: scale,
        tools: "pan,box_zoom,wheel_zoom,reset", toolbar_location: "above",
        background_fill_alpha: 0, border_fill_alpha: 0, outline_line_color: faint,
      });
      plot.toolbar.logo = null;
      // A finger scrolls the page.
      if (matchMedia("(pointer: coarse)").matches) plot.toolbar.active_drag = null;
      plot.title.text_color = ink;
      for (const axis of [...plot.xaxes, ...plot.yaxes]) {
        axis.axis_label_text_color = axis.major_label_text_color = ink;
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = faint;
      }
      plot.xaxis.axis_label = data.x;
      for (const grid of [plot.xgrid, plot.ygrid]) grid.grid_line_color = faint;

      const lines = new Bokeh.ColumnDataSource();
      const points = new Bokeh.ColumnDataSource();
      function update() {
        const on = figure.curves.filter(([number]) => isOn[number]);
        const few = on.filter(([, x]) => x.length < FEW);
        lines.data = {
          x: on.map(([, x]) => x), y: on.map(([, , y]) => values(y)),
          name: on.map(([number]) => data.names[number]),
          colour: on.map(([number]) => colour(number)),
          dash: on.map(([number]) => dash(number)[0]),
        };
        points.data = {
          x: few.flatMap(([, x]) => x), y: few.flatMap(([, , y]) => values(y)),
          name: few.flatMap(([number, x]) => x.map(() => data.names[number])),
          colour: few.flatMap(([number, x]) => x.map(() => colour(number))),
        };
      }
      update();
      plot.multi_line({ field: "x" }, { field: "y" }, {
        source: lines, line_color: { field: "colour" }, line_dash: { field: "dash" },
        line_width: 1.5,
      });
      plot.scatter({ field: "x" }, { field: "y" }, {
        source: points, color: { field: "colour" }, size: 6,
      });
      plot.add_tools(new Bokeh.HoverTool({
        line_policy: "nearest",
        tooltips: [["", "@name"], [data.x, "$snap_x{0,0}"], ["value", "$snap_y{0.[000000]}"]],
      }));
      drawn.set(element, update);
      return Bokeh.Plotting.show(plot, element);
    }

    // --- in view ---

    // One after the other, so that the first one is there soon.
    let queue = Promise.resolve();
    const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    async function drawOnce(element) {
      if (drawn.has(element)) return;
      await draw(element);
      await painted();
      element.setAttribute("data-drawn", scale);
    }
    const observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting) queue = queue.then(() => drawOnce(entry.target));
      }
    }, { rootMargin: "100px" });
    const elements = root.querySelectorAll(".figure");
    for (const element of elements) observer.observe(element);

    function drawAgain() {
      drawn.clear();
      for (const element of elements) {
        element.replaceChildren();
        element.removeAttribute("data-drawn");
        observer.unobserve(element);
        observer.observe(element);
      }
    }

    // --- switches ---

    const updateAll = () => drawn.forEach((update) => update());
    const boxes = data.names.map((name, number) => {
      const label = document.createElement("label");
      const box = document.createElement("input");
      const swatch = document.createElement("i");
      const text = document.createElement("span");
      box.type = "checkbox";
      box.checked = true;
      box.addEventListener("change", () => {
        isOn[number] = box.checked;
        updateAll();
      });
      swatch.style.borderTopColor = colour(number);
      swatch.style.borderTopStyle = dash(number)[1];
      text.textContent = name;
      label.append(box, swatch, text);
      root.querySelector(".legend").append(label);
      return box;
    });

    for (const button of root.querySelectorAll("[data-all]")) {
      button.addEventListener("click", () => {
        isOn.fill(button.dataset.all === "on");
        for (const box of boxes) box.checked = button.dataset.all === "on";
        updateAll();
      });
    }
    const scales = root.querySelectorAll("[data-scale]");
    for (const button of scales) {
      button.addEventListener("click", () => {
        scale = button.dataset.scale;
        for (const other of scales) other.setAttribute("aria-pressed", String(other === button));
        drawAgain();
      });
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAgain);
  }

  for (const root of document.querySelectorAll(".curves")) makeCurves(root);
})();
