"""The host's dataset builders for composed image retrieval, map-style."""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from omegaconf import OmegaConf

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import ConfigError
from neucore_plugin.common.files import atomic_write, cache_dir
from neucore_plugin.config.loading import dataset_defaults
from neucore_plugin.config.published import PUBLISHED, SPLITS
from neucore_plugin.config.sections import dataset_types
from neucore_plugin.datasets import folder, protocols
from neucore_plugin.datasets.emoji import drawings
from neucore_plugin.datasets.emoji import splits as emoji
from neucore_plugin.datasets.published import catalogue
from neucore_plugin.datasets.shards import reader as shards
from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset
from neucore_plugin.host.registration import register_builder

Content = tuple[dict[str, Any], dict[str, tuple[list[Triplet], Gallery]]]


class TripletBuilder(BaseDatasetBuilder):
    """Common part: processors from the config, one TripletDataset a split and protocol. Subclasses read annotations.

    `build_datasets` returns {split: TripletDataset}, and {"split@preset": TripletDataset} for every protocol after the
    first; only splits whose name starts with "train" load target images. `data_type: shards` reads what `neucore
    shards` wrote instead. `wanted`: the splits that a run names; None = all that can be trained on or evaluated.
    """

    name = ""
    train_dataset_cls = eval_dataset_cls = TripletDataset
    credit: str | None = None
    wanted: Sequence[str] | None = None

    def __init__(self, cfg: Any = None) -> None:
        """cfg: a section of `datasets`, or a part of one: the schema has the rest. Raises ConfigError."""
        given = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
        super().__init__(OmegaConf.create(dataset_defaults(self.name, given)))

    def build_datasets(self) -> dict[str, TripletDataset]:
        self.build_processors()
        info = OmegaConf.to_container(self.config.build_info)
        self.left_out: dict[str, dict[str, Any]] = {}
        if self.config.get("data_type") == "shards":
            return self.build(info, *self._read_shards(info))
        distributed.on_main(lambda: self.prepare(info))  # it writes files: one process does it, the others wait
        return self.build(info, *self.read(info))

    def prepare(self, info: dict[str, Any]) -> None:
        """Make what the data set needs on disk; nothing by default."""

    def read(self, info: dict[str, Any]) -> Content:
        """Images by name (a path, or what else `load_image` takes), and triplets and gallery by split."""
        raise ConfigError(f"{type(self).__name__} must define read()")

    def _read_shards(self, info: dict[str, Any]) -> Content:
        if not info.get("root"):
            raise ConfigError(
                f"datasets.{self.name}.build_info.root is null; with data_type: shards it names the folder that "
                "`neucore shards` wrote"
            )
        paths, splits, self.left_out = shards.read_shards(info["root"], self.name)
        return paths, {s: found for s, found in splits.items() if self.wanted is None or s in self.wanted}

    def build(
        self, info: dict[str, Any], paths: dict[str, Any], splits: dict[str, tuple[list[Triplet], Gallery]]
    ) -> dict[str, TripletDataset]:
        """One data set a split and protocol."""
        stores = {side: ImageStore(paths, self.vis_processors[side]) for side in ("train", "eval")}
        chosen = protocols.presets(self.name, info.get("protocol"))
        datasets = {}
        for split, (triplets, gallery) in splits.items():
            side = "train" if split.startswith("train") else "eval"
            limit = info.get(f"max_{side}")
            for protocol in chosen if side == "eval" else chosen[:1]:
                name = split if protocol is chosen[0] else f"{split}@{protocol.name}"
                asked = protocols.queries(protocol, triplets[:limit], side == "train", info.get("joiner", "and"))
                dataset = datasets[name] = TripletDataset(
                    self.name,
                    name,
                    asked,
                    gallery,
                    stores[side],
                    captions=self.text_processors[side],
                    train=side == "train",
                    protocol=protocol,
                    answers=any(triplet.targets for triplet in asked),
                )
                dataset.credit = self.credit
                if self.name == "fashioniq" and side == "eval":
                    dataset.family = f"{split.split('_')[0]}_mean"
                dataset.left_out = self.left_out.get(split, {})
                logging.info("%s: %s holds %d queries, gallery %d", self.name, name, len(dataset), len(gallery.ids))
                if side == "eval" and self.name in PUBLISHED:
                    logging.info("%s: %s: protocol %s: %s", self.name, name, protocol.name, protocol.summary)
        return datasets


class PublishedBuilder(TripletBuilder):
    """A data set as published, below build_info.root or its environment variable (see `datasets/published/`).

    Raises one ConfigError with every annotation file and image folder that is missing; with `missing: skip` absent
    images are left out with the queries that need them, counted and listed in a file.
    """

    def read(self, info: dict[str, Any]) -> Content:
        splits = [s for s in catalogue.READERS[self.name].splits if s in (self.wanted or self.SPLITS)]
        _, found, self.left_out = catalogue.load(self.name, info.get("root"), splits, info.get("missing", "error"))
        if self.left_out:
            self._list_missing()
        return {name: path for _, gallery in found.values() for name, path in gallery.files.items()}, found

    def _list_missing(self) -> None:
        files = sorted({file for row in self.left_out.values() for file in row.pop("files")})
        listing = cache_dir() / f"missing-images-{self.name}.txt"

        def write() -> None:
            with atomic_write(listing, "w") as stream:
                stream.write("\n".join(files) + "\n")

        distributed.on_main(write)
        for split, row in self.left_out.items():
            row["listed_in"] = str(listing)
            logging.warning(
                "%s: %s lacks %d images; %d queries are skipped (the files: %s)",
                *(self.name, split, row["missing_images"], row["skipped_queries"], listing),
            )


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
                "DATASET_CONFIG_DICT": dataset_types(_reader.name),
            },
        )
    )


@register_builder("emoji")
class EmojiBuilder(TripletBuilder):
    """The embedded default: OpenMoji drawings (see `datasets/emoji/`)."""

    name = "emoji"
    SPLITS = SPLITS["emoji"]
    credit = drawings.CREDIT
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = dataset_types("emoji")

    def prepare(self, info: dict[str, Any]) -> None:
        drawings.prepare(info.get("cache_dir"), image_size=info["image_size"])

    def read(self, info: dict[str, Any]) -> Content:
        splits = emoji.load(info.get("cache_dir"), image_size=info["image_size"], role_cap=info["role_cap"])
        _, gallery = splits["train"]  # the gallery of every split
        return gallery.files, splits


@register_builder("folder")
class FolderBuilder(TripletBuilder):
    """One's own images and JSON annotations (see `datasets/folder.py`)."""

    name = "folder"
    SPLITS = None  # whatever the root holds
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = dataset_types("folder")

    def read(self, info: dict[str, Any]) -> Content:
        root = info["root"]
        known = folder.images(root)
        splits = [s for s in folder.splits(root, self.wanted or ()) if self.wanted is None or s in self.wanted]
        return known, {split: folder.load_split(root, split, known) for split in splits}
