// A draft outlives reloads, expired leases and lost networks. Its name is the rater and the prompt's completions, whose ids never change;
// its client_id is made once, so that however often it is sent, by whichever tab, the server stores one ranking.
const PREFIX = "rankloop:draft:";
const KEEP_MILLISECONDS = 30 * 86_400_000;

function uuid() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16)); // Plain http on a local network has no randomUUID.
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

function read(key) {
  try {
    const value = JSON.parse(localStorage.getItem(key));
    return value && typeof value === "object" && typeof value.client_id === "string" ? value : null;
  } catch {
    return null;
  }
}

export class Draft {
  constructor(user, name) {
    this.key = `${PREFIX}${user}:${name}`;
    const kept = read(this.key);
    this.found = Boolean(kept && Object.keys(kept.placed?.overall ?? {}).length);
    this.data = { client_id: uuid(), placed: {}, flags: {}, comment: "", seconds: 0, ...kept };
    this.stored = false;
    this.save();
    dropOld();
  }

  // False when the browser keeps nothing (private window, full disk): the page then says so.
  save() {
    if (this.stored) return true;
    this.data.saved_at = Date.now();
    try {
      localStorage.setItem(this.key, JSON.stringify(this.data));
      return true;
    } catch {
      return false;
    }
  }

  // The ranking is on the server: nothing is left to keep.
  clear() {
    this.stored = true;
    try {
      localStorage.removeItem(this.key);
    } catch {
      /* Nothing was kept. */
    }
  }
}

function dropOld() {
  try {
    for (const key of Object.keys(localStorage).filter((name) => name.startsWith(PREFIX))) {
      if (Date.now() - (read(key)?.saved_at ?? 0) > KEEP_MILLISECONDS) localStorage.removeItem(key);
    }
  } catch {
    /* Nothing was kept. */
  }
}
