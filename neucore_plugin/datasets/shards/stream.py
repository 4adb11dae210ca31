"""Training from shards of whole samples, read from end to end with webdataset, also from afar. Knows no host, no model.

A folder, local or behind an address, holds
    train-00000.tar ...     samples of a training split: KEY.json (the query), KEY.reference.jpg, KEY.target.jpg; the
                            image files byte for byte, KEY the place of the triplet in the split's list
    triplets-train.json     the triplets of the split, from which concepts and vocabulary are made before training
    eval/                   the other splits by place, as `reader.py` has them
    stream.json             the manifest: which triplets each shard holds, size and SHA-256 of every file

The order of an epoch follows from (seed, epoch, processes, workers): webdataset shuffles the shards, deals them to the
processes and to their workers, and each worker shuffles samples in a buffer. No sample comes twice in an epoch.

Nothing in an archive is trusted. Its headers are read first: members are regular files of the names above, of the
triplets that the manifest names, in its order, and of bounded size. webdataset then groups them; its own `decode`,
which unpickles, is never called: pictures go through `load_image`, JSON through the reader of triplets.
"""

import contextlib
import dataclasses
import os
import random
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

from tqdm import tqdm

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import ConfigError, DataError, ImageError, NeucoreError
from neucore_plugin.common.files import cache_dir, expanded, parse_json, sha256_file, sha256_text
from neucore_plugin.common.images import load_for
from neucore_plugin.common.randomness import mix
from neucore_plugin.datasets.annotations import is_whole, read_json
from neucore_plugin.datasets.shards import reader, remote
from neucore_plugin.datasets.shards.reader import MANIFEST, REMEDY, ShardImage
from neucore_plugin.datasets.triplets import Gallery, Triplet, TripletDataset

STREAM_FORMAT = "neucore-stream-1"
EVAL = "eval"
MAX_PICTURE = 256 << 20  # bytes of a member; of the query's JSON a 256th part
_SPLIT = re.compile(r"train[A-Za-z0-9_.-]{0,75}")
_SHARD = re.compile(rf"{_SPLIT.pattern}-[0-9]{{5,7}}\.tar")
_FILE = re.compile(
    rf"{_SHARD.pattern}|({EVAL}/)?triplets-[A-Za-z0-9_.-]{{1,80}}\.json|{EVAL}/index\.json|{EVAL}/shard-[0-9]{{5,7}}\.tar"
)
_SUM = re.compile(r"[0-9a-f]{64}")
_MEMBER = re.compile(r"([0-9]{8,12})\.(?:(json)|(reference|target)\.[a-z0-9]{1,8})")
_MAX_SHARDS = 1_000_000

Split = tuple[list[Triplet], Gallery]


@dataclasses.dataclass(frozen=True, slots=True)
class StreamFile:
    """A file of a stream: where it comes from, where it lies or will lie; of a shard of whole samples also the places
    of its triplets in the split's list."""

    source: str
    path: str
    size: int
    sha256: str
    numbers: tuple[int, ...] = ()

    def local(self) -> Path:
        """The local file, fetched where it comes from afar. Raises DataError."""
        path = Path(self.path)
        return path if self.source == self.path else remote.fetch(self.source, path, self.size, self.sha256)

    def __str__(self) -> str:
        return remote.shown(self.source).strip("'") if remote.is_remote(self.source) else self.source


@dataclasses.dataclass(frozen=True)
class Stream:
    """What a folder holds: by training split its triplets and shards; the images and splits to evaluate on."""

    train: dict[str, tuple[list[Triplet], list[StreamFile]]]
    images: dict[str, ShardImage]
    evaluated: dict[str, Split]
    left_out: dict[str, dict[str, Any]]  # as `read_shards` gives it


