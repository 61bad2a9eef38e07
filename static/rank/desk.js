// One prompt on the desk: its cards, its bands, its draft. Cards never move; the bar below shows the order.
import { Sheet } from "./bands.js";
import { makeDraggable } from "./drag.js";

const OVERALL = "overall";
const make = (tag, fields = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), fields);
  node.append(...children);
  return node;
};

export class Desk {
  constructor(task, draft, { say, submit, skip }) {
    this.task = task;
    this.draft = draft;
    this.say = say;
    this.over = new AbortController();
    this.cards = [...task.querySelectorAll(".card")];
    this.ids = this.cards.map((card) => card.dataset.id);
    this.letters = Object.fromEntries(this.cards.map((card) => [card.dataset.id, card.dataset.letter]));
    this.names = [OVERALL, ...task.dataset.criteria.split("\n").filter(Boolean)];
    this.ties = task.dataset.ties === "yes";
    this.chosen = this.ids[0];
    this.active = OVERALL;
    this.find = (selector) => task.querySelector(selector);
    this.adopt(draft.data);
    this.wire(submit, skip);
    this.choose(this.chosen);
  }

  // Take what a draft says: after a reload, or when another tab changed it.
  adopt(data) {
    this.draft.data = data;
    this.sheets = Object.fromEntries(this.names.map((name) => [name, new Sheet(this.ids, this.ties, data.placed?.[name])]));
    this.flags = Object.fromEntries(this.ids.map((id) => [id, new Set(data.flags?.[id] ?? [])]));
    if (document.activeElement !== this.find("#comment")) this.find("#comment").value = data.comment ?? "";
    this.show();
  }

  // Another tab saved the same draft. The clock alone is no news, and would cost the undo.
  follow(data) {
    const said = ({ client_id, placed, flags, comment }) => JSON.stringify([client_id, placed, flags, comment]);
    if (said(data) !== said(this.draft.data)) this.adopt(data);
  }

  wire(submit, skip) {
    const on = (node, type, act) => node.addEventListener(type, act, { signal: this.over.signal });
    on(this.task, "click", (event) => this.click(event));
    on(this.task, "focusin", (event) => {
      const card = event.target.closest(".card");
      if (card && card.dataset.id !== this.chosen) this.choose(card.dataset.id, { focus: false });
    });
    on(this.find("#comment"), "input", (event) => {
      this.draft.data.comment = event.target.value;
      this.keep();
    });
    on(this.find("#undo"), "click", () => this.undo());
    on(this.find("#submit"), "click", submit);
    on(this.find("#skip-it"), "click", skip);
    makeDraggable(this.task, {
      pick: (target) => {
        if (target.closest(".flags")) return null;
        const id = target.closest(".card-head")?.closest(".card").dataset.id ?? target.closest(".chip")?.dataset.id;
        return id ? { id, letter: this.letters[id] } : null;
      },
      drop: (id, level) => this.place(id, level),
      signal: this.over.signal,
    });
  }

  click(event) {
    const flag = event.target.closest(".flag");
    const chip = event.target.closest(".chip");
    const band = event.target.closest("[data-level]");
    const tab = event.target.closest("[data-sheet]");
    const card = event.target.closest(".card");
    if (flag) this.flag(card.dataset.id, flag.dataset.flag);
    else if (chip) this.choose(chip.dataset.id);
    else if (band) this.place(this.chosen, Number(band.dataset.level));
    else if (tab) this.turnTo(tab.dataset.sheet);
    else if (card && !event.target.closest("a, summary") && getSelection().isCollapsed) this.choose(card.dataset.id);
  }

  // True if the key meant something here.
  key(event) {
    const digit = /^(?:Digit|Numpad)([0-9])$/.exec(event.code)?.[1] ?? (/^[0-9]$/.test(event.key) ? event.key : null);
    const letter = event.key.length === 1 ? event.key.toUpperCase() : "";
    const named = this.ids.find((id) => this.letters[id] === letter);
    if (digit !== null && !event.repeat) this.place(this.chosen, Number(digit) + (event.shiftKey && digit !== "0" ? 9 : 0));
    else if (event.key.startsWith("Arrow")) return this.move(event);
    else if (letter === "U") this.undo();
    else if (event.key === "," || event.key === ".") this.turn(event.key === "." ? 1 : -1);
    else if (named && !event.shiftKey) this.choose(named);
    else return false;
    return true;
  }

  move(event) {
    if (event.target.closest(".prompt")) return false;
    const top = this.cards[0].offsetTop;
    const columns = this.cards.filter((card) => card.offsetTop === top).length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    const next = this.ids[this.ids.indexOf(this.chosen) + step];
    if (next) this.choose(next);
    return true;
  }

  choose(id, { focus = true } = {}) {
    this.chosen = id;
    for (const card of this.cards) {
      const is = card.dataset.id === id;
      card.classList.toggle("is-chosen", is);
      card.tabIndex = is ? 0 : -1;
      if (is && focus) {
        card.focus({ preventScroll: true });
        card.scrollIntoView({ block: "nearest" });
      }
    }
    this.task.querySelectorAll(".chip").forEach((chip) => chip.classList.toggle("is-chosen", chip.dataset.id === id));
  }

