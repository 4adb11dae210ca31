"""GalleryIndex: one's own images encoded once, then searched with a picture and a sentence.

Letters: G gallery images, Q queries. Encodings are dicts of tensors [G,*]; the index does not know what the keys mean.
On disk (store.py) they are plain arrays that are memory-mapped, never pickles.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from neucore_plugin.common.errors import DataError, did_you_mean, first_few
from neucore_plugin.common.images import LeftOut, Picture, load_for
from neucore_plugin.common.names import Listing, Names, name_of, path_of
from neucore_plugin.retrieval import store
from neucore_plugin.retrieval.encoding import (
    Failure,
    RetrievalModel,
    Source,
    canonical,
    collect,
    encode,
    evaluating,
    relative,
    repeated,
)
from neucore_plugin.retrieval.ranks import topk

_GALLERY_CHUNK = 65536  # images scored at a time: bounds the float32 copy of a half precision gallery
_QUERY_CELLS = 1 << 24  # scores held at a time, 64 MB
_QUERY_BATCH = 64  # queries encoded at a time


@dataclass(frozen=True)
class Hit:
    """One retrieved image; `rank` counts from 1, a higher `score` is better."""

    rank: int
    name: str
    score: float
    path: Path


class GalleryIndex:
    """Encoded images with their names. Make one with `build` or `load`.

    names: unique, in gallery order (equal scores are ordered by it). encodings: dict of tensors [G,*], float32 or
    float16, on the CPU. failures: images that could not be read when the index was built or extended. left_out: files
    and folders that were no pictures then, counted by the reason; it is not saved.
    """

    def __init__(
        self,
        names: Sequence[str],
        paths: Sequence[Path],
        encodings: dict[str, Tensor],
        model: RetrievalModel | None = None,
        root: Path | None = None,
        failures: Sequence[Failure] = (),
        model_fingerprint: str | None = None,
    ):
        self.names, self.paths = list(names), [Path(path) for path in paths]
        self.encodings, self.model, self.root = dict(encodings), model, root
        self.failures, self.left_out = list(failures), LeftOut()
        self.model_fingerprint = model_fingerprint or _fingerprint(model)
        self._index_names()

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._position

    def __repr__(self) -> str:
        return f"GalleryIndex({len(self)} images, root={str(self.root)!r}, model={self.model_fingerprint})"

    @classmethod
    def build(
        cls,
        model: RetrievalModel,
        source: Source,
        batch_size: int = 32,
        progress: bool = True,
        dtype: torch.dtype = torch.float32,
        workers: int = 2,
    ) -> "GalleryIndex":
        """Encode every image of `source`.

        source: a folder (with those below it and those linked there, hidden files left out, sorted by name; names are
        relative posix paths), a list of files (kept in order), or {name: file}. dtype float16 halves the store; scores
        are still computed in float32. Unreadable images are skipped and listed in `failures`; DataError when nothing is
        left.
        """
        root, named, left_out = collect(source)
        encodings, good, failures = encode(model, named, batch_size, progress, dtype, workers)
        names, paths = [name for name, _ in good], [path for _, path in good]
        index = cls(names, paths, encodings, model, root, failures)
        index.left_out = left_out
        return index

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: RetrievalModel | None = None,
        root: str | Path | None = None,
        verify: bool = True,
    ) -> "GalleryIndex":
        """Open a saved index, memory-mapped.

        model: needed to search it. root: where the images lie now, if they were moved.
        DataError: not an index, damaged (sha256 of every file is compared unless verify is off), or built by another
        model; the remedy is to build it again.
        """
        stored = store.read(folder, verify)
        root = Path(root).resolve() if root is not None else path_of(stored.root) if stored.root else None
        paths = [root / path_of(path) if root is not None else path_of(path) for path in stored.paths]
        failures = [Failure(f["name"], path_of(f["path"]), f["reason"]) for f in stored.failures]
        index = cls(stored.names, paths, stored.encodings, None, root, failures, stored.model_fingerprint)
        if model is not None:
            index.attach(model, where=f" in {folder}")
        return index

    def save(self, folder: str | Path) -> None:
        """Write the index into `folder`; a kill at any moment leaves the earlier index there, or none, or this one."""
        paths = [relative(path, self.root) for path in self.paths]
        failures = [{"name": f.name, "path": name_of(f.path), "reason": f.reason} for f in self.failures]
        root = name_of(self.root) if self.root is not None else None
        stored = store.Stored(self.names, paths, self.encodings, root, failures, self.model_fingerprint)
        store.write(folder, stored)

    def attach(self, model: RetrievalModel, where: str = "") -> None:
        """Search with `model` from now on; DataError when another model built the index (fingerprints differ)."""
        given = _fingerprint(model)
        if given and self.model_fingerprint and given != self.model_fingerprint:
            raise DataError(
                f"the index{where} was built by model {self.model_fingerprint}, but the model given is {given}: their "
                "encodings cannot be compared; build the index again with this model, or load the one that built it"
            )
        self.model = model

    def add(self, source: Source, batch_size: int = 32, progress: bool = True, workers: int = 2) -> list[str]:
        """Encode further images and put them at the end; returns their names. DataError for a name already there."""
        model = self._require_model()
        _, named, left_out = collect(source, self.root)
        if known := [name for name, _ in named if name in self]:
            names = first_few(map(repr, known), 5)
            raise DataError(f"already in the index: {names}; remove them first to encode them anew")
        dtype = next(iter(self.encodings.values())).dtype
        encodings, good, failures = encode(model, named, batch_size, progress, dtype, workers)
        if (old := _shapes(self.encodings)) != (new := _shapes(encodings)):
            raise DataError(f"the model encodes as {new}, but the index holds {old}; build the index again")
        self.encodings = {key: torch.cat([value, encodings[key]]) for key, value in self.encodings.items()}
        self.names += [name for name, _ in good]
        self.paths += [path for _, path in good]
        self.failures += failures
        self.left_out += left_out
        self._index_names()
        return [name for name, _ in good]

    def remove(self, names: str | Sequence[str]) -> None:
        """Take images out of the index (their files stay). DataError for an unknown name, or if none would be left."""
        gone = {self.position(name) for name in ([names] if isinstance(names, str) else names)}
        keep = [place for place in range(len(self)) if place not in gone]
        if not keep:
            raise DataError(f"this would remove all {len(self)} images; an index holds at least one")
        self.encodings = {key: value[torch.tensor(keep)] for key, value in self.encodings.items()}
        self.names, self.paths = [self.names[p] for p in keep], [self.paths[p] for p in keep]
        self._index_names()

    def position(self, name: str) -> int:
        """Gallery position of a name; DataError with the nearest name when there is none."""
        if (known := self._names.find(name)) is None:
            raise DataError(f"no image {name!r} in the index ({len(self)} images).{did_you_mean(name, self.names)}")
        return self._position[known]

    def reference(self, image: Picture) -> tuple[Image.Image, int | None]:
        """The picture meant by a name in the index, a file, its bytes or a picture, and its gallery position if it has
        one: a picture that Pillow opened from a file has that file's.
        """
        processor = getattr(self.model, "image_processor", None)
        if not isinstance(image, str | os.PathLike):
            file = _file_of(image)
            return load_for(processor, image), self._locate(file) if file else None
        name = name_of(image)
        file = image if os.path.exists(image) else Listing().find(Path(image))
        if name in self or (file is None and self._names.find(name) is not None):
            place = self.position(name)
            return load_for(processor, self.paths[place]), place
        if file is None:
            hint = did_you_mean(name, self.names)
            raise DataError(f"reference {name!r} is neither a file nor a name in the index.{hint}")
        return load_for(processor, file), self._locate(file)

    def search(
        self, image: Picture | None = None, text: str | None = None, k: int | None = 10, exclude_reference: bool = True
    ) -> list[Hit]:
        """The k best images, None = all, for a reference and a relative caption.

        image: a name in the index, a file, its bytes, an open binary file, or a picture of Pillow. Either may be None:
        then the query is text alone or image alone. The reference itself is left out where it is in the index, unless
        exclude_reference is off.
        """
        return self.search_many([(image, text)], k, exclude_reference)[0]

    def search_many(
        self, queries: Sequence[tuple[Picture | None, str | None]], k: int | None = 10, exclude_reference: bool = True
    ) -> list[list[Hit]]:
        """`search` for many (image, text) pairs, encoded and scored in batches; one list of hits for each, in order."""
        model = self._require_model()
        if not queries:
            raise DataError("no queries given; give at least one pair (image, text)")
        groups: dict[tuple[bool, bool], list[int]] = {}
        for number, (image, text) in enumerate(queries):
            kind = (image is not None, bool(text and text.strip()))
            if kind == (False, False):
                raise DataError(f"query {number}: neither image nor text given; give a reference, a caption, or both")
            groups.setdefault(kind, []).append(number)
        step = max(1, min(_QUERY_BATCH, _QUERY_CELLS // len(self)))
        results: list[list[Hit]] = [[] for _ in queries]
        with torch.inference_mode(), evaluating(model):
            for (with_image, with_text), numbers in groups.items():
                for start in range(0, len(numbers), step):
                    batch = numbers[start : start + step]
                    pixels, excluded = None, [None] * len(batch)
                    if with_image:
                        found = [self.reference(queries[number][0]) for number in batch]
                        pixels = torch.stack([model.image_processor(image) for image, _ in found]).to(model.device)
                        excluded = [place if exclude_reference else None for _, place in found]
                    texts = [queries[number][1] for number in batch] if with_text else None
                    scores = self.scores(model.encode_query(pixels, texts))
                    for row, places in enumerate(_best(scores, k, excluded)):
                        results[batch[row]] = [
                            Hit(rank, self.names[place], float(scores[row, place]), self.paths[place])
                            for rank, place in enumerate(places, start=1)
                        ]
        return results

    def scores(self, query: dict[str, Tensor]) -> Tensor:
        """Scores [Q,G] (float32, on the CPU) of encoded queries against the whole gallery, in chunks of images."""
        model = self._require_model()
        parts = []
        with torch.inference_mode():
            for start in range(0, len(self), _GALLERY_CHUNK):
                part = {
                    key: value[start : start + _GALLERY_CHUNK].to(model.device, torch.float32)
                    for key, value in self.encodings.items()
                }
                parts.append(model.score(query, part).float().cpu())
        return torch.cat(parts, 1)

    def _require_model(self) -> RetrievalModel:
        if self.model is None:
            raise DataError("this index was opened without a model; pass one: GalleryIndex.load(folder, model=model)")
        return self.model

    def _index_names(self) -> None:
        self._position = {name: place for place, name in enumerate(self.names)}
        self._names = Names(self._position)
        if len(self._position) != len(self.names):
            names = first_few(map(repr, repeated(self.names)), 5)
            raise DataError(f"a name stands twice in the index: {names}; names must be unique")
        folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in self.paths}}
        self._by_path = {}
        for place, path in enumerate(self.paths):
            folder, name = os.path.split(path)
            self._by_path[os.path.abspath(path)] = place
            self._by_path.setdefault(os.path.join(folders[folder], name), place)  # through a link to its folder

    def _locate(self, path: str | Path) -> int | None:
        """Gallery position of a file, also when it is given by another spelling or through a link to its folder."""
        for spelling in (os.path.abspath(path), str(canonical(path)), os.path.realpath(path)):
            if spelling in self._by_path:
                return self._by_path[spelling]
        return None


def _best(scores: Tensor, k: int | None, excluded: Sequence[int | None]) -> list[list[int]]:
    """Gallery positions of the k best images of each query; None: of all, the reference left out."""
    if k is not None:
        return topk(scores, k, excluded).tolist()
    lengths = [scores.shape[1] - (place is not None) for place in excluded]
    return [
        topk(scores[row : row + 1], length, [excluded[row]])[0].tolist() if length else []
        for row, length in enumerate(lengths)
    ]


def _file_of(picture: Any) -> str | None:
    """The file that a picture, or the open file that it is read from, says that it is."""
    opened = getattr(picture, "fp", None) if isinstance(picture, Image.Image) else picture
    name = getattr(picture, "filename", None) or getattr(opened, "name", None)
    return os.fsdecode(name) if isinstance(name, str | bytes) else None


def _fingerprint(model: Any) -> str | None:
    """Of the model and of what turns a picture into its pixels; None where the model has none."""
    values = [getattr(part, "fingerprint", None) for part in (model, getattr(model, "image_processor", None))]
    if values[0] is None:
        return None
    return " ".join(str(value() if callable(value) else value) for value in values if value is not None)


def _shapes(encodings: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape[1:]) for key, value in sorted(encodings.items())}
