"use strict";
// Tips by pointer or by touch: for what carries data-tip (a JSON list of lines), and for charts of
// lines, whose values are read off the drawing with its scales. And the switch of the horizontal axis.
const tip = document.getElementById("tip");
let cursor = null;

function showTip(lines, x, y) {
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(x + 12, document.documentElement.clientWidth - box.width - 8);
  const below = y + 16 + box.height < window.innerHeight;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = Math.max(8, below ? y + 16 : y - box.height - 12) + "px";
}

function hideTip() {
  tip.hidden = true;
  if (cursor) cursor.remove();
  cursor = null;
}

function shown(number) {
  return Number(number.toPrecision(3)).toString();
}

function unscale(described, pixel) {
  const [low, high, start, end] = described.split(" ").map(Number);
  return low + (pixel - start) / (end - start) * (high - low);
}

function points(path) {
  return path.getAttribute("d").slice(1).split("L").map((pair) => pair.split(" ").map(Number));
}

function nearest(list, x, y) {
  const far = ([a, b]) => Math.abs(a - x) + 0.05 * Math.abs(b - y);
  return list.reduce((best, point) => far(point) < far(best) ? point : best);
}

function chartTip(svg, event) {
  const box = svg.getBoundingClientRect();
  const factor = svg.viewBox.baseVal.width / box.width;
  const x = (event.clientX - box.left) * factor, y = (event.clientY - box.top) * factor;
  const rows = [...svg.querySelectorAll(".line")].map((path) => {
    return [path.dataset.label, nearest(points(path), x, y)];
  });
  if (rows.length === 0) return;
  const at = rows.map(([, point]) => point).reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  const lines = [svg.dataset.xLabel + ": " + shown(unscale(svg.dataset.x, at[0]))];
  for (const [label, point] of rows) {
    const here = Math.abs(point[0] - at[0]) < 8;
    if (here) lines.push(label + ": " + shown(unscale(svg.dataset.y, point[1])));
  }
  if (cursor) cursor.remove();
  cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  const [, , bottom, top] = svg.dataset.y.split(" ");
  cursor.setAttribute("d", `M${at[0]} ${bottom}V${top}`);
  svg.append(cursor);
  showTip(lines, event.clientX, event.clientY);
}

function tipAt(event) {
  const element = event.target.closest("[data-tip]");
  const chart = event.target.closest("svg[data-x]");
  hideTip();
  if (element) showTip(JSON.parse(element.dataset.tip), event.clientX, event.clientY);
  else if (chart) chartTip(chart, event);
}

document.addEventListener("pointermove", tipAt);
document.addEventListener("pointerdown", tipAt);
document.addEventListener("scroll", hideTip, { passive: true });

for (const button of document.querySelectorAll("button[data-axis]")) {
  button.addEventListener("click", () => {
    button.closest("section").dataset.axis = button.dataset.axis;
    for (const other of button.parentElement.children) {
      other.setAttribute("aria-pressed", String(other === button));
    }
  });
}
