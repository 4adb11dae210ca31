"""The host's dataset builders for composed image retrieval, map-style."""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar, get_args

from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from omegaconf import OmegaConf

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.common.files import atomic_write, cache_dir
from neucore_plugin.common.text import AND
from neucore_plugin.config.data import DatasetSchema
from neucore_plugin.config.loading import dataset_defaults, escaped
from neucore_plugin.config.published import PUBLISHED, SPLITS
from neucore_plugin.config.sections import dataset_types
from neucore_plugin.datasets import folder, icons, protocols
from neucore_plugin.datasets.emoji import drawings
from neucore_plugin.datasets.emoji import splits as emoji
from neucore_plugin.datasets.published import catalogue
from neucore_plugin.datasets.shards import reader as shards
from neucore_plugin.datasets.shards import stream as streams
from neucore_plugin.datasets.triplets import (
    LEFT_OUT,
    Gallery,
    ImageStore,
    Triplet,
    TripletDataset,
    left_out_text,
    no_names,
)
from neucore_plugin.host.registration import register_builder

DATA_TYPES = get_args(DatasetSchema.model_fields["data_type"].annotation)
Content = tuple[dict[str, Any], dict[str, tuple[list[Triplet], Gallery]]]


class TripletBuilder(BaseDatasetBuilder):
    """Common part: processors from the config, one TripletDataset a split and protocol. Subclasses read annotations.

    `build_datasets` returns {split: TripletDataset}, and {"split@preset": TripletDataset} for every protocol after the
    first; only splits whose name starts with "train" load target images. `data_type: shards` reads what `neucore
    shards` wrote instead, `stream` what it wrote with --triplets: a training split is then a TripletStream.
    `wanted`: the splits that a run names; None = all that can be trained on or evaluated.
    The host's `load_dataset(name, vis_path=..., data_type=...)` gives the root, or the folder of shards.
    """

    name = ""
    place = "root"  # the key of build_info that says where the images are
    train_dataset_cls = eval_dataset_cls = TripletDataset
    credit: str | None = None
    names = staticmethod(no_names)
    wanted: Sequence[str] | None = None

    def __init__(self, cfg: Any = None) -> None:
        """cfg: a section of `datasets`, or a part of one: the schema has the rest. Raises ConfigError."""
        given = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
        config = OmegaConf.create(escaped(dataset_defaults(self.name, given)))
        for kind in DATA_TYPES:  # where `load_dataset` writes its vis_path
            config.build_info[kind] = {"storage": None}
        super().__init__(config)

    def build_datasets(self) -> dict[str, TripletDataset]:
        self.build_processors()
        info = OmegaConf.to_container(self.config.build_info)
        storage = {kind: info.pop(kind)["storage"] for kind in DATA_TYPES}  # as it was given: no interpolation
        info = OmegaConf.to_container(OmegaConf.create(info), resolve=True)
        data_type = next((kind for kind in DATA_TYPES if storage[kind]), self.config.data_type)
        if storage[data_type]:
            info[self.place if data_type == "images" else "root"] = str(storage[data_type])
        self.left_out: dict[str, dict[str, Any]] = {}
        streamed: dict[str, TripletDataset] = {}
        if data_type == "shards":
            paths, splits = self._read_shards(info)
        elif data_type == "stream":
            streamed, paths, splits = self._read_stream(info)
        else:
            distributed.on_main(lambda: self.prepare(info))  # it writes files: one process does it, the others wait
            paths, splits = self.read(info)
        if any("files" in row for row in self.left_out.values()):
            self._list_bad()
        return streamed | self.build(info, paths, splits)

    def prepare(self, info: dict[str, Any]) -> None:
        """Make what the data set needs on disk; nothing by default."""

    def read(self, info: dict[str, Any]) -> Content:
        """Images by name (a path, or what else `load_image` takes), and triplets and gallery by split."""
        raise ConfigError(f"{type(self).__name__} must define read()")

    def _root(self, info: dict[str, Any], data_type: str, how: str) -> str:
        if not info.get("root"):
            raise ConfigError(
                f"datasets.{self.name}.build_info.root is null; with data_type: {data_type} it names the folder that "
                f"`{how}` wrote"
            )
        return info["root"]

    def _read_shards(self, info: dict[str, Any]) -> Content:
        root = self._root(info, "shards", "neucore shards")
        paths, splits, self.left_out = shards.read_shards(root, self.name)
        splits = {s: found for s, found in splits.items() if self.wanted is None or s in self.wanted}
        return self._without_bad(info, paths, splits)

    def _without_bad(
        self, info: dict[str, Any], paths: dict[str, Any], splits: dict[str, tuple[list[Triplet], Gallery]]
    ) -> Content:
        """What is read by place, with `missing: skip` without what cannot be read."""
        if info.get("missing") == "skip":
            splits, bad = catalogue.skip_bad(self.name, splits, self._processor_of)
            for split, row in bad.items():  # beside what lacked when they were written
                before = self.left_out.get(split, {})
                self.left_out[split] = row | {key: row[key] + before.get(key, 0) for key in LEFT_OUT}
            paths = _images(splits)
        return paths, splits

    def _read_stream(
        self, info: dict[str, Any]
    ) -> tuple[dict[str, TripletDataset], dict[str, Any], dict[str, tuple[list[Triplet], Gallery]]]:
        """The training splits as streams; what is evaluated on by place."""
        root = self._root(info, "stream", "neucore shards --triplets")
        found = streams.open_stream(root, self.name, self.wanted, info.get("allow_remote", False))
        self.left_out = found.left_out
        streamed = {split: self._stream(info, split, *content) for split, content in found.train.items()}
        return streamed, *self._without_bad(info, found.images, found.evaluated)

    def _stream(
        self, info: dict[str, Any], split: str, triplets: list[Triplet], files: list[streams.StreamFile]
    ) -> TripletDataset:
        """A training split; of chosen shards, the triplets that these hold."""
        protocol, captions = protocols.presets(self.name, info.get("protocol"))[0], self.text_processors["train"]
        held = sorted(number for file in files for number in file.numbers)[: info.get("max_train")]
        asked = {n: protocols.queries(protocol, [triplets[n]], True, _joiner(info, captions)) for n in held}
        queries = [query for found in asked.values() for query in found]
        names = dict.fromkeys(name for query in queries for name in (query.reference, *query.targets))
        dataset = streams.TripletStream(
            *(self.name, split, queries, Gallery((), ()), ImageStore(names, self.vis_processors["train"])),
            captions=captions,
            train=True,
            protocol=protocol,
            written=triplets,
            numbers={query.query_id: number for number, found in asked.items() for query in found},
            shards=files,
            buffer=info["shuffle_buffer"],
            skip=info.get("missing") == "skip",
        )
        dataset.credit, dataset.names, dataset.left_out = self.credit, self.names, self.left_out.get(split, {})
        logging.info("%s: %s holds %d queries in %d shards", self.name, split, len(dataset), len(dataset.shards))
        for notice in dataset.notices:
            logging.warning("%s: %s: %s", self.name, split, notice)
        return dataset

    def _processor_of(self, split: str) -> Any:
        return self.vis_processors["train" if protocols.is_train(split) else "eval"]

    def _list_bad(self) -> None:
        """Write the bad image files into a list, and tell what they cost."""
        listing = cache_dir() / f"missing-images-{self.name}.txt"
        files = sorted({file for row in self.left_out.values() for file in row.get("files", ())})

        def write() -> None:
            with atomic_write(listing, "w") as stream:
                stream.write("\n".join(files) + "\n")

        distributed.on_main(write)
        for split, row in self.left_out.items():
            if row.pop("files", None):
                row["listed_in"] = str(listing)
                logging.warning("%s: %s: %s (the files: %s)", self.name, split, left_out_text(row), listing)

    def build(
        self, info: dict[str, Any], paths: dict[str, Any], splits: dict[str, tuple[list[Triplet], Gallery]]
    ) -> dict[str, TripletDataset]:
        """One data set a split and protocol."""
        stores = {side: ImageStore(paths, self.vis_processors[side]) for side in ("train", "eval")}
        one_process = bool(info.get("one_process"))
        for store in stores.values():
            store.checked = info.get("missing") == "skip"
        chosen = protocols.presets(self.name, info.get("protocol"))
        datasets = {}
        for split, (triplets, gallery) in splits.items():
            side = "train" if protocols.is_train(split) else "eval"
            content = triplets[: info.get(f"max_{side}")], gallery
            captions = self.text_processors[side]
            made = protocols.build(self.name, split, content, stores[side], chosen, _joiner(info, captions), captions)
            for name, dataset in made.items():
                dataset.credit, dataset.names, dataset.one_process = self.credit, self.names, one_process
                if self.name == "fashioniq" and side == "eval":
                    dataset.family = f"{split.split('_')[0]}_mean"
                dataset.left_out = self.left_out.get(split, {})
                logging.info("%s: %s holds %d queries, gallery %d", self.name, name, len(dataset), len(gallery.ids))
                if side == "eval" and self.name in PUBLISHED:
                    used = dataset.protocol
                    logging.info("%s: %s: protocol %s: %s", self.name, name, used.name, used.summary)
                for notice in dataset.notices:
                    logging.warning("%s: %s: %s", self.name, name, notice)
            datasets |= made
        return datasets


