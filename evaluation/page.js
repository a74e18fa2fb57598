"use strict";
// The parts that every page has: tables that sort, and pictures under a divider.

function compareBy(better, descending) {
  // A first click on a metric brings the best to the top; what has no value stays at the bottom.
  const worth = (value) => (better === "higher" ? -value : better === "one" ? Math.abs(value - 1) : value);
  return (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : worth(a) - worth(b);
    return descending ? -order : order;
  };
}

function sortable(table, sort) {
  // Calls sort(index of the column, comparison of its values) when a head is clicked.
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const again = head.dataset.sorted === "first";
      for (const other of heads) {
        other.removeAttribute("aria-sort");
        delete other.dataset.sorted;
      }
      head.dataset.sorted = again ? "second" : "first";
      const descending = (head.dataset.better === "higher") !== again;
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sort(index, compareBy(head.dataset.better, again));
    });
  });
}

for (const table of document.querySelectorAll("table.sortable")) {
  const value = (row, index) => {
    const found = row.cells[index].dataset.value;
    if (found === undefined) return row.cells[index].textContent.trim();
    return found === "" ? null : Number(found);
  };
  sortable(table, (index, compare) => {
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => compare(value(a, index), value(b, index)));
    table.tBodies[0].append(...rows);
  });
}

function stage(root) {
  // Two pictures of one place, the left one cut off at the divider. Returns a function that takes other pictures.
  const canvas = root.querySelector(".canvas");
  const view = root.querySelector(".view");
  const range = root.querySelector("input");
  const [left, zoom, right] = root.querySelectorAll("select");
  const under = canvas.appendChild(new Image());
  const over = canvas.appendChild(new Image());
  over.className = "over";
  const size = { width: Number(root.dataset.width), height: Number(root.dataset.height) };
  const first = Number(zoom.value);
  let layers = [];

  function place() {
    // The slider spans what is seen of the pictures, which is a part where they are enlarged.
    const at = view.scrollLeft + (range.value / 100) * view.clientWidth;
    canvas.style.setProperty("--at", `${(100 * at) / canvas.clientWidth}%`);
    range.setAttribute("aria-valuetext", `${Math.round(range.value)} % ${layers[left.value].name}`);
  }
  function show() {
    for (const [image, chosen] of [[over, left], [under, right]]) {
      image.src = layers[chosen.value].src;
      image.alt = layers[chosen.value].name;
    }
    place();
  }
  function enlarge() {
    const factor = Number(zoom.value);
    const middle = [view.scrollLeft + view.clientWidth / 2, view.scrollTop + view.clientHeight / 2];
    const before = canvas.clientWidth;
    canvas.style.width = factor === first ? "100%" : `${size.width * factor}px`;
    canvas.classList.toggle("pixels", factor > 1);
    const change = canvas.clientWidth / before;
    view.scrollTo(middle[0] * change - view.clientWidth / 2, middle[1] * change - view.clientHeight / 2);
    place();
  }
  canvas.addEventListener("pointermove", (event) => {
    const box = view.getBoundingClientRect();
    range.value = (100 * (event.clientX - box.left)) / view.clientWidth;
    place();
  });
  view.addEventListener("scroll", place);
  range.addEventListener("input", place);
  left.addEventListener("change", show);
  right.addEventListener("change", show);
  zoom.addEventListener("change", enlarge);

  return (images, newSize = size) => {
    const chosen = layers.length ? [left.value, right.value] : [0, Math.min(1, images.length - 1)];
    layers = images;
    Object.assign(size, newSize);
    for (const [select, at] of [[left, chosen[0]], [right, chosen[1]]]) {
      select.replaceChildren(...layers.map((layer, index) => new Option(layer.name, index)));
      select.value = at;
    }
    enlarge();
    show();
  };
}

function layersOf(element) {
  return [...element.querySelectorAll("img")].map((image) => ({ name: image.alt, src: image.src }));
}
