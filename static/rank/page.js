// The ranking page: fetches the next prompt, sends rankings, and keeps the draft through whatever happens in between.
import { Desk } from "./desk.js";
import { Draft } from "./draft.js";
import { LeaseClock } from "./lease.js";
import { Unreachable, call, fragment } from "./server.js";

const $ = (id) => document.getElementById(id);
const place = $("content");
const urls = JSON.parse(place.dataset.urls);
const at = (url, lease) => url.replace("00000000-0000-0000-0000-000000000000", lease);
const at_work = { desk: null, clock: null, lease: "", busy: false, retry: null };

function say(text, loud = false) {
  $("said").textContent = text;
  if (!loud) return;
  const toast = $("toast") ?? document.body.appendChild(Object.assign(document.createElement("div"), { id: "toast" }));
  toast.textContent = text;
  toast.classList.add("is-shown");
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => toast.classList.remove("is-shown"), 3500);
}

// What happened, what was kept, what to do: `actions` are [label, function or address].
function banner(kind, text, ...actions) {
  const box = $("banner");
  box.className = `note ${kind}`;
  box.replaceChildren(Object.assign(document.createElement("p"), { textContent: text }));
  for (const [label, act] of actions) {
    const isLink = typeof act === "string";
    const node = Object.assign(document.createElement(isLink ? "a" : "button"), { textContent: label, className: "button" });
    if (isLink) node.href = act;
    else node.addEventListener("click", act);
    box.append(node);
  }
  box.hidden = false;
}

function calm() {
  $("banner").hidden = true;
  at_work.retry = null;
}

function signedOut() {
  banner("warn", "You are signed out. Your draft is kept in this browser, under your name.", ["Sign in", urls.login]);
}

function lost(text, again) {
  at_work.retry = again;
  banner("warn", text, ["Try again", again]);
}

function leave() {
  at_work.clock?.stop();
  at_work.desk?.end();
  at_work.desk = at_work.clock = null;
}

async function load({ before = "" } = {}) {
  if (at_work.busy) return;
  at_work.busy = true;
  $("desk").setAttribute("aria-busy", "true");
  try {
    const { signedOut: out, html } = await fragment(urls.task);
    if (out) return signedOut();
    calm();
    leave();
    // The server's template escaped or cleaned every text in it; the policy of this page runs no inline script anyway.
    $("desk").innerHTML = html;
    const task = $("task");
    if (task) open(task, before);
    else stop();
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    lost("The server could not be reached, so there is no next prompt yet. Nothing is lost.", () => load({ before }));
  } finally {
    at_work.busy = false;
    $("desk").removeAttribute("aria-busy");
  }
}

function stop() {
  $("count").textContent = $("clock").textContent = $("remaining").textContent = "";
  $("stop")?.focus();
  document.querySelector("[data-again]")?.addEventListener("click", () => load());
}

function open(task, before) {
  const { today, left, draft: name, lease } = task.dataset;
  const draft = new Draft(place.dataset.user, name);
  at_work.lease = lease;
  at_work.desk = new Desk(task, draft, { say, submit, skip: askSkip });
  at_work.clock = new LeaseClock(task, { extend, expired });
  $("count").textContent = `${today} of ${Number(today) + Number(left)} today`;
  scrollTo(0, 0);
  tick();
  if (before && before !== draft.key) say("Somebody else has that prompt now. This is another one.", true);
  else if (draft.found) say("Your draft is here again.", true);
}

function takeAgain() {
  load({ before: at_work.desk?.draft.key });
}

function expired() {
  $("remaining").textContent = "";
  banner("warn", "Your time on this prompt ended. Your draft is kept in this browser.", ["Take it again", takeAgain]);
}

async function extend() {
  const answer = await call(at(urls.extend, at_work.lease));
  if (answer.signedOut) signedOut();
  return answer.status === 200 ? answer.data.expires_at : null;
}

async function submit() {
  const { desk, lease } = at_work;
  if (!desk || at_work.busy) return;
  if (desk.missing) return say(desk.missing, true);
  at_work.busy = true;
  let answer;
  try {
    answer = await call(urls.submit, { lease, ...desk.ranking });
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    lost("The server did not answer. Your ranking is kept in this browser; sending it again stores it once.", submit);
    return;
  } finally {
    at_work.busy = false;
  }
  if (answer.signedOut) return signedOut();
  if (answer.status === 200 || answer.status === 201) return stored(desk);
  refused(answer.error, desk);
}

function stored(desk) {
  desk.draft.clear();
  at_work.clock.stop();
  calm();
  say("Stored.");
  return load();
}

