"""What the `datasets` section may say: a schema a data set, and those of the processors."""

from typing import Any

from pydantic import Field

from neucore_plugin.schema_values import Section, Text, choice, triple, whole

CIRR_SPLITS = ("train", "val")
EMOJI_SPLITS = ("train", "val", "test_combo", "test_role", "test_word", "test_two")


class ImageProcessorSchema(Section):
    name: Text
    image_size: whole(1) = 224
    mean: triple(low=0) = [0.5, 0.5, 0.5]
    std: triple(above=0) = [0.5, 0.5, 0.5]
    fit: choice("pad", "crop", "stretch") = "pad"
    augment: choice("none", "crop_flip") = "none"


class CaptionProcessorSchema(Section):
    name: Text


class ProcessorPairSchema(Section):
    train: Any = None
    eval: Any = None


class PreprocessSchema(Section):
    vis_processor: ProcessorPairSchema | None = None
    text_processor: ProcessorPairSchema | None = None


class DatasetSchema(Section):
    """Base of the data sets' schemas; a subclass gives `build_info` a type of its own."""

    type: Text = "default"
    data_type: choice("images") = "images"
    build_info: dict[str, Any] = Field(default_factory=dict)
    vis_processor: ProcessorPairSchema | None = None
    text_processor: ProcessorPairSchema | None = None


class EmojiInfoSchema(Section):
    cache_dir: Text | None = None
    image_size: whole(16) = 224
    role_cap: whole(1) = 12
    max_train: whole(1) | None = None
    max_eval: whole(1) | None = None


class EmojiSchema(DatasetSchema):
    build_info: EmojiInfoSchema = Field(default_factory=EmojiInfoSchema)


class CirrInfoSchema(Section):
    root: Text | None = None  # null: the environment variable NEUCORE_CIRR_ROOT
    max_train: whole(1) | None = None
    max_eval: whole(1) | None = None


class CirrSchema(DatasetSchema):
    build_info: CirrInfoSchema = Field(default_factory=CirrInfoSchema)


class FolderInfoSchema(Section):
    root: Text
    max_train: whole(1) | None = None
    max_eval: whole(1) | None = None


class FolderSchema(DatasetSchema):
    build_info: FolderInfoSchema
