// Runs before the first paint, so that a chosen theme does not flash; then wires the switch.
(() => {
  const KEY = "rankloop:theme";
  const names = { system: "Theme: system", light: "Theme: light", dark: "Theme: dark" };
  const read = () => {
    try {
      return localStorage.getItem(KEY) in names ? localStorage.getItem(KEY) : "system";
    } catch {
      return "system";
    }
  };
  const apply = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  };
  apply(read());
  addEventListener("DOMContentLoaded", () => {
    for (const button of document.querySelectorAll("[data-theme-switch]")) {
      const say = () => {
        button.title = names[read()];
        button.setAttribute("aria-label", `${names[read()]}. Change theme.`);
        button.dataset.shows = read();
      };
      say();
      button.addEventListener("click", () => {
        const order = Object.keys(names);
        const next = order[(order.indexOf(read()) + 1) % order.length];
        try {
          localStorage.setItem(KEY, next);
        } catch {
          /* Private windows: the choice lasts until the next page. */
        }
        apply(next);
        say();
      });
    }
    for (const button of document.querySelectorAll("[data-copy]")) {
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(button.dataset.copy);
        const said = button.textContent;
        button.textContent = "copied";
        setTimeout(() => (button.textContent = said), 1200);
      });
    }
  });
})();
