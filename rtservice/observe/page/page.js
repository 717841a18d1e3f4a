// Fetches status.json once a second, and shows it. All text is set as textContent, since some of it comes from peers.
"use strict";

const EVERY = 1000, LATE = 5000;  // ms between two requests; timeout of a request in ms
const SHOWN = [60, 300];  // minimum and maximum span of a graph, in seconds
const PAGE = 25;
const byId = (id) => document.getElementById(id);

const histories = {};  // counts of each worker over time
const peaks = {};  // values of each graph over time
let order = "-age", offset = 0, answered = Date.now(), asking = null;

// --- number formats ---

const whole = (n) => Math.round(n).toLocaleString("en");

function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  for (; n >= 1024 && unit < units.length - 1; unit++) n /= 1024;
  return `${unit && n < 100 ? n.toFixed(1) : Math.round(n)} ${units[unit]}`;
}

function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor(seconds % 3600 / 60)} min`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor(seconds % 86400 / 3600)} h`;
}

const millis = (seconds) => `${(seconds * 1000).toFixed(seconds < 0.01 ? 2 : 0)} ms`;
const sum = (values) => values.reduce((a, b) => a + b, 0);
const listed = (counts) => Object.entries(counts).map(([name, n]) => `${whole(n)} ${name}`).join(", ") || "–";

// --- history ---

function counted(worker, now) {
  const listeners = Object.values(worker.counters.listeners);
  const of = (word) => sum(listeners.map((listener) => listener[word]));
  return {
    time: worker.counted ?? now, open: sum(listeners.flatMap((listener) => Object.values(listener.phase))),
    opened: of("opened"), moved: of("in") + of("out"), cpu: worker.counters.cpu_seconds || 0,
    looks: sum(worker.counters.lag.buckets), late: worker.counters.lag.seconds,
  };
}

function remember(workers, now) {
  for (const worker of workers) {
    const history = histories[worker.worker] ??= [];
    // Each worker updates its counts once a second, at its own time.
    if (worker.counted === null || worker.counted !== history.at(-1)?.time) history.push(counted(worker, now));
    while (history.length && history[0].time < now - SHOWN[1] - 10) history.shift();
  }
}

const rate = (word) => (now, before) => Math.max(0, now[word] - before[word]) / Math.max(0.001, now.time - before.time);

// For each graph: `of` computes the value of a worker from two neighbours of its history, `all` that of all workers.
const GRAPHS = [
  {title: "connections", of: (now) => now.open, show: whole, all: sum},
  {title: "new connections / s", of: rate("opened"), show: whole, all: sum},
  {title: "bytes / s", of: rate("moved"), show: bytes, all: sum},
  {
    title: "reactor lag", show: millis, all: (values) => Math.max(0, ...values),
    of: (now, before) => now.looks > before.looks ? (now.late - before.late) / (now.looks - before.looks) : 0,
  },
];

function series(graph, worker) {
  const history = histories[worker];
  return history.map((now, i) => [now.time, graph.of(now, history[i - 1] ?? now)]);
}

// --- drawing ---

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "polyline", "line"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

const colour = (worker) => `c${worker % 6}`;

function draw(graph, workers, end) {
  const lines = workers.map((worker) => [worker, series(graph, worker)]);
  const latest = graph.all(lines.map(([, values]) => values.length ? values.at(-1)[1] : 0));
  const peak = peaks[graph.title] ??= [];
  peak.push([end, latest]);
  while (peak[0][0] < end - SHOWN[1]) peak.shift();
  const most = graph.show(Math.max(...peak.map(([, value]) => value)));
  const wide = Math.min(SHOWN[1], Math.max(SHOWN[0], end - peak[0][0]));
  const top = Math.max(1e-9, ...lines.flatMap(([, values]) => values.map(([, value]) => value)));
  const now = graph.show(latest);
  const svg = make("svg", {viewBox: "0 0 300 60", preserveAspectRatio: "none", role: "img",
    "aria-label": `${graph.title}: now ${now}, maximum ${most}`});
  for (const [worker, values] of lines) {
    const points = values.filter(([time]) => time >= end - wide)
      .map(([time, value]) => `${(300 - 300 * (end - time) / wide).toFixed(1)},${(58 - 55 * value / top).toFixed(1)}`);
    svg.append(make("polyline", {class: colour(worker), points: points.join(" ")}));
  }
  return make("figure", {"data-graph": graph.title},
    make("figcaption", {}, make("span", {}, graph.title), make("span", {}, `max ${most}`)), make("strong", {}, now), svg);
}

