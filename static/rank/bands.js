// The order of one set of cards: a level for each placed card. Levels may have gaps while the rater works; bands have none.
export class Sheet {
  constructor(ids, tiesAllowed, placed = {}) {
    this.ids = ids;
    this.tiesAllowed = tiesAllowed;
    this.placed = {};
    for (const id of ids) if (Number.isInteger(placed[id]) && placed[id] >= 1 && placed[id] <= ids.length) this.placed[id] = placed[id];
    this.history = [];
  }

  // Returns "" or the reason why the card was not placed. Level 0 takes it back.
  place(id, level) {
    if (!Number.isInteger(level) || level < 0 || level > this.ids.length) return `There are ${this.ids.length} bands.`;
    const before = this.placed[id] ?? 0;
    if (before === level) return "";
    if (level && !this.tiesAllowed && this.at(level).length) return `Ties are not allowed in this project, and band ${level} is taken.`;
    this.history.push([id, before]);
    this.set(id, level);
    return "";
  }

  set(id, level) {
    if (level) this.placed[id] = level;
    else delete this.placed[id];
  }

  // Returns the card that was put back where it was, or null.
  undo() {
    const last = this.history.pop();
    if (!last) return null;
    this.set(...last);
    return last[0];
  }

  at(level) {
    return this.ids.filter((id) => (this.placed[id] ?? 0) === level);
  }

  get missing() {
    return this.at(0);
  }

  get bands() {
    return this.ids.map((_, index) => this.at(index + 1)).filter((band) => band.length);
  }
}
