"""Which schema checks what, and which names are known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from neucore_plugin.config.data import DATASET_SCHEMAS, PROCESSOR_SCHEMAS
from neucore_plugin.config.model import CirBaselineSchema, ModelSchema, NeucoreSchema
from neucore_plugin.config.published import SPLITS
from neucore_plugin.config.run import RUNNERS, TASKS
from neucore_plugin.config.shipped import CONFIGS

MODEL_SCHEMAS: dict[str, type[ModelSchema]] = {"neucore": NeucoreSchema, "cir_baseline": CirBaselineSchema}


def model_types(arch: str) -> dict[str, str]:
    """{model type: path of its yaml} of a model of ours.

    The authors' form is NEUCORE's alone, what needs no training the baselines'.
    """
    files = {path.stem: str(path) for path in sorted((CONFIGS / "models").glob("*.yaml"))}
    others = "zeroshot_" if arch == "neucore" else "official_"
    return {name: path for name, path in files.items() if not name.startswith(others)}


def dataset_types(name: str) -> dict[str, str]:
    """{type: path of its yaml} of a data set of ours."""
    return {"default": str(CONFIGS / "datasets" / f"{name}.yaml")}


@dataclass(frozen=True)
class Tables:
    """Known names and default files: {arch: {model type: path}}, {data set: {type: path}}, {data set: its splits}.

    own_pixels: of a section `model.backbone.image`, what its model's files say of its pixels; None: they are not asked.
    """

    models: Mapping[str, Mapping[str, str]]
    datasets: Mapping[str, Mapping[str, str]]
    tasks: tuple[str, ...] = TASKS
    runners: tuple[str, ...] = RUNNERS
    processors: tuple[str, ...] = tuple(PROCESSOR_SCHEMAS)
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: SPLITS)
    own_pixels: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None


def package_tables() -> Tables:
    """What this package alone knows, without the host."""
    datasets = {name: dataset_types(name) for name in DATASET_SCHEMAS}
    return Tables(models={arch: model_types(arch) for arch in MODEL_SCHEMAS}, datasets=datasets)
