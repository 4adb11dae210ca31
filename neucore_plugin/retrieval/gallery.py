"""What an index holds: its images by gallery position, by name and by file, and their encodings.

Letters: G gallery positions, n images of a part, k chosen ones.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from neucore_plugin.common.errors import DataError, did_you_mean
from neucore_plugin.common.images import LeftOut, Picture, load_for
from neucore_plugin.common.names import Listing, Names, name_of, path_of
from neucore_plugin.common.shard_image import ShardImage
from neucore_plugin.retrieval import units
from neucore_plugin.retrieval.encoding import Failure, RetrievalModel
from neucore_plugin.retrieval.rows import Row
from neucore_plugin.retrieval.sources import File, canonical
from neucore_plugin.retrieval.units import Facts, Manifest, Part

BLOCK = 65536  # images scored at a time: bounds the float32 copy of a half precision gallery


class Gallery:
    """Parts in a row, each position an image or one that was removed. `GalleryIndex` makes, changes and searches it."""

    model: RetrievalModel | None
    first_stage: Any = None  # of large galleries, kept open between searches: see qdrant_edge.py

    def _set(
        self,
        parts: list[Part],
        root: Path | None,
        failures: Sequence[Failure],
        fingerprint: str | None,
        shapes: dict[str, tuple[int, ...]],
        on_disk: tuple[Path, Manifest, dict[str, Facts]] | None = None,
    ) -> None:
        self.parts, self.root, self.failures, self.model_fingerprint = parts, root, list(failures), fingerprint
        self.shapes, self.left_out = shapes, LeftOut()
        self.folder, self.manifest, self.units = on_disk or (None, None, {})
        self._alive: Tensor | None = None
        self._folders: dict[str, str] = {}  # where the folders of files lead to
        gone = units.removed_rows(self.units)
        self._strike([part.start + row for part in parts if part.unit for row in gone.get(part.unit, ())])

    def __len__(self) -> int:
        return self.stored if self._alive is None else int(self._alive.sum())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self.positions_of([name])

    def __repr__(self) -> str:
        return f"GalleryIndex({len(self)} images, root={str(self.root)!r}, model={self.model_fingerprint})"

    @property
    def stored(self) -> int:
        """G: gallery positions, those of removed images included."""
        return self.parts[-1].start + self.parts[-1].count if self.parts else 0

    @property
    def alive(self) -> Tensor | None:
        """Which positions hold an image, bool [G]; None: all."""
        return self._alive

    @property
    def dtype(self) -> torch.dtype:
        """Of the encodings: float32 or float16."""
        if self.manifest is not None:
            return units.DTYPES[self.manifest.dtype]
        return next(iter(self.parts[0].arrays.values())).dtype if self.parts else torch.float32

    @property
    def names(self) -> list[str]:
        """Of all images, in gallery order; this reads every row."""
        return [row.name for _, row in self.rows()]

    @property
    def paths(self) -> list[File]:
        """Of all images, in gallery order; this reads every row."""
        return [self._file(row) for _, row in self.rows()]

    @property
    def encodings(self) -> dict[str, Tensor]:
        """Of all images [len,*], as stored; copied where the index has several parts or lost images."""
        found = {}
        for key in self.shapes:
            values = [part.arrays[key] for part in self.parts]
            value = values[0] if len(values) == 1 else torch.cat(values)
            found[key] = value if self._alive is None else value[self._alive]
        return found

    def rows(self) -> Iterator[tuple[int, Row]]:
        """(position, row) of all images, in gallery order."""
        for part in self.parts:
            for position, row in enumerate(part.rows, part.start):
                if self._alive is None or self._alive[position]:
                    yield position, row

    def row(self, position: int) -> Row:
        """What is known of the image at a gallery position. DataError for one beyond the gallery."""
        part = self._part(position)
        return part.rows[position - part.start]

    def name(self, position: int) -> str:
        """Of the image at a gallery position."""
        return self.row(position).name

    def path(self, position: int) -> File:
        """Its file, or its place in a tar shard: what `load_image` takes."""
        return self._file(self.row(position))

    def attributes(self, position: int) -> dict[str, Any]:
        """What the source said of it."""
        return dict(self.row(position).attributes)

    def _file(self, row: Row) -> File:
        path = self.root / path_of(row.path) if self.root is not None else path_of(row.path)
        return path if row.place is None else ShardImage(str(path), row.place, row.bytes or 0, row.name)

    def _part(self, position: int) -> Part:
        if 0 <= position < self.stored:
            low, high = 0, len(self.parts) - 1
            while low < high:  # the last part that starts at or before it
                middle = (low + high + 1) // 2
                low, high = (middle, high) if self.parts[middle].start <= position else (low, middle - 1)
            return self.parts[low]
        raise DataError(f"gallery position {position}: the gallery has {self.stored}, counted from 0")

    def positions_of(self, names: Sequence[str]) -> dict[str, int]:
        """{name: gallery position} of those of the given names that are in the index, spelt the same."""
        found = {}
        for part in self.parts:
            for name, rows in part.rows.known(names).items():
                for row in rows:
                    if self._alive is None or self._alive[part.start + row]:
                        found[name] = part.start + row
        return found

    def _meant(self, name: str) -> int | None:
        """Gallery position of the image that a spelling means. DataError where it may mean several."""
        found = {}
        for part in self.parts:
            for row, known in part.rows.spelt(name):
                if self._alive is None or self._alive[part.start + row]:
                    found[known] = part.start + row
        return found.get(Names(found).find(name))

    def _hint(self, name: str) -> str:
        return did_you_mean(name, self.names if self.stored <= 20_000 else [])

    def position(self, name: str) -> int:
        """Gallery position of a name; DataError with the nearest name when there is none."""
        if (place := self._meant(name)) is None:
            raise DataError(f"no image {name!r} in the index ({len(self)} images).{self._hint(name)}")
        return place

    def blocks(self, step: int = BLOCK) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """(position of the first, {key: [n,*] as stored}) of runs of at most `step` positions, removed ones too."""
        for part in self.parts:
            for start in range(0, part.count, step):
                yield part.start + start, {key: value[start : start + step] for key, value in part.arrays.items()}

    def candidates(self, positions: Tensor) -> dict[str, Tensor]:
        """Encodings {key: [k,*]} in float32 of the images at gallery positions [k]."""
        places = positions.tolist()
        owners = [self._part(place) for place in places]
        found = {key: torch.empty(len(places), *shape) for key, shape in self.shapes.items()}
        for part in {id(owner): owner for owner in owners}.values():
            slots = torch.tensor([slot for slot, owner in enumerate(owners) if owner is part])
            rows = positions[slots].cpu() - part.start
            for key, value in part.arrays.items():
                found[key][slots] = value[rows].float()
        return found

    def reference(self, image: Picture) -> tuple[Image.Image, int | None]:
        """The picture meant by a name in the index, a file, its bytes or a picture, and its gallery position if it has
        one: a picture that Pillow opened from a file has that file's.
        """
        processor = getattr(self.model, "image_processor", None)
        if not isinstance(image, str | os.PathLike):
            file = _file_of(image)
            return load_for(processor, image), self._locate(file) if file else None
        file, place = self.meant_by(image)
        return load_for(processor, file), place

    def meant_by(self, image: str | os.PathLike) -> tuple[File | str | os.PathLike, int | None]:
        """The file of a reference that is given by name or path, and its gallery position if it has one."""
        name = name_of(image)
        file = image if os.path.exists(image) else Listing().find(Path(image))
        if name in self or (file is None and self._meant(name) is not None):
            place = self.position(name)
            return self.path(place), place
        if file is None:
            raise DataError(f"reference {name!r} is neither a file nor a name in the index.{self._hint(name)}")
        return file, self._locate(file)

    def _locate(self, path: str | Path) -> int | None:
        """Gallery position of a file, also when it is given by another spelling or through a link to its folder."""
        for spelling in (os.path.abspath(path), str(canonical(path)), os.path.realpath(path)):
            for part in self.parts:
                for row, text in part.rows.of_file(name_of(os.path.basename(spelling))):
                    if self._alive is not None and not self._alive[part.start + row]:
                        continue
                    place = os.path.abspath(self.root / path_of(text) if self.root is not None else path_of(text))
                    folder, name = os.path.split(place)
                    if spelling in (place, os.path.join(self._real(folder), name)):
                        return part.start + row
        return None

    def _real(self, folder: str) -> str:
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        return self._folders[folder]

    def _by_unit(self, positions: Sequence[int] | set[int]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for position in sorted(positions):
            part = self._part(position)
            found.setdefault(part.unit, []).append(position - part.start)
        return found

    def _strike(self, positions: Sequence[int] | set[int]) -> None:
        if positions:
            alive = self._alive.clone() if self._alive is not None else torch.ones(self.stored, dtype=torch.bool)
            alive[torch.tensor(sorted(positions))] = False
            self._alive = alive


def _file_of(picture: Any) -> str | None:
    """The file that a picture, or the open file that it is read from, says that it is."""
    opened = getattr(picture, "fp", None) if isinstance(picture, Image.Image) else picture
    name = getattr(picture, "filename", None) or getattr(opened, "name", None)
    return os.fsdecode(name) if isinstance(name, str | bytes) else None
