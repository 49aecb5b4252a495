// What the page shows, in the order in which it is drawn.

if (facts.cells) await showLayers();
if (facts.charts.times) {
  later("times", () => draw("times", facts.charts.times, { stages: facts.stages }));
  tables.stages = () => [["stage", "seconds", "of all"],
    facts.stages.map((each) => [each.stage, each.seconds.toFixed(2), percent(each.share)])];
}
if (facts.charts.depth) {
  later("depth", () => draw("depth", facts.charts.depth, { blocks: facts.depth }));
  tables.depth = () => [["behind block", "relative error", "checkpoint"],
    facts.depth.map((each) => [each.block, percent(each.error), each.checkpoint])];
}
await drawAll();
