"""An authors' checkpoint and its vocabulary -> a checkpoint of ours that needs nothing else."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.concepts import ConceptVocabulary, ReleasedConceptExtractor
from neucore_plugin.config.loading import model_defaults
from neucore_plugin.models.backbones import build_backbone
from neucore_plugin.models.backbones.resnet_gru import NETWORKS, SPECIALS, released_classes, word_list
from neucore_plugin.models.neucore import NeucoreModel
from neucore_plugin.released.captions import FILES, training_captions
from neucore_plugin.released.names import cnn_of, converted_state, grouped, is_cnn, settings_from
from neucore_plugin.released.vocabulary import read_vocabulary
from neucore_plugin.weights import checkpoint
from neucore_plugin.weights.files import SCALARS, misfits, read, state_of

NEW = ("absent_image", "absent_word", "absent_sentence")  # stand-ins that the released form does not have
_HEADS = ("module_heads", "concept_heads")  # no shape tells them
# Plain values that may stand beside the weights: a Namespace holds settings. None runs code.
_PLAIN = [argparse.Namespace, *SCALARS]
_SETTINGS = ("opt", "args", "config", "options")


@dataclass
class Conversion:
    """What was made of an authors' checkpoint."""

    model: NeucoreModel
    unused: list[str]
    notes: list[str] = field(default_factory=list)


def released_types() -> dict[str, dict[str, Any]]:
    """{model type: its model section} of the released form."""
    paths = {k: v for k, v in NeucoreModel.PRETRAINED_MODEL_CONFIG_DICT.items() if k.startswith("official_")}
    return {name: model_defaults({"arch": "neucore", "model_type": name}) for name in paths}


