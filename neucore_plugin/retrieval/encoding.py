"""From a folder or a list of files to encodings: what `GalleryIndex.build` and `add` do.

Letters: B images of a batch, G images in all.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from neucore_plugin.common.errors import DataError, first_few
from neucore_plugin.common.images import LOOKED_FOR, LeftOut, find_images, is_hidden, load_for, told
from neucore_plugin.common.names import name_of
from neucore_plugin.retrieval.store import DTYPES

log = logging.getLogger(__name__)

Source = str | Path | Sequence[str | Path] | Mapping[str, str | Path]


class RetrievalModel(Protocol):
    """What the index asks of a model.

    Where the model, and its image_processor, have a `fingerprint`, it guards an index against
    another model's encodings.
    """

    device: torch.device

    def image_processor(self, image: Image.Image) -> Tensor: ...

    def encode_image(self, pixels: Tensor) -> dict[str, Tensor]: ...

    def encode_query(self, pixels: Tensor | None, texts: list[str] | None) -> dict[str, Tensor]: ...

    def score(self, query: dict[str, Tensor], gallery: dict[str, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Failure:
    """An image that could not be read, and why."""

    name: str
    path: Path
    reason: str


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode inside, every sub-module's own mode restored after; objects that are no torch module pass through."""
    modules = [part for part in model.modules() if part.training] if hasattr(model, "modules") else []
    if modules:
        model.eval()
    try:
        yield
    finally:
        for part in modules:
            part.training = True


def collect(source: Source, root: Path | None = None) -> tuple[Path | None, list[tuple[str, Path]], LeftOut]:
    """Root folder, (name, path) of every image of a source, and what was left out, which is logged too.

    With `root` given names are relative to it.
    """
    if isinstance(source, Mapping):
        if not source:
            raise DataError("an empty mapping of images; give at least one {name: file}")
        return root, [(str(name), canonical(path)) for name, path in source.items()], LeftOut()
    if isinstance(source, (str, Path)):
        folder = Path(source)
        if not folder.is_dir():
            what = "is a file; give a list of files, or a folder" if folder.exists() else "does not exist"
            raise DataError(f"image folder {str(source)!r} {what}")
        folder = folder.resolve()
        root = root or folder
        found, left_out = find_images(folder)
        paths = sorted((relative(path, root), path) for path in found)
        if not paths:
            text = f"no images in {str(source)!r} or below; looked for {LOOKED_FOR}; {told(left_out)}"
            raise DataError(text.rstrip("; "))
        if left_out:
            log.warning("%s: %s", source, told(left_out))
        return root, paths, left_out
    given = [canonical(path) for path in source]
    paths = [path for path in given if not is_hidden(path.name)]
    left_out = LeftOut({"hidden": len(given) - len(paths)} if len(paths) < len(given) else {})
    if not paths:
        raise DataError(f"an empty list of images; give at least one file; {told(left_out)}".rstrip("; "))
    if left_out:
        log.warning("the given files: %s", told(left_out))
    root = root or Path(os.path.commonpath([path.parent for path in paths]))
    named = [(relative(path, root), path) for path in paths]
    if again := repeated([name for name, _ in named]):
        raise DataError(f"given twice: {first_few(map(repr, again), 5)}; give each image once")
    return root, named, left_out


def canonical(path: str | Path) -> Path:
    """Absolute path with the links of its folder followed, so that one file has one spelling; its own name is kept."""
    plain = os.path.abspath(path)
    return Path(os.path.realpath(os.path.dirname(plain)), os.path.basename(plain))


def encode(
    model: RetrievalModel,
    named: Sequence[tuple[str, Path]],
    batch_size: int,
    progress: bool,
    dtype: torch.dtype,
    workers: int,
) -> tuple[dict[str, Tensor], list[tuple[str, Path]], list[Failure]]:
    """Encodings [G,*] on the CPU, the (name, path) pairs they belong to, and the images that could not be read.

    DataError when none could be read, or when the model's numbers are not finite in `dtype`.
    """
    if dtype not in DTYPES:
        raise DataError(f"dtype={dtype}: an index stores {' or '.join(str(d) for d in DTYPES)}")
    if batch_size < 1 or workers < 1:
        raise DataError(f"batch_size={batch_size}, workers={workers}: both must be at least 1")
    good: list[tuple[str, Path]] = []
    failures: list[Failure] = []
    parts: dict[str, list[Tensor]] = {}

    def read(item: tuple[str, Path]) -> Tensor | str:
        try:
            image = load_for(model.image_processor, item[1])
        except (DataError, OSError) as error:
            return str(error)
        return model.image_processor(image)

    batches = [named[start : start + batch_size] for start in range(0, len(named), batch_size)]
    bar = tqdm(total=len(named), desc="encoding images", unit="image", disable=not progress)
    with bar, ThreadPoolExecutor(workers) as pool, torch.inference_mode(), evaluating(model):
        ahead = [pool.submit(read, item) for item in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            loaded = [future.result() for future in ahead]
            # read the next batch while this one is encoded; never more than that in memory
            ahead = [pool.submit(read, item) for item in batches[number + 1]] if number + 1 < len(batches) else []
            failures += [
                Failure(*item, value) for item, value in zip(batch, loaded, strict=True) if isinstance(value, str)
            ]
            readable = [(item, value) for item, value in zip(batch, loaded, strict=True) if not isinstance(value, str)]
            if readable:
                pixels = torch.stack([value for _, value in readable]).to(model.device)
                for key, value in model.encode_image(pixels).items():
                    parts.setdefault(key, []).append(value.to("cpu", dtype))
                good += [item for item, _ in readable]
            bar.update(len(batch))
    if failures:
        listed = first_few([f"{failure.name}: {failure.reason}" for failure in failures], 5, "; ")
        if not good:
            raise DataError(f"none of the {len(named)} images could be read: {listed}")
        log.warning("%d of %d images could not be read and are left out: %s", len(failures), len(named), listed)
    encodings = {key: torch.cat(values) for key, values in parts.items()}
    for key, value in encodings.items():
        if not bool(value.isfinite().all()):
            remedy = "store float32 instead" if dtype == torch.float16 else "the model's weights are damaged"
            raise DataError(f"encoding {key!r} holds NaN or infinite numbers; {remedy}")
    return encodings, good, failures


def relative(path: Path, root: Path | None) -> str:
    """Text of the posix path below root, or of the path as it is when it lies elsewhere."""
    below = root is not None and path.is_relative_to(root)
    return name_of((path.relative_to(root) if below else path).as_posix())


def repeated(names: Sequence[str]) -> list[str]:
    """The names that stand in the list more than once."""
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]
