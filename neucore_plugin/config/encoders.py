"""What `model.backbone.image` and `model.backbone.text` may say, a schema an encoder."""

import re
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, get_args

from annotated_types import Gt
from pydantic import Discriminator, Field, Tag

from neucore_plugin.config.encoder_parts import (
    BertSchema,
    Blip2VitSchema,
    BlocksSchema,
    ClipSchema,
    EmbedderSchema,
    EncoderSchema,
    HuggingFaceSchema,
    OpenClipSchema,
    RegisteredSchema,
    TunedSchema,
    VitSchema,
)
from neucore_plugin.config.kinds import THREE, Channels, Real, Text
from neucore_plugin.config.section import Section

_PRETRAINED = "path or URL of the weights, or none for random ones"
_WORDS = "words of a caption that are read"
# Mean and deviation of an encoder's pixels, red, green, blue.
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RAW = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # its own processor does it
# How pictures may be made square, and resized, where a model says it.
FITS_OF_MODELS = ("pad", "crop", "stretch", "shortest")
RESIZING_FITS = ("shortest", "stretch")  # where they may be resized to more, and their border left out
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


# --- images ----------------------------------------------------------------------------------------------------------


class EfficientNetLite0Schema(BlocksSchema):
    """EfficientNet-Lite0, which installs with the package; ImageNet weights."""

    encoder = "embedded.EfficientNetLite0"
    pixel_statistics = HALF

    name: Literal["efficientnet_lite0"] = Field(description="efficientnet_lite0")
    image_size: int = Field(224, ge=32, multiple_of=32, description="side of the pictures in pixels")
    grid: int = Field(4, ge=1, description="side of the map of tokens, at most image_size / 32; smaller: averaged")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.grid > self.image_size // 32:
            yield "grid", f"got {self.grid}; allowed: at most image_size / 32, here {self.image_size // 32}"


class FeaturesSchema(EncoderSchema):
    """Feature maps extracted before, given in place of pixels."""

    encoder = "resnet_gru.Features"

    name: Literal["features"] = Field(description="features")
    width: int = Field(2048, ge=1, description="channels of a map")
    grid: int = Field(7, ge=1, description="side of a map")
    image_size: int = Field(224, ge=32, multiple_of=32, description="side of the pictures that maps were made from")


class ResNetSchema(EncoderSchema):
    """The last map of torchvision's ResNet, as the authors use it."""

    encoder = "resnet_gru.ResNet"
    pixel_statistics = IMAGENET

    name: Literal["resnet"] = Field(description="resnet")
    network: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = Field(
        "resnet50", description="which of torchvision's networks"
    )
    weights: Text | None = Field(None, description="path of a state dict of torchvision's network; null: random")
    image_size: int = Field(224, ge=32, multiple_of=32, description="side of the pictures in pixels")
    fit: Literal["released"] | None = Field(
        None, description="released: pictures are read as by the authors (see cir_image); null: as the processor says"
    )
    moving_norms: bool = Field(
        False, description="batch norms follow the batches in training with freeze: true as well, as in their code"
    )


class ClipImageSchema(ClipSchema):
    """CLIP's image tower: class token and patches of a ViT, or the cells of a ResNet's last map."""

    encoder = "clip.ClipImage"
    pixel_statistics = CLIP

    image_size: int | None = Field(None, ge=1, description="side of the pictures in pixels; null: the architecture's")


class RegisteredImageSchema(RegisteredSchema):
    """The image side of a model of the host's registry."""

    encoder = "registered.RegisteredImage"
    pixel_statistics = CLIP

    image_size: int = Field(224, ge=1, description="side of the pictures in pixels")
    mean: Channels | None = Field(None, description="mean of the pixels' channels; null: CLIP's")
    std: Annotated[list[Annotated[Real, Gt(0)]], THREE] | None = Field(
        None, description="their deviation; null: CLIP's"
    )
    spatial: bool = Field(True, description="the last tokens form a square map of the image, if their number allows")


class EmbedderImageSchema(EmbedderSchema):
    """Pictures, and queries of a picture and a text, each as one vector."""

    encoder = "embedder.EmbedderImage"
    pixel_statistics = RAW

    image_size: int = Field(448, ge=1, description="side of the square pictures that the model's own processor gets")


class OwnPixelsSchema(Section):
    """Of an image encoder whose files say what its pictures look like; what is null is as they say."""

    image_size: int | None = Field(None, ge=1, description="side of the pictures in pixels; null: the model's")
    mean: Channels | None = Field(None, description="mean of the pixels' channels; null: the model's")
    std: Annotated[list[Annotated[Real, Gt(0)]], THREE] | None = Field(
        None, description="their deviation; null: the model's"
    )
    fit: Literal[FITS_OF_MODELS] | None = Field(
        None, description="how pictures become square, as of the processor cir_image; null: the model's"
    )
    interpolation: Literal[INTERPOLATIONS] | None = Field(
        None, description="how pictures are resized; null: as the model's"
    )
    resize: int | None = Field(
        None,
        ge=1,
        description="with fit: shortest or stretch, what the (shorter) side is resized to, the centre cropped; "
        "null: the model's",
    )


