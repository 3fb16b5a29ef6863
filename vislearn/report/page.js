// The page is complete without this: it hides all but one per-class plot, opens what a link points at, and says on a
// tap what a pointer gets by hovering.
document.querySelectorAll("[data-chooser]").forEach((figure) => {
  const panels = figure.querySelectorAll("[data-panel]");
  const label = figure.querySelector("label");
  const select = figure.querySelector("select");
  if (panels.length < 2) return;
  const show = () => panels.forEach((panel) => { panel.hidden = panel.dataset.panel !== select.value; });
  label.hidden = false;
  figure.classList.add("chosen");
  select.addEventListener("change", show);
  show();
});

document.querySelectorAll("td.none").forEach((cell) => {
  cell.addEventListener("click", () => cell.classList.toggle("told"));
});

const openTarget = () => {
  const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
};
addEventListener("hashchange", openTarget);
openTarget();
