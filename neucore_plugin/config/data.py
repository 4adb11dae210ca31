"""What the `datasets` section may say: a schema a data set, and those of the processors."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt
from pydantic import Field, PlainValidator, ValidationInfo, create_model

from neucore_plugin.common.images import MAX_PIXELS
from neucore_plugin.config.encoders import FITS_OF_MODELS, HALF, INTERPOLATIONS, RESIZING_FITS
from neucore_plugin.config.kinds import THREE, Allowed, NoneTwice, Real, Text
from neucore_plugin.config.published import PRESETS
from neucore_plugin.config.section import Problems, Section

FITS = (*FITS_OF_MODELS, "released")
AUGMENTS = ("none", "crop_flip")

# --- processors ------------------------------------------------------------------------------------------------------


class ImageProcessorSchema(Section):
    """Pictures made square, as pixels. Size, mean and deviation follow from the image encoder where it is known."""

    name: Literal["cir_image"] = Field("cir_image", description="cir_image")
    image_size: int = Field(224, ge=1, description="side in pixels")
    mean: Annotated[list[Annotated[Real, Ge(0)]], THREE] = Field([*HALF[0]], description="mean of the channels")
    std: Annotated[list[Annotated[Real, Gt(0)]], THREE] = Field([*HALF[1]], description="deviation of the channels")
    fit: Literal[FITS] = Field(
        "pad",
        description="pad to a square on white, crop the middle, or stretch; shortest: the shorter side is resized, the "
        "centre cropped; released: as the authors, plain RGB (alpha dropped, not turned by EXIF), padded, resized to "
        "8/7, the centre cropped",
    )
    augment: Literal[AUGMENTS] = Field(
        "none", description="crop_flip: random crop and horizontal flip, so that nothing is cached"
    )
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="pictures with more pixels are refused")
    interpolation: Literal[INTERPOLATIONS] = Field("bicubic", description="how pictures are resized")
    resize: int | None = Field(
        None,
        ge=1,
        description="with fit: shortest or stretch, what the (shorter) side is resized to, the centre cropped; "
        "null: image_size",
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.resize is not None and (self.fit not in RESIZING_FITS or self.resize < self.image_size):
            fits = " or ".join(RESIZING_FITS)
            yield "resize", f"got {self.resize}; it needs fit: {fits}, and at least image_size ({self.image_size})"


class CaptionProcessorSchema(Section):
    """Relative captions in one line."""

    name: Literal["cir_caption"] = Field("cir_caption", description="cir_caption")
    clean: bool = Field(True, description="false: the raw caption, as text encoders with captions: released read it")


PROCESSOR_SCHEMAS: dict[str, type[Section]] = {"cir_image": ImageProcessorSchema, "cir_caption": CaptionProcessorSchema}


def _processor(given: Any, info: ValidationInfo) -> Any:
    """A processor checked by its schema; the host's own pass unchecked."""
    problems: Problems | None = info.context
    if given is None:
        return None
    if not isinstance(given, dict):
        raise ValueError("no mapping")
    name = given.get("name")
    if problems is not None and not problems.name(problems.key("name"), name, problems.processors, "known processor"):
        return given
    schema = PROCESSOR_SCHEMAS.get(name)
    return given if schema is None else schema.model_validate(given, context=problems).model_dump(warnings=False)


Processor = Annotated[Any, PlainValidator(_processor), Allowed("a mapping with `name`")]


class ProcessorPairSchema(Section):
    """Processors of the training and of everything else."""

    train: Processor = Field(None, description="of the splits whose name begins with train")
    eval: Processor = Field(None, description="of the other splits")


class PreprocessSchema(Section):
    """Processors for the host's load_model_and_preprocess; runs take those of their data sets."""

    vis_processor: ProcessorPairSchema | None = Field(None, description="of images")
    text_processor: ProcessorPairSchema | None = Field(None, description="of captions")


# --- data sets -------------------------------------------------------------------------------------------------------

DEFAULT_PROCESSORS = {
    kind: {side: {"name": name} for side in ("train", "eval")}
    for kind, name in (("vis_processor", "cir_image"), ("text_processor", "cir_caption"))
}


class InfoSchema(Section):
    """Base of what the builders are told."""

    max_train: int | None = Field(None, ge=1, description="the first training triplets only, for trials; null: all")
    max_eval: int | None = Field(None, ge=1, description="the first triplets of the other splits only; null: all")


