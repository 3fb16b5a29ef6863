// The page is complete without this: it hides all but one per-class plot, opens what a link points at, and opens
// everything before printing.
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

// Where nothing can hover, a tap on a dash says why the number is missing.
document.querySelectorAll("td.none").forEach((cell) => {
  cell.addEventListener("click", () => cell.classList.toggle("told"));
});

const openTarget = () => {
  const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
};
addEventListener("hashchange", openTarget);
openTarget();

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((entry) => { entry.open = true; });
});
addEventListener("afterprint", () => opened.forEach((entry) => { entry.open = false; }));
