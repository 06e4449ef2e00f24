"use strict";
const all = (selector) => document.querySelectorAll(selector);

// Policies: a button hides and shows everything of its colour.
for (const button of all("button[data-toggle]"))
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", on);
    for (const part of all(`[data-series="${button.dataset.toggle}"]`)) part.classList.toggle("off", !on);
  });

// Views: one of a group of buttons chooses which of the group's charts is seen.
for (const button of all("button[data-show]"))
  button.addEventListener("click", () => {
    const { group, show } = button.dataset;
    for (const other of all(`button[data-group="${group}"]`)) other.setAttribute("aria-pressed", other === button);
    for (const view of all(`[data-view="${group}"]`)) view.hidden = view.dataset.name !== show;
  });

const tip = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const part = event.target.closest?.("[data-tip]");
  tip.style.visibility = part ? "visible" : "hidden";
  if (!part) return;
  tip.textContent = part.dataset.tip;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - width - 8)}px`;
  tip.style.top = `${Math.max(8, Math.min(event.clientY + 14, innerHeight - height - 8))}px`;
});