def open_stream(
    root: str, name: str | None = None, wanted: Sequence[str] | None = None, allow_remote: bool = False
) -> Stream:
    """Read manifest, triplets and what is evaluated on; no training shard is opened.

    root: a folder, or its shards as webdataset writes them: a brace pattern, several joined by "::". With
        `allow_remote` also an address (http, https, s3, gs) of these; the files are kept in the cache, in streams/.
    name: the data set that is expected. wanted: the splits; None = all.
    Raises ConfigError for a root that is refused, DataError where a file is missing, altered, or cannot be fetched.
    """
    base, chosen = locate(root, allow_remote)
    afar = remote.is_remote(base)
    place = remote.shown(base) if afar else base
    plain = distributed.on_main(lambda: _fetched_manifest(base)) if afar else _local_manifest(Path(base))
    if name is not None and plain.get("name") != name:
        raise DataError(
            f"{place}: holds samples of {str(plain.get('name'))[:80]!r}, not of {name!r}; give another root"
        )
    splits, files = open_manifest(plain, place)

    def at(file: str) -> StreamFile:
        fact = files[file]
        path = _in_cache(file, files) if afar else Path(base) / file
        source = remote.beside(base, file) if afar else str(path)
        return StreamFile(source, str(path), fact["bytes"], fact["sha256"])

    train, left_out, known = {}, {}, set()
    for split, row in splits.items():
        if wanted is not None and split not in wanted:
            continue
        file = at(f"triplets-{split}.json")
        (triplets, _), missing = reader.read_split(_once(file.local), row["sha256"], {})
        shards = [
            dataclasses.replace(at(shard["file"]), numbers=tuple(shard["queries"]))
            for shard in row["shards"]
            if chosen is None or shard["file"] in chosen
        ]
        for shard in shards:
            if max(shard.numbers) >= len(triplets):
                raise DataError(f"{shard}: is to hold a triplet that {split} lacks; {REMEDY}")
            if not afar:
                _check_size(Path(shard.path), shard.size)
        if shards:
            train[split] = triplets, shards
            left_out |= {split: missing} if missing else {}
            known |= {shard["file"] for shard in row["shards"]}
    if strange := sorted((chosen or set()) - known):
        raise DataError(f"{place}: {strange[0]} is no shard of the splits that are read; {MANIFEST} lists them")
    rest = [at(file) for file in files if file.startswith(f"{EVAL}/")]
    if not rest or (wanted is not None and set(wanted) <= train.keys()):
        return Stream(train, {}, {}, left_out)
    paths = _once(lambda: [file.local() for file in tqdm(rest, "fetching", unit="file", disable=not afar)])
    images, evaluated, missing = reader.read_shards(paths[0].parent, name)
    evaluated = {split: found for split, found in evaluated.items() if wanted is None or split in wanted}
    return Stream(train, images, evaluated, left_out | missing)


def _in_cache(file: str, files: Mapping[str, Mapping[str, Any]]) -> Path:
    """Where a fetched file lies: named by its content, those of `eval/` together; never by an address."""
    folder, _, name = file.rpartition("/")
    if folder:
        return cache_dir() / "streams" / files[f"{EVAL}/{reader.INDEX}"]["sha256"] / name
    return cache_dir() / "streams" / f"{files[file]['sha256']}{Path(name).suffix}"


def _once(fetch: Callable[[], Any]) -> Any:
    """Fetched by the main process first; the others find the files, or fetch them where they share no disk with it."""
    if distributed.world_size() > 1:
        distributed.on_main(lambda: fetch() and None)
    return fetch()


