"""From pictures to encodings: what `GalleryIndex.build`, `add` and `sync` do with each run of pictures.

Letters: B images of a batch, n images in all.
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

from neucore_plugin.common.errors import DataError, NeucoreError, first_few
from neucore_plugin.common.files import sha256_file
from neucore_plugin.common.images import load_for
from neucore_plugin.common.shard_image import ShardImage
from neucore_plugin.retrieval.rows import Row
from neucore_plugin.retrieval.sources import File, Item, relative
from neucore_plugin.retrieval.units import DTYPES

log = logging.getLogger(__name__)


class RetrievalModel(Protocol):
    """What the index asks of a model.

    Where the model, and its image_processor, have a `fingerprint`, it guards an index against
    another model's encodings. Where the model has `scores_half` and it is true, `score` is given a gallery in half
    precision as it is stored; otherwise a copy in float32.
    An explained search also wants `explain(query, gallery)`, {term: [Q,G]} whose sum is the score, and shows what
    `concepts_read(texts)` gives, the words of each text that are taken as concepts.
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
    path: File
    reason: str


@dataclass(frozen=True)
class Encoded:
    """encodings: {key: [n,*]} on the CPU; rows: the n pictures they belong to; failures: what could not be read."""

    encodings: dict[str, Tensor]
    rows: list[Row]
    failures: list[Failure]


def fingerprint_of(model: Any) -> str | None:
    """Of the model and of what turns a picture into its pixels; None where the model has none."""
    values = [getattr(part, "fingerprint", None) for part in (model, getattr(model, "image_processor", None))]
    if values[0] is None:
        return None
    return " ".join(str(value() if callable(value) else value) for value in values if value is not None)


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


def shapes_of(encodings: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """{key: shape of one image's encoding}."""
    return {key: tuple(value.shape[1:]) for key, value in sorted(encodings.items())}


def probe(model: RetrievalModel) -> dict[str, tuple[int, ...]]:
    """`shapes_of` what a model makes of a picture, asked with a white one."""
    pixels = model.image_processor(Image.new("RGB", (64, 64), "white"))
    with torch.inference_mode(), evaluating(model):
        return shapes_of(model.encode_image(pixels[None].to(model.device)))


@contextmanager
def fitting(index: Any) -> Iterator[None]:
    """For whatever scores an index by its model: encodings that are not of the model's shapes become a DataError."""
    try:
        yield
    except NeucoreError:
        raise
    except Exception:
        check_shapes(index.shapes, index.model)
        raise


def check_shapes(shapes: Mapping[str, tuple[int, ...]], model: RetrievalModel) -> None:
    """DataError where an index says that a model built it, but holds what that model never makes."""
    if (made := probe(model)) != shapes:
        raise DataError(
            f"the index holds encodings {shapes}, but its model makes {made}: the index was altered, or another model "
            "built it; build it again"
        )


def check_settings(batch_size: int, workers: int, dtype: torch.dtype) -> None:
    """Raises DataError."""
    if dtype not in DTYPES.values():
        raise DataError(f"dtype={dtype}: an index stores {' or '.join(str(d) for d in DTYPES.values())}")
    if batch_size < 1 or workers < 1:
        raise DataError(f"batch_size={batch_size}, workers={workers}: both must be at least 1")


def bar(total: int, progress: bool) -> Any:
    """The progress bar that `encode` moves: rate and time left."""
    return tqdm(total=total, desc="encoding images", unit="image", disable=not progress)


def encode(
    model: RetrievalModel,
    items: Sequence[Item],
    root: Path | None,
    batch_size: int,
    dtype: torch.dtype,
    workers: int,
    shown: Any,
    digests: bool = False,
) -> Encoded:
    """Read and encode pictures; those that cannot be read are in `failures`. shown: a `bar`.

    root: what the rows' paths are relative to; digests: rows say size, time and sha256 of each file as well.
    DataError when the model's numbers are not finite in `dtype`; it names the pictures.
    """
    rows: list[Row] = []
    failures: list[Failure] = []
    parts: dict[str, list[Tensor]] = {}

    def read(item: Item) -> tuple[Tensor, Row] | str:
        try:
            row = row_of(item, root, digests)
            return model.image_processor(load_for(model.image_processor, item.file)), row
        except (DataError, OSError) as error:
            return str(error)

    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    with ThreadPoolExecutor(workers) as pool, torch.inference_mode(), evaluating(model):
        ahead = [pool.submit(read, item) for item in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            loaded = [future.result() for future in ahead]
            # read the next batch while this one is encoded; never more than that in memory
            ahead = [pool.submit(read, item) for item in batches[number + 1]] if number + 1 < len(batches) else []
            for item, value in zip(batch, loaded, strict=True):
                if isinstance(value, str):
                    failures.append(Failure(item.name, item.file, value))
            readable = [value for value in loaded if not isinstance(value, str)]
            if readable:
                pixels = torch.stack([value for value, _ in readable]).to(model.device)
                for key, value in model.encode_image(pixels).items():
                    parts.setdefault(key, []).append(value.to("cpu", dtype))
                rows += [row for _, row in readable]
            shown.update(len(batch))
    encodings = {key: torch.cat(values) for key, values in parts.items()}
    for key, value in encodings.items():
        if not bool((finite := value.isfinite().flatten(1).all(1)).all()):
            bad = first_few([repr(rows[place].name) for place in (~finite).nonzero().flatten().tolist()])
            half = dtype == torch.float16
            remedy = "store float32 instead (dtype, --dtype)" if half else "the model's weights are damaged"
            raise DataError(f"encoding {key!r} holds NaN or infinite numbers; {remedy}. Of {bad}")
    return Encoded(encodings, rows, failures)


def row_of(item: Item, root: Path | None, digest: bool) -> Row:
    """The row of a picture; with `digest` its file is read. OSError where it cannot be."""
    if isinstance(item.file, ShardImage):
        path = relative(Path(item.file.shard), root)
        return Row(item.name, path, item.file.offset, item.file.size, attributes=item.attributes)
    path = relative(item.file, root)
    if not digest or not item.file.is_file():
        return Row(item.name, path, attributes=item.attributes)
    status = os.stat(item.file)
    return Row(
        item.name, path, None, status.st_size, status.st_mtime_ns, sha256_file(item.file), attributes=item.attributes
    )


def tell(failures: Sequence[Failure], read: int) -> None:
    """Warn of what could not be read beside `read` pictures; DataError where there are none."""
    if failures:
        total = len(failures) + read
        listed = first_few([f"{failure.name}: {failure.reason}" for failure in failures], 5, "; ")
        if not read:
            raise DataError(f"none of the {total} images could be read: {listed}")
        log.warning("%d of %d images could not be read and are left out: %s", len(failures), total, listed)
