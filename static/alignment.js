// The pages of runs and models: copy what is made for copying, and keep opened details open when the live part is renewed.
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "copied";
  } catch {
    button.textContent = "select and copy by hand";
  }
  setTimeout(() => (button.textContent = before), 1500);
});

let open = [];
document.addEventListener("htmx:beforeSwap", () => {
  open = [...document.querySelectorAll("details[open][data-keep]")].map((one) => one.dataset.keep);
});
document.addEventListener("htmx:afterSettle", () => {
  for (const one of document.querySelectorAll("details[data-keep]")) if (open.includes(one.dataset.keep)) one.open = true;
});