def load_released(
    path: str | Path, wanted: str = "the .pth that the released code wrote"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(weights under the authors' names, settings the file holds) of a `.pth`, read as weights only.

    wanted: what the file should be, for errors.

    Raises: CheckpointError for a file that is missing, damaged, hostile, or no checkpoint of the released form.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"no file {path}; give {wanted}")
    value = read(path, allowed=_PLAIN)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; {wanted} is a dict of weights")
    if value.get("format") == checkpoint.FORMAT:
        raise CheckpointError(f"{path} is a checkpoint of ours already (use it as model.checkpoint), not {wanted}")
    state = state_of(value, path)
    if odd := [name for name, part in state.items() if part.layout != torch.strided or part.is_quantized]:
        raise CheckpointError(
            f"{path} holds {len(odd)} sparse or quantised weights, such as {odd[0]}: dense ones are read"
        )
    settings = next((value[key] for key in _SETTINGS if key in value), {})
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    return state, dict(settings) if isinstance(settings, Mapping) else {}


def convert_state(
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    words: Sequence[str],
    concepts: ConceptVocabulary,
    model_type: str | None = None,
) -> Conversion:
    """The model of an authors' state dict: each of its entries is the file's, but for the stand-ins in NEW.

    Args:
        settings: the authors' settings (`opt`), for what shapes do not tell: data set and numbers of heads.
        words: a word for each row of the embedding.
    Raises: CheckpointError, with everything that is missing or does not fit.
    """
    wrong = checkpoint.non_finite(state)
    if wrong:
        raise CheckpointError(f"{len(wrong)} weights hold NaN or infinity, such as {wrong[0]}: no trained model")
    made = settings_from(state, settings, model_type, released_types())
    section, notes = model_defaults(made), []
    if assumed := [name for name in _HEADS if settings.get(name) is None]:
        used = {"module_heads": made["fusion"]["heads"], "concept_heads": made["concept_alignment"]["heads"]}
        notes.append(
            f"{', '.join(f'{name} {used[name]}' for name in assumed)}: not in the file's settings but taken from "
            f"{made['model_type']}; no shape tells them, and wrong ones give wrong results: --settings names the right"
        )
    check_words(words, state, made["model_type"])
    model = NeucoreModel.from_section(build_backbone(section["backbone"], words, load=False), concepts, section)
    if any(value.dtype == torch.float64 for value in state.values()):
        model.double()
    new, unused = converted_state(state)
    own = model.state_dict()
    if "matching.temperature" not in new:
        new["matching.temperature"] = own["matching.temperature"].clone()
        notes.append(f"temperature: absent in the file, set to {made['matching']['temperature']:g}")
    problems = misfits(own, new, optional=NEW)
    if problems:
        raise CheckpointError("the checkpoint does not fit the released form.\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for name in NEW:
            own[name].zero_()  # untrained: a query without image or text gets nothing rather than noise
    model.load_state_dict({**own, **new}, strict=True)
    model.trained = True
    return Conversion(model.eval(), unused, notes)


def check_words(words: Sequence[str], state: Mapping[str, Tensor], model_type: str) -> None:
    """Raise CheckpointError where the words cannot be those of the embedding's rows."""
    count = state["txt_enc.embed.weight"].shape[0]
    if len(words) != count or tuple(words[: len(SPECIALS)]) != SPECIALS:
        raise CheckpointError(
            f"the word vocabulary does not belong to this checkpoint: it has {len(words):,} words and begins with "
            f"{', '.join(words[:5])}; the embedding has {count:,} rows, of which the first are {', '.join(SPECIALS)}. "
            f"Give the captions it was trained on ({FILES[model_type]}), or the authors' vocabulary"
        )


def cnn_state(path: str | Path, width: int) -> dict[str, Tensor]:
    """torchvision's state dict of a ResNet whose maps have `width` channels, under names as the authors' code has them.

    Raises: CheckpointError, with the file's name.
    """
    wanted = f"torchvision's state dict of one of {', '.join(NETWORKS)}"
    state = {f"img_enc.cnn.{name}": value for name, value in load_released(path, wanted)[0].items()}
    if (found := cnn_of(state)) is None:
        raise CheckpointError(f"the CNN {path} is not {wanted}: names or shapes of its weights differ")
    network = found[0]
    if NETWORKS[network] != width:
        raise CheckpointError(
            f"the CNN {path} is a {network} with {NETWORKS[network]} channels; the checkpoint was trained on {width}"
        )
    if wrong := checkpoint.non_finite(state):
        raise CheckpointError(f"the CNN {path}: {len(wrong)} weights hold NaN or infinity, such as {wrong[0]}")
    return state


def convert(
    source: str | Path,
    output: str | Path,
    captions: Sequence[str | Path] = (),
    vocabulary: str | Path | None = None,
    concepts: str | Path | None = None,
    model_type: str | None = None,
    settings: Mapping[str, Any] | None = None,
    cnn: str | Path | None = None,
) -> Conversion:
    """Write `output`, a checkpoint of ours, from the authors' `source`.

    Args:
        captions: annotation files of the training split (see `captions.py`), for words and concept classes.
        vocabulary: the words, a row each, as JSON or the authors' pickle; then captions give the classes alone.
        concepts: a concept vocabulary of ours as JSON, to be used as the classes instead.
        settings: the authors' settings where the file itself lacks them.
        cnn: torchvision's state dict of the ResNet whose maps the model was trained on, where `source` holds no CNN:
            the result then takes pictures instead of maps.
    Raises: CheckpointError, ConfigError and DataError; nothing is written then.
    """
    if Path(output).is_dir():
        raise ConfigError(
            f"--out {output} is a folder; give the file that is to be written, such as {output}/model.pth"
        )
    state, given = load_released(source)
    given |= settings or {}
    types = released_types()
    if cnn is not None:
        if any(is_cnn(name) for name in state):
            raise CheckpointError(f"{source} brings its own CNN; leave out the file {cnn}")
        settings_from(state, given, model_type, types)  # first of all it is told what lacks
        state |= cnn_state(cnn, state["img_enc.proj.weight"].shape[1])
    section = settings_from(state, given, model_type, types)
    if not captions and vocabulary is None:
        raise ConfigError(
            f"the words of the embedding are needed: give --captions ({FILES[section['model_type']]}), or --vocabulary"
        )
    texts = training_captions(captions, section["model_type"]) if captions else []
    words = read_vocabulary(vocabulary) if vocabulary is not None else word_list(texts, rule="released")
    check_words(words, state, section["model_type"])
    if concepts is not None:
        known = ConceptVocabulary.from_json(concepts)
    else:
        extract = ReleasedConceptExtractor(model_defaults(section)["concepts"]["pos"])
        lemmas = (lemma for found in extract(texts, progress=True) for lemma in found) if texts else ()
        known = ConceptVocabulary(released_classes(words, lemmas))
    done = convert_state(state, given, words, known, model_type)
    weights, frozen = checkpoint.model_state(done.model)
    try:
        checkpoint.save({"architecture": done.model.checkpoint_header(), "model": weights, "frozen": frozen}, output)
    except OSError as error:
        raise ConfigError(f"--out {output} cannot be written: {error.strerror or error}") from error
    return done


def report(done: Conversion, output: str | Path) -> list[str]:
    """What a user should know of a conversion, line by line."""
    config, words, concepts = done.model.config, done.model.backbone.text.words, done.model.vocabulary.words
    fusion = config["fusion"]
    classes = f"{len(concepts):,} concept classes"
    if not concepts:
        classes = "no concept classes: it searches and is evaluated; to train it further, give --captions as well"
    return [
        f"{output}: {config['model_type']}, width {config['embed_dim']}, "
        f"images: {config['backbone']['image']['name']}, {fusion['steps']} instruction types, "
        f"depth {fusion['module_depth']}, layers {fusion['layers']}",
        f"{len(words):,} words, {classes}",
        f"not used: {', '.join(grouped(done.unused)) or 'nothing'}",
        "new, not trained: the stand-ins for a query without image or without text",
        *done.notes,
    ]
