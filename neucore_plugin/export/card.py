"""The model card of an exported model: README.md with the hub's front matter. What files said is escaped."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import read_json
from neucore_plugin.common.text import visible
from neucore_plugin.config.loading import read_yaml

# What markdown reads as a mark, a link, an address or HTML; within a word `_` is none.
_MARKS = re.compile(r"[\\`*{}\[\]()#|!~<>&]|(?<!\w)_|_(?!\w)|:(?=/)|@(?!\d)|(?<=www)\.")
RESULTS = "evaluation.json"  # beside a checkpoint; it says which model it is of


def found_results(checkpoint: Path, fingerprint: str) -> tuple[dict[str, Any], str]:
    """The results {split: {row: metrics}} of the run that a checkpoint lies in, where they are of this very model; else
    none, and why. fingerprint: the model's. Raises DataError for a damaged file."""
    path = checkpoint.parent / RESULTS
    if not checkpoint.is_file() or not path.is_file():
        return {}, f"no {RESULTS} lies beside the checkpoint"
    content = read_json(path, dict, "evaluate again, or move it away")
    of = content.get("checkpoint")
    if not isinstance(of, Mapping) or of.get("fingerprint") != fingerprint:
        return {}, f"{RESULTS} beside the checkpoint is of other weights"
    results = content.get("results")
    if not isinstance(results, dict):
        raise DataError(f"{path}: is no result file: it lacks its results; evaluate again, or move it away")
    return results, ""


def trained_on(checkpoint: Path) -> list[str]:
    """The data sets of the run that a checkpoint lies in, by its config.yaml; empty where there is none."""
    path = checkpoint.parent / "config.yaml"
    if not checkpoint.is_file() or not path.is_file():
        return []
    datasets = read_yaml(path).get("datasets")
    return [str(name) for name in datasets] if isinstance(datasets, Mapping) else []


def places(section: Mapping[str, Any]) -> list[str]:
    """What a model section names by a path: whoever loads it elsewhere needs the same file there."""
    found = []
    for side, encoder in (section.get("backbone") or {}).items():
        for key, value in encoder.items():
            if isinstance(value, str) and (value.startswith(("/", "~", "./", "../")) or Path(value).exists()):
                found.append(f"model.backbone.{side}.{key}={value}")
    return found


def markdown(text: Any) -> str:
    """A text of a file for a page of markdown: one line, and nothing in it is a mark, a link or HTML."""
    return _MARKS.sub(lambda sign: f"&#{ord(sign[0])};", visible(str(text)))


def card(
    *,
    name: str,
    header: Mapping[str, Any],
    fingerprint: str,
    version: str,
    license: str | None,
    datasets: list[str],
    results: Mapping[str, Mapping[str, Mapping[str, Any]]],
    without: str,
    onnx: str | None,
) -> str:
    """The card's text.

    name: of the folder. header: of the checkpoint. results: those of `found_results`, or `without`, why there are none.
    license: an identifier of the hub's list; None leaves the field open. onnx: what is to be said of the ONNX form.
    """
    section = header["config"]
    title = section.get("method") or header["arch"]
    front = {
        "library_name": "neucore-plugin",
        "license": license or "other",
        **({} if license else {"license_name": "not-yet-chosen", "license_link": "README.md#licence"}),
        "tags": ["composed-image-retrieval", "image-retrieval", header["arch"], *(["onnx"] if onnx else [])],
        "language": ["en"],
        "pipeline_tag": "image-feature-extraction",
        **({"datasets": datasets} if datasets else {}),
    }
    encoders = {side: (section.get("backbone") or {}).get(side, {}).get("name") for side in ("image", "text")}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=False)}---",
        f"# {markdown(name)}",
        "A model of composed image retrieval: given a reference image and a relative caption, a text that says what "
        "should be different, it finds the target image in a gallery.",
        _table(
            ["", ""],
            [
                ["model", title],
                ["image encoder", encoders["image"]],
                ["text encoder", encoders["text"]],
                ["width", section.get("embed_dim")],
                ["concepts", len(header["concepts"]["words"])],
                ["trained on", ", ".join(datasets) or "not told"],
                ["made with", f"neucore-plugin {version}"],
                ["fingerprint", fingerprint],
            ],
        ),
        "The weights of encoders that were frozen in the training are not in this folder: they are taken from where "
        "the config says, and checked by their sums.",
        "## Use",
        "```python\nfrom neucore_plugin import load_model\nfrom neucore_plugin.retrieval import GalleryIndex\n\n"
        'model = load_model("PATH_OF_THIS_FOLDER")  # or "OWNER/NAME" of a hub\n'
        'index = GalleryIndex.build(model, "my_pictures")\n'
        'print(index.search("my_pictures/one.jpg", "the same but red", k=10))\n```',
        "Every command of `neucore` takes this folder as `--checkpoint`.",
        *(["## ONNX", onnx] if onnx else []),
        "## Results",
        _results(results) if results else f"None: {markdown(without)}.",
        "## Licence",
        f"{markdown(license)}, as its author says."
        if license
        else "Not yet chosen: set `license` at the top of this file. Data and encoders have licences of their own, "
        "which may bind what is trained with them.",
        "## Source",
        'Zhao & Xu, "NEUCORE: Neural Concept Reasoning for Composed Image Retrieval", PMLR 243 (arXiv 2310.01358), in '
        "the implementation of neucore-plugin.",
    ]
    return "\n\n".join(parts) + "\n"


def _results(results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    metrics = list(
        dict.fromkeys(key for rows in results.values() for row in rows.values() for key in row if "@" in key)
    )
    rows = [
        [split, row, *(f"{values[key]:.2f}" if key in values else "" for key in metrics), values["queries"]]
        for split, found in results.items()
        for row, values in found.items()
    ]
    return f"Percent, by `neucore evaluate`.\n\n{_table(['split', 'query', *metrics, 'queries'], rows)}"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(str(cell) if line is lines[1] else markdown(cell) for cell in line)} |" for line in lines
    )
