"""What a report says, without a browser: numbers that come back, warnings, what it leaves out."""

import json
import random
import re
from base64 import b64decode

import numpy as np
import pytest
import records

from optq.errors import OutputError, SettingError
from optq.findings import BOTH
from optq.record import BlockRecord
from optq.report.page import build, layers, pack, summary, warnings
from optq.report.page.known import Known, Several


def unpacked(packed):
    """As ``column`` of page.js reads it."""
    if "list" in packed:
        return packed["list"]
    if "of" in packed:
        return [packed["of"][place] for place in b64decode(packed["at"])]
    logs = "log" in packed
    steps = np.frombuffer(b64decode(packed["log" if logs else "linear"]), dtype="<u2")
    first = 2 if logs else 1
    scale = (packed["high"] - packed["low"]) / (65535 - first)
    found = []
    for step in steps.astype(int):
        value = packed["low"] + scale * (step - first)
        zero = logs and step == 1
        found.append(None if step == 0 else 0.0 if zero else np.exp(value) if logs else value)
    return found


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([3, 1, 3, None] * 100, "of"),
        ([random.Random(i).randint(0, 10**7) for i in range(300)], "list"),
        ([10.0 ** random.Random(i).uniform(-9, 3) for i in range(300)] + [0.0, None], "log"),
        ([random.Random(i).uniform(-2, 5) for i in range(300)] + [None], "linear"),
        ([], "of"),
    ],
    ids=["few", "whole", "positive", "signed", "none"],
)
def test_columns_come_back(values, kind):
    packed = pack.column(values)
    assert kind in packed
    back = unpacked(json.loads(json.dumps(packed)))
    assert len(back) == len(values)
    for value, other in zip(values, back, strict=True):
        if kind in ("of", "list") or value is None or (value == 0 and kind == "log"):
            assert other == value
        else:
            assert other == pytest.approx(value, rel=5e-4, abs=1e-4 if kind == "linear" else 0)


def test_levels_keep_a_diagonal_within_a_few_percent():
    values = [5.0, 0.0, 0.02, 1.7, 300.0]
    steps, low, high = pack.levels(values)
    assert (low, high) == (0.02, 300.0) and steps[1] == 0
    back = [low * (high / low) ** ((int(step) - 1) / 254) if step else 0.0 for step in steps]
    assert back == pytest.approx(values, rel=0.02)
    assert pack.levels([0.0, 0.0])[0].tolist() == [0, 0]


def test_every_layer_has_a_place_that_gives_its_name_back():
    made = records.record(2, 3)
    places = layers.Places(made.layers)
    blocks, kinds = [*places.blocks], [*places.kinds]
    for layer, place in zip(made.layers, places.every, strict=True):
        inside = kinds[place.kind].replace("*", str(place.expert))
        assert f"{blocks[place.block]}.{inside}" == layer.name
    assert places.block_labels() == ["0", "1"]
    assert places.kind_labels()[3:] == [
        *("o_proj", "experts gate_proj", "experts up_proj", "experts down_proj")
    ]
    assert layers.tails(["mlp.gate_proj", "mlp.shared.gate_proj", "mlp.experts.*.gate_proj"]) == [
        *("mlp gate_proj", "shared gate_proj", "experts gate_proj")
    ]


def test_a_cell_is_of_the_worst_expert():
    made = records.record(2, 5)
    places = layers.Places(made.layers)
    (cell,) = (
        cell
        for cell in layers.cells(made.layers, places)
        if (cell["block"], [*places.kinds][cell["kind"]]) == (1, "mlp.experts.*.up_proj")
    )
    those = [x for x in made.layers if re.match(r"model\.layers\.1\..*up_proj", x.name)]
    errors = [layer.relative_error for layer in those]
    assert cell["layers"] == 5 and cell["error"] == pytest.approx(max(errors), rel=1e-3)
    assert cell["mean"] == pytest.approx(sum(errors) / 5, rel=1e-3)
    assert made.layers[cell["layer"]].relative_error == max(errors)
    left = sum(x.error for x in those) / sum(x.rtn_error for x in those)
    assert cell["left"] == pytest.approx(left, rel=1e-3)


