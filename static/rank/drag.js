// Dragging by pointer events, so that mouse, pen and finger work alike. The cards stay where they are: a small copy of the letter moves.
const START_PIXELS = 6;

// `pick(target)` names the card that a press on `target` would drag, or null; `drop(id, level)` places it.
export function makeDraggable(root, { pick, drop, signal }) {
  let press = null;

  const over = (event) => document.elementFromPoint(event.clientX, event.clientY)?.closest?.("[data-level]") ?? null;

  const stop = () => {
    press?.ghost?.remove();
    root.querySelectorAll(".is-over").forEach((node) => node.classList.remove("is-over"));
    root.classList.remove("is-dragging");
    press = null;
  };

  root.addEventListener(
    "pointerdown",
    (event) => {
      const card = event.button === 0 ? pick(event.target) : null;
      if (card) press = { ...card, x: event.clientX, y: event.clientY, pointer: event.pointerId, ghost: null };
    },
    { signal },
  );
  root.addEventListener(
    "pointermove",
    (event) => {
      if (!press || event.pointerId !== press.pointer) return;
      if (!press.ghost) {
        if (Math.hypot(event.clientX - press.x, event.clientY - press.y) < START_PIXELS) return;
        root.setPointerCapture(event.pointerId);
        press.ghost = Object.assign(document.createElement("div"), { className: "ghost", textContent: press.letter });
        document.body.append(press.ghost);
        root.classList.add("is-dragging");
      }
      event.preventDefault();
      press.ghost.style.transform = `translate(${event.clientX}px, ${event.clientY}px)`;
      const band = over(event);
      root.querySelectorAll(".is-over").forEach((node) => node !== band && node.classList.remove("is-over"));
      band?.classList.add("is-over");
    },
    { signal },
  );
  root.addEventListener(
    "pointerup",
    (event) => {
      if (!press || event.pointerId !== press.pointer) return;
      const { id, ghost } = press;
      const band = ghost ? over(event) : null;
      stop();
      if (!ghost) return;
      // The click that ends a drag must not also be taken as a tap.
      const ended = new AbortController();
      addEventListener("click", (click) => click.stopPropagation(), { capture: true, signal: ended.signal });
      setTimeout(() => ended.abort(), 50);
      if (band) drop(id, Number(band.dataset.level));
    },
    { signal },
  );
  root.addEventListener("pointercancel", stop, { signal });
  signal.addEventListener("abort", stop);
}
