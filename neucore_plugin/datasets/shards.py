"""Tar shards in webdataset's layout: every image once, triplets as JSON, an index. Knows no host and no model.

A folder of shards holds
    shard-00000.tar ...     members 000000.jpg, 000001.png, ...: the image files, byte for byte
    triplets-{split}.json   the queries and the gallery of a split
    index.json              counts, fingerprints, each shard's size and SHA-256, each image's name, shard and place

A training sample needs two images that lie anywhere, so shards are read by place, as a map-style data set: order,
resume, workers and processes are those of a folder. `stream` reads them from end to end with webdataset, for encoding.

Shards come from elsewhere, so nothing in them is trusted: names are labels and never paths, members are bytes and never
decoded by their suffix (webdataset's own `decode` unpickles .pyd, .pkl and .pth), nothing but local files is opened.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from neucore_plugin.datasets.annotations import read_json
from neucore_plugin.datasets.triplets import Gallery, Triplet
from neucore_plugin.errors import DataError
from neucore_plugin.files import atomic_write, sha256_text, write_json
from neucore_plugin.images import IMAGE_SUFFIXES

FORMAT = "neucore-shards-1"
INDEX = "index.json"
_SHARD = re.compile(r"shard-\d{5}\.tar")
_SPLIT = re.compile(r"[A-Za-z0-9_.-]{1,80}")
_MEMBER = re.compile(rf"\d{{6,12}}({'|'.join(map(re.escape, (*IMAGE_SUFFIXES, '.img')))})")
_FIELDS = {field.name for field in dataclasses.fields(Triplet)}


@dataclasses.dataclass(frozen=True)
class ShardImage:
    """An image inside a shard: `load_image` takes it as it takes a path."""

    shard: str
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """The bytes of the image file. Raises DataError where the shard ends before them."""
        try:
            data = os.pread(_descriptor(self.shard, os.getpid()), self.size, self.offset)
        except OSError as error:
            raise DataError(
                f"{self.shard} cannot be read ({error.strerror}); is the folder of shards complete?"
            ) from None
        if len(data) != self.size:
            raise DataError(f"{self.shard} is truncated: it ends before image {self.name!r}; copy the shard again")
        return data

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


@lru_cache(maxsize=256)
def _descriptor(shard: str, process: int) -> int:
    """One descriptor a shard and process; reading by place needs no seek, so threads may share it."""
    return os.open(shard, os.O_RDONLY)


# --- writing ----------------------------------------------------------------------------------------------------------


def write_shards(
    out: str | Path,
    name: str,
    paths: Mapping[str, Path],
    splits: Mapping[str, tuple[Sequence[Triplet], Gallery]],
    *,
    max_bytes: int = 256 << 20,
    workers: int = 2,
    progress: bool = True,
) -> Path:
    """Write a data set as shards of about `max_bytes`; returns the path of the index.

    paths: image files by name, each written once; splits: as readers give them. Finished shards of an interrupted call
    are kept; a complete folder is left alone. Raises DataError for missing image files, or a folder of other content.
    """
    out = Path(out).expanduser()
    missing = [str(path) for path in paths.values() if not Path(path).is_file()]
    if missing:
        raise DataError(f"{len(missing):,} images have no file, such as {missing[0]}; see `neucore data check`")
    bad = [split for split in splits if not _SPLIT.fullmatch(split)]
    if bad or not splits:
        raise DataError(f"splits {bad}: names of letters, digits, '.', '_' and '-' are wanted, at least one")
    plan = _plan(paths, max_bytes)
    content = {split: _plain_split(triplets, gallery) for split, (triplets, gallery) in splits.items()}
    sizes = [(image, Path(path).suffix.lower(), os.path.getsize(path)) for image, path in paths.items()]
    key = sha256_text(json.dumps([FORMAT, name, max_bytes, sizes, content], ensure_ascii=False, sort_keys=True))
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, key)
    jobs = [(out / f"shard-{number:05d}.tar", names) for number, names in enumerate(plan)]
    with (
        ThreadPoolExecutor(max(1, workers)) as pool,
        tqdm(total=len(paths), desc="writing shards", unit="image", disable=not progress) as bar,
    ):
        shards = list(pool.map(lambda job: _write_shard(*job, paths, key, bar), jobs))
    for split, plain in content.items():
        write_json(out / f"triplets-{split}.json", plain, indent=None)
    index = {
        "format": FORMAT,
        "name": name,
        "content": key,
        "images": len(paths),
        "splits": {
            split: {"queries": len(plain["triplets"]), "gallery": len(plain["gallery"]), "sha256": _sum(plain)}
            for split, plain in content.items()
        },
        "shards": shards,
    }
    write_json(out / INDEX, index, indent=None)
    for part in out.glob("shard-*.json"):
        part.unlink()
    (out / "writing.json").unlink(missing_ok=True)
    return out / INDEX


def _plain_split(triplets: Sequence[Triplet], gallery: Gallery) -> dict[str, Any]:
    return {"triplets": [dataclasses.asdict(triplet) for triplet in triplets], "gallery": list(gallery.ids)}


def _sum(plain: Mapping[str, Any]) -> str:
    return sha256_text(json.dumps(plain, ensure_ascii=False, sort_keys=True))


def _plan(paths: Mapping[str, Path], max_bytes: int) -> list[list[tuple[str, str]]]:
    """(image name, member name) of each shard, in order."""
    shards: list[list[tuple[str, str]]] = [[]]
    filled = 0
    for number, (name, path) in enumerate(paths.items()):
        size = os.path.getsize(path) + 1536  # header and padding
        if filled and filled + size > max_bytes:
            shards.append([])
            filled = 0
        suffix = Path(path).suffix.lower()
        shards[-1].append((name, f"{number:06d}{suffix if suffix in IMAGE_SUFFIXES else '.img'}"))
        filled += size
    return shards


def _claim(out: Path, key: str) -> None:
    """The folder is empty, or holds (a part of) the same content; else DataError. A finished index is kept."""
    for note in (out / INDEX, out / "writing.json"):
        if note.is_file():
            if read_json(note, dict, "the shards").get("content") != key:
                raise DataError(
                    f"{out} holds shards of other images, splits or settings; give another --out, or empty it"
                )
            return
    if any(out.iterdir()):
        raise DataError(f"{out} is not empty and holds no shards of ours; give another --out")
    write_json(out / "writing.json", {"content": key})


def _write_shard(path: Path, members: Sequence[tuple[str, str]], paths: Mapping[str, Path], key: str, bar: Any) -> dict:
    """One shard and a note of what is in it; both stand only when whole. What a former call finished is taken over."""
    note = path.with_suffix(".json")
    if path.is_file():
        record = None
        if note.is_file():
            record = read_json(note, dict, "the shards")
        elif (path.parent / INDEX).is_file():
            index = read_json(path.parent / INDEX, dict, "the shards")
            record = next((shard for shard in index["shards"] if shard["file"] == path.name), None)
        if record and record["bytes"] == path.stat().st_size:
            bar.update(len(members))
            return record
    placed = []
    with atomic_write(path) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, member in members:
            data = Path(paths[name]).read_bytes()
            info = tarfile.TarInfo(member)  # time, owner and mode are constants: equal content gives equal bytes
            info.size = len(data)
            offset = archive.offset + 512
            archive.addfile(info, io.BytesIO(data))
            placed.append({"name": name, "offset": offset, "size": len(data)})
            bar.update(1)
    record = {"file": path.name, "bytes": path.stat().st_size, "sha256": _file_sum(path), "images": placed}
    write_json(note, record, indent=None)
    return record


def _file_sum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


def read_shards(folder: str | Path) -> tuple[dict[str, ShardImage], dict[str, tuple[list[Triplet], Gallery]]]:
    """Images by name, and triplets and gallery by split. No image is read.

    Raises DataError where the index is missing, altered or names places outside its shards, a shard is missing or of
    another size than it was written with, or a split's file does not fit its sum.
    """
    root, index = _open_index(folder)
    images: dict[str, ShardImage] = {}
    for shard in index["shards"]:
        path = _shard_path(root, shard)
        end = 0
        for image in shard["images"]:
            name, offset, size = (image.get(key) for key in ("name", "offset", "size"))
            whole = all(isinstance(number, int) and not isinstance(number, bool) for number in (offset, size))
            if (
                not isinstance(name, str)
                or not whole
                or size < 0
                or offset < end + 512
                or offset + size > shard["bytes"]
            ):
                raise DataError(
                    f"{root / INDEX}: image {str(name)[:80]!r} has no place of its own in {path.name}; {REMEDY}"
                )
            if name in images:
                raise DataError(f"{root / INDEX}: image {name[:80]!r} is listed twice; {REMEDY}")
            images[name] = ShardImage(str(path), offset, size, name)
            end = offset + size
    return images, {split: _read_split(root, split, row, images) for split, row in index["splits"].items()}


REMEDY = "write the shards again with `neucore shards`"


def _open_index(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    if "://" in str(folder) or str(folder).startswith("pipe:"):
        raise DataError(f"{folder}: shards are read from a folder; copy or mount it, then give its path")
    root = Path(folder).expanduser()
    if not (root / INDEX).is_file():
        remedy = "`neucore shards` writes one"
        if (root / "writing.json").is_file():
            remedy = "its writing was interrupted: give the same `neucore shards` command again"
        raise DataError(f"{root}: has no {INDEX}, so it is no complete folder of shards; {remedy}")
    index = read_json(root / INDEX, dict, "the shards")
    if index.get("format") != FORMAT:
        raise DataError(f"{root / INDEX}: has the format {index.get('format')!r}, not {FORMAT!r}; {REMEDY}")
    shards, splits = index.get("shards"), index.get("splits")
    good = isinstance(shards, list) and isinstance(splits, dict) and all(isinstance(r, dict) for r in splits.values())
    good = good and all(
        isinstance(shard, dict) and isinstance(shard.get("bytes"), int) and isinstance(shard.get("images"), list)
        and all(isinstance(image, dict) for image in shard["images"])
        for shard in shards
    )  # fmt: skip
    if not good:
        raise DataError(f"{root / INDEX}: lacks its lists of shards and splits; {REMEDY}")
    return root, index


def _shard_path(root: Path, shard: Mapping[str, Any]) -> Path:
    file = shard.get("file")
    if not isinstance(file, str) or not _SHARD.fullmatch(file):
        raise DataError(f"{root / INDEX}: {str(file)[:80]!r} is no shard of this folder (shard-NNNNN.tar); {REMEDY}")
    path = root / file
    if not path.is_file():
        raise DataError(f"{path} is missing; copy it again, or {REMEDY}")
    if (found := path.stat().st_size) != shard["bytes"]:
        raise DataError(
            f"{path} has {found:,} bytes, not {shard['bytes']:,}: it is truncated or another file; copy it again"
        )
    return path


def _read_split(
    root: Path, split: str, row: Mapping[str, Any], images: Mapping[str, Any]
) -> tuple[list[Triplet], Gallery]:
    if not _SPLIT.fullmatch(split):
        raise DataError(f"{root / INDEX}: {split[:80]!r} is no name of a split; {REMEDY}")
    path = root / f"triplets-{split}.json"
    plain = read_json(path, dict, "the shards")
    if _sum(plain) != row.get("sha256"):
        raise DataError(f"{path}: was altered since it was written; {REMEDY}")
    ids = plain.get("gallery")
    if not isinstance(ids, list) or any(not isinstance(name, str) or name not in images for name in ids):
        raise DataError(f"{path}: its gallery names images that no shard holds; {REMEDY}")
    triplets = []
    for entry in plain.get("triplets") or []:
        if not isinstance(entry, dict) or set(entry) - _FIELDS:
            raise DataError(f"{path}: a triplet with fields that this version does not know; {REMEDY}")
        triplets.append(Triplet(**{key: _tuples(value) for key, value in entry.items()}))
    return triplets, Gallery(tuple(ids), tuple(images[name] for name in ids))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def verify(folder: str | Path, progress: bool = True) -> int:
    """Read every byte of every shard and compare the sums; returns the number of images. Raises DataError."""
    images, _ = read_shards(folder)
    root, index = _open_index(folder)
    for shard in tqdm(index["shards"], "checking shards", unit="shard", disable=not progress):
        path = _shard_path(root, shard)
        if _file_sum(path) != shard.get("sha256"):
            raise DataError(f"{path}: its content has changed (SHA-256 does not fit); copy it again, or {REMEDY}")
    return len(images)


def stream(folder: str | Path) -> Any:
    """A webdataset pipeline over the images, each once among all workers and processes: {"name", "bytes"}.

    For reading a whole gallery from end to end. Raises DataError as `read_shards` does; a shard that ends early too.
    """
    import webdataset

    images, _ = read_shards(folder)
    order = {(image.shard, number): image for number, image in _numbered(images)}
    shards = sorted({image.shard for image in images.values()})

    def members(source: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for entry in source:
            yield from _members(entry["url"], order)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return webdataset.DataPipeline(
            webdataset.SimpleShardList(shards), webdataset.split_by_node, webdataset.split_by_worker, members
        )


def _numbered(images: Mapping[str, ShardImage]) -> Iterator[tuple[int, ShardImage]]:
    """Images with their number within their shard."""
    counts: dict[str, int] = {}
    for image in images.values():
        yield counts.get(image.shard, 0), image
        counts[image.shard] = counts.get(image.shard, 0) + 1


def _members(shard: str, order: Mapping[tuple[str, int], ShardImage]) -> Iterator[dict[str, Any]]:
    """Regular members of our form alone, as bytes; the name comes from the index."""
    try:
        with tarfile.open(shard, mode="r:") as archive:
            for number, info in enumerate(archive):
                if not info.isreg() or not _MEMBER.fullmatch(info.name):
                    raise DataError(f"{shard}: holds {info.name[:80]!r}, which is no member of ours; {REMEDY}")
                image = order.get((shard, number))
                data = archive.extractfile(info).read()
                if image is None or image.offset != info.offset_data or len(data) != image.size:
                    raise DataError(f"{shard}: member {info.name} is not where the index says; {REMEDY}")
                yield {"name": image.name, "bytes": data}
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard}: no whole tar file ({error}); copy it again") from None