def test_a_record_of_the_first_version_has_places_too():
    made = records.record(2, 2)
    old = [layer.model_copy(update={"block": None, "site": None}) for layer in made.layers]
    assert layers.Places(old).every == layers.Places(made.layers).every
    empty = {"histogram": [], "wbits": None, "at_ends": None, "scale_min": None, "scale_max": None}
    bare = [layer.model_copy(update=empty) for layer in old]
    page = build.page(
        Several([records.known(made=made.model_copy(update={"layers": bare, "sites": []}))])
    )
    assert "Worst layers" in page


def test_first_screen():
    said = summary.of(records.known(), "moe-4bit")
    assert said["size"]["before"] == "61.0 GB" and said["size"]["after"] == "17.9 GB"
    assert said["size"]["bits"] == 4.25 and said["quality"]["against"].divergence == 0.0312
    assert said["quality"]["command"] is None
    worst = max(records.known().record.layers, key=lambda layer: layer.relative_error)
    assert said["worst"][0]["name"] == worst.name and len(said["worst"]) == 5
    assert said["time"] == (
        "Factorizing the Hessians took 2.0% of the run (20 s of 17 min); the sweeps over"
        " the columns took 25.0%, the forward passes 40.0%."
    )
    assert [stage["stage"] for stage in summary.stages(records.TIMES)] == [
        *("forward", "solve", "other", "hessian", "factor")
    ]


def test_what_was_not_measured_is_asked_for():
    said = summary.of(records.known(findings=None), "moe-4bit")
    assert said["quality"]["stream"] == pytest.approx(0.001 * 1.06**2)
    assert said["quality"]["command"] == "optq eval moe-4bit --against Qwen/Qwen3-30B-A3B"


def test_all_is_well():
    clean = records.record(2, 2)
    full = [layer.model_copy(update={"borrowed": 0}) for layer in clean.layers]
    made = clean.model_copy(update={"layers": full})
    assert warnings.of(records.known(made=made, findings=None)) == []


@pytest.mark.parametrize(
    ("update", "line"),
    [
        ({"damp_tries": 2}, "1 layer needed more damping .*q_proj 2"),
        ({"dead_columns": 900}, "1 layer had inputs that no .*q_proj 900 of 2048"),
        ({"fallback_rows": 90}, "1 layer with rows that fell back.*q_proj 90 of 768"),
        ({"relative_error": 0.4}, "1 layer with a relative error above 20%: .*q_proj 40%"),
        ({"calls": 2}, "1 layer ran more than once"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_warnings_of_layers(update, line):
    made = records.record(1, 2)
    layers_ = [layer.model_copy(update={"borrowed": 0}) for layer in made.layers]
    layers_[0] = layers_[0].model_copy(update=update)
    (said,) = warnings.of(
        records.known(made=made.model_copy(update={"layers": layers_}), findings=None)
    )
    assert re.search(line, said), said


def test_a_fault_of_both_models_is_no_warning():
    fault = {"fault": "it repeats itself" + BOTH}
    both = [each.model_copy(update=fault) for each in records.FINDINGS.completions]
    known = records.known(findings=records.FINDINGS.model_copy(update={"completions": both}))
    assert not [line for line in warnings.of(known) if "completions" in line]
    assert "it repeats itself, as the dense" in build.page(Several([known]))


def test_warnings_of_the_whole():
    made = records.record(1, 2)
    far = {"blocks": [BlockRecord(block="model.layers.0", error=0.8)], "dense": ["a.b", "a.c"]}
    said = warnings.of(records.known(made=made.model_copy(update=far)))
    assert said[0] == "1 of 2 completions went wrong, first on “The <b>capital</b> of France”: " + (
        "it repeats itself"
    )
    assert "80% off" in said[1] and "2 of 2" not in said[2] and "1 borrowed" in said[2]
    assert said[-1] == "2 linear layers inside the blocks stay dense: a.b, a.c"
    far["dense"] = ["a.b"]
    said = warnings.of(records.known(made=made.model_copy(update=far)))
    assert said[-1] == "1 linear layer inside the blocks stays dense: a.b"


def test_what_users_and_models_say_is_not_markup():
    page = build.page(Several([records.known(place="a</script><b>bold</b>")]))
    assert page.count("</script>") == 3 and "<b>" not in page.replace("<b>'", "")
    assert "The &lt;b&gt;capital&lt;/b&gt; of France" in page
    assert "https://" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_without_a_record_the_rest_is_left_out():
    known = records.known()
    bare = Known(known.place, known.config, known.what, known.before, weights=known.weights)
    page = build.page(Several([bare]))
    assert "there is no record of the run" in page and "not known" in page
    assert "4.25 bits a weight" in page and "Error by layer" not in page
    assert "<script" not in page and len(page) < 20_000


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_size": 4096}, "hidden_size is 2048 and 4096"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is"),
    ],
    ids=lambda value: "",
)
def test_other_models_are_refused(change, why):
    one, other = records.known(), records.known("other")
    other = Known(other.place, records.CONFIG | change, other.what, record=other.record)
    with pytest.raises(SettingError, match=f"moe-4bit and other are of different models: {why}"):
        Several([one, other])


