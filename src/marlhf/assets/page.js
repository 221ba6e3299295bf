"use strict";
// A tip for whatever carries data-tip (a JSON list of lines), by pointer or by touch.
const tip = document.getElementById("tip");

function showTip(lines, x, y) {
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, x + 12), document.documentElement.clientWidth - box.width - 8);
  const below = y + 16 + box.height < window.innerHeight;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = Math.max(8, below ? y + 16 : y - box.height - 12) + "px";
}

function tipAt(event) {
  const element = event.target.closest("[data-tip]");
  if (element) showTip(JSON.parse(element.dataset.tip), event.clientX, event.clientY);
  else tip.hidden = true;
}

document.addEventListener("pointermove", tipAt);
document.addEventListener("pointerdown", tipAt);
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