class PublishedBuilder(TripletBuilder):
    """A data set as published, below build_info.root or its environment variable (see `datasets/published/`).

    Raises one ConfigError with every annotation file and image folder that is missing; with `missing: skip` images that
    have no file or cannot be read are left out with the queries that need them, counted and listed in a file.
    """

    def read(self, info: dict[str, Any]) -> Content:
        splits = [s for s in catalogue.READERS[self.name].splits if s in (self.wanted or self.SPLITS)]
        given = info.get("root"), splits, info.get("missing", "error"), self._processor_of, info.get("features")
        _, found, self.left_out = catalogue.load(self.name, *given)
        return _images(found), found


def _joiner(info: dict[str, Any], captions: Any) -> str:
    """What stands between the captions of a pair, by the config, else by the text processor."""
    return info.get("joiner") or ("and" if getattr(captions, "clean", True) else AND)


def _images(splits: dict[str, tuple[list[Triplet], Gallery]]) -> dict[str, Any]:
    """The images of all galleries by name."""
    return {name: path for _, gallery in splits.values() for name, path in gallery.files.items()}


for _reader in catalogue.READERS.values():
    register_builder(_reader.name)(
        type(
            f"{_reader.name.capitalize()}Builder",
            (PublishedBuilder,),
            {
                "__module__": __name__,
                "__doc__": f"{_reader.title} as published, below build_info.root or ${_reader.root_variable}.",
                "name": _reader.name,
                "SPLITS": _reader.answered,
                "credit": _reader.credit,
                "names": staticmethod(_reader.names),
                "DATASET_CONFIG_DICT": dataset_types(_reader.name),
            },
        )
    )


