"""The host task `composed_image_retrieval`: concepts, feature caches, evaluation, result files.

B batch, Q queries, G gallery images.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import ConfigError, DataError, ImageError, nearest
from neucore_plugin.common.files import cache_dir
from neucore_plugin.common.images import check_images, load_image
from neucore_plugin.concepts import ConceptExtractor, ConceptVocabulary, cached_concepts
from neucore_plugin.datasets.encode_ahead import _bad_images
from neucore_plugin.datasets.feature_cache import FeatureCache, build_cache, content_fingerprints
from neucore_plugin.datasets.triplets import GalleryDataset, ImageStore, TripletDataset
from neucore_plugin.evaluation.evaluator import _gather, _gather_keys, _in_order, _interleave, _quiet
from neucore_plugin.evaluation.ranking import LESS, Ranking
from neucore_plugin.evaluation.results import show_finished, summary, write_results
from neucore_plugin.host.registration import register_task
from neucore_plugin.retrieval.ranks import topk

SPLIT_KEYS = ("train_splits", "valid_splits", "test_splits")


@register_task("composed_image_retrieval")
class ComposedImageRetrievalTask(BaseTask):
    """Train and evaluate a composed-retrieval model of the registry.

    Protocol: the gallery is the split's own list, encoded once; the reference is removed from the ranking; ties go to
    the image that comes first in the gallery; the rank of a query is that of its best-placed right answer.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.run, self.model_config = cfg.run_cfg, cfg.model_cfg
        self._gallery: tuple[str, dict[str, torch.Tensor]] | None = None
        self._results: dict[str, dict[str, Any]] = {}

    @classmethod
    def setup_task(cls, **kwargs) -> "ComposedImageRetrievalTask":
        """The host's entry: `cfg` holds the sections run, model and datasets."""
        return cls(kwargs["cfg"])

    # ---- before training ------------------------------------------------------------------------------------------

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, TripletDataset]]:
        """{name: {split: TripletDataset}}, with the concepts of every relative caption."""
        datasets = {}
        for name, config in cfg.datasets_cfg.items():
            builder = registry.get_builder_class(name)
            if builder is None:
                known = registry.mapping["builder_name_mapping"]
                raise ConfigError(f"datasets.{name}: no such data set.{nearest(name, known)}")
            made = builder(config)
            made.wanted = self._wanted_splits()
            datasets[name] = made.build_datasets()
        self._check_splits(datasets)
        self._expand_protocols(cfg.run_cfg, datasets)
        everything = _all(datasets)
        texts = sorted({text for dataset in everything for text in dataset.texts})
        concepts = self._concepts(texts)
        for dataset in everything:
            dataset.concepts = [concepts[text] for text in dataset.texts]
        return datasets

    def build_split(self, cfg: Any, name: str, split: str) -> TripletDataset:
        """One split of a data set, also one without answers, with the concepts of its relative captions."""
        made = registry.get_builder_class(name)(cfg.datasets_cfg[name])
        made.wanted = [split]
        dataset = made.build_datasets()[split]
        concepts = self._concepts(sorted(set(dataset.texts)))
        dataset.concepts = [concepts[text] for text in dataset.texts]
        return dataset

    def _wanted_splits(self) -> list[str]:
        """Splits that the run names; an evaluation does without those of the training."""
        keys = ("valid_splits", "test_splits") if self.run.get("evaluate") else SPLIT_KEYS
        return [split for key in keys for split in self.run.get(key) or []]

    @staticmethod
    def _expand_protocols(run: Any, datasets: Mapping[str, Mapping[str, Any]]) -> None:
        """Test a split with every protocol of its data set: "val" becomes "val", "val@soft", ...; one after the other,
        so that they share the encoded gallery."""
        named = list(dict.fromkeys(split for splits in datasets.values() for split in splits))
        chosen = [split for split in run.get("test_splits") or [] if "@" not in split]
        if any("@" in split for split in named):
            run["test_splits"] = [
                name for split in chosen for name in named if name == split or name.startswith(f"{split}@")
            ]

    def _check_splits(self, datasets: Mapping[str, Mapping[str, Any]]) -> None:
        held = {split for splits in datasets.values() for split in splits}
        problems = [
            f"run.{key}: no data set of this config has a split {split!r}.{nearest(split, held)}"
            for key in SPLIT_KEYS
            for split in self.run.get(key) or []
            if split not in held and not (key == "train_splits" and self.run.get("evaluate"))
        ]
        if problems:
            raise ConfigError("\n".join(problems))

    def _concepts(self, texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
        extractor = ConceptExtractor(tuple(self.model_config.concepts.pos))
        return cached_concepts(extractor, texts, self._cache_root(), distributed.on_main)

    def _cache_root(self) -> Path:
        given = self.run.get("cache_dir")
        return (Path(given).expanduser() if given else cache_dir()) / "features"

    def build_model(self, cfg: Any, datasets: Mapping[str, Mapping[str, TripletDataset]] | None = None) -> Any:
        """The model of the config: from `model.checkpoint` where given, else new with the train split's concepts."""
        model_class = registry.get_model_class(cfg.model_cfg.arch)
        if cfg.model_cfg.get("checkpoint"):
            return model_class.from_config(cfg.model_cfg)
        if self.run.get("evaluate"):
            raise ConfigError("run.evaluate is true, but model.checkpoint names no trained weights to evaluate")
        train = [
            dataset for dataset in _all(datasets or {}) if dataset.split in (self.run.get("train_splits") or ["train"])
        ]
        if not train:
            raise ConfigError("run.train_splits is empty: the concept vocabulary is built from the training captions")
        vocabulary = ConceptVocabulary.from_captions(
            [concepts for dataset in train for concepts in dataset.concepts], cfg.model_cfg.concepts.min_count
        )
        if not len(vocabulary):
            raise DataError(
                f"the captions of {', '.join(d.split for d in train)} hold no concept that occurs at least "
                f"{cfg.model_cfg.concepts.min_count} times; lower model.concepts.min_count or widen model.concepts.pos"
            )
        logging.info("concept vocabulary: %d lemmas", len(vocabulary))
        captions = [text for dataset in train for text in dataset.texts]
        return model_class.from_config(cfg.model_cfg, vocabulary=vocabulary, captions=captions)

    def prepare(self, model: Any, datasets: Mapping[str, Any], cfg: Any, output_dir: str | Path) -> None:
        """Check every image, and run frozen encoders ahead once, into caches on disk."""
        everything = _all(datasets)
        if is_main_process():
            model.vocabulary.to_json(Path(output_dir) / "concepts.json")
        stores = {id(dataset.images): dataset.images for dataset in everything}.values()
        model.image_processor = copy.copy(everything[0].images.processor)
        for dataset in everything:
            if not dataset.train:
                model.image_processor = dataset.images.processor
        backbone = model.backbone
        cacheable = bool(self.run.get("cache_features", True))
        for store in stores:
            if cacheable and backbone.freeze_image and store.processor.deterministic:
                store.cache = self._image_cache(backbone.image, store, model.device)
            else:
                failures = check_images(list(store.paths.values()))
                if failures:
                    raise _bad_images(failures, output_dir)
        if cacheable and backbone.freeze_text:
            cache = self._text_cache(backbone.text, sorted({text for d in everything for text in d.texts}))
            for dataset in everything:
                dataset.text_cache = cache

    def _image_cache(self, encoder: Any, store: ImageStore, device: torch.device) -> FeatureCache:
        names = list(store.paths)

        @torch.inference_mode()
        def encode(part: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            try:
                pixels = torch.stack([store.processor(load_image(store.paths[name])) for name in part])
            except ImageError:
                # One is bad: look at all of them now, so that the user mends them in one go.
                raise _bad_images(check_images(list(store.paths.values())), self._cache_root()) from None
            out = encoder(pixels.to(device))
            yield from zip(out["tokens"].cpu().numpy(), out["pooled"].cpu().numpy(), strict=True)

        encoder_key = f"{encoder.fingerprint}|{store.processor.fingerprint}"
        return self._shared(
            lambda: build_cache(
                self._cache_root(),
                "images",
                encoder_key,
                names,
                content_fingerprints(list(store.paths.values())),
                encode,
                batch_size=8,  # twice as fast on a CPU as 32: the activations stay in its cache
            )
        )

    def _text_cache(self, encoder: Any, texts: Sequence[str]) -> FeatureCache:
        @torch.inference_mode()
        def encode(part: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            out = {key: value.cpu() for key, value in encoder(part).items()}
            for words, mask, sentence in zip(out["words"], out["mask"], out["sentence"], strict=True):
                yield words[mask].numpy(), sentence.numpy()

        return self._shared(
            lambda: build_cache(self._cache_root(), "texts", encoder.fingerprint, texts, [""] * len(texts), encode, 64)
        )

    @staticmethod
    def _shared(build) -> FeatureCache:
        """The main process builds, the others wait and then open the same files."""
        return distributed.on_main(build)

    # ---- training and evaluation ----------------------------------------------------------------------------------

    def train_step(self, model: Any, samples: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Losses of one batch; the runner steps on "loss" and logs the others."""
        return model(samples)

    @torch.inference_mode()
    def evaluation(
        self, model: Any, data_loader: DataLoader, cuda_enabled: bool = False, testing: bool = False, **_: Any
    ) -> dict[str, Any]:
        """Rank the gallery for this process's queries, then gather.

        The row is called by the model's `title`. With `testing`, rows "text_only" and "image_only" stand beside it: the
        same model sees less of a query.
        The data set's protocol says what is ranked and counted (see `datasets/protocols.py`).

        Returns {"dataset", "title", "ranks": {row: LongTensor [Q]}, "subset_ranks": the same within each query's
        group, "soft": {row: [(ranks, ranks in the group, weights) a query]}, "best": {row: LongTensor [Q,K]}, "top":
        LongTensor [Q,10], "top_scores": [Q,10]}, the same on every process. What a data set has no use for is empty:
        "subset_ranks" unless every query has a group, "soft" and "best" unless the protocol asks for them.
        """
        model = getattr(model, "module", model)
        model.eval()
        dataset = data_loader.dataset
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        gallery = self._encode_gallery(model, dataset, data_loader)
        rows = dict.fromkeys([model.title, *(LESS if testing else ())])  # a baseline may itself be "text_only"
        ranking = Ranking(dataset)
        found: dict[str, dict[str, dict[int, Any]]] = {}
        bar = tqdm(data_loader, f"ranking {dataset.split}", unit="batch", leave=False, disable=_quiet())
        for samples in bar:
            indices = samples["index"].tolist()
            for row in rows:
                query = self._encode_queries(model, samples, row)
                scores = model.score(query, gallery, chunk=int(self.run.get("score_chunk", 256)))
                for kind, values in ranking(scores, indices, shown=row == model.title).items():
                    found.setdefault(kind, {}).setdefault(row, {}).update(zip(indices, values, strict=True))
        whole = {
            kind: {row: _in_order(_gather(values), len(dataset)) for row, values in of_rows.items()}
            for kind, of_rows in _gather_keys(found).items()
        }
        shown = {kind: whole.pop(kind)[model.title] for kind in ("top", "top_scores")}
        kinds = {kind: {} for kind in ("ranks", "subset_ranks", "soft", "best")}
        return {"dataset": dataset, "title": model.title, **kinds, **whole, **shown}

    @torch.inference_mode()
    def rank_for_submission(
        self, model: Any, dataset: TripletDataset, count: int, in_group: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Gallery positions of the `count` best images of each query, and of the `in_group` best of its group.

        The reference takes no place. Groups are empty lists where the data set has none. DataError for a gallery that
        is too small.
        """
        if len(dataset.gallery.ids) <= count:
            raise DataError(f"a gallery of {len(dataset.gallery.ids)} images cannot give {count} images a query")
        loader = DataLoader(dataset, batch_size=int(self.run.get("batch_size_eval", 64)), collate_fn=dataset.collater)
        gallery = self._encode_gallery(model, dataset, loader)
        whole: list[list[int]] = []
        groups: list[list[int]] = []
        for samples in tqdm(loader, f"ranking {dataset.split}", unit="batch", disable=_quiet()):
            indices = samples["index"].tolist()
            scores = model.score(self._encode_queries(model, samples), gallery).cpu()
            excluded = [dataset.reference_position(index) for index in indices]
            whole += topk(scores, count, excluded).tolist()
            for row, index in enumerate(indices):
                members = sorted(set(dataset.member_positions(index)) - {excluded[row]})
                order = sorted(members, key=lambda place: (-float(scores[row, place]), place))
                groups.append(order[:in_group])
        return whole, groups

    @staticmethod
    def _encode_queries(model: Any, samples: Mapping[str, Any], row: str | None = None) -> dict[str, torch.Tensor]:
        inputs: dict[str, Any] = {}
        if row != "text_only":
            cached = {key: samples.get(f"reference_{key}") for key in ("tokens", "pooled")}
            inputs = {"pixels": samples.get("reference_image"), **cached}
        if row != "image_only":
            cached = {key: samples[key] for key in ("words", "word_mask", "sentence")} if "words" in samples else None
            inputs |= {
                "texts": samples["text_input"],
                "text_features": cached,
                "concept_words": samples["concept_words"],
            }
        return model.encode_query(**inputs)

    def _encode_gallery(self, model: Any, dataset: TripletDataset, loader: DataLoader) -> dict[str, torch.Tensor]:
        """Gallery encoding [G,D]; kept until the weights or the gallery change, since splits often share it."""
        key = f"{model.fingerprint()}|{dataset.gallery.fingerprint}"
        if self._gallery is not None and self._gallery[0] == key:
            return self._gallery[1]
        images = GalleryDataset(dataset.gallery, dataset.images)
        mine = Subset(images, range(get_rank(), len(images), get_world_size()))
        batches = DataLoader(
            mine, batch_size=loader.batch_size or 64, num_workers=loader.num_workers, collate_fn=images.collater
        )
        parts = []
        for batch in tqdm(batches, "encoding gallery", unit="batch", leave=False, disable=_quiet()):
            encoded = model.encode_image(batch.get("image"), tokens=batch.get("tokens"), pooled=batch.get("pooled"))
            parts.append({name: value.cpu() for name, value in encoded.items()})
        own = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
        encoding = {name: value.to(model.device) for name, value in _interleave(own).items()}
        self._gallery = (key, encoding)
        return encoding

    def after_evaluation(self, val_result: Mapping[str, Any], split_name: str, epoch: Any = None) -> dict[str, Any]:
        """Metrics of a split, percent: R@1/5/10/50, median rank; the other rows and each change type beside them.

        R_subset@1/2/3 as well where the queries have groups, mAP@K where the protocol has it. `agg_metrics`, which
        selects the best checkpoint, is the mean of what the protocol names; without one of R@1 and R@10, or with groups
        of R@5 and R_subset@1, which is CIRR's rule.
        """
        dataset, title = val_result["dataset"], val_result["title"]
        table = {row: summary(val_result, row) for row in val_result["ranks"]}
        changes = sorted({triplet.change for triplet in dataset.triplets} - {""})
        per_change = {
            change: summary(val_result, title, [t.change == change for t in dataset.triplets]) for change in changes
        }
        self._results[split_name] = {**val_result, "table": table, "per_change": per_change}
        metrics = dict(table[title])
        chosen_by = ("R@5", "R_subset@1") if val_result["subset_ranks"] else ("R@1", "R@10")
        select = dataset.protocol.select if dataset.protocol is not None else ()
        held = [name for name in select if name in metrics]  # a small gallery has no mAP@50
        if held and (len(held) == len(select) or dataset.protocol.precision_at):
            chosen_by = held
        metrics["agg_metrics"] = sum(metrics[name] for name in chosen_by) / len(chosen_by)
        metrics |= {row: values for row, values in table.items() if row != title}
        if per_change:
            metrics["per_change"] = per_change
        return metrics

    # ---- results --------------------------------------------------------------------------------------------------

    def show_finished(self, output_dir: str | Path, cfg: Any) -> None:
        """A finished run is asked for again: its table on the log, its results.json and report.html one level up."""
        show_finished(output_dir, cfg.run_cfg.output_dir)

    def finish(
        self,
        test_metrics: Mapping[str, Any],
        model: Any,
        output_dir: str | Path,
        cfg: Any,
        provenance: Mapping[str, Any],
    ) -> list[Path]:
        """Write the result files of the test splits (see `results.py`); returns their paths."""
        evaluated = {split: self._results[split] for split in test_metrics}
        if not evaluated:
            return []
        model = getattr(model, "module", model).eval()
        report = bool(self.run.get("report", True))
        return write_results(evaluated, model, output_dir, cfg.run_cfg.output_dir, provenance, report)


def _all(datasets: Mapping[str, Any]) -> list[TripletDataset]:
    return [dataset for splits in datasets.values() for dataset in splits.values()]
