// Numbers, charts and tables: what every part of the page draws with.

const facts = JSON.parse(document.getElementById("facts").textContent);
const $ = (id) => document.getElementById(id);
const views = new Map();

// Numbers, as pack.py packs them.

function bytes(text) {
  const raw = atob(text), found = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
  return found;
}

function column(packed) {
  if (packed.list) return packed.list;
  if (packed.of) return Array.from(bytes(packed.at), (place) => packed.of[place]);
  const logs = packed.log !== undefined, first = logs ? 2 : 1;
  const steps = new Uint16Array(bytes(logs ? packed.log : packed.linear).buffer);
  const scale = (packed.high - packed.low) / (65535 - first);
  return Array.from(steps, (step) => {
    if (step === 0) return null;
    if (logs && step === 1) return 0;
    const value = packed.low + scale * (step - first);
    return logs ? Math.exp(value) : value;
  });
}

function starts(counts) {
  const found = [0];
  for (const count of counts) found.push(found[found.length - 1] + count);
  return found;
}

function digits(value, n) {  // trailing zeros count, as in words.py
  if (value === 0) return "0";
  const made = value.toPrecision(n);
  return made.includes("e") ? String(Number(made)) : made;
}

const percent = (value) => (value === null ? "-" : `${digits(100 * value, 3)}%`);
const short = (value) => (value === null ? "-" : digits(value, 3));
const whole = (value) => value.toLocaleString("en");

// Charts: specs of Vega from charts.py, with data by name.

function tip(handler, event, item, value) {
  const box = $("tip");
  if (value === null || value === undefined || value === "") {
    box.hidden = true;
    return;
  }
  const rows = Object.entries(value).filter(([, each]) => each !== "null" && each !== "");
  box.replaceChildren(...rows.map(([name, each]) => {
    const row = document.createElement("div");
    row.append(element("span", name), element("b", String(each)));
    return row;
  }));
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - width - 8);
  const below = event.clientY + 16 + height < innerHeight;
  box.style.left = `${Math.max(left, 8)}px`;
  box.style.top = `${below ? event.clientY + 16 : Math.max(event.clientY - height - 10, 8)}px`;
}

function element(tag, words) {
  const made = document.createElement(tag);
  made.textContent = words;
  return made;
}

const drawings = new Map();  // how often each chart was begun: the last one counts

async function draw(id, spec, data, click) {
  const turn = (drawings.get(id) || 0) + 1;
  drawings.set(id, turn);
  const own = structuredClone(spec), box = document.createElement("div");
  for (const source of own.data) if (data[source.name]) source.values = data[source.name];
  $(id).replaceChildren(box);
  $("tip").hidden = true;
  const { view } = await vegaEmbed(box, own,
    { mode: "vega", renderer: "svg", actions: false, defaultStyle: false, tooltip: tip });
  // The page says what a chart shows, and has its numbers as a table.
  box.querySelector("svg").setAttribute("aria-hidden", "true");
  if (views.has(id)) views.get(id).finalize();
  if (drawings.get(id) !== turn) return;
  if (click) view.addEventListener("click", (_, item) => item && item.datum && click(item.datum));
  views.set(id, view);
}

// Charts are drawn one after the other, so that the page is there before the last of them.

const waiting = new Map();

function later(id, how) {
  waiting.set(id, how);
}

async function drawAll() {
  for (const [id, how] of waiting) {
    waiting.delete(id);
    await how();
    await new Promise((done) => setTimeout(done, 0));
  }
  document.documentElement.dataset.drawn = "yes";
}

// Tables behind the charts, made when they are opened.

const tables = {};

function fill(details) {
  const [names, rows] = tables[details.dataset.table]();
  const table = document.createElement("table"), head = table.createTHead().insertRow();
  for (const name of names) {
    const cell = element("th", name);
    cell.scope = "col";
    head.append(cell);
  }
  const body = table.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const value of row) line.insertCell().textContent = value;
  }
  details.querySelector(".scroll").replaceChildren(table);
}

for (const details of document.querySelectorAll("details.data")) {
  details.addEventListener("toggle", () => details.open && fill(details));
}