@register_builder("emoji")
class EmojiBuilder(TripletBuilder):
    """The embedded default: OpenMoji drawings (see `datasets/emoji/`)."""

    name = "emoji"
    place = "cache_dir"
    SPLITS = SPLITS["emoji"]
    credit = drawings.CREDIT
    names = staticmethod(emoji.emoji_names)
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = dataset_types("emoji")

    def prepare(self, info: dict[str, Any]) -> None:
        drawings.prepare(info.get("cache_dir"), image_size=info["image_size"])

    def read(self, info: dict[str, Any]) -> Content:
        splits = emoji.load(info.get("cache_dir"), image_size=info["image_size"], role_cap=info["role_cap"])
        if info.get("drawings"):
            self.credit = None  # whose they are is not known
            splits, self.left_out = emoji.other_drawings(info["drawings"], splits, info.get("cache_dir"))
            for split, row in self.left_out.items():
                if self.wanted is None or split in self.wanted:
                    logging.info("emoji: %s: in %s %s", split, info["drawings"], left_out_text(row))
            splits = {split: found for split, found in splits.items() if self.wanted is None or split in self.wanted}
        _, gallery = next(iter(splits.values()))  # the gallery of every split
        return gallery.files, splits


@register_builder("icons")
class IconsBuilder(TripletBuilder):
    """Tabler's icons, from the package as npm gives it (see `datasets/icons.py`)."""

    name = "icons"
    SPLITS = SPLITS["icons"]
    credit = icons.CREDIT
    names = staticmethod(icons.names)
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = dataset_types("icons")

    def prepare(self, info: dict[str, Any]) -> None:
        if not info.get("root"):
            raise ConfigError(
                "datasets.icons.build_info.root is null; give the folder of the unpacked package there. Fetch it with\n"
                f"  {icons.FETCH}\nand then root is the folder `package`"
            )
        icons.prepare(info["root"], info.get("cache_dir"), info["image_size"])

    def read(self, info: dict[str, Any]) -> Content:
        splits = icons.load(info["root"], info.get("cache_dir"), info["image_size"])
        splits = {split: found for split, found in splits.items() if self.wanted is None or split in self.wanted}
        _, gallery = next(iter(splits.values()))
        return gallery.files, splits


@register_builder("folder")
class FolderBuilder(TripletBuilder):
    """One's own images and JSON annotations (see `datasets/folder.py`)."""

    name = "folder"
    SPLITS = None  # whatever the root holds
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = dataset_types("folder")

    def read(self, info: dict[str, Any]) -> Content:
        root = info["root"]
        if not root:
            raise ConfigError(
                "datasets.folder.build_info.root is null; give the path of your folder there, or as in "
                'load_dataset("folder", vis_path=FOLDER)'
            )
        known = folder.images(root)
        splits = [s for s in folder.splits(root, self.wanted or ()) if self.wanted is None or s in self.wanted]
        return known, {split: folder.load_split(root, split, known) for split in splits}