class OpenClipImageSchema(OwnPixelsSchema, OpenClipSchema):
    """The image tower of a model of open_clip."""

    encoder = "open_clip.OpenClipImage"
    pixels_from = "open_clip.own_pixels"


class HuggingFaceImageSchema(OwnPixelsSchema, HuggingFaceSchema):
    """The image tower of a model of two towers, or a vision model alone."""

    encoder = "huggingface.HuggingFaceImage"
    pixels_from = "huggingface.own_pixels"


class AlbefImageSchema(TunedSchema):
    """Class token and patches of ALBEF's ViT."""

    encoder = "albef.AlbefImage"
    pixel_statistics = CLIP

    name: Literal["albef"] = Field(description="albef")
    image_size: int = Field(224, ge=1, description="side of the pictures in pixels, a multiple of patch_size")
    patch_size: int = Field(16, ge=1, description="side of a patch in pixels")
    architecture: VitSchema | None = Field(None, description="other sizes than the published ones, for trials")
    projected: bool = Field(False, description="tokens in the space of the contrastive loss, of unit length")
    proj_dim: int = Field(256, ge=1, description="width of that space")
    pretrained: Text | None = Field(None, description=f"{_PRETRAINED}; null: the host's URL")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.image_size % self.patch_size:
            yield "image_size", f"got {self.image_size}; allowed: a multiple of the patch size {self.patch_size}"


class BlipImageSchema(AlbefImageSchema):
    """Class token and patches of BLIP's ViT."""

    encoder = "blip.BlipImage"

    name: Literal["blip"] = Field(description="blip")
    vit: Literal["base", "large"] = Field("base", description="which of the published ViTs")


class Blip2ImageSchema(TunedSchema):
    """BLIP-2's queries, or the patches that they read."""

    encoder = "blip2.Blip2Image"
    pixel_statistics = CLIP

    name: Literal["blip2"] = Field(description="blip2")
    vit: Literal["eva_clip_g", "clip_L"] = Field("eva_clip_g", description="which of the published ViTs")
    tokens: Literal["queries", "patches"] = Field(
        "queries", description="the Q-Former's queries, which have no place, or the ViT's class token and patches"
    )
    image_size: int = Field(224, ge=14, multiple_of=14, description="side of the pictures in pixels")
    queries: int = Field(32, ge=1, description="how many queries")
    architecture: Blip2VitSchema | None = Field(None, description="other sizes than the published ones, for trials")
    pretrained: Text | None = Field(None, description=f"of the Q-Former: {_PRETRAINED}; null: the host's URL")
    vit_pretrained: Text | None = Field(None, description=f"of the ViT: {_PRETRAINED}; null: the host's URL")


# --- texts -----------------------------------------------------------------------------------------------------------


class MiniLMSchema(TunedSchema):
    """MiniLM-L6, which installs with the package."""

    encoder = "embedded.MiniLM"

    name: Literal["minilm_l6"] = Field(description="minilm_l6")
    max_words: int = Field(64, ge=1, le=510, description=f"{_WORDS}: BERT has 512 positions, with [CLS] and [SEP]")


class GloveBiGRUSchema(EncoderSchema):
    """GloVe words read by a bidirectional GRU, as the authors use it."""

    encoder = "resnet_gru.GloveBiGRU"

    name: Literal["glove_bigru"] = Field(description="glove_bigru")
    freeze: bool = Field(False, description="nothing of it is trained")
    freeze_words: bool = Field(False, description="the embedding alone is not trained")
    word_dim: int = Field(300, ge=1, description="width of a word's vector")
    width: int = Field(512, ge=2, multiple_of=2, description="width of the GRU, both directions together")
    glove: Text | None = Field(None, description="path of a GloVe text file, or of a .npy matrix; null: random vectors")
    glove_words: Text | None = Field(None, description="words of a .npy, one a line; null: the .txt beside it")
    max_words: int = Field(128, ge=1, description=_WORDS)
    captions: Literal["default", "released"] = Field(
        "default", description="released: raw captions become words, concepts and classes as in the authors' code"
    )


class ClipTextSchema(ClipSchema):
    """CLIP's text tower."""

    encoder = "clip.ClipText"

    max_words: int | None = Field(None, ge=1, description=f"{_WORDS}; null: what the context holds")


class RegisteredTextSchema(RegisteredSchema):
    """The text side of a model of the host's registry."""

    encoder = "registered.RegisteredText"

    max_words: int = Field(64, ge=1, description=_WORDS)


