// The page is complete without this: it hides all but one per-class plot, opens what a link points at, says on a tap
// what a pointer gets by hovering, copies tables, and marks the section that is being read.
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

const copy = async (text) => {
  try { return await navigator.clipboard.writeText(text); } catch { /* plain http, or not allowed: the older way */ }
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  if (!done) throw new Error("not copied");
};
document.querySelectorAll("[data-copy]").forEach((button) => {
  const link = button.parentElement.querySelector("a[download]");
  button.hidden = false;
  button.addEventListener("click", async () => {
    const bytes = Uint8Array.from(atob(link.href.split("base64,")[1]), (letter) => letter.charCodeAt(0));
    let said = "copied";
    try { await copy(new TextDecoder().decode(bytes)); } catch { said = "not allowed here"; }
    button.textContent = said;
    setTimeout(() => { button.textContent = "copy"; }, 1600);
  });
});

if ("IntersectionObserver" in window) {
  const links = new Map([...document.querySelectorAll(".topics a")].map((a) => [a.hash.slice(1), a]));
  const seen = new IntersectionObserver((entries) => entries.forEach(({ target, isIntersecting }) => {
    if (isIntersecting) links.get(target.id)?.setAttribute("aria-current", "true");
    else links.get(target.id)?.removeAttribute("aria-current");
  }), { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll(".topic").forEach((topic) => seen.observe(topic));
}
