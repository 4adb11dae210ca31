"""The host's dataset builders for composed image retrieval, map-style."""

import logging
from pathlib import Path
from typing import Any, ClassVar

from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from omegaconf import OmegaConf

from neucore_plugin import distributed, host
from neucore_plugin.datasets import cirr, emoji, folder
from neucore_plugin.datasets.triplets import Gallery, ImageStore, Triplet, TripletDataset
from neucore_plugin.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "datasets"


class TripletBuilder(BaseDatasetBuilder):
    """Common part: processors from the config, one TripletDataset a split. Subclasses read the annotations.

    `build_datasets` returns {split: TripletDataset}; only splits whose name starts with "train" load target images.
    """

    name = ""
    train_dataset_cls = eval_dataset_cls = TripletDataset
    credit: str | None = None

    def build_datasets(self) -> dict[str, TripletDataset]:
        self.build_processors()
        info = self.config.get("build_info") or {}
        info = OmegaConf.to_container(info, resolve=True) if OmegaConf.is_config(info) else dict(info)
        distributed.on_main(lambda: self.prepare(info))  # it writes files: one process does it, the others wait
        return self.build(info)

    def prepare(self, info: dict[str, Any]) -> None:
        """Make what the data set needs on disk; nothing by default."""

    def read(self, info: dict[str, Any]) -> tuple[dict[str, Path], dict[str, tuple[list[Triplet], Gallery]]]:
        """Image files by name, and triplets and gallery by split."""
        raise ConfigError(f"{type(self).__name__} must define read()")

    def build(self, info: dict[str, Any]) -> dict[str, TripletDataset]:
        paths, splits = self.read(info)
        stores = {side: ImageStore(paths, self.vis_processors[side]) for side in ("train", "eval")}
        datasets = {}
        for split, (triplets, gallery) in splits.items():
            side = "train" if split.startswith("train") else "eval"
            limit = info.get(f"max_{side}")
            dataset = TripletDataset(
                self.name,
                split,
                triplets[:limit] if limit else triplets,
                gallery,
                stores[side],
                captions=self.text_processors[side],
                train=side == "train",
            )
            dataset.credit = self.credit
            datasets[split] = dataset
            logging.info("%s: %s holds %d queries, gallery %d", self.name, split, len(dataset), len(gallery.ids))
        return datasets


@host.register_builder("emoji")
class EmojiBuilder(TripletBuilder):
    """The embedded default: OpenMoji drawings (see `datasets/emoji.py`)."""

    name = "emoji"
    SPLITS = emoji.SPLITS
    credit = "Drawings: OpenMoji (openmoji.org), CC BY-SA 4.0"
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": str(CONFIGS / "emoji.yaml")}

    def prepare(self, info: dict[str, Any]) -> None:
        emoji.prepare(info.get("cache_dir"), image_size=info["image_size"])

    def read(self, info: dict[str, Any]):
        data = emoji.load(info.get("cache_dir"), image_size=info["image_size"], role_cap=info["role_cap"])
        paths = dict(zip(data.gallery.ids, data.gallery.paths, strict=True))
        return paths, {split: (data.triplets(split), data.gallery) for split in self.SPLITS}


@host.register_builder("cirr")
class CirrBuilder(TripletBuilder):
    """CIRR as published, below build_info.root or $NEUCORE_CIRR_ROOT (see `datasets/cirr.py`); without test1.

    Raises one ConfigError with every annotation file and image folder that is missing.
    """

    name = "cirr"
    SPLITS = cirr.WITH_TARGETS
    credit = "Annotations: CIRR (Liu et al., ICCV 2021), MIT. Images: NLVR2, under its terms of use"
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": str(CONFIGS / "cirr.yaml")}

    def read(self, info: dict[str, Any]):
        root = cirr.locate(info.get("root"), self.SPLITS)
        paths, splits = {}, {}
        for split in self.SPLITS:
            triplets, gallery, files = cirr.load_split(root, split)
            paths |= files
            splits[split] = (triplets, gallery)
        logging.info("cirr: protocol hard: a hit is target_hard; R_subset@K ranks the other members of a query's group")
        return paths, splits


@host.register_builder("folder")
class FolderBuilder(TripletBuilder):
    """One's own images and JSON annotations (see `datasets/folder.py`)."""

    name = "folder"
    SPLITS = None  # whatever the root holds
    DATASET_CONFIG_DICT: ClassVar[dict[str, str]] = {"default": str(CONFIGS / "folder.yaml")}

    def read(self, info: dict[str, Any]):
        root = info["root"]
        known = folder.images(root)
        return known, {split: folder.load_split(root, split, known) for split in folder.splits(root)}
