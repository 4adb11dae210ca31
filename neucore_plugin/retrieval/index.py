"""GalleryIndex: one's own images encoded once, then searched with a picture and a sentence.

Letters: G gallery positions, Q queries, n images of a part. Encodings are dicts of tensors [G,*]; the index does not
know what the keys mean. It is a run of parts (units.py), held in memory or memory-mapped from a folder.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neucore_plugin.common.errors import DataError, first_few
from neucore_plugin.common.images import Picture
from neucore_plugin.common.names import path_of
from neucore_plugin.common.shard_image import ShardImage
from neucore_plugin.retrieval import building, earlier, units, upkeep
from neucore_plugin.retrieval.encoding import (
    Encoded,
    Failure,
    RetrievalModel,
    bar,
    check_settings,
    encode,
    fingerprint_of,
    shapes_of,
    tell,
)
from neucore_plugin.retrieval.gallery import Gallery
from neucore_plugin.retrieval.queries import Found, Query, answer
from neucore_plugin.retrieval.rows import Row, Rows
from neucore_plugin.retrieval.sources import File, Source, collect, relative, repeated
from neucore_plugin.retrieval.units import Part
from neucore_plugin.retrieval.upkeep import Synced


@dataclass(frozen=True)
class Hit:
    """One retrieved image; `rank` counts from 1, a higher `score` is better.

    path: its file, or its place in a tar shard: what `load_image` takes. position: in the gallery, for
    `GalleryIndex.name` and the like; attributes: what the source said of it; terms: what the score is the sum of, where
    it was asked for.
    """

    rank: int
    name: str
    score: float
    path: File
    position: int | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    terms: Mapping[str, float] | None = None


class GalleryIndex(Gallery):
    """Encoded images with their names. Make one with `build` or `open`.

    Each image has a gallery position, which is stable until `compact`; equal scores are ordered by it. `len` and
    `names` count the images that are there; `stored` counts positions, those of removed images included.

    folder: where it lies, None in memory: then every change is on disk when its call returns. root: what names are
    relative to. failures: images that could not be read when the index was built or extended. left_out: files and
    folders that were no pictures then, counted by the reason; it is not saved.
    """

    def __init__(
        self,
        names: Sequence[str],
        paths: Sequence[str | Path],
        encodings: dict[str, Tensor],
        model: RetrievalModel | None = None,
        root: Path | None = None,
        failures: Sequence[Failure] = (),
        model_fingerprint: str | None = None,
        attributes: Sequence[Mapping[str, Any]] | None = None,
    ):
        """In memory, of encodings [G,*] that are there already. DataError: a name stands twice."""
        if again := repeated(names):
            listed = first_few(map(repr, again), 5)
            raise DataError(f"a name stands twice in the index: {listed}; names must be unique")
        more = attributes if attributes is not None else [{}] * len(names)
        rows = [
            Row(name, relative(Path(path), root), attributes=known)
            for name, path, known in zip(names, paths, more, strict=True)
        ]
        parts = [Part(None, 0, len(rows), dict(encodings), Rows.of(rows))] if rows else []
        self._set(parts, root, failures, model_fingerprint or fingerprint_of(model), shapes_of(encodings))
        self.model = model

    # ---- making, opening, saving ------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        model: RetrievalModel,
        source: Source,
        batch_size: int = 32,
        progress: bool = True,
        dtype: torch.dtype | None = None,
        workers: int = 2,
        *,
        out: str | Path | None = None,
        unit_size: int = 4096,
        checkpoint: str | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> "GalleryIndex":
        """Encode every image of `source`.

        source: a folder (with those below it and those linked there, hidden files left out, sorted by name; names are
        relative posix paths), a list of files (kept in order), or {name: file}. Unreadable images are skipped and
        listed in `failures`; DataError when nothing is left.

        out: a folder that the index is written to, unit by unit, `unit_size` images each; the same call continues one
        that was cut short and encodes what is missing. Without it the index is held in memory.
        dtype: float16 (the default on disk) halves the store; scores are computed in float32 all the same.
        checkpoint: noted in the index, for whoever opens it. share: (number, of how many) processes that build one
        index together: each encodes every so-manieth unit.
        """
        dtype = dtype or (torch.float16 if out is not None else torch.float32)
        check_settings(batch_size, workers, dtype)
        collected = collect(source)
        if out is not None:
            settings = building.Settings(batch_size, dtype, workers, progress, unit_size)
            building.build(model, collected, Path(out), settings, checkpoint, share)
            index = cls.open(out, model)
        else:
            items = collected.everything()
            with bar(len(items), progress) as shown:
                made = encode(model, items, collected.root, batch_size, dtype, workers, shown)
            tell(made.failures, len(made.rows))
            index = cls([], [], {}, model, collected.root)
            index.shapes = shapes_of(made.encodings)
            index._take(made)
        index.left_out = collected.left_out
        return index

    @classmethod
    def open(
        cls, folder: str | Path, model: RetrievalModel | None = None, root: str | Path | None = None
    ) -> "GalleryIndex":
        """Open a saved index, memory-mapped: at once, whatever its size.

        model: needed to search it. root: where the images lie now, if they were moved.
        DataError: not an index, damaged (`verify` reads every byte), or built by another model; the remedy is to build
        it again. An index of the earlier format is opened as well; changes of it are kept in memory, until `save`.
        """
        return cls._open(Path(folder), model, root, verify=False)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: RetrievalModel | None = None,
        root: str | Path | None = None,
        verify: bool = True,
    ) -> "GalleryIndex":
        """`open`, and with `verify` the sha256 sum of every file is compared."""
        return cls._open(Path(folder), model, root, verify)

    @classmethod
    def _open(cls, folder: Path, model: RetrievalModel | None, root: str | Path | None, verify: bool) -> "GalleryIndex":
        place = Path(root).resolve() if root is not None else None
        index = cls.__new__(cls)
        index.model = None
        if units.read_format(folder).get("format") == earlier.FORMAT:
            stored = earlier.read(folder, verify)
            place = place or (path_of(stored.root) if stored.root else None)
            failures = [Failure(f["name"], path_of(f["path"]), f["reason"]) for f in stored.failures]
            paths = [place / path_of(path) if place is not None else path_of(path) for path in stored.paths]
            index.__init__(stored.names, paths, stored.encodings, None, place, failures, stored.model_fingerprint)
        else:
            manifest, found, parts = building.read(folder, verify)
            place = place or (path_of(manifest.root) if manifest.root else None)
            failures = [Failure(f["name"], path_of(f["path"]), f["reason"]) for u in found.values() for f in u.failures]
            index._set(parts, place, failures, manifest.model, manifest.shapes, (folder, manifest, found))
        if model is not None:
            index.attach(model, where=f" in {folder}")
        return index

    def save(self, folder: str | Path) -> None:
        """Write the index into `folder`; a kill at any moment leaves the earlier index there, or none, or this one.

        An index that lies in this folder is there already.
        """
        if self.folder is None or Path(folder).resolve() != self.folder.resolve():
            building.save(self, Path(folder))

    def attach(self, model: RetrievalModel, where: str = "") -> None:
        """Search with `model` from now on; DataError when another model built the index (fingerprints differ)."""
        building.check_model(self.model_fingerprint, model, where)
        self.model = model

    # ---- changing ---------------------------------------------------------------------------------------------------

    def add(
        self, source: Source, batch_size: int = 32, progress: bool = True, workers: int = 2, unit_size: int = 4096
    ) -> list[str]:
        """Encode further images and put them at the end; returns their names. DataError for a name already there."""
        model, dtype = self._require_model(), self.dtype
        check_settings(batch_size, workers, dtype)
        collected = collect(source, self.root)
        items = collected.everything()
        if known := self.positions_of([item.name for item in items]):
            names = first_few(map(repr, known), 5)
            raise DataError(f"already in the index: {names}; remove them first to encode them anew")
        added, failures, apart = [], [], []
        with bar(len(items), progress) as shown:
            for start in range(0, len(items), unit_size):
                some, disk = items[start : start + unit_size], self.folder is not None
                made = encode(model, some, self.root, batch_size, dtype, workers, shown, digests=disk)
                failures += made.failures
                if made.rows:
                    self._take(made)
                    added += [row.name for row in made.rows]
                else:
                    apart += made.failures
        tell(failures, len(added))
        self.change(Encoded({}, [], apart), [])
        self.left_out += collected.left_out
        return added

    def change(self, made: Encoded, gone: Sequence[int]) -> None:
        """Put what was encoded at the end and take positions out, as one step: on disk where the index lies there.

        What could not be read is noted, once for the same reason.
        """
        news = [failure for failure in made.failures if failure not in self.failures]
        if made.rows or ((gone or news) and self.folder is not None):
            self._take(made, self._by_unit(gone) if self.folder is not None else None)
        else:
            self.failures += news
        self._strike(gone)

    def _take(self, made: Encoded, removes: Mapping[str, list[int]] | None = None) -> None:
        if made.rows and shapes_of(made.encodings) != self.shapes:
            new = shapes_of(made.encodings)
            raise DataError(f"the model encodes as {new}, but the index holds {self.shapes}; build the index again")
        if self.folder is not None:
            part = building.append(self, made, dict(removes or {}))
        else:
            part = Part(None, self.stored, len(made.rows), made.encodings, Rows.of(made.rows))
        if part is not None:
            self.parts.append(part)
            if self._alive is not None:
                self._alive = torch.cat([self._alive, torch.ones(part.count, dtype=torch.bool)])
        self.failures += made.failures

    def remove(self, names: str | Sequence[str]) -> None:
        """Take images out of the index (their files stay). DataError for an unknown name, or if none would be left."""
        gone = {self.position(name) for name in ([names] if isinstance(names, str) else names)}
        if len(gone) == len(self):
            raise DataError(f"this would remove all {len(self)} images; an index holds at least one")
        self.change(Encoded({}, [], []), sorted(gone))

    def sync(
        self,
        folder: str | Path | None = None,
        batch_size: int = 32,
        progress: bool = True,
        workers: int = 2,
        unit_size: int = 4096,
    ) -> Synced:
        """Bring the index up to a folder (its root, where none is given), and say what that took.

        New pictures are added, those that are gone are taken out, and those whose content differs (sha256; not even
        read where size and time are the same) are encoded anew. One that was moved or renamed keeps its encodings.
        Images whose files lie elsewhere are left alone; where the root itself has moved, its new place is noted.
        DataError: no pictures there, shards, or an index without a root.
        """
        self._require_model()
        check_settings(batch_size, workers, self.dtype)
        if folder is None and self.root is None:
            raise DataError("the index has no root folder; say which folder to compare it with")
        place = Path(folder if folder is not None else self.root).resolve()
        if not place.is_dir():
            raise DataError(f"{str(place)!r} is no folder; give the folder of the pictures")
        if self.manifest is not None and upkeep.moved_root(self, place):
            self._reopen(place)
        collected = collect(place, self.root)
        if not collected.items or isinstance(collected.items[0].file, ShardImage):
            raise DataError(f"{str(place)!r} holds tar shards, which are not compared; add those that are new")
        return upkeep.sync(self, collected, place, batch_size, workers, progress, unit_size)

    def compact(self) -> tuple[int, int]:
        """Merge the small units on disk and drop what was removed: (units before, units after). Positions change."""
        before = upkeep.compact(self._on_disk())
        self._reopen(self.root)
        return before

    def verify(
        self, model: RetrievalModel | None = None, progress: bool = False, asked: Sequence[Query] = ()
    ) -> dict[str, Any]:
        """Read every byte: `info`, and "problems", a list of texts; empty where all is as it was written.

        model: whether it is the one that built the index is checked as well, and where there is a first stage (Qdrant
        Edge) for large galleries, "recall": the measured share of the true best images that it keeps, "made" on
        made-up queries and "asked" on given ones.
        """
        from neucore_plugin.retrieval import qdrant_edge, recall

        self._on_disk()
        facts = upkeep.verify(self, model, progress)
        if wrong := qdrant_edge.check(self):
            facts["problems"].append(wrong)
        if model is not None and not facts["problems"]:
            self.model = model
            facts["recall"] = recall.recall(self, asked)
        return facts

    def info(self) -> dict[str, Any]:
        """Counts, bytes, model, checkpoint, root, dtype and shapes; of a build also how many units it has and lacks."""
        return upkeep.info(self)

    def _on_disk(self) -> Path:
        if self.folder is None:
            raise DataError("the index is held in memory; save it first")
        return self.folder

    def _reopen(self, root: Path | None) -> None:
        model, left_out = self.model, self.left_out
        self.__dict__.update(type(self)._open(self.folder, None, root, verify=False).__dict__)
        self.model, self.left_out = model, left_out

    # ---- searching --------------------------------------------------------------------------------------------------

    def search(
        self,
        image: Picture | None = None,
        text: str | None = None,
        k: int | None = 10,
        exclude_reference: bool = True,
        *,
        images: Sequence[Picture] = (),
        then: Sequence[str] = (),
        exclude: Sequence[str] = (),
        without_texts: Sequence[str] = (),
        without_images: Sequence[Picture] = (),
        where: str | None = None,
        explain: bool = False,
        exact: bool = False,
    ) -> list[Hit]:
        """The k best images, None = all, for a reference and a relative caption; where fewer are left, all of these.

        image: a name in the index, a file, its bytes, an open binary file, or a picture of Pillow. Either may be None:
        then the query is text alone or image alone. References that are in the index are left out, unless
        exclude_reference is off. images: further references. then: further turns of a dialogue.
        exclude: names of images that are no answers. without_texts, without_images: what the images should not be like.
        where: a filter on attributes, see `filters`. explain: each hit has the terms of its score. exact: score
        every image, also where there is a first stage. How several references, turns and negatives become one score:
        `queries`.
        """
        more = (images, then, exclude, without_texts, without_images, where, explain, exact)
        return self.search_many([Query(image, text, k, exclude_reference, *more)])[0]

    def search_many(
        self,
        queries: Sequence[Query | tuple[Picture | None, str | None]],
        k: int | None = 10,
        exclude_reference: bool = True,
    ) -> list[list[Hit]]:
        """`search` for many queries, encoded and scored in batches; one list of hits for each, in order.

        queries: (image, text) pairs, or `Query`s, which say the rest themselves.
        """
        self._require_model()
        if not queries:
            raise DataError("no queries given; give at least one pair (image, text)")
        asked = []
        for number, query in enumerate(queries):
            try:
                asked.append(query if isinstance(query, Query) else Query(*query, k, exclude_reference))
            except DataError as error:
                raise DataError(f"query {number}: {error}") from None
        if not len(self):
            raise DataError("the index holds no images yet; finish its build, or add some")
        return [self.hits(found) for found in answer(self, asked)]

    def hits(self, found: Sequence[Found]) -> list[Hit]:
        """What was found, best first, with all that is known of it."""
        rows = [self.row(one.position) for one in found]
        return [
            Hit(rank, row.name, one.score, self._file(row), one.position, dict(row.attributes), one.terms)
            for rank, (one, row) in enumerate(zip(found, rows, strict=True), start=1)
        ]

    def scores(self, query: dict[str, Tensor]) -> Tensor:
        """Scores [Q,G] (float32, on the CPU) of encoded queries against the whole gallery; -inf for removed images."""
        model = self._require_model()
        if not len(self):
            raise DataError("the index holds no images yet; finish its build, or add some")
        dtype = None if getattr(model, "scores_half", False) else torch.float32  # None: as it is stored
        found = torch.empty(len(next(iter(query.values()))), self.stored)
        with torch.inference_mode():
            for start, block in self.blocks():
                part = {key: value.to(model.device, dtype) for key, value in block.items()}
                scores = model.score(query, part)
                found[:, start : start + scores.shape[1]] = scores
            return found if self._alive is None else found.masked_fill_(~self._alive, -torch.inf)

    def _require_model(self) -> RetrievalModel:
        if self.model is None:
            raise DataError("this index was opened without a model; pass one: GalleryIndex.open(folder, model=model)")
        return self.model
