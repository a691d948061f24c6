// Read-outs for the charts of core/charts.py: a tooltip under the pointer, and a hairline at the same x in all charts
// that share the x axis. Values come back from the drawn places, so the page carries its data once.
"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const ACROSS = 1000; // STEPS_ACROSS in charts.py
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;

  const number = (value, digits) =>
    value.toLocaleString("en-US", { maximumFractionDigits: digits, minimumFractionDigits: Math.min(digits, 3) });
  const mix = (low, high, share, log) => (log ? low * (high / low) ** share : low + (high - low) * share);

  // "M1 2 3 4M5 6h0" -> [[1, 2], [3, 4], [5, 6]]
  const pointsOf = (path) => {
    const values = path.getAttribute("d").replace(/h0|z/g, "").split(/[M ]+/).filter(Boolean).map(Number);
    return values.flatMap((value, i) => (i % 2 ? [] : [[value, values[i + 1]]]));
  };

  const nearest = (points, across) => {
    let low = 0;
    let high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] <= across) low = middle;
      else high = middle;
    }
    return across - points[low][0] < points[high][0] - across ? low : high;
  };

  const charts = [...document.querySelectorAll("svg[data-chart]")].map((svg) => {
    const facts = JSON.parse(svg.dataset.chart);
    const hair = svg.appendChild(document.createElementNS(SVG, "line"));
    hair.setAttribute("class", "hair");
    hair.setAttribute("y1", "0");
    hair.setAttribute("y2", "100%");
    return { svg, facts, hair, series: null };
  });

  const frame = (svg) => {
    const box = svg.getBoundingClientRect();
    const style = getComputedStyle(svg);
    const [top, right, bottom, left] = ["Top", "Right", "Bottom", "Left"].map((s) => parseFloat(style[`padding${s}`]));
    return { left: box.left + left, top: box.top + top, width: box.width - left - right,
      height: box.height - top - bottom };
  };

  const seriesOf = (chart) => {
    chart.series ??= [...chart.svg.querySelectorAll("path[data-name]")].map((path) => {
      const points = pointsOf(path);
      const half = chart.facts.kind === "area" ? points.length / 2 : points.length;
      const own = path.getAttribute("style");
      return { name: path.dataset.name, own, points: points.slice(0, half), back: points.slice(half).reverse() };
    });
    return chart.series;
  };

  const line = (own, name, value) => {
    const row = document.createElement("div");
    const swatch = row.appendChild(document.createElement("i"));
    if (own) swatch.setAttribute("style", own);
    else swatch.hidden = true;
    row.appendChild(document.createElement("span")).textContent = name;
    row.appendChild(document.createElement("b")).textContent = value;
    return row;
  };

  const lineRows = (chart, across, height) => {
    const { x, y, log, xlog, digits, xdigits, kind } = chart.facts;
    const at = (place) => mix(x[0], x[1], place / ACROSS, xlog);
    const rows = seriesOf(chart).filter((series) => series.points.length).map((series) => {
      const index = nearest(series.points, across);
      const [right, down] = series.points[index];
      const base = kind === "area" ? series.back[index][1] : height;
      const value = number(mix(y[0], y[1], (base - down) / height, log), digits);
      const far = Math.abs(right - across) > ACROSS / 100;
      const name = far ? `${series.name} at ${number(at(right), xdigits)}` : series.name;
      return line(series.own, name, value);
    });
    if (kind === "area") rows.reverse();
    return [`${chart.facts.xname} ${number(at(across), xdigits)}`, rows];
  };

  const heatRows = (chart, across, down) => {
    const { x, rows, row, values, unit } = chart.facts;
    const r = Math.min(rows.length - 1, Math.max(0, Math.floor(down * rows.length)));
    const columns = values[r].length;
    const c = Math.min(columns - 1, Math.floor((across / ACROSS) * columns));
    const edge = (column) => mix(x[0], x[1], column / columns);
    const [from, to] = [Math.floor(edge(c)) + 1, Math.floor(edge(c + 1))];
    const when = to > from ? `${number(from, 0)}\u2013${number(to, 0)}` : number(Math.max(to, 1), 0);
    const value = values[r][c] === null ? "no data" : number(values[r][c], 2);
    return [`${chart.facts.xname} ${when}`, [line("", `${row} ${rows[r]}, ${unit}`, value)]];
  };

  const place = (event) => {
    tip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = tip;
    const right = event.clientX + 16 + width < document.documentElement.clientWidth;
    tip.style.left = `${Math.max(4, right ? event.clientX + 16 : event.clientX - width - 16)}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, window.innerHeight - height - 8))}px`;
  };

  const hairs = (chart, across) => {
    const value = mix(chart.facts.x[0], chart.facts.x[1], across / ACROSS, chart.facts.xlog);
    for (const other of charts) {
      const { x, xlog, xname } = other.facts;
      const share = xlog ? Math.log(value / x[0]) / Math.log(x[1] / x[0]) : (value - x[0]) / (x[1] - x[0]);
      const shown = other === chart || (xname === chart.facts.xname && share >= 0 && share <= 1);
      other.hair.classList.toggle("shown", shown);
      if (shown) for (const end of ["x1", "x2"]) other.hair.setAttribute(end, `${100 * share}%`);
    }
  };

  const leave = () => {
    tip.hidden = true;
    for (const chart of charts) chart.hair.classList.remove("shown");
  };

  const move = (chart, event) => {
    const { left, top, width, height } = frame(chart.svg);
    const share = (event.clientX - left) / width;
    if (share < -0.02 || share > 1.02) return leave();
    const across = Math.min(1, Math.max(0, share)) * ACROSS;
    const heat = chart.facts.kind === "heat";
    const [head, rows] = heat ? heatRows(chart, across, (event.clientY - top) / height)
      : lineRows(chart, across, height);
    const title = document.createElement("em");
    title.textContent = head;
    tip.replaceChildren(title, ...rows);
    hairs(chart, across);
    place(event);
  };

  document.body.appendChild(tip);
  for (const chart of charts) {
    chart.svg.addEventListener("pointermove", (event) => move(chart, event));
    chart.svg.addEventListener("pointerdown", (event) => move(chart, event));
    chart.svg.addEventListener("pointerleave", leave);
  }
})();