def locate(root: str, allow_remote: bool = False) -> tuple[str, set[str] | None]:
    """(folder or address of one, names of the shards in it that are read or None for all). Raises ConfigError."""
    if expanded(root).is_dir():
        return str(expanded(root).absolute()), None
    from braceexpand import UnbalancedBracesError, braceexpand

    if re.search(r"[0-9]{8}", "".join(re.findall(r"\{[^{}]*\}", root))):
        raise ConfigError(f"{root}: numbers of shards have at most seven digits")
    parts = [root] if "[" in root else root.split("::")  # [::1] is a host
    try:
        found = [url for part in parts for url in islice(braceexpand(part, escape=False), _MAX_SHARDS)]
    except UnbalancedBracesError:
        raise ConfigError(
            f"{root}: a brace has no partner; a pattern is written as in train-{{00000..00007}}.tar"
        ) from None
    if any(map(remote.is_remote, found)):
        found = [remote.checked_url(url) for url in found]
        if not allow_remote:
            raise ConfigError(
                f"{remote.shown(root)}: is fetched from elsewhere; set build_info.allow_remote=true if you trust it"
            )
    pairs = [_parted(url) for url in found]
    folders = {folder for folder, _ in pairs}
    if len(folders) > 1:
        raise ConfigError(f"{root}: names shards of {len(folders)} folders; give those of one")
    (base,) = folders
    if not remote.is_remote(base) and not Path(base).is_dir():
        raise ConfigError(f"{base}: no such folder; give the folder that `neucore shards --triplets` wrote")
    names = {name for _, name in pairs if name}
    return base, names or None


def _parted(url: str) -> tuple[str, str]:
    """(folder, shard) of a shard's path or address; (folder, "") of a folder's."""
    if not remote.is_remote(url):
        path = expanded(url).absolute()
        return (str(path.parent), path.name) if path.suffix == ".tar" else (str(path), "")
    parts = urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    if not name.endswith(".tar"):
        folder, name = parts.path.rstrip("/"), ""
    return urlunsplit((parts.scheme, parts.netloc, folder, parts.query, "")), name


def _local_manifest(root: Path) -> dict[str, Any]:
    if not (root / MANIFEST).is_file():
        remedy = "`neucore shards --triplets` writes one"
        if (root / "writing.json").is_file():
            remedy = "its writing was interrupted: give the same `neucore shards` command again"
        elif (root / reader.INDEX).is_file():
            remedy = "these shards are read by place: data_type: shards"
        raise DataError(f"{root}: has no {MANIFEST}, so it is no complete folder of samples; {remedy}")
    return read_json(root / MANIFEST, dict, "the shards")


def _fetched_manifest(base: str) -> dict[str, Any]:
    """Always anew: the shards may have been written anew."""
    path = cache_dir() / "streams" / f"{sha256_text(base)}-{MANIFEST}"
    return read_json(remote.fetch(remote.beside(base, MANIFEST), path), dict, "the shards")


