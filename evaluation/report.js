// Of the report: every picture's values, the scatter plot, and the pictures under a divider.

const data = JSON.parse(document.getElementById("data").textContent);
const printed = (value, column) => (value === null ? "–" : value.toFixed(column.digits));

{
  const table = document.getElementById("pictures");
  const find = document.getElementById("find");
  const more = document.getElementById("more");
  const few = 100;
  let order = data.names.map((_, index) => index);
  let limit = few;
  const fill = () => {
    const wanted = find.value.toLowerCase();
    const found = order.filter((index) => data.names[index].toLowerCase().includes(wanted));
    table.tBodies[0].replaceChildren(
      ...found.slice(0, limit).map((index) => {
        const row = document.createElement("tr");
        const head = document.createElement("th");
        head.scope = "row";
        head.textContent = head.title = data.names[index];
        row.append(head);
        data.columns.forEach((column, at) => (row.insertCell().textContent = printed(data.values[index][at], column)));
        return row;
      }),
    );
    document.getElementById("shown").textContent = `${Math.min(limit, found.length)} of ${found.length}`;
    more.hidden = found.length <= limit;
  };
  sortable(table, (column, compare) => {
    const value = (index) => (column ? data.values[index][column - 1] : data.names[index]);
    order.sort((a, b) => compare(value(a), value(b)));
    fill();
  });
  find.addEventListener("input", fill);
  more.addEventListener("click", () => {
    limit = Infinity;
    fill();
  });
  fill();
}

const plot = document.getElementById("plot");
if (plot) {
  const across = document.getElementById("across");
  const up = document.getElementById("up");
  const extent = document.getElementById("extent");
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  const first = (kind, other) => Math.max(data.columns.findIndex((column) => column.kind === kind), other);
  for (const select of [across, up]) select.append(...data.columns.map((column, index) => new Option(column.title, index)));
  across.value = first("full-reference", 0);
  up.value = first("no-reference", 0);
  if (up.value === across.value) up.value = 1;

  const make = (name, attributes, parent, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return parent.appendChild(element);
  };
  const ticks = ([low, high], count) => {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
    const found = [];
    for (let at = Math.ceil(low / step); at * step <= high; at++) found.push(at * step);
    return [found, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))];
  };
  const range = (values) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    return [low - margin, high + margin];
  };

  const draw = () => {
    const [x, y] = [Number(across.value), Number(up.value)];
    const both = (point) => point.values[x] !== null && point.values[y] !== null;
    const averages = data.averages.filter(both);
    const alone = extent.value === "averages" && averages.length;
    const points = alone ? [] : data.names.map((label, index) => ({ label, values: data.values[index] })).filter(both);
    const { clientWidth: width, clientHeight: height } = plot;
    const box = { left: 58, right: width - 12, top: 12, bottom: height - 44 };
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    plot.replaceChildren(svg, tip);
    tip.hidden = true;
    if (!points.length && !averages.length) {
      make("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, svg, "No picture has both values.");
      return;
    }
    const [xs, ys] = [x, y].map((axis) => range([...points, ...averages].map((point) => point.values[axis])));
    const px = (value) => box.left + ((value - xs[0]) / (xs[1] - xs[0])) * (box.right - box.left);
    const py = (value) => box.bottom - ((value - ys[0]) / (ys[1] - ys[0])) * (box.bottom - box.top);

    const [columns, columnDigits] = ticks(xs, Math.max(3, width / 110));
    for (const value of columns) {
      make("line", { class: "grid", x1: px(value), x2: px(value), y1: box.top, y2: box.bottom }, svg);
      make("text", { class: "tick", x: px(value), y: box.bottom + 16, "text-anchor": "middle" }, svg, value.toFixed(columnDigits));
    }
    const [rows, rowDigits] = ticks(ys, Math.max(3, height / 70));
    for (const value of rows) {
      make("line", { class: "grid", x1: box.left, x2: box.right, y1: py(value), y2: py(value) }, svg);
      make("text", { class: "tick", x: box.left - 6, y: py(value) + 4, "text-anchor": "end" }, svg, value.toFixed(rowDigits));
    }
    // The upward axis is written from bottom to top, so that its arrow points upward as well.
    const ends = { higher: "better →", lower: "← better", one: "1 is best" };
    const name = (column) => `${column.title}${column.unit ? ` (${column.unit})` : ""}, ${ends[column.better]}`;
    make("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, svg, name(data.columns[x]));
    make("text", { transform: `translate(14 ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, svg, name(data.columns[y]));

    const dot = (point, kind, radius) => {
      const circle = make("circle", { class: kind, cx: px(point.values[x]), cy: py(point.values[y]), r: radius }, svg);
      circle.dataset.tip = `${point.label}: ${data.columns[x].title} ${printed(point.values[x], data.columns[x])}, ${data.columns[y].title} ${printed(point.values[y], data.columns[y])}`;
    };
    for (const point of points) dot(point, "point", points.length > 500 ? 3 : 4.5);
    for (const point of [...averages].reverse()) dot(point, point.kind, point.kind === "run" ? 8 : 6);

    // A label goes to the first free place near its point. One that has none, or of a published method on a narrow
    // screen, is said on hovering alone.
    const taken = averages.map((point) => ({ x: px(point.values[x]) - 7, y: py(point.values[y]) - 7, w: 14, h: 14 }));
    const free = (a) =>
      a.x >= box.left && a.x + a.w <= box.right && a.y >= box.top && a.y + a.h <= box.bottom &&
      taken.every((b) => a.x >= b.x + b.w || b.x >= a.x + a.w || a.y >= b.y + b.h || b.y >= a.y + a.h);
    for (const point of averages) {
      if (width < 560 && point.kind === "published") continue;
      const text = make("text", { class: point.kind }, svg, point.label);
      const [w, h] = [text.getComputedTextLength() + 4, 15];
      const [cx, cy] = [px(point.values[x]), py(point.values[y])];
      let spot = null;
      for (let ring = 11; ring < 110 && !spot; ring += 12) {
        for (let turn = 0; turn < 16 && !spot; turn++) {
          const [dx, dy] = [Math.cos((turn * Math.PI) / 8) * ring, Math.sin((turn * Math.PI) / 8) * ring];
          const candidate = { x: cx + dx - (dx < -1 ? w : dx > 1 ? 0 : w / 2), y: cy + dy - h / 2, w, h };
          if (free(candidate)) spot = { ...candidate, ring, dx, dy };
        }
      }
      if (!spot) {
        text.remove();
        continue;
      }
      taken.push(spot);
      text.setAttribute("x", spot.x + 2);
      text.setAttribute("y", spot.y + 12);
      if (spot.ring > 11) {
        const line = make("line", { class: "leader", x1: cx, y1: cy, x2: cx + spot.dx, y2: cy + spot.dy }, svg);
        svg.insertBefore(line, svg.querySelector("circle"));
      }
    }
  };
  plot.addEventListener("pointermove", (event) => {
    const text = event.target.dataset?.tip;
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const box = plot.getBoundingClientRect();
    const [left, top] = [event.clientX - box.left, event.clientY - box.top];
    tip.style.left = `${Math.max(0, Math.min(left + 12, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${top + 14}px`;
  });
  for (const select of [across, up, extent]) select.addEventListener("change", draw);
  new ResizeObserver(draw).observe(plot);
}

for (const root of document.querySelectorAll(".stage")) stage(root)(layersOf(root.parentElement.querySelector(".sources")));
