"""The authors' checkpoints: the names of their weights here, and the settings that their shapes tell.

Knows torch and no host.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from neucore_plugin.common.errors import CheckpointError, ConfigError, first_few
from neucore_plugin.models.backbones.resnet_gru import NETWORKS

_ENGINE = "program_engine."
_PREFIXES = (
    ("temperature", "matching.temperature"),
    ("txt_enc.embed.", "backbone.text.embedding."),
    ("txt_enc.sent_enc.", "backbone.text.gru."),
    ("img_enc.proj.", "image_projection."),
    ("Transform_m.0.", "matching.transform."),
    ("Attention_EM.attention.", "matching.attention."),
    ("concept_net.fg_net.", "alignment.fg_pool."),
    ("concept_net.bg_net.", "alignment.bg_pool."),
    ("concept_net.encoder.", "alignment.encoder."),
    ("noun_encoder.", "alignment.classifier.projection."),
    (_ENGINE + "query_attention.global_emb_fn.", "fusion.attend.query."),
    (_ENGINE + "query_attention.guide_emb_fn.0.", "fusion.attend.guide."),
    (_ENGINE + "query_attention.att_fn.key2att.", "fusion.attend.key."),
    (_ENGINE + "query_attention.att_fn.feat2att.", "fusion.attend.feature."),
    (_ENGINE + "query_attention.att_fn.to_alpha.", "fusion.attend.alpha."),
)
_STACKS = (  # a stack's linear layers are numbered one by one there; here a ReLU stands between two
    (_ENGINE + "instruction_generator.mlpencoder.model.", "fusion.instructions.mlp."),
    (_ENGINE + "out_proj.model.", "fusion.output."),
)
_EXECUTOR = re.compile(r"program_engine\.executors\.layer(\d+)\.instruction_type(\d+)\.(.+)")
_PARTS = (
    ("fn.to_qkv.", "attention.{}.qkv."),
    ("fn.to_out.0.", "attention.{}.proj."),
    ("fn.net.0.", "mlp.{}.fc1."),
    ("fn.net.3.", "mlp.{}.fc2."),
)
# No result of the released code depends on these.
_IDLE = ("Attention_IS.", "concept_net.encoder.head.", "concept_net.encoder.patch_embed.")
_NEEDED = {  # weights that every checkpoint has, and the number of their axes
    "txt_enc.embed.weight": 2,
    "txt_enc.sent_enc.weight_hh_l0": 2,
    "txt_enc.sent_enc.weight_hh_l0_reverse": 2,
    "img_enc.proj.weight": 4,
    "noun_encoder.weight": 2,
    "concept_net.encoder.pos_embed": 3,
    "program_engine.executors.layer0.instruction_type0.module.layers.0.0.fn.to_qkv.weight": 2,
    "program_engine.executors.layer0.instruction_type0.module.layers.0.1.fn.net.0.weight": 2,
}
_FIRST_MLP = "concept_net.encoder.blocks.0.mlp.fc1.weight"
_DATA = {"cirr": "official_cirr", "fashioniq": "official_fashioniq", "shoes": "official_shoes"}


def renamed(name: str) -> str | None:
    """A weight's name in the authors' checkpoint -> its name in our model; None where nothing uses it.

    The CNN's names are the business of `cnn_names`, which needs the shapes as well.
    """
    if name.startswith(_IDLE):
        return None
    if found := _EXECUTOR.fullmatch(name):
        return _executor(*found.groups())
    for old, new in _STACKS:
        if name.startswith(old) and (rest := _stack(name.removeprefix(old))):
            return new + rest
    for old, new in _PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def _stack(rest: str) -> str | None:
    found = re.fullmatch(r"(\d+)\.fc\.(\w+)", rest)
    return f"{2 * int(found[1])}.{found[2]}" if found else None


def _executor(layer: str, kind: str, rest: str) -> str | None:
    head = f"fusion.executors.{layer}.{kind}."
    if generator := _stack(rest.removeprefix("params_generator.model.")):
        return f"{head}generator.{generator}"
    if not (found := re.fullmatch(r"module\.layers\.(\d+)\.\d+\.(.+)", rest)):
        return None
    depth, part = found.groups()
    for old, new in _PARTS:
        if part.startswith(old):
            return head + new.format(depth) + part.removeprefix(old)
    return None  # running statistics of the norms, which instance norms do not use


def is_cnn(name: str) -> bool:
    """Whether a weight of the authors' checkpoint belongs to the CNN."""
    return name.startswith("img_enc.") and not name.startswith("img_enc.proj.")


