"""The folder form of a checkpoint, as hubs keep models: safetensors and JSON, no pickle. Knows no host.

`config.json` says what the model is and the sha256 of the other files that are read; their names are fixed, so that
nothing in a folder can lead out of it. What such a file may ask for is the same as of a checkpoint (`trust.py`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from neucore_plugin.common.errors import CheckpointError, DataError, first_few
from neucore_plugin.common.files import atomic_write, expanded, hub_name, read_json, sha256_file, write_json
from neucore_plugin.weights.files import read
from neucore_plugin.weights.hub import hub_file, hub_folder

FORMAT = "neucore-folder-1"
CONFIG, WEIGHTS, CONCEPTS, PIXELS, WORDS = (
    "config.json",
    "model.safetensors",
    "concepts.json",
    "preprocessor_config.json",
    "words.json",
)
OPTIONAL = (WORDS,)  # of encoders with a word vocabulary of their own
_LARGEST = 1 << 26  # bytes of a JSON file: a million words are a fifth of that
_REMEDY = "export the checkpoint again, or fetch the folder again"


def write(folder: Path, stored: Mapping[str, Any], version: str) -> None:
    """Write what `checkpoint.load` gave into a folder that is there; optimiser and random states are left out.

    version: of this package. Raises CheckpointError for weights that are no tensors.
    """
    from safetensors.torch import save

    header, state = stored["architecture"], stored["model"]
    if wrong := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"the checkpoint holds entries that are no tensors: {first_few(wrong)}")
    with atomic_write(folder / WEIGHTS) as stream:
        stream.write(save({name: value.contiguous() for name, value in state.items()}, {"format": "pt"}))
    write_json(folder / CONCEPTS, header["concepts"])
    write_json(folder / PIXELS, {"image_processor_type": "cir_image", **header["image_processor"]})
    if "words" in header:
        write_json(folder / WORDS, list(header["words"]), indent=None)
    names = [name for name in (WEIGHTS, CONCEPTS, PIXELS, WORDS) if (folder / name).is_file()]
    content = {
        "format": FORMAT,
        "library": "neucore-plugin",
        "version": version,
        "arch": header["arch"],
        "model": header["config"],
        "frozen": stored["frozen"],
        "progress": stored.get("progress") or {},
        "sha256": {name: sha256_file(folder / name) for name in names},
    }
    write_json(folder / CONFIG, content)


def is_here(source: str | Path) -> bool:
    """Whether `source` is a folder with a config, or names a repository of the hub, OWNER/NAME[@REVISION]."""
    return (expanded(source) / CONFIG).is_file() or hub_name(source) is not None


def load(source: str | Path) -> dict[str, Any]:
    """What `checkpoint.load` gives of a file, of a folder or a repository. Nothing in it is run.

    The hub is asked for nothing further where its config is not ours. Raises CheckpointError for what is missing,
    damaged, hostile, or of another make.
    """
    repository = hub_name(source)
    if repository is None:
        folder, name, revision = expanded(source), str(source), None
    else:
        name, revision = repository
        folder = hub_folder(name, "checkpoint", revision)
        revision = folder.name  # the commit: all files are of one
    try:
        config = _config(folder)
        sums = config["sha256"]
        paths = {}
        for part in sums:
            if repository is not None:
                hub_file(name, part, "checkpoint", revision)
            paths[part] = _inside(folder, part)
            if (found := sha256_file(paths[part])) != sums[part]:
                raise CheckpointError(
                    f"{paths[part]}: its sha256 is {found}, but {CONFIG} says {sums[part]}: damaged, or another file; "
                    f"{_REMEDY}"
                )
        pixels = _json(folder, PIXELS, dict)
        pixels.pop("image_processor_type", None)
        header = {
            "arch": config["arch"],
            "config": config["model"],
            "concepts": _json(folder, CONCEPTS, dict),
            "image_processor": pixels,
            **({"words": _json(folder, WORDS, list)} if WORDS in paths else {}),
        }
        if not all(isinstance(word, str) for word in header.get("words", ())):
            raise CheckpointError(f"{folder / WORDS}: every word must be a text; {_REMEDY}")
    except DataError as error:
        raise CheckpointError(str(error)) from error
    return {
        "architecture": header,
        "model": read(paths[WEIGHTS]),
        "frozen": config["frozen"],
        "progress": config["progress"],
    }


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = _json(folder, CONFIG, dict)
    if config.get("format") != FORMAT:
        mark = config.get("format")
        newer = isinstance(mark, str) and mark.startswith("neucore-folder-")
        remedy = (
            "install the version that wrote it" if newer else "`neucore export` makes such a folder of a checkpoint"
        )
        raise CheckpointError(f"{path}: is none of our models (format {mark!r}, this version reads {FORMAT}); {remedy}")
    wanted = {"arch": str, "model": dict, "frozen": dict, "progress": dict, "sha256": dict}
    if wrong := [key for key, kind in wanted.items() if not isinstance(config.get(key), kind)]:
        raise CheckpointError(f"{path}: {first_few(wrong)}: missing, or of another kind; {_REMEDY}")
    if wrong := [key for key in ("frozen", "sha256") if not all(isinstance(v, str) for v in config[key].values())]:
        raise CheckpointError(f"{path}: {first_few(wrong)}: every entry must be a sum, as text; {_REMEDY}")
    required = {WEIGHTS, CONCEPTS, PIXELS}
    if lacking := sorted(required - set(config["sha256"])):
        raise CheckpointError(f"{path}: lacks the sum of {first_few(lacking)}; {_REMEDY}")
    if strange := sorted(set(config["sha256"]) - required - set(OPTIONAL)):
        raise CheckpointError(
            f"{path}: names files that no such folder has: {first_few(map(repr, strange))}; {_REMEDY}"
        )
    return config


def _json(folder: Path, name: str, kind: type) -> Any:
    path = _inside(folder, name)
    if path.stat().st_size > _LARGEST:
        raise CheckpointError(f"{path}: has {path.stat().st_size:,} bytes, at most {_LARGEST:,}; {_REMEDY}")
    return read_json(path, kind, _REMEDY)


def _inside(folder: Path, name: str) -> Path:
    """The file of this name, after a look at where a link leads: in the folder, or in the hub's cache beside it."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks {name}; {_REMEDY}")
    places = [
        folder.resolve(),
        *([folder.parent.parent.resolve() / "blobs"] if folder.parent.name == "snapshots" else []),
    ]
    if not any(path.resolve().is_relative_to(place) for place in places):
        raise CheckpointError(f"{path}: is a link that leads out of its folder; put the file itself there")
    return path
