"""What compressed-tensors says of layers in ``config_groups`` and ``ignore``: written and read."""

from __future__ import annotations

import re
from typing import Any

from optq.core.grid import BITS
from optq.core.weight import LayerScheme
from optq.errors import ModelError, OtherMethodError
from optq.formats.scheme import EXPERT, Schemes, heads_of
from optq.model.checkpoint import TOGETHER

PACKED = "pack-quantized"
INTEGERS = "int-quantized"  # codes as int8, activations quantized too
HEAD = "lm_head"  # what readers look for
OTHER_KIND = "give a checkpoint of integer weights, format pack-quantized or int-quantized"
# Early releases (0.5) left "frozen" in the config of files that are compressed.
STATUSES = ("compressed", "frozen")


def groups_of(layers: Schemes) -> dict[str, Any]:
    """A group for each scheme; that of experts first: transformers takes it for them."""
    heads = heads_of(layers)
    inside = [name for name in layers if name not in heads]
    same = {layers[name] for name in inside}
    order = [*filter(EXPERT.fullmatch, inside), *inside, *heads]
    targets: dict[LayerScheme, list[str]] = {layers[name]: [] for name in order}
    for name in heads:
        targets[layers[name]] += dict.fromkeys([name, HEAD])
    for name in inside if len(same) > 1 else ():
        targets[layers[name]].append(name)
        if experts := EXPERT.fullmatch(name):  # asked for by these names here, too
            first = [f"{experts[1]}.0.{part}_proj" for part in ("gate", "up", "down")]
            targets[layers[name]] += [each for each in first if each not in layers]
    if len(same) == 1:
        targets[same.pop()].append("Linear")
    return {
        f"group_{index}": _group(layer, [*dict.fromkeys(names)])
        for index, (layer, names) in enumerate(targets.items())
    }


def _group(layer: LayerScheme, targets: list[str]) -> dict[str, Any]:
    channel = layer.groupsize == -1
    return {
        "targets": targets,
        "weights": {
            "num_bits": layer.wbits,
            "type": "int",
            "symmetric": layer.sym,
            "strategy": "channel" if channel else "group",
            "group_size": None if channel else layer.groupsize,
            "dynamic": False,
            "actorder": None,  # the order of the sweep leaves no trace in these files
            "observer": None,
            "observer_kwargs": {},
            "block_structure": None,
        },
        "input_activations": None if layer.abits is None else _by_token(layer.abits),
        "output_activations": None,
        "format": PACKED if layer.abits is None else INTEGERS,
    }


def _by_token(abits: int) -> dict[str, Any]:
    """Each token with a scale that is found when it is read."""
    return {
        "num_bits": abits,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "actorder": None,
        "observer": None,
        "observer_kwargs": {},
        "block_structure": None,
    }


def refuse_other_kinds(settings: dict[str, Any], kind: str = PACKED) -> None:
    if settings.get("format") != kind:
        raise OtherMethodError(f"the weights are kept as {settings.get('format')}", OTHER_KIND)
    status = settings.get("quantization_status")
    if status not in STATUSES:
        raise OtherMethodError(f"the quantization_status is {status}, not compressed", OTHER_KIND)
    for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config", "sparsity_config"):
        value = settings.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise OtherMethodError(f"the checkpoint has a {key}", OTHER_KIND)


def scheme_of(title: str, group: Any, kind: str = PACKED) -> LayerScheme:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise OtherMethodError(f"{title} does not say how weights are quantized", OTHER_KIND)
    activations = group.get("input_activations")
    for key in ("input_activations", "output_activations"):
        known = kind == INTEGERS and key == "input_activations" and _is_by_token(activations)
        if group.get(key) is not None and not known:
            how = " in another way than by token in 8 bits" if kind == INTEGERS else ""
            raise OtherMethodError(f"{title} quantizes {key.replace('_', ' ')}{how}", OTHER_KIND)
    if group.get("format") not in (None, kind):
        raise OtherMethodError(f"{title} keeps weights as {group['format']}", OTHER_KIND)
    weights = {"type": "int", "symmetric": True} | group["weights"]
    for key, wanted in (
        ("type", ("int",)),
        ("num_bits", BITS),
        ("strategy", ("group", "channel")),
        ("dynamic", (False, None)),
        ("symmetric", (True, False)),
        ("actorder", (None, False, "static", "weight", "group", "dynamic")),
    ):
        if weights.get(key) not in wanted or isinstance(weights.get(key), float):
            raise OtherMethodError(f"{title} has weights of {key} {weights.get(key)}", OTHER_KIND)
    groupsize, grouped = weights.get("group_size"), weights["strategy"] == "group"
    if not grouped and groupsize is None:
        groupsize = -1
    if not isinstance(groupsize, int) or not (groupsize > 0 if grouped else groupsize == -1):
        raise ModelError(f"{title} has a {weights['strategy']} of {groupsize} columns", TOGETHER)
    # "dynamic" was a second name of "group", "static" is one of "weight".
    actorder = grouped and weights.get("actorder") in ("group", "dynamic")
    abits = None if activations is None else activations["num_bits"]
    return LayerScheme(weights["num_bits"], groupsize, weights["symmetric"], actorder, abits)


def _is_by_token(activations: Any) -> bool:
    """Whether they are 8-bit integers, symmetric, with a scale to each token that it brings."""
    if not isinstance(activations, dict):
        return False
    told = {"type": "int", "symmetric": True, "dynamic": False} | activations
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return all(told.get(key) == value for key, value in wanted.items())


def of_experts(settings: dict[str, Any]) -> LayerScheme:
    """The scheme that transformers reads experts with: of one group, by the targets' form.

    As ``get_experts_scheme`` of its integration has it.
    """
    groups = settings["config_groups"]

    def some(pattern: str) -> list[str]:
        return [
            title
            for title, group in groups.items()
            if any(re.match(pattern, target) for target in group["targets"])
        ]

    title = [*some("re:.*experts"), *some("(?!re:)"), *groups][0]
    return scheme_of(title, groups[title])


def patterns_in(what: str, patterns: Any) -> list[str]:
    """Names, ``re:`` expressions and ``Linear``, checked."""
    if not isinstance(patterns, list) or not all(isinstance(one, str) for one in patterns):
        raise ModelError(f"{what} is no list of names", TOGETHER)
    for pattern in patterns:
        if what != "ignore" and pattern != "Linear" and re.fullmatch(r"[A-Z]\w*", pattern):
            # Names on disk do not tell which modules are of a class.
            raise OtherMethodError(f"{what} name the class {pattern}", OTHER_KIND)
        try:
            matches(pattern, "")
        except re.error as error:
            raise ModelError(f"{what} holds {pattern}: {error}", TOGETHER) from error
    return patterns


def matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern in ("Linear", name)
