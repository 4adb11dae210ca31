"""Which schema checks what: tables of models, data sets and processors. Knows neither torch nor lavis."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel

from neucore_plugin.config import data as schema_data
from neucore_plugin.config import run
from neucore_plugin.config.data import (
    CaptionProcessorSchema,
    EmojiSchema,
    FolderSchema,
    ImageProcessorSchema,
)
from neucore_plugin.config.encoders import BACKBONE_SCHEMAS
from neucore_plugin.config.model import CirBaselineSchema, NeucoreSchema
from neucore_plugin.config.published import PUBLISHED, SPLITS

MODEL_SCHEMAS: dict[str, type[BaseModel]] = {"neucore": NeucoreSchema, "cir_baseline": CirBaselineSchema}
DATASET_SCHEMAS: dict[str, type[BaseModel]] = {
    **{name: getattr(schema_data, f"{name.capitalize()}Schema") for name in PUBLISHED},
    "emoji": EmojiSchema,
    "folder": FolderSchema,
}
DATASET_SPLITS: dict[str, tuple[str, ...]] = dict(SPLITS)
PROCESSOR_SCHEMAS: dict[str, type[BaseModel]] = {
    "cir_image": ImageProcessorSchema,
    "cir_caption": CaptionProcessorSchema,
}


@dataclass(frozen=True)
class Tables:
    """Known names and default files. `splits`: the split names that a builder is known to have."""

    models: Mapping[str, Mapping[str, str]]
    datasets: Mapping[str, Mapping[str, str]]
    tasks: tuple[str, ...] = run.OUR_TASKS
    runners: tuple[str, ...] = run.OUR_RUNNERS
    processors: tuple[str, ...] = tuple(PROCESSOR_SCHEMAS)
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict(DATASET_SPLITS))


def register_dataset_schema(name: str, schema: type[BaseModel], splits: Iterable[str] | None = None) -> None:
    """Check `datasets.<name>` by `schema` (usually a DatasetSchema); `splits`: the names that its builder knows."""
    DATASET_SCHEMAS[name] = schema
    if splits is not None:
        DATASET_SPLITS[name] = tuple(splits)


def register_model_schema(arch: str, schema: type[BaseModel]) -> None:
    """Check the `model` section of `arch` by `schema`."""
    MODEL_SCHEMAS[arch] = schema


def register_backbone_schema(side: str, name: str, schema: type[BaseModel]) -> None:
    """Check `model.backbone.<side>` (image or text) with that name by `schema`."""
    BACKBONE_SCHEMAS[side][name] = schema


def register_processor_schema(name: str, schema: type[BaseModel]) -> None:
    """Check a processor with that name by `schema`."""
    PROCESSOR_SCHEMAS[name] = schema
