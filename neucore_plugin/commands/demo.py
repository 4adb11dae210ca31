"""neucore demo: the trained emoji model, an index of its drawings, and the page to search them with."""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neucore_plugin.commands.serve import add_service_arguments, serve

HELP = "search the emoji drawings in the browser; trains the emoji model if there is none"
CONFIG = "train_emoji"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the run and the index lie, and how the service is reached."""
    parser.epilog = "example: neucore demo --port 8080"
    parser.add_argument(
        "--output", type=Path, default=Path("output"), help="holds emoji/ and emoji-index/ (default output)"
    )
    parser.add_argument("--no-browser", action="store_true", help="print the address alone")
    add_service_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Train where needed, index where needed, then serve until Ctrl-C. Raises NeucoreError."""
    from neucore_plugin.datasets.emoji.drawings import CREDIT, svg_files
    from neucore_plugin.serve import running

    running.require()
    svg_files()  # what is missing is told now
    place = arguments.output / "emoji-index"

    def opened() -> Any:
        checkpoint = newest_checkpoint(arguments.output / "emoji")
        if checkpoint is None:
            runs = arguments.output / "emoji"
            _say(f"no finished run in {runs}: the main job, {CONFIG}, trains one; this takes minutes")
            checkpoint = _trained(arguments.output / "emoji")
        _say(f"model: {checkpoint}")
        index = _indexed(checkpoint, place)
        index.search(text="a picture", k=1)  # what the first query loads
        return index

    def show(url: str) -> None:
        if not arguments.no_browser and (
            os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or _has_desktop()
        ):
            import webbrowser

            webbrowser.open(url)

    serve(arguments, opened, "Emoji", CREDIT, show)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _has_desktop() -> bool:
    return sys.platform in ("darwin", "win32")


def newest_checkpoint(folder: Path) -> Path | None:
    """The best checkpoint of the training that was finished last in a folder of runs; None where there is none."""
    from neucore_plugin.training.run_folder import BEST, read_record

    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        record = read_record(path)
        if record and record["kind"] == "train" and record["status"] == "finished" and (path / BEST).is_file():
            found.append((record["created"], path / BEST))
    return max(found, default=(0, None))[1]


def _trained(folder: Path) -> Path:
    from neucore_plugin import launch
    from neucore_plugin.common.errors import DataError

    launch.run(CONFIG, [f"run.output_dir={folder}"])
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise DataError(f"the training in {folder} has not finished; the same command continues it")
    return checkpoint


def _indexed(checkpoint: Path, place: Path) -> Any:
    """The index of all drawings by this model: as it is there, finished, or made anew for another model or drawings."""
    from neucore_plugin import load_model
    from neucore_plugin.common.distributed import pick_device
    from neucore_plugin.common.errors import DataError
    from neucore_plugin.common.files import read_json, write_json
    from neucore_plugin.datasets.emoji.drawings import prepare
    from neucore_plugin.retrieval import GalleryIndex
    from neucore_plugin.retrieval.encoding import fingerprint_of

    model = load_model(checkpoint, device=pick_device("auto"))
    pictures = place.with_name(f"{place.name}.json")
    entries, before = list(drawings(prepare())), None
    with contextlib.suppress(DataError, OSError):  # none yet, or damaged
        before = read_json(pictures)
    if (place / "manifest.json").is_file():
        other = GalleryIndex.open(place).model_fingerprint != fingerprint_of(model)
        if other or before != entries:  # drawings of another version, or that lie elsewhere by now
            _say(f"{place} is of {'another model' if other else 'other drawings'}; it is made anew")
            shutil.rmtree(place)
    write_json(pictures, entries, indent=0)
    return GalleryIndex.build(model, pictures, out=place, unit_size=512, checkpoint=str(checkpoint.resolve()))


def drawings(folder: Path) -> Iterator[dict[str, Any]]:
    """Every drawing with the emoji's English name, and what `datasets/emoji` knows of it, as a list of an index."""
    from neucore_plugin.datasets.emoji.attributes import parse
    from neucore_plugin.datasets.emoji.drawings import read_manifest
    from neucore_plugin.datasets.emoji.splits import emoji_names

    ids = sorted(read_manifest(folder)["files"])
    names, seen = emoji_names(ids), set()
    for emoji_id in ids:
        name = names.get(emoji_id, emoji_id)
        name = f"{name} ({emoji_id})" if name in seen else name
        seen.add(name)
        entry = {"path": str((folder / f"{emoji_id}.png").absolute()), "name": name, "code": emoji_id}
        if (known := parse(emoji_id)) is not None:
            found = {"kind": known.kind, "gender": known.gender, "tone": known.tone, "hair": known.hair}
            entry |= {key: value for key, value in found.items() if value}
        yield entry