def test_a_record_of_no_layers():
    empty = records.record(1, 2).model_copy(update={"layers": [], "sites": [], "blocks": []})
    alone = build.page(Several([records.known("empty", empty)]))
    assert "The record names no layer." in alone and "GPTQ, 4 bits, groups of 128" in alone
    page = build.page(Several([records.known(), records.known("empty", empty)]))
    assert "Side by side" in page and "relative error of empty" not in page


def test_depth_is_of_those_that_know_it():
    """The first may have no record; the others' lines have their own colors."""
    bare = Known("bare", records.CONFIG, records.known().what)
    several = Several([bare, records.known("q3"), records.known("q4")])
    facts = build.data(several)
    assert {row["checkpoint"] for row in facts["depth"]} == {"q3", "q4"} and not facts["metrics"]
    (scale,) = (each for each in facts["charts"]["depth"]["scales"] if each["name"] == "color")
    assert scale["domain"] == ["q3", "q4"]
    assert scale["range"] == ["var(--series-1)", "var(--series-2)"]
    page = build.page(several)
    assert 'id="depth"' in page and "the heat map shows" not in page


def test_round_to_nearest_gains_nothing_over_itself():
    made = records.record(1, 2).model_copy(update={"method": "rtn"})
    facts = build.data(Several([records.known(made=made)]))
    assert "gain" not in facts["charts"]
    assert "left" not in {metric["field"] for metric in facts["metrics"]}


def test_other_layers_are_refused():
    one, made = records.known(), records.record(3, 4)
    first, *rest = made.layers
    wider = made.model_copy(update={"layers": [first.model_copy(update={"rows": 9}), *rest]})
    with pytest.raises(SettingError, match="q_proj is 768 x 2048 and 9 x 2048"):
        Several([one, records.known("other", wider)])
    elsewhere = [x.model_copy(update={"name": f"x.{x.name}"}) for x in made.layers]
    moved = made.model_copy(update={"layers": elsewhere})
    with pytest.raises(SettingError, match="has no layer model"):
        Several([one, records.known("other", moved)])
    with pytest.raises(SettingError, match="named twice"):
        Several([one, one])


def test_names_that_are_alike_are_told_apart_by_their_places():
    assert Several([records.known("a/x"), records.known("b/x")]).names == ["a/x", "b/x"]
    assert Several([records.known("a/x"), records.known("b/y")]).names == ["x", "y"]


def test_a_place_for_the_file(tmp_path):
    path = tmp_path / "report.html"
    build.check(path, False)
    build.write(path, build.page(Several([records.known()])))
    build.check(path, False)  # a report may replace a report
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists and is no report"):
        build.check(path, False)
    build.check(path, True)
    with pytest.raises(OutputError, match="is a folder"):
        build.check(tmp_path, True)
    with pytest.raises(OutputError, match="there is no folder"):
        build.check(tmp_path / "nowhere" / "report.html", False)
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