class OpenClipTextSchema(OpenClipSchema):
    """The text tower of a model of open_clip."""

    encoder = "open_clip.OpenClipText"

    max_words: int | None = Field(None, ge=1, description=f"{_WORDS}; null: what the context holds")


class HuggingFaceTextSchema(HuggingFaceSchema):
    """The text tower of a model of two towers, or a text model alone, of sentence-transformers too."""

    encoder = "huggingface.HuggingFaceText"

    tokenizer: Text | None = Field(None, description="OWNER/NAME or folder of its tokenizer; null: repo's")
    pooling: Literal["cls", "mean", "last"] | None = Field(
        None, description="the sentence of a text model alone; null: as sentence-transformers' files say, else mean"
    )
    max_words: int | None = Field(None, ge=1, description=f"{_WORDS}; null: what the model was made for")


class EmbedderTextSchema(EmbedderSchema):
    """Texts, each as one vector."""

    encoder = "embedder.EmbedderText"


class Blip2TextSchema(TunedSchema):
    """BLIP-2's Q-Former as a text encoder."""

    encoder = "blip2.Blip2Text"

    name: Literal["blip2"] = Field(description="blip2")
    max_words: int = Field(60, ge=1, le=510, description=_WORDS)
    architecture: BertSchema | None = Field(None, description="other sizes than the published ones, for trials")
    pretrained: Text | None = Field(None, description=f"{_PRETRAINED}; null: the host's URL")


class AlbefTextSchema(Blip2TextSchema):
    """The text half of ALBEF's BERT."""

    encoder = "albef.AlbefText"

    name: Literal["albef"] = Field(description="albef")
    projected: bool = Field(False, description="vectors in the space of the contrastive loss, of unit length")
    proj_dim: int = Field(256, ge=1, description="width of that space")


class BlipTextSchema(AlbefTextSchema):
    """BLIP's BERT."""

    encoder = "blip.BlipText"

    name: Literal["blip"] = Field(description="blip")


# --- all of them -----------------------------------------------------------------------------------------------------

_IMAGE = (EfficientNetLite0Schema, ResNetSchema, FeaturesSchema, BlipImageSchema, AlbefImageSchema, Blip2ImageSchema)
_TEXT = (MiniLMSchema, GloveBiGRUSchema, BlipTextSchema, AlbefTextSchema, Blip2TextSchema)
BACKBONE_SCHEMAS: dict[str, dict[str, type[EncoderSchema]]] = {
    side: {get_args(schema.model_fields["name"].annotation)[0]: schema for schema in schemas}
    for side, schemas in {
        "image": (
            *_IMAGE,
            ClipImageSchema,
            OpenClipImageSchema,
            HuggingFaceImageSchema,
            EmbedderImageSchema,
            RegisteredImageSchema,
        ),
        "text": (
            *_TEXT,
            ClipTextSchema,
            OpenClipTextSchema,
            HuggingFaceTextSchema,
            EmbedderTextSchema,
            RegisteredTextSchema,
        ),
    }.items()
}


def _name(given: Any) -> Any:
    return given.get("name") if isinstance(given, Mapping) else getattr(given, "name", None)


def _by_name(side: str) -> Any:
    """Any encoder of a side. A callable discriminator, since pydantic's own takes no fields with validators."""
    tagged = (Annotated[schema, Tag(name)] for name, schema in BACKBONE_SCHEMAS[side].items())
    return Annotated[reduce(or_, tagged), Discriminator(_name)]


ImageEncoder, TextEncoder = _by_name("image"), _by_name("text")


def _clip_size(image: Mapping[str, Any]) -> Any:
    """Side of the pictures of a CLIP architecture, by its config or by its name."""
    if isinstance(image.get("config"), Mapping):
        return (image["config"].get("vision_cfg") or {}).get("image_size")
    name = str(image.get("arch"))
    size = re.search(r"-(\d{3})(-quickgelu)?$", name)
    return int(size[1]) if size else {"RN50x4": 288, "RN50x16": 384}.get(name, 224)


PIXELS = ("image_size", "mean", "std", "fit", "interpolation", "resize")


def reads_raw(backbone: Mapping[str, Any]) -> bool:
    """Whether the text encoder of a section `model.backbone` takes raw captions, as the released code does."""
    return (backbone.get("text") or {}).get("captions") == "released"


def pixels_of(image: Mapping[str, Any]) -> dict[str, Any]:
    """What a section `model.backbone.image` says of its pixels (PIXELS), as far as it is known."""
    pixels = {key: image.get(key) for key in PIXELS}
    if image.get("name") == "clip" and pixels["image_size"] is None:
        pixels["image_size"] = _clip_size(image)
    schema = BACKBONE_SCHEMAS["image"].get(image.get("name"))
    if schema and schema.pixel_statistics:
        for key, usual in zip(("mean", "std"), schema.pixel_statistics, strict=True):
            pixels[key] = pixels[key] or [*usual]
    return {key: value for key, value in pixels.items() if value is not None}