def cnn_names(state: Mapping[str, Tensor], network: str) -> dict[str, str] | None:
    """{name in `state`: name in torchvision's network} of a CNN's weights; None where they are not this network's.

    Names that hold torchvision's, or the places of its parts in a Sequential, are understood; any others by their
    order, if all shapes agree.
    """
    from torchvision import models

    with torch.device("meta"):
        net = getattr(models, network)(weights=None)
    own = {name: tuple(value.shape) for name, value in net.state_dict().items() if not name.startswith("fc.")}
    places = [name for name, _ in net.named_children()]
    theirs = {name: tuple(value.shape) for name, value in state.items() if is_cnn(name)}
    counted = [name for name in own if not name.endswith("num_batches_tracked")]

    def fits(names: Mapping[str, str]) -> bool:
        return set(counted) <= set(names.values()) and all(own[new] == theirs[old] for old, new in names.items())

    by_name: dict[str, str] = {}
    for name in theirs:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            place = parts[cut]
            if place.isdigit() and int(place) < len(places):
                place = places[int(place)]
            for first in (parts[cut], place):
                candidate = ".".join([first, *parts[cut + 1 :]])
                if candidate in own and name not in by_name:
                    by_name[name] = candidate
    if len(set(by_name.values())) == len(by_name) and fits(by_name):
        return by_name
    ordered = [name for name in theirs if not name.endswith("num_batches_tracked")][: len(counted)]
    by_order = dict(zip(ordered, counted, strict=False))
    return by_order if fits(by_order) else None


def cnn_of(state: Mapping[str, Tensor]) -> tuple[str, dict[str, str]] | None:
    """(a CNN's name, see `cnn_names`) of the weights below `img_enc.`; None where they are no known CNN's."""
    found = ((network, cnn_names(state, network)) for network in NETWORKS)
    return next(((network, names) for network, names in found if names is not None), None)


def name_map(state: Mapping[str, Tensor]) -> tuple[dict[str, str | None], str | None]:
    """({authors' name: our name, None where nothing uses it}, the CNN's name or None). Raises CheckpointError."""
    network, inner = None, {}
    if any(is_cnn(name) for name in state):
        if (found := cnn_of(state)) is None:
            raise CheckpointError(
                f"the weights below img_enc. are none of {', '.join(NETWORKS)}, so the image encoder cannot be built"
            )
        network, inner = found
    return {
        name: f"backbone.image.network.{inner[name]}" if name in inner else renamed(name) for name in state
    }, network