def open_manifest(plain: Mapping[str, Any], place: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """({split: its row}, {file: its size and sum}) of a manifest, all of the right form. Raises DataError."""
    if plain.get("format") != STREAM_FORMAT:
        raise DataError(f"{place}: {MANIFEST} has the format {plain.get('format')!r}, not {STREAM_FORMAT!r}; {REMEDY}")
    splits, files = plain.get("splits"), plain.get("files")
    good = isinstance(splits, dict) and isinstance(files, dict) and splits and all(
        _FILE.fullmatch(file) and isinstance(fact, dict) and is_whole(fact.get("bytes")) and fact["bytes"] >= 0
        and _SUM.fullmatch(str(fact.get("sha256")))
        for file, fact in files.items()
    ) and all(
        _SPLIT.fullmatch(split) and f"triplets-{split}.json" in files and isinstance(row, dict)
        and isinstance(row.get("shards"), list) and row["shards"]
        for split, row in splits.items()
    )  # fmt: skip
    good = good and (f"{EVAL}/index.json" in files or not any(file.startswith(f"{EVAL}/") for file in files))
    if not good:
        raise DataError(f"{place}: {MANIFEST} lacks its splits, or the size and sum of a file; {REMEDY}")
    for split, row in splits.items():
        seen: set[int] = set()
        names = set()
        for shard in row["shards"]:
            file, numbers = (shard.get("file"), shard.get("queries")) if isinstance(shard, dict) else (None, None)
            if not (
                isinstance(file, str) and _SHARD.fullmatch(file) and file in files and file not in names
                and isinstance(numbers, list) and numbers and all(is_whole(n) and n >= 0 for n in numbers)
            ):  # fmt: skip
                raise DataError(f"{place}: {MANIFEST} names {str(file)[:80]!r} of {split}, which is no shard; {REMEDY}")
            names.add(file)
            if len(set(numbers)) < len(numbers) or not seen.isdisjoint(numbers):
                raise DataError(f"{place}: {MANIFEST} lists a triplet of {split} twice ({file}); {REMEDY}")
            seen.update(numbers)
    return splits, files


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise DataError(f"{path} is missing; copy it again, or {REMEDY}")
    if (found := path.stat().st_size) != size:
        raise DataError(f"{path} has {found:,} bytes, not {size:,}: it is truncated or another file; copy it again")


def verify(folder: str | Path, progress: bool = True) -> int:
    """Read every byte of every file, compare the sums, look through the training shards; returns the number of samples.

    Raises DataError.
    """
    root = expanded(folder)
    splits, files = open_manifest(_local_manifest(root), str(root))
    for file, fact in tqdm(files.items(), "checking files", unit="file", disable=not progress):
        _check_size(root / file, fact["bytes"])
        if sha256_file(root / file) != fact["sha256"]:
            raise DataError(
                f"{root / file}: its content has changed (SHA-256 does not fit); copy it again, or {REMEDY}"
            )
    shards = [shard for _, found in open_stream(str(root)).train.values() for shard in found]
    for shard in shards:
        with open(shard.path, "rb") as stream:
            check_members(stream, shard)
    return sum(len(shard["queries"]) for row in splits.values() for shard in row["shards"])


def check_members(stream: BinaryIO, shard: StreamFile) -> None:
    """Look at an open shard's headers before anything in it is read, and go back to its start. Raises DataError.

    Its members are regular files of our names, none twice, of bounded size, of the triplets that the manifest lists, in
    its order. A sample may lack a member: that is told where the sample is asked for.
    """
    place, seen = -1, set()
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for info in archive:
                found = _MEMBER.fullmatch(info.name)
                if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or found is None:
                    raise DataError(f"{shard}: holds {info.name[:80]!r}, which is no member of ours; {REMEDY}")
                number, role = int(found[1]), found[2] or found[3]
                if info.size > (MAX_PICTURE if role != "json" else MAX_PICTURE >> 8):
                    raise DataError(f"{shard}: {info.name} has {info.size:,} bytes, which no sample has; {REMEDY}")
                if place < 0 or number != shard.numbers[place]:
                    place, seen = place + 1, set()
                if place >= len(shard.numbers) or number != shard.numbers[place] or role in seen:
                    raise DataError(f"{shard}: {info.name} is not where the manifest says; {REMEDY}")
                seen.add(role)
        stream.seek(0)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shard}: no whole tar file ({error}); copy it again") from None
    if place + 1 != len(shard.numbers):  # a cut at the end of a member looks like the end of the archive
        raise DataError(f"{shard}: ends after {place + 1:,} of {len(shard.numbers):,} samples; copy it again")


@contextlib.contextmanager
def _announced(**numbers: int) -> Iterator[None]:
    """Tell webdataset who asks, where it looks first; a worker that was not forked knows no process group."""
    before = {key: os.environ.get(key) for key in numbers}
    os.environ.update({key: str(number) for key, number in numbers.items()})
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