  place(id, level) {
    const why = this.sheet.place(id, level);
    if (why) return this.say(why, true);
    this.changed();
    this.choose(id);
    const tied = this.sheet.at(level).filter((other) => other !== id).map((other) => this.letters[other]);
    const where = level ? `in band ${level}${tied.length ? `, tied with ${tied.join(", ")}` : ""}` : "taken back";
    this.say(`${this.letters[id]} ${where}`);
  }

  undo() {
    const id = this.sheet.undo();
    if (!id) return this.say("Nothing to undo.", true);
    this.changed();
    this.choose(id);
    this.say(`Undone: ${this.letters[id]}`);
  }

  flag(id, name) {
    const flags = this.flags[id];
    if (!flags.delete(name)) flags.add(name);
    this.changed();
  }

  turn(step) {
    const index = (this.names.indexOf(this.active) + step + this.names.length) % this.names.length;
    this.turnTo(this.names[index]);
  }

  turnTo(name) {
    this.active = name;
    this.show();
    this.choose(this.chosen);
    this.say(`Ranking: ${name}`);
  }

  get sheet() {
    return this.sheets[this.active];
  }

  changed() {
    this.draft.data.placed = Object.fromEntries(this.names.map((name) => [name, this.sheets[name].placed]));
    this.draft.data.flags = Object.fromEntries(Object.entries(this.flags).map(([id, flags]) => [id, [...flags]]));
    this.keep();
    this.show();
  }

  keep() {
    if (!this.draft.save()) this.say("This browser keeps no drafts: submit before you leave the page.", true);
  }

  // "" once each card is placed on every sheet, else what is missing.
  get missing() {
    const parts = this.names
      .filter((name) => this.sheets[name].missing.length)
      .map((name) => `${name === OVERALL ? "" : `${name}: `}${this.sheets[name].missing.map((id) => this.letters[id]).join(", ")}`);
    return parts.length ? `Not placed: ${parts.join("; ")}` : "";
  }

  get ranking() {
    const { client_id, comment, seconds } = this.draft.data;
    const flags = Object.fromEntries(Object.entries(this.flags).filter(([, set]) => set.size).map(([id, set]) => [id, [...set]]));
    const criteria = Object.fromEntries(this.names.slice(1).map((name) => [name, this.sheets[name].bands]));
    return { client_id, bands: this.sheets[OVERALL].bands, criteria, flags, comment: comment ?? "", duration_seconds: Math.round(seconds * 10) / 10 };
  }

  show() {
    const chip = (id) => make("button", { type: "button", className: `chip${id === this.chosen ? " is-chosen" : ""}`, textContent: this.letters[id] });
    const chips = (level) =>
      this.sheet.at(level).flatMap((id, index) => {
        const node = chip(id);
        node.dataset.id = id;
        return index && level ? [make("span", { className: "tie", textContent: "=" }), node] : [node];
      });
    const bands = this.ids.map((_, index) => {
      const put = make("button", { type: "button", className: "put", textContent: index + 1 });
      put.setAttribute("aria-label", `Put the chosen card into band ${index + 1}`);
      const band = make("div", { className: "band" }, put, ...chips(index + 1));
      band.dataset.level = index + 1;
      return band;
    });
    this.find(".band-list").replaceChildren(...bands);
    const missing = this.sheet.missing;
    this.find(".unplaced").replaceChildren(make("span", { className: "quiet", textContent: missing.length ? "not placed" : "all placed" }), ...chips(0));
    this.showTabs();
    this.showCards();
    this.find("#submit").setAttribute("aria-disabled", String(Boolean(this.missing)));
    this.find("#undo").disabled = !this.sheet.history.length;
  }

  showTabs() {
    const tabs = this.find(".tabs");
    tabs.hidden = this.names.length === 1;
    tabs.replaceChildren(
      ...this.names.map((name) => {
        const sheet = this.sheets[name];
        const done = sheet.ids.length - sheet.missing.length;
        const state = sheet.missing.length ? `${done}/${sheet.ids.length}` : "✓";
        const tab = make("button", { type: "button", textContent: name }, make("span", { className: "quiet", textContent: ` ${state}` }));
        tab.dataset.sheet = name;
        tab.setAttribute("aria-pressed", String(name === this.active));
        return tab;
      }),
    );
  }

  showCards() {
    for (const card of this.cards) {
      const { id, letter } = card.dataset;
      const level = this.sheet.placed[id];
      const where = level ? `band ${level}` : "not placed";
      card.querySelector(".place").textContent = where;
      card.classList.toggle("is-placed", Boolean(level));
      card.setAttribute("aria-label", `Card ${letter}, ${where}`);
      card.querySelectorAll(".flag").forEach((flag) => flag.setAttribute("aria-pressed", String(this.flags[id].has(flag.dataset.flag))));
      const number = this.flags[id].size;
      card.querySelector(".flags summary").textContent = number ? `Flags: ${number}` : "Flag";
    }
  }

  end() {
    this.over.abort();
  }
}