def converted_state(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(weights under our names, names that nothing uses)."""
    names, _ = name_map(state)
    new = {target: state[name] for name, target in names.items() if target is not None}
    new["image_projection.weight"] = new["image_projection.weight"].flatten(1)  # a 1x1 convolution there
    if "matching.temperature" in new:
        new["matching.temperature"] = new["matching.temperature"].reshape(-1)
    for name in list(new):  # old files lack the counters, which nothing computes with
        if name.startswith("backbone.image.") and name.endswith("running_var"):
            new.setdefault(f"{name.removesuffix('running_var')}num_batches_tracked", torch.zeros((), dtype=torch.long))
    return new, [name for name, target in names.items() if target is None]


def settings_from(
    state: Mapping[str, Tensor], given: Mapping[str, Any], model_type: str | None, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The `model` section of a checkpoint: what its shapes tell, the rest from its own settings or from `defaults`.

    Args:
        state: weights under the authors' names. given: the settings that the file holds; may be empty.
        model_type: of ours; None means by the file's data set.
        defaults: {model type: its model section}.
    """
    problems = [f"{name} is absent" for name in _NEEDED if name not in state]
    problems += [
        f"{name} has {state[name].dim()} axes, not {axes}"
        for name, axes in _NEEDED.items()
        if name in state and state[name].dim() != axes
    ]
    temperature = state.get("temperature")
    if temperature is not None and temperature.numel() != 1:
        problems.append(f"temperature has {temperature.numel()} numbers, not 1")
    if problems:
        raise CheckpointError(
            f"no checkpoint of the released NEUCORE: {'; '.join(problems)} (it holds {first_few(state)})"
        )
    model_type = model_type or _DATA.get(str(given.get("data_name", "")).lower())
    if model_type not in defaults:
        raise CheckpointError(
            f"the file does not say which data set it was trained on (it says {given.get('data_name')!r}); give the "
            f"model type: {', '.join(sorted(defaults))}"
        )
    default = defaults[model_type]
    hidden = state["txt_enc.sent_enc.weight_hh_l0"].shape
    if hidden[0] != 3 * hidden[1]:
        raise CheckpointError(f"the text encoder is no GRU: its recurrent weight is {list(hidden)}, not [3H, H]")
    dim, word_dim = 2 * hidden[1], state["txt_enc.embed.weight"].shape[1]
    blocks = _count(state, r"concept_net\.encoder\.blocks\.(\d+)\.")
    layers = _count(state, r"program_engine\.executors\.layer(\d+)\.")
    first = "program_engine.executors.layer0.instruction_type0."
    head = re.escape(first)
    heads = _whole(given, "module_heads", default["fusion"]["heads"])
    concept_heads = _whole(given, "concept_heads", default["concept_alignment"]["heads"])
    inner = state[f"{first}module.layers.0.0.fn.to_qkv.weight"].shape[0] // 3
    if inner % heads:
        raise CheckpointError(f"the executors' width {inner} is no multiple of {heads} heads; give the right number")
    if dim % concept_heads:
        raise CheckpointError(f"the width {dim} is no multiple of {concept_heads} concept_heads; give the right number")
    _, network = name_map(state)
    image = {"name": "features", "width": state["img_enc.proj.weight"].shape[1]}
    if network is not None:
        image = {"name": "resnet", "network": network, "weights": None}
    return {
        "arch": "neucore",
        "model_type": model_type,
        "form": "released",
        "backbone": {
            "image": {**image, "freeze": True},
            "text": {"name": "glove_bigru", "word_dim": word_dim, "width": dim, "glove": None, "freeze_words": True},
        },
        "embed_dim": dim,
        "concept_alignment": {
            "depth": blocks,
            "heads": concept_heads,
            "mlp_ratio": state[_FIRST_MLP].shape[0] / dim if _FIRST_MLP in state else 4.0,
        },
        "fusion": {
            "steps": _count(state, r"program_engine\.executors\.layer0\.instruction_type(\d+)\."),
            "layers": layers,
            "module_depth": _count(state, head + r"module\.layers\.(\d+)\."),
            "heads": heads,
            "head_dim": inner // heads,
            "mlp_ratio": state[f"{first}module.layers.0.1.fn.net.0.weight"].shape[0] / dim,
            "generator_linears": _count(state, head + r"params_generator\.model\.(\d+)\."),
            "instruction_linears": _count(state, r"program_engine\.instruction_generator\.mlpencoder\.model\.(\d+)\."),
        },
        "matching": {
            "temperature": _real(given, "temperature", 2.65926) if temperature is None else float(temperature),
            "learn_temperature": bool(given.get("learn_temperature", True)),
        },
    }


def _whole(given: Mapping[str, Any], name: str, default: int) -> int:
    """A setting that is a whole number of at least 1, also as text; absent or None: the default. ConfigError."""
    value = given.get(name)
    if value is None:
        return default
    if not re.fullmatch(r"0*[1-9]\d{0,5}", str(value)):
        raise ConfigError(f"the setting {name} is {value!r}; a whole number of at least 1 is wanted")
    return int(value)


def _real(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    try:
        if math.isfinite(float(value)):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"the setting {name} is {value!r}; a finite number is wanted")


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Different numbers that a pattern finds at the beginning of the names; they must be 0, 1, 2, ..."""
    found = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    if found != set(range(len(found))):
        raise CheckpointError(f"weights are missing: the numbers in {pattern} are {sorted(found)}")
    return len(found)


def grouped(names: list[str]) -> list[str]:
    """Names with `*` for their numbers, and counts: what a user wants to read of many."""
    counts = Counter(re.sub(r"\d+", "*", name) for name in names)
    return [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