// Columns are [title, cell, "number" or "text" or "", key to sort by].
function table(id, columns, rows, none) {
  const heads = columns.map(([title, , kind = "", key]) => {
    const head = make("th", {class: kind, scope: "col"});
    if (!key) {
      head.textContent = title;
      return head;
    }
    const mine = order.replace("-", "") === key, down = order.startsWith("-");
    if (mine) head.setAttribute("aria-sort", down ? "descending" : "ascending");
    head.append(make("button", {type: "button", "data-key": key}, title + (mine ? (down ? " ▾" : " ▴") : "")));
    return head;
  });
  const body = rows.map((row) => make("tr", {}, ...columns.map(([, cell, kind = ""]) => {
    const value = cell(row);
    return value instanceof Node ? value : make("td", {class: kind}, String(value));
  })));
  if (!rows.length && none) body.push(make("tr", {}, make("td", {colspan: columns.length, class: "quiet"}, none)));
  const focused = document.activeElement?.dataset?.key;
  byId(id).replaceChildren(make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
  if (focused) byId(id).querySelector(`button[data-key="${focused}"]`)?.focus();
}

function showWorkers(status) {
  const now = (worker) => histories[worker.worker].at(-1), before = (worker) => histories[worker.worker].at(-2);
  const cpu = (worker) => `${whole(100 * rate("cpu")(now(worker), before(worker)))} %`;
  const descriptors = ({descriptors, descriptor_limit}) => `${whole(descriptors || 0)} of ${whole(descriptor_limit || 0)}`;
  table("workers", [
    ["worker", (worker) => worker.worker],
    ["phase", ({phase}) => make("td", {class: ["ready", "serving"].includes(phase) ? "good" : "wait"}, phase)],
    ["pid", (worker) => worker.pid ?? "–", "number"],
    ["age", (worker) => span(worker.age), "number"],
    ["connections", (worker) => whole(counted(worker).open), "number"],
    ["CPU", (worker) => before(worker) ? cpu(worker) : "–", "number"],
    ["memory", (worker) => bytes(worker.counters.memory || 0), "number"],
    ["descriptors", (worker) => descriptors(worker.counters), "number"],
    ["starts", (worker) => whole(status.starts[worker.worker] || 1), "number"],
    ["exits", (worker) => listed(status.exits[worker.worker] || {}), "text"],
  ], status.workers);
}

function showListeners(status) {
  const all = {};
  for (const worker of status.workers) {
    for (const [name, counts] of Object.entries(worker.counters.listeners)) {
      const total = all[name] ??= {name, open: 0, opened: 0, in: 0, out: 0, closed: {}, refused: {}, handshake_failed: {}};
      total.open += sum(Object.values(counts.phase));
      for (const word of ["opened", "in", "out"]) total[word] += counts[word];
      for (const word of ["closed", "refused", "handshake_failed"]) {
        for (const [label, n] of Object.entries(counts[word])) total[word][label] = (total[word][label] || 0) + n;
      }
    }
  }
  table("listeners", [
    ["listener", (listener) => listener.name],
    ["connections", (listener) => whole(listener.open), "number"],
    ["opened", (listener) => whole(listener.opened), "number"],
    ["received", (listener) => bytes(listener.in), "number"],
    ["sent", (listener) => bytes(listener.out), "number"],
    ["closed", (listener) => listed(listener.closed), "text"],
    ["refused", (listener) => listed(listener.refused), "text"],
    ["handshakes failed", (listener) => listed(listener.handshake_failed), "text"],
  ], Object.values(all));
}

function showHub(status) {
  const hubs = status.workers.filter(({counters}) => counters.hub).map(({worker, counters}) => ({worker, ...counters.hub}));
  byId("connecting").hidden = !hubs.length;
  const state = (hub) => hub.up === null ? "–" : hub.up ? "up" : "no connection";
  table("hub", [
    ["worker", (hub) => hub.worker],
    ["hub", (hub) => make("td", {class: hub.up ? "good" : "wait"}, state(hub))],
    ...["topics", "subscriptions", "members", "claims", "published", "delivered", "dropped", "gaps", "reconnects"]
      .map((name) => [name, (hub) => whole(hub[name]), "number"]),
    ["publish failed", (hub) => whole(hub.publish_failed), "number"],
  ], hubs);
}

function showProtocol(status) {
  const all = {};
  for (const worker of status.workers) {
    for (const [name, n] of Object.entries(worker.counters.protocol)) all[name] = (all[name] || 0) + n;
  }
  byId("counting").hidden = !Object.keys(all).length;
  table("protocol", [
    ["metric", ([name]) => name],
    ["value", ([, n]) => n.toLocaleString("en"), "number"],
  ], Object.entries(all).sort(([a], [b]) => a < b ? -1 : 1));
}

function showConnections(status) {
  const {rows, missing, most} = status.connections, several = status.workers.length > 1;
  table("connections", [
    ["peer", (row) => row.peer, "", "peer"],
    ["listener", (row) => row.listener, "", "listener"],
    ...(several ? [["worker", (row) => row.worker, "number"]] : []),
    ["phase", (row) => row.phase, "", "phase"],
    ["age", (row) => span(row.age), "number", "age"],
    ["idle", (row) => span(row.idle), "number", "idle"],
    ["received", (row) => bytes(row.bytes_in), "number", "bytes_in"],
    ["sent", (row) => bytes(row.bytes_out), "number", "bytes_out"],
  ], rows, "no connections");
  const open = sum(status.workers.map((worker) => counted(worker).open));
  const unheard = missing.length ? `; no answer from worker ${missing.join(", ")}` : "";
  byId("shown").textContent = (rows.length ? `${whole(offset + 1)} to ${whole(offset + rows.length)} of ${whole(Math.max(open, offset + rows.length))}` : "") + unheard;
  byId("earlier").disabled = offset === 0;
  byId("later").disabled = rows.length < PAGE || offset + 2 * PAGE > most;
}

function showCertificates(status) {
  byId("certified").hidden = !status.certificates.length;
  table("certificates", [
    ["names", (certificate) => certificate.names || "–", "text"],
    ["listener", (certificate) => certificate.listener],
    ["days left", (certificate) => {
      const days = certificate.days_left, early = certificate.not_before > status.time;
      const shown = early ? "not valid yet" : days < 0 ? "expired" : days === 0 ? "less than 1" : whole(days);
      return make("td", {class: `number ${early || days < 7 ? "bad" : days < 21 ? "wait" : "good"}`}, shown);
    }, "number"],
    ["until", (certificate) => new Date(certificate.not_after * 1000).toISOString().slice(0, 10)],
    ["file", (certificate) => certificate.path, "text"],
  ], status.certificates);
}

function show(status) {
  remember(status.workers, status.time);
  document.title = `${status.state} – rtservice`;
  byId("state").textContent = status.state;
  byId("state").className = `state ${status.ready ? "good" : "wait"}`;
  byId("uptime").textContent = `for ${span(status.time - status.started)}`;
  byId("version").textContent = `version ${status.version}`;
  const numbers = status.workers.map((worker) => worker.worker);
  byId("graphs").replaceChildren(...GRAPHS.map((graph) => draw(graph, numbers, status.time)));
  byId("legend").replaceChildren(...(numbers.length < 2 ? [] : numbers.map((number) => make("span", {},
    make("svg", {viewBox: "0 0 14 5", "aria-hidden": "true"}, make("line", {class: colour(number), x2: 14, y1: 2.5, y2: 2.5})),
    `worker ${number}`))));
  showWorkers(status);
  showListeners(status);
  showHub(status);
  showProtocol(status);
  showConnections(status);
  showCertificates(status);
  table("settings", [["setting", ([name]) => name], ["value", ([, value]) => value, "text"]], Object.entries(status.settings));
}

// --- requests ---

async function ask() {
  asking?.abort();
  const mine = asking = new AbortController();
  const timer = setTimeout(() => mine.abort(), LATE);
  try {
    const answer = await fetch(`status.json?sort=${order}&offset=${offset}&limit=${PAGE}`, {signal: mine.signal, cache: "no-store"});
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
    answered = Date.now();
    byId("broken").hidden = true;
    document.body.classList.remove("stale");
  } catch (problem) {
    if (mine !== asking) return;
    byId("broken").textContent =
      `No answer from the server for ${span((Date.now() - answered) / 1000)}: the data below is old (${problem.message})`;
    byId("broken").hidden = false;
    document.body.classList.add("stale");
  } finally {
    clearTimeout(timer);
  }
}

async function forever() {
  await ask();
  setTimeout(forever, EVERY);
}

byId("connections").addEventListener("click", ({target}) => {
  const key = target.dataset.key;
  if (key) {
    order = order === `-${key}` ? key : `-${key}`;
    offset = 0;
    ask();
  }
});
byId("earlier").addEventListener("click", () => { offset = Math.max(0, offset - PAGE); ask(); });
byId("later").addEventListener("click", () => { offset += PAGE; ask(); });
forever();
