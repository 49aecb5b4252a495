// Layers: the heat map, the experts of a block, and the one that is chosen.

async function showLayers() {
const of = {};
for (const [name, packed] of Object.entries(facts.columns)) of[name] = column(packed);
const bins = column(facts.bins), binStarts = starts(bins);
const codeLevels = new Uint16Array(bytes(facts.codes).buffer);
const runs = column(facts.runs), runStarts = starts(runs), levelBytes = bytes(facts.levels);
const lowest = column(facts.lowest), highest = column(facts.highest);

function nameOf(index) {
  const block = facts.blocks[of.block[index]], kind = facts.kinds[of.kind[index]];
  return block === kind ? block : `${block}.${kind.replace("*", of.expert[index])}`;
}

const members = new Map();  // block and kind -> layers
for (let i = 0; i < facts.count; i++) {
  const key = `${of.block[i]},${of.kind[i]}`;
  if (!members.has(key)) members.set(key, []);
  members.get(key).push(i);
}
const cellAt = new Map();
for (const cell of facts.cells) {
  cell.block_label = facts.block_labels[cell.block];
  cell.kind_label = facts.kind_labels[cell.kind];
  cell.name = nameOf(cell.layer);
  cellAt.set(`${cell.block},${cell.kind}`, cell);
}
let chosen = facts.cells.reduce((a, b) => (b.error > a.error ? b : a)).layer;
let opened = null;  // the block whose experts are shown

const placeOf = (index) => ({
  block_label: facts.block_labels[of.block[index]],
  kind_label: facts.kind_labels[of.kind[index]],
  expert: of.expert[index],
});

async function drawHeat() {
  const metric = facts.metrics[Number($("metric").value)];
  const cells = facts.cells.filter((cell) => cell[metric.field] !== null);
  await draw("heat", metric.spec, { cells, chosen: [placeOf(chosen)] },
    (datum) => {
      if (datum.layer === undefined) return;
      choose(datum.layer, true);
      if (opened !== null) $("experts-panel").scrollIntoView({ block: "nearest" });
    });
  ring("heat");  // another may be chosen by now
}

async function drawExperts() {
  const rows = [];
  for (let i = 0; i < facts.count; i++) {
    if (of.block[i] === opened && of.expert[i] !== null) {
      rows.push({ ...placeOf(i), layer: i, name: nameOf(i), error: of.relative_error[i],
        left: of.left[i], tokens: of.tokens[i], borrowed: of.borrowed[i] });
    }
  }
  const first = rows.length ? new Set(rows.map((row) => row.expert)).size : 0;
  $("experts-title").textContent = `The ${first} experts of block ${facts.block_labels[opened]}`;
  await draw("experts", facts.charts.experts, { cells: rows, chosen: [placeOf(chosen)] },
    (datum) => datum.layer !== undefined && choose(datum.layer, true));
  ring("experts");
}

function ring(id) {
  if (views.has(id)) views.get(id).data("chosen", [placeOf(chosen)]).run();
}

function codesOf(index) {
  const here = codeLevels.subarray(binStarts[index], binStarts[index + 1]);
  const all = here.reduce((a, b) => a + b, 0) || 1;
  const many = of.wbits[index] === 8 && here.length === 16;
  return Array.from(here, (count, i) => (
    { code: many ? `${16 * i}–${16 * i + 15}` : String(i), share: count / all }));
}

function runsOf(index) {
  const site = of.site[index];
  if (site === null) return [];
  const here = levelBytes.subarray(runStarts[site], runStarts[site + 1]);
  const span = Math.log(highest[site] / lowest[site]);
  return Array.from(here, (level, i) => ({
    column: Math.round((i * of.cols[index]) / here.length),
    mean: level === 0 ? 0 : lowest[site] * Math.exp((span * (level - 1)) / 254),
  }));
}

// The line of those: a point ends the last run, and the one before columns that nothing reached.
function edgesOf(index) {
  const every = runsOf(index), found = [];
  every.forEach((run, i) => {
    const before = i && every[i - 1].mean;
    if (run.mean > 0) found.push(run);
    else if (before) found.push({ ...run, mean: before }, { ...run, mean: null });
  });
  const last = every.at(-1);
  if (last && last.mean) found.push({ ...last, column: of.cols[index] });
  return found;
}

function said(index) {
  const rows = [
    ["relative error", percent(of.relative_error[index])],
    [`of ${facts.over}'s error`, percent(of.left[index])],
    ["error", short(of.error[index])],
    ["rows x columns", `${of.rows[index]} x ${of.cols[index]}`],
    ["bits", of.wbits[index] === null ? "-" : String(of.wbits[index])],
    ["tokens read", whole(of.tokens[index])],
    ["damping", short(of.damp[index])
      + (of.damp_tries[index] ? `, after ${of.damp_tries[index]} more tries` : "")],
    ["columns without tokens", String(of.dead_columns[index])],
    ["rows that fell back", String(of.fallback_rows[index])],
    ["codes at the ends", percent(of.at_ends[index])],
  ];
  if (of.scale_min[index] !== null) {
    rows.push(["scales", `${short(of.scale_min[index])} to ${short(of.scale_max[index])}`]);
  }
  if (of.borrowed[index]) rows.push(["borrowed tokens", whole(of.borrowed[index])]);
  if (of.calls[index] > 1) rows.push(["calls in a forward", String(of.calls[index])]);
  return rows;
}

function part(id, rows, data, none) {
  $(`${id}-note`).textContent = rows.length ? "" : none;
  if (rows.length) return draw(id, facts.charts[id], data);
  $(id).replaceChildren();
}

function drawLayer() {
  const few = facts.detailed < facts.count ? `Kept for the ${facts.detailed} worst layers.` : "";
  const none = few || "Not in this record.";
  const codes = codesOf(chosen), runs = runsOf(chosen).filter((run) => run.mean > 0);
  return Promise.all([part("codes", codes, { codes }, none),
    part("diagonal", runs, { runs, edges: edgesOf(chosen) }, none)]);
}

function options(select, labels, values, value) {
  select.replaceChildren(...labels.map((label, i) => new Option(label, values[i])));
  select.value = String(value);
}

function choose(index, open) {
  chosen = index;
  const block = of.block[index], kind = of.kind[index], expert = of.expert[index];
  const inside = facts.kinds.map((_, k) => k).filter((k) => members.has(`${block},${k}`));
  options($("pick-block"), facts.block_labels, facts.blocks.map((_, i) => i), block);
  options($("pick-kind"), inside.map((k) => facts.kind_labels[k]), inside, kind);
  $("pick-expert-label").hidden = expert === null;
  if (expert !== null) {
    const experts = members.get(`${block},${kind}`);
    options($("pick-expert"), experts.map((i) => of.expert[i]), experts, index);
  }
  $("chosen-title").textContent = nameOf(index);
  $("chosen-facts").replaceChildren(...said(index).map(([name, value]) => {
    const row = document.createElement("div");
    row.append(element("dt", name), element("dd", value));
    return row;
  }));
  ring("heat");
  if ($("experts-panel")) {
    if (open && expert !== null && opened !== block) {
      opened = block;
      $("experts-panel").hidden = false;
      drawExperts();
    } else if (open && expert === null) {
      opened = null;
      $("experts-panel").hidden = true;
    } else if (opened !== null) ring("experts");
  }
  if (views.has("heat")) drawLayer();
  for (const details of document.querySelectorAll("#chosen details.data[open]")) fill(details);
}

function step(down, across) {
  let block = of.block[chosen], kind = of.kind[chosen];
  for (;;) {
    block += down;
    kind += across;
    if (block < 0 || kind < 0 || block >= facts.blocks.length || kind >= facts.kinds.length) return;
    const cell = cellAt.get(`${block},${kind}`);
    if (cell) return choose(cell.layer, true);
  }
}

$("heat").addEventListener("keydown", (event) => {
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const move = moves[event.key];
  if (move && !event.ctrlKey && !event.altKey && !event.metaKey) {
    event.preventDefault();
    step(...move);
  }
});
$("metric").addEventListener("change", drawHeat);
$("pick-block").addEventListener("change", (event) => {
  const block = Number(event.target.value), cell = cellAt.get(`${block},${of.kind[chosen]}`);
  choose((cell || facts.cells.find((each) => each.block === block)).layer, true);
});
$("pick-kind").addEventListener("change", (event) =>
  choose(cellAt.get(`${of.block[chosen]},${event.target.value}`).layer, true));
$("pick-expert").addEventListener("change", (event) => choose(Number(event.target.value), true));
for (const button of document.querySelectorAll("[data-layer]")) {
  button.addEventListener("click", () => {
    choose(Number(button.dataset.layer), true);
    $("chosen").scrollIntoView();
    $("pick-block").focus({ preventScroll: true });
  });
}

function spread(kind) {
  const left = facts.cells.filter((cell) => cell.kind === kind && cell.left !== null)
    .map((cell) => cell.left).sort((a, b) => a - b);
  const half = left.length >> 1, last = left.length - 1;
  const middle = left.length % 2 ? left[half] : (left[half - 1] + left[half]) / 2;
  return left.length ? [left[0], middle, left[last]].map(percent) : ["-", "-", "-"];
}

tables.cells = () => [
  ["layer", "layers", "relative error", "mean", `of ${facts.over}'s`, "codes at the ends", "bits"],
  facts.cells.map((cell) => [cell.name, cell.layers, percent(cell.error), percent(cell.mean),
    percent(cell.left), percent(cell.ends), cell.bits ?? "-"])];
tables.codes = () => [["code", "of the weights"],
  codesOf(chosen).map((each) => [each.code, percent(each.share)])];
tables.runs = () => [["from column", "mean of diag H"],
  runsOf(chosen).map((each) => [each.column, digits(each.mean, 2)])];
tables.gain = () => [["layers", "least", "median", "most"],
  facts.kinds.map((_, kind) => [facts.kind_labels[kind], ...spread(kind)])];

choose(chosen, false);
if (facts.charts.gain) {
  later("gain", () => draw("gain", facts.charts.gain,
    { cells: facts.cells.filter((cell) => cell.left !== null) }));
}
await drawHeat();
await drawLayer();
}
