"""What the `datasets` section may say: a schema a data set, and those of the processors."""

from typing import Any

from pydantic import Field

from neucore_plugin.config.published import PRESETS
from neucore_plugin.config.values import Section, Text, choice, triple, whole, words


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
    data_type: choice("images", "shards") = "images"
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


class PublishedInfoSchema(Section):
    root: Text | None = None  # null: the data set's environment variable, such as NEUCORE_CIRR_ROOT
    missing: choice("error", "skip") = "error"  # images that have no file
    max_train: whole(1) | None = None
    max_eval: whole(1) | None = None


def _presets(dataset: str) -> Any:
    return words(tuple(PRESETS[dataset]), at_least=1)


class CirrInfoSchema(PublishedInfoSchema):
    protocol: _presets("cirr") = [next(iter(PRESETS["cirr"]))]


class CirrSchema(DatasetSchema):
    build_info: CirrInfoSchema = Field(default_factory=CirrInfoSchema)


class FashioniqInfoSchema(PublishedInfoSchema):
    protocol: _presets("fashioniq") = [next(iter(PRESETS["fashioniq"]))]
    joiner: choice("and", "<and>") = "and"  # between the two captions of a pair; glove_bigru has a vector for <and>


class FashioniqSchema(DatasetSchema):
    build_info: FashioniqInfoSchema = Field(default_factory=FashioniqInfoSchema)


class ShoesInfoSchema(PublishedInfoSchema):
    protocol: _presets("shoes") = [next(iter(PRESETS["shoes"]))]


class ShoesSchema(DatasetSchema):
    build_info: ShoesInfoSchema = Field(default_factory=ShoesInfoSchema)


class Fashion200kInfoSchema(PublishedInfoSchema):
    protocol: _presets("fashion200k") = [next(iter(PRESETS["fashion200k"]))]


class Fashion200kSchema(DatasetSchema):
    build_info: Fashion200kInfoSchema = Field(default_factory=Fashion200kInfoSchema)


class CircoInfoSchema(PublishedInfoSchema):
    protocol: _presets("circo") = [next(iter(PRESETS["circo"]))]


class CircoSchema(DatasetSchema):
    build_info: CircoInfoSchema = Field(default_factory=CircoInfoSchema)


class FolderInfoSchema(Section):
    root: Text
    max_train: whole(1) | None = None
    max_eval: whole(1) | None = None


class FolderSchema(DatasetSchema):
    build_info: FolderInfoSchema
