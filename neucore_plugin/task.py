"""The host's hub of a run: the task `composed_image_retrieval` builds data and model, prepares, evaluates, writes."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from torch.utils.data import DataLoader

from neucore_plugin.clauses import clauses
from neucore_plugin.common import distributed
from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.common.files import features_dir
from neucore_plugin.concepts import ConceptExtractor, ConceptVocabulary, ReleasedConceptExtractor, cached_concepts
from neucore_plugin.config.crosschecks import unknown_splits
from neucore_plugin.config.encoders import reads_raw
from neucore_plugin.config.model import ZERO_SHOT
from neucore_plugin.datasets.encode_ahead import encode_ahead
from neucore_plugin.datasets.training_gallery import TrainingGallery
from neucore_plugin.datasets.triplets import TripletDataset
from neucore_plugin.evaluation.evaluator import Evaluator
from neucore_plugin.evaluation.ranking import Evaluated
from neucore_plugin.evaluation.results import show_finished, write_results
from neucore_plugin.host.registration import register_task

Datasets = Mapping[str, Mapping[str, TripletDataset]]  # {name: {split: data set}}


@register_task("composed_image_retrieval")
class ComposedImageRetrievalTask(BaseTask):
    """Train and evaluate a composed-retrieval model of the registry. The host calls the methods in this order."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.run, self.model_config = cfg.run_cfg, cfg.model_cfg
        self.evaluator = Evaluator(int(self.run.score_chunk), int(self.run.batch_size_eval))
        self._evaluated: dict[str, Evaluated] = {}

    @classmethod
    def setup_task(cls, **kwargs: Any) -> "ComposedImageRetrievalTask":
        """The host's entry: `cfg` holds the sections run, model and datasets."""
        return cls(kwargs["cfg"])

    # ---- data and model -------------------------------------------------------------------------------------------

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, TripletDataset]]:
        """The splits that the run names, with the concepts of every relative caption; an evaluation does without those
        of the training."""
        keys = [*([] if self.run.evaluate else ["train_splits"]), "valid_splits", "test_splits"]
        named = {key: list(getattr(self.run, key)) for key in keys}
        wanted = [split for splits in named.values() for split in splits]
        datasets = {name: _builder(cfg, name, wanted).build_datasets() for name in cfg.datasets_cfg}
        first = 0
        for splits in datasets.values():  # two images of one training never have one number
            for dataset in splits.values():
                dataset.first_key = first
            first += max(len(dataset.images.paths) for dataset in splits.values()) if splits else 0
        known = list(dict.fromkeys(split for splits in datasets.values() for split in splits))
        problems = [": ".join(found) for found in unknown_splits(self.run, datasets, known)]
        if problems:
            raise ConfigError("\n".join(problems))
        # Test a split with every protocol of its data set: "val" becomes "val", "val@soft", ...; one after the other,
        # so that they share the encoded gallery.
        if any("@" in split for split in known):
            bare = [split for split in named["test_splits"] if "@" not in split]
            self.run.test_splits = [name for split in bare for name in known if name.split("@")[0] == split]
        self._find_concepts(_all(datasets))
        return datasets

    def build_split(self, cfg: Any, name: str, split: str) -> TripletDataset:
        """One split of a data set, also one without answers, with the concepts of its relative captions."""
        dataset = _builder(cfg, name, [split]).build_datasets()[split]
        self._find_concepts([dataset])
        return dataset

    def _find_concepts(self, datasets: Sequence[TripletDataset]) -> None:
        pos, folder = tuple(self.model_config.concepts.pos), features_dir(self.run.cache_dir)
        raw = reads_raw(self.model_config.get("backbone") or {})
        asked = [(dataset, dataset.repeats if raw else [1] * len(dataset)) for dataset in datasets]
        concepts = {}
        for count in sorted({count for _, repeats in asked for count in repeats}):
            of_count = [(d, place) for d, ns in asked for place, n in enumerate(ns) if n == count]
            texts = sorted({text for d, place in of_count for text in (d.texts[place], *d.wordings[place])})
            extractor = ReleasedConceptExtractor(pos, count) if raw else ConceptExtractor(pos)
            concepts[count] = cached_concepts(extractor, texts, folder, distributed.on_main)
        for dataset, repeats in asked:
            dataset.concepts = [concepts[count][text] for text, count in zip(dataset.texts, repeats, strict=True)]
            further = zip(dataset.wordings, repeats, strict=True)
            dataset.wording_concepts = [tuple(concepts[n][text] for text in texts) for texts, n in further]

    def build_model(self, cfg: Any, datasets: Datasets | None = None) -> Any:
        """The model of the config: from `model.checkpoint` where given, else new with the train splits' concepts.

        A method that trains nothing needs neither.
        """
        train = [dataset for dataset in _all(datasets or {}) if dataset.split in self.run.train_splits]
        beyond = (cfg.model_cfg.get("matching") or {}).get("negatives", "batch") != "batch"
        gallery = TrainingGallery(train) if beyond and train and not self.run.evaluate else None
        model = self._new_model(cfg, train)
        model.seed = int(self.run.seed)
        if gallery is not None:
            model.use_gallery(gallery, model.seed)
        return model

    def _new_model(self, cfg: Any, train: Sequence[TripletDataset]) -> Any:
        model_class = registry.get_model_class(cfg.model_cfg.arch)
        if cfg.model_cfg.get("checkpoint") or cfg.model_cfg.get("method") in ZERO_SHOT:
            return model_class.from_config(cfg.model_cfg)
        least = cfg.model_cfg.concepts.min_count
        vocabulary = ConceptVocabulary.from_captions([found for part in train for found in part.concepts], least)
        if not len(vocabulary):
            raise DataError(
                f"the captions of {', '.join(self.run.train_splits)} hold no concept that occurs at least {least} "
                "times; lower model.concepts.min_count or widen model.concepts.pos"
            )
        logging.info("concept vocabulary: %d lemmas", len(vocabulary))
        captions = [text for dataset in train for text in dataset.texts]
        return model_class.from_config(cfg.model_cfg, vocabulary=vocabulary, captions=captions)

    def prepare(self, model: Any, datasets: Datasets, cfg: Any, output_dir: str | Path) -> None:
        """Keep the vocabulary, check every image, and run frozen encoders ahead once, into caches on disk."""
        everything = _all(datasets)
        if distributed.rank() == 0:
            model.vocabulary.to_json(Path(output_dir) / "concepts.json")
            model.tell_unknown(text for dataset in everything for text in dataset.texts)
        shown_as = [dataset for dataset in everything if not dataset.train] or everything[:1]
        model.image_processor = shown_as[-1].images.processor
        root, cache = features_dir(self.run.cache_dir), bool(self.run.cache_features) and not model.reads_pairs
        for dataset in everything:
            dataset.clauses = partial(clauses, most=model.clauses) if model.clauses > 1 else None
            dataset.images.reads = model.image_reads
        encode_ahead(everything, model.backbone, model.device, root, distributed.on_main, cache, output_dir)
        shown = [dataset for dataset in everything if dataset.split in self.run.train_splits]
        if model.layout is not None and shown and not self.run.evaluate:
            model.fit_layout(None if any(dataset.streamed for dataset in shown) else TrainingGallery(shown))

    # ---- training and evaluation ----------------------------------------------------------------------------------

    def train_step(self, model: Any, samples: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Losses of one batch; the runner steps on "loss" and logs the others."""
        return model(samples)

    def evaluation(
        self, model: Any, data_loader: DataLoader, cuda_enabled: bool = False, testing: bool = False, **_: Any
    ) -> Evaluated:
        """Rank the gallery for every query of a split, on every process the same; `testing`: also for partial ones."""
        return self.evaluator.evaluate(model, data_loader, partial=testing)

    def after_evaluation(self, val_result: Evaluated, split_name: str, epoch: Any = None) -> dict[str, Any]:
        """Metrics of a split, percent, with `agg_metrics`, which selects the best checkpoint."""
        self._evaluated[split_name] = val_result
        return val_result.metrics()

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
        """Write the result files of the test splits (see `evaluation/results.py`); returns their paths."""
        evaluated = {split: self._evaluated[split] for split in test_metrics}
        if not evaluated:
            return []
        return write_results(evaluated, model, output_dir, cfg.run_cfg.output_dir, provenance, bool(self.run.report))


def _builder(cfg: Any, name: str, splits: Sequence[str]) -> Any:
    """The builder of a data set, for the splits that are wanted."""
    builder = registry.get_builder_class(name)(cfg.datasets_cfg[name])
    builder.wanted = list(splits)
    return builder


def _all(datasets: Datasets) -> list[TripletDataset]:
    return [dataset for splits in datasets.values() for dataset in splits.values()]
