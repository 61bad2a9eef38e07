// The clock of one grant: it is extended while the page is visibly in use, and says when it runs out.
const IN_USE_MILLISECONDS = 180_000;
const WARN_SECONDS = 120;

export class LeaseClock {
  constructor(task, { extend, expired }) {
    this.offset = Date.parse(task.dataset.now) - Date.now(); // The server's clock rules.
    this.seconds = Number(task.dataset.leaseSeconds);
    this.ends = Date.parse(task.dataset.expires);
    this.extend = extend;
    this.expired = expired;
    this.used = Date.now();
    this.asking = false;
    this.isOver = false;
  }

  get left() {
    return Math.round((this.ends - Date.now() - this.offset) / 1000);
  }

  get warning() {
    if (this.isOver || this.left > Math.min(WARN_SECONDS, this.seconds / 3)) return "";
    const left = Math.max(0, this.left);
    return `${Math.floor(left / 60)}:${String(left % 60).padStart(2, "0")} left on this prompt`;
  }

  touch() {
    this.used = Date.now();
  }

  async tick() {
    if (this.isOver) return;
    if (this.left <= 0) return this.end();
    const inUse = document.visibilityState === "visible" && Date.now() - this.used < Math.min(IN_USE_MILLISECONDS, this.seconds * 500);
    if (!inUse || this.asking || this.left > this.seconds / 2) return;
    this.asking = true;
    try {
      const ends = await this.extend();
      if (ends) this.ends = Date.parse(ends);
      else this.end();
    } catch {
      /* No network at this moment: the next tick asks again. */
    } finally {
      this.asking = false;
    }
  }

  end() {
    this.isOver = true;
    this.expired();
  }

  stop() {
    this.isOver = true;
  }
}