class TripletStream(TripletDataset):
    """The queries of a training split whose pictures come as a stream of whole samples.

    Texts, concepts and length are those of a `TripletDataset`; samples have the same keys and values. A sample is not
    had by its number: `samples` gives the raw ones of this process and worker in the order of an epoch, `decode` makes
    one of them. `sizes`: the queries of each shard.

    Args, besides those of TripletDataset:
        written: the triplets of the split as the shards have them. numbers: which of them a query was made of, by its
            id. shards: of the split. buffer: raw samples among which a worker draws the next. skip: leave bad samples
            out, instead of raising.
    """

    streamed = True

    def __init__(
        self,
        *arguments: Any,
        written: Sequence[Triplet],
        numbers: Mapping[str, int],
        shards: Sequence[StreamFile],
        buffer: int,
        skip: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.written, self.buffer, self.skip = written, buffer, skip
        self._asked: dict[int, list[int]] = {}
        for index, triplet in enumerate(self.triplets):
            self._asked.setdefault(numbers[triplet.query_id], []).append(index)
        counts = {shard: sum(len(self._asked.get(n, ())) for n in shard.numbers) for shard in shards}
        self.shards = [shard for shard, count in counts.items() if count]  # the others are beyond max_train
        self.sizes = [counts[shard] for shard in self.shards]

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise DataError(f"{self.name}: {self.split!r} is a stream, which is read in its order; use data_type: shards")

    @property
    def fingerprint(self) -> str:
        """Changes with any query or text, shard, their order, or the buffer."""
        return sha256_text("\n".join([super().fingerprint, str(self.buffer), *(shard.sha256 for shard in self.shards)]))

    def samples(self, seed: int, epoch: int, rank: int, world: int, worker: int, workers: int) -> Iterator[Any]:
        """Raw samples (index, sample) of one of `workers` workers of process `rank` of `world`, in its order.

        A worker gets whole shards, none that another gets. Raises DataError for a shard that is not as it was written.
        """
        import webdataset

        by_name = {str(number): shard for number, shard in enumerate(self.shards)}
        # A list, never a pattern: webdataset would expand braces and variables of the environment in it.
        dealt = webdataset.DataPipeline(
            webdataset.SimpleShardList(list(by_name), seed=mix(seed, epoch)),
            webdataset.split_by_node,
            webdataset.split_by_worker,
        )
        with _announced(RANK=rank, WORLD_SIZE=world, WORKER=worker, NUM_WORKERS=workers):
            own = [by_name[entry["url"]] for entry in dealt]
        draw = random.Random(mix(seed, epoch, rank, worker))
        stages = (
            lambda: self._opened(own),
            webdataset.tariterators.tar_file_expander,
            webdataset.tariterators.group_by_keys,
            self._queries,
            webdataset.shuffle(self.buffer, initial=self.buffer, rng=draw),
        )
        try:
            yield from webdataset.DataPipeline(*stages)
        except NeucoreError:
            raise
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{self.name}: a shard of {self.split} cannot be read to its end ({error})") from error

    @staticmethod
    def _opened(shards: Sequence[StreamFile]) -> Iterator[dict[str, Any]]:
        """Open shards as webdataset's `url_opener` does, fetched and looked through before."""
        for shard in shards:
            with open(path := shard.local(), "rb") as stream:
                check_members(stream, shard)
                yield {"url": str(shard), "stream": stream, "local_path": str(path)}

    def _queries(self, source: Iterator[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for sample in source:
            for index in self._asked.get(int(sample["__key__"]), ()):
                yield index, sample

    def decode(self, index: int, sample: Mapping[str, Any]) -> dict[str, Any]:
        """A sample of `TripletDataset` from a raw one. Raises DataError naming shard, key and what is wrong."""
        key = sample["__key__"]
        found = {role.partition(".")[0]: data for role, data in sample.items()}
        try:
            if lacking := [role for role in ("json", "reference", "target") if role not in found]:
                raise DataError(f"has no {' and no '.join(lacking)}")
            try:
                query = reader.triplet_of(parse_json(found["json"].decode()))
            except ValueError as error:
                raise DataError(f"its JSON is no query ({error})") from None
            if query != self.written[int(key)]:
                raise DataError(f"its JSON is another query than triplet {int(key)} of the split")
            processor = self.images.processor
            return self._sample(index, lambda role, _: {"image": processor(load_for(processor, found[role]))})
        except DataError as error:
            what = "a picture of it: " if isinstance(error, ImageError) else ""
            remedy = REMEDY if not what else f"mend it, then {REMEDY}; missing: skip leaves it out"
            raise DataError(f"{sample['__url__']}: sample {key}: {what}{error}; {remedy}") from None
