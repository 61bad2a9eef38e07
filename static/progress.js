// Live totals of one project. The server sends numbers; when they change, htmx asks for the table of raters again.
const place = document.getElementById("progress");
const live = document.getElementById("live");
const format = new Intl.NumberFormat("en");
let wait = 1000;

function show(progress) {
  for (const node of place.querySelectorAll("[data-show]")) {
    const value = progress[node.dataset.show];
    if (node.tagName === "PROGRESS") node.value = value;
    else node.textContent = format.format(value);
  }
}

function connect() {
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const socket = new WebSocket(`${scheme}://${location.host}/ws/live/`);
  let first = true;
  socket.addEventListener("open", () => socket.send(JSON.stringify({ do: "project.watch", project: place.dataset.project })));
  socket.addEventListener("message", ({ data }) => {
    const message = JSON.parse(data);
    if (message.event !== "progress") return;
    wait = 1000;
    show(message.progress);
    live.textContent = "Live: the numbers follow the raters.";
    live.dataset.live = "yes";
    if (!first) document.body.dispatchEvent(new Event("progress-changed"));
    first = false;
  });
  socket.addEventListener("close", () => {
    live.textContent = "Not live at the moment: trying to connect again. The numbers are the last ones known.";
    delete live.dataset.live;
    setTimeout(connect, wait);
    wait = Math.min(wait * 2, 30000);
  });
}
connect();