class EmojiInfoSchema(InfoSchema):
    cache_dir: Text | None = Field(None, description="where drawings are kept; null: $NEUCORE_CACHE, ~/.cache/neucore")
    image_size: int = Field(224, ge=32, le=1024, description="side of the drawings in pixels")
    role_cap: int = Field(12, ge=1, description="role changes kept a reference; more of them, more training time")
    drawings: Text | None = Field(
        None,
        description="folder of other drawings, named by code point (1f468-1f3fd.png), as `neucore data drawings` "
        "makes one; null: OpenMoji's",
    )


class IconsInfoSchema(InfoSchema):
    root: Text | None = Field(
        None,
        description="the unpacked package @tabler/icons, never null; without it the command that fetches it is told",
    )
    cache_dir: Text | None = Field(
        None, description="where they are rendered to; null: $NEUCORE_CACHE, ~/.cache/neucore"
    )
    image_size: int = Field(224, ge=32, le=1024, description="side of the drawings in pixels")


class RootInfoSchema(InfoSchema):
    """Of a data set that may also be read as shards."""

    allow_remote: bool = Field(False, description="data_type: stream may fetch its shards from an address (root)")
    shuffle_buffer: int = Field(256, ge=1, description="data_type: stream: samples a worker draws the next from")


class FolderInfoSchema(RootInfoSchema):
    root: Text | None = Field(None, description="your folder, never null: images/** and a JSON file a split")


class DatasetSchema(Section):
    """Base of the data sets' schemas; a subclass gives `build_info` a type of its own."""

    type: Text = Field("default", description="the host's set of defaults")
    data_type: Literal["images", "shards", "stream"] = Field(
        "images",
        description="shards: build_info.root is a folder that `neucore shards` wrote; stream: one that it wrote with "
        "--triplets, the address of one, or a brace pattern of its shards",
    )
    vis_processor: ProcessorPairSchema | None = Field(None, description="of images; cir_image where not given")
    text_processor: ProcessorPairSchema | None = Field(None, description="of captions; cir_caption where not given")


class EmojiSchema(DatasetSchema):
    """OpenMoji drawings, made by rules."""

    build_info: EmojiInfoSchema = Field(default_factory=EmojiInfoSchema, description="how it is built")


class IconsSchema(DatasetSchema):
    """Tabler's icons, queries made by rules."""

    build_info: IconsInfoSchema = Field(default_factory=IconsInfoSchema, description="how it is built")


class FolderSchema(DatasetSchema):
    """One's own images and annotations."""

    build_info: FolderInfoSchema = Field(description="how it is built")


class PublishedInfoSchema(RootInfoSchema):
    """Of a data set that is laid out as published: its builder says what a root lacks, file by file."""

    root: Text | None = Field(None, description="its folder; null: its environment variable, such as NEUCORE_CIRR_ROOT")
    missing: Literal["error", "skip"] = Field(
        "error",
        description="images without a file or unreadable stop the run; skip: they are left out with their queries",
    )


def _published(name: str, **own: Any) -> type[DatasetSchema]:
    """The schema of a published data set, with its presets and keys of its `own`."""
    presets = tuple(PRESETS[name])
    about = "evaluation presets, in one pass over the gallery; the first selects the best checkpoint"
    protocol = Annotated[list[Literal[presets]], NoneTwice], Field([presets[0]], min_length=1, description=about)
    title = name.capitalize()
    info = create_model(
        f"{title}InfoSchema", __base__=PublishedInfoSchema, __module__=__name__, protocol=protocol, **own
    )
    build_info = info, Field(default_factory=info, description="how it is built")
    return create_model(f"{title}Schema", __base__=DatasetSchema, __module__=__name__, build_info=build_info)


_JOINER = Field(
    None,
    description="between a pair's captions; <and>: the released form's mark, for glove_bigru alone; null: the mark "
    "where captions stay raw (cir_caption with clean: false), else and",
)
_FEATURES = Field(
    None,
    description="folder below the root (patch_feat_res152 in the authors' layout) of feature maps, a .pkl or .npy a "
    "picture, for the image encoder features; null: pictures are read",
)
_ONE_PROCESS = Field(
    False,
    description="with captions: released, the second order of a pair repeats its concepts once more, as where one "
    "process reads both orders: the authors' evaluation in batches of 32",
)

DATASET_SCHEMAS: dict[str, type[DatasetSchema]] = {
    "cirr": _published("cirr", features=(Text | None, _FEATURES)),
    "fashioniq": _published(
        "fashioniq", joiner=(Literal["and", "<and>"] | None, _JOINER), one_process=(bool, _ONE_PROCESS)
    ),
    "shoes": _published("shoes"),
    "fashion200k": _published("fashion200k"),
    "circo": _published("circo"),
    "emoji": EmojiSchema,
    "icons": IconsSchema,
    "folder": FolderSchema,
}