function refused({ code, message }, desk) {
  at_work.clock.stop();
  if (code === "lease_expired" || code === "lease_lost" || code === "lease_unknown") {
    const text = code === "lease_expired" ? "Your time on this prompt ended, so the ranking was not stored." : message;
    return banner("warn", `${text} Your draft is kept in this browser.`, ["Take it again", takeAgain]);
  }
  if (code === "already_ranked" || code === "client_id_reused") {
    desk.draft.clear();
    return banner("warn", "You have already submitted this prompt, perhaps in another tab. That ranking stands.", ["Next prompt", () => load()]);
  }
  banner("bad", `Not stored: ${message} Your draft is kept in this browser.`, ["Try again", submit]);
}

function askSkip() {
  if (!at_work.desk || $("skip").open) return;
  $("skip").returnValue = "";
  $("skip").querySelector("form").reset();
  $("skip").showModal();
}

async function skipped() {
  const { desk, lease } = at_work;
  const form = new FormData($("skip").querySelector("form"));
  if ($("skip").returnValue !== "skip" || !desk || !form.get("reason")) return desk?.choose(desk.chosen);
  try {
    const answer = await call(at(urls.skip, lease), { reason: form.get("reason"), comment: form.get("comment") });
    if (answer.signedOut) return signedOut();
    if (answer.error) return refused(answer.error, desk);
    desk.draft.clear();
    await load();
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    lost("The server did not answer, so the prompt is still yours.", skipped);
  }
}

function isOpen() {
  return document.querySelector("dialog[open]");
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const dialog = isOpen();
  if (dialog?.id === "skip" && !event.target.closest("textarea") && /^[1-9]$/.test(event.key)) {
    const choice = dialog.querySelectorAll("[name=reason]")[Number(event.key) - 1];
    choice?.click();
    choice?.focus();
    return;
  }
  if (dialog || event.target.closest("textarea, input, select")) return;
  at_work.clock?.touch();
  if (event.key === "?") $("keys").showModal();
  else if (event.key === "Enter" && !event.target.closest("button, a, summary")) {
    if (!event.repeat) at_work.retry ? at_work.retry() : submit();
  } else if (event.key === "s" || event.key === "S") askSkip();
  else if (!at_work.desk?.key(event)) return;
  event.preventDefault();
});

function wireDialogs() {
  const goOn = () => at_work.desk?.choose(at_work.desk.chosen);
  $("show-keys").addEventListener("click", () => $("keys").showModal());
  $("pause").addEventListener("click", () => {
    const ends = at_work.clock && new Date(at_work.clock.ends).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    $("paused-until").textContent = ends ? `The prompt stays yours until ${ends}.` : "";
    $("paused").showModal();
  });
  for (const id of ["keys", "paused"]) $(id).addEventListener("close", goOn);
  $("skip").addEventListener("close", skipped);
  const guide = (show) => {
    $("guidelines").hidden = !show;
    $("show-guidelines").setAttribute("aria-expanded", String(show));
    if (!show) goOn();
  };
  $("show-guidelines")?.addEventListener("click", () => guide($("guidelines").hidden));
  $("hide-guidelines")?.addEventListener("click", () => guide(false));
}

// Counts only the time that the page is seen and not paused.
function tick() {
  const { desk, clock } = at_work;
  if (!desk) return;
  const seconds = Math.floor(desk.draft.data.seconds);
  $("clock").textContent = `${Math.floor(seconds / 60)} m ${seconds % 60} s`;
  $("remaining").textContent = clock.warning;
  if (document.visibilityState !== "visible" || $("paused").open) return;
  clock.tick();
}

let last = performance.now();
setInterval(() => {
  const now = performance.now();
  const { desk } = at_work;
  if (desk && document.visibilityState === "visible" && !$("paused").open) {
    desk.draft.data.seconds += Math.min(5, (now - last) / 1000);
    if (Math.floor(now / 10_000) !== Math.floor(last / 10_000)) desk.draft.save();
  }
  last = now;
  tick();
}, 1000);

for (const type of ["pointerdown", "pointermove", "wheel", "scroll"]) {
  addEventListener(type, () => at_work.clock?.touch(), { capture: true, passive: true });
}
addEventListener("online", () => at_work.retry?.());
addEventListener("storage", (event) => {
  const { desk } = at_work;
  if (!desk || event.key !== desk.draft.key) return;
  if (event.newValue === null) {
    banner("warn", "You finished this prompt in another tab.", ["Next prompt", () => load()]);
  } else desk.follow(JSON.parse(event.newValue));
});
wireDialogs();
load();
