"""Reading tar shards in webdataset's layout: every image once, triplets as JSON, an index. Knows no host, no model.

A folder of shards holds
    shard-00000.tar ...     members 000000.jpg, 000001.png, ...: the image files, byte for byte
    triplets-{split}.json   the queries and the gallery of a split
    index.json              counts, fingerprints, each shard's size and SHA-256, each image's name, shard and place

A training sample needs two images that lie anywhere, so these shards are read by place, as a map-style data set: order,
resume, workers and processes are those of a folder. Shards of whole samples, read from end to end: `stream.py`.

Shards come from elsewhere, so nothing in them is trusted: names are labels and never paths, members are bytes and never
decoded by their suffix (webdataset's own `decode` unpickles .pyd, .pkl and .pth), nothing but local files is opened.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from neucore_plugin.common.errors import DataError
from neucore_plugin.common.files import expanded, sha256_file, sha256_text
from neucore_plugin.common.shard_image import ShardImage, forget_opened
from neucore_plugin.datasets.annotations import is_whole, read_json
from neucore_plugin.datasets.triplets import LEFT_OUT, Gallery, Triplet, left_out_text

FORMAT = "neucore-shards-1"
INDEX = "index.json"
MANIFEST = "stream.json"  # of shards of whole samples: see `stream.py`
_SHARD = re.compile(r"shard-[0-9]{5,7}\.tar")
SPLIT_NAME = re.compile(r"[A-Za-z0-9_.-]{1,80}")
# Of members, as a hint to other readers; others are .img. One list for all machines, whatever their Pillow reads.
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_FIELDS = {field.name for field in dataclasses.fields(Triplet)}
_TRIPLET = TypeAdapter(Triplet)
REMEDY = "write the shards again with `neucore shards`"


Splits = dict[str, tuple[list[Triplet], Gallery]]


def read_shards(
    folder: str | Path, name: str | None = None
) -> tuple[dict[str, ShardImage], Splits, dict[str, dict[str, Any]]]:
    """Images by name; triplets and gallery by split; what missing images cost when the shards were written, by split.

    The last is the counts of LEFT_OUT and "listed_in" of the splits that lack some (see `catalogue.without`).
    No image is read. `name`: the data set that is expected.
    Raises DataError where the index is missing, altered or names places outside its shards, a shard is missing or of
    another size than it was written with, or a split's file does not fit its sum.
    """
    root, index = open_index(folder)
    if name is not None and index.get("name") != name:
        raise DataError(f"{root}: holds shards of {str(index.get('name'))[:80]!r}, not of {name!r}; give another root")
    forget_opened()  # a folder that was written anew is not read by the old files
    images: dict[str, ShardImage] = {}
    files: set[str] = set()
    for shard in index["shards"]:
        path = _shard_path(root, shard)
        if path.name in files:
            raise DataError(f"{root / INDEX}: {path.name} is listed twice; {REMEDY}")
        files.add(path.name)
        end = 0
        for image in shard["images"]:
            label, offset, size = (image.get(key) for key in ("name", "offset", "size"))
            if (
                not isinstance(label, str)
                or not (is_whole(offset) and is_whole(size))
                or size < 0
                or offset < end + 512  # each member has a header before it
                or offset + size > shard["bytes"]
            ):
                raise DataError(
                    f"{root / INDEX}: image {str(label)[:80]!r} has no place of its own in {path.name}; {REMEDY}"
                )
            if label in images:
                raise DataError(f"{root / INDEX}: image {label[:80]!r} is listed twice; {REMEDY}")
            images[label] = ShardImage(str(path), offset, size, label)
            end = offset + size
    if not images:
        raise DataError(f"{root / INDEX}: lists no images; {REMEDY}")
    splits, left_out = {}, {}
    for split, row in index["splits"].items():
        if not SPLIT_NAME.fullmatch(split):
            raise DataError(f"{root / INDEX}: {split[:80]!r} is no name of a split; {REMEDY}")
        splits[split], found = read_split(root / f"triplets-{split}.json", row.get("sha256"), images)
        if found:
            left_out[split] = found
            logging.warning("%s: when %s was written: %s", root, split, left_out_text(found))
    return images, splits, left_out


def open_index(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder's path and the content of its index, of the right form. Raises DataError."""
    if "://" in str(folder) or str(folder).startswith("pipe:"):
        raise DataError(
            f"{folder}: shards are read by place from a folder; copy or mount it, then give its path. From afar whole "
            "samples are read: data_type: stream"
        )
    root = expanded(folder)
    if not (root / INDEX).is_file():
        remedy = "`neucore shards` writes one"
        if (root / "writing.json").is_file():
            remedy = "its writing was interrupted: give the same `neucore shards` command again"
        elif (root / MANIFEST).is_file():
            remedy = "these shards hold whole samples: data_type: stream"
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


def split_sum(plain: Mapping[str, Any]) -> str:
    """The fingerprint of a split's file: of its content, however it is spaced."""
    return sha256_text(json.dumps(plain, ensure_ascii=False, sort_keys=True))


def read_split(
    path: Path, expected: Any, images: Mapping[str, Any]
) -> tuple[tuple[list[Triplet], Gallery], dict[str, Any]]:
    """Triplets and gallery of a split's file, and what bad images cost (counts of LEFT_OUT), {} where none was.

    expected: the file's `split_sum`. images: what its gallery may name. Raises DataError.
    """
    plain = read_json(path, dict, "the shards")
    if split_sum(plain) != expected:
        raise DataError(f"{path}: was altered since it was written; {REMEDY}")
    missing = plain.get("left_out", {})
    counts = {key: missing[key] for key in LEFT_OUT if key in missing} if isinstance(missing, dict) else {"": None}
    good = all(type(count) is int and count >= 0 for count in counts.values())
    if not isinstance(plain.get("triplets"), list) or not good:
        raise DataError(f"{path}: needs a list 'triplets', and counts of what was left out; {REMEDY}")
    ids = plain.get("gallery")
    if not isinstance(ids, list) or any(not isinstance(name, str) or name not in images for name in ids):
        raise DataError(f"{path}: its gallery names images that no shard holds; {REMEDY}")
    triplets = []
    for number, entry in enumerate(plain["triplets"]):
        try:
            triplets.append(triplet_of(entry))
        except DataError as error:
            raise DataError(f"{path}: triplet {number} {error}; {REMEDY}") from None
    left_out = {**counts, "listed_in": str(path)} if any(counts.values()) else {}
    return (triplets, Gallery(tuple(ids), tuple(images[name] for name in ids))), left_out


def triplet_of(entry: Any) -> Triplet:
    """A triplet from its JSON. Raises DataError, whose text goes on after the entry's name."""
    if not isinstance(entry, dict) or set(entry) - _FIELDS:
        raise DataError("has fields that this version does not know")
    try:
        return _TRIPLET.validate_python(entry)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise DataError(f"has a wrong {wrong['loc'][0]}: {wrong['msg']}") from None


def verify(folder: str | Path, progress: bool = True) -> int:
    """Read every byte of every shard and compare the sums; returns the number of images. Raises DataError."""
    images, _, _ = read_shards(folder)
    root, index = open_index(folder)
    for shard in tqdm(index["shards"], "checking shards", unit="shard", disable=not progress):
        path = _shard_path(root, shard)
        if sha256_file(path) != shard.get("sha256"):
            raise DataError(f"{path}: its content has changed (SHA-256 does not fit); copy it again, or {REMEDY}")
    return len(images)
