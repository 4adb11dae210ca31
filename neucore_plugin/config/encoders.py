"""What `model.backbone.image` and `model.backbone.text` may say, a schema an encoder. Knows neither torch nor lavis."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, PlainValidator

from neucore_plugin.config.values import Flag, Probability, Section, Text, choice, real, refuse, triple, whole


def _settings(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise refuse("a mapping")
    return value


Settings = Annotated[dict[str, Any], PlainValidator(_settings)]  # of another program: it checks them itself


class LoraSchema(Section):
    """Low-rank adapters (the extra `lora`): the encoder stays frozen, two thin matrices a linear layer are trained."""

    rank: whole(1) = 8
    alpha: real(above=0) = 16.0
    dropout: Probability = 0.0


class EncoderSchema(Section):
    """Base of the schemas of encoders that can be fine-tuned."""

    name: Text
    freeze: Flag = True
    train_blocks: whole(1) | None = None  # with freeze: false, the last blocks alone; null: everything
    layer_decay: real(above=0, high=1) = 1.0  # the learning rate of a block, over that of the block after it
    checkpoint_activations: Flag = False  # computes the blocks' activations again in the backward pass: less memory
    lora: LoraSchema | None = None  # with freeze: false


class EfficientNetLite0Schema(Section):
    name: Text
    image_size: whole(32, multiple=32) = 224
    grid: whole(1) = 4
    freeze: Flag = True
    train_blocks: whole(1) | None = None
    layer_decay: real(above=0, high=1) = 1.0


class FeaturesSchema(Section):
    name: Text
    width: whole(1) = 2048
    grid: whole(1) = 7
    image_size: whole(32, multiple=32) = 224
    freeze: Flag = True


class ResNetSchema(Section):
    name: Text
    network: choice("resnet18", "resnet34", "resnet50", "resnet101", "resnet152") = "resnet50"
    weights: Text | None = None  # a state dict of torchvision's network; null: random weights
    image_size: whole(32, multiple=32) = 224
    freeze: Flag = True


class GloveBiGRUSchema(Section):
    name: Text
    word_dim: whole(1) = 300
    width: whole(2, multiple=2) = 512
    glove: Text | None = None  # a GloVe text file, or a .npy matrix; null: random vectors
    glove_words: Text | None = None  # words of a .npy, one a line; null: the .txt beside it
    max_words: whole(1) = 128
    freeze_words: Flag = False  # the embedding alone
    freeze: Flag = False


class MiniLMSchema(EncoderSchema):
    max_words: whole(1, 510) = 64  # BERT's 512 positions less [CLS] and [SEP]


class ClipImageSchema(EncoderSchema):
    arch: Text = "ViT-B-32"  # one of the host's architectures
    config: Settings | None = None  # an architecture in place of `arch`, as in the host's files
    image_size: whole(1) | None = None  # null: the architecture's
    pretrained: Text = "openai"  # a tag, a URL, a path, or none
    quick_gelu: Flag | None = None  # null: as the names of arch and pretrained say


class ClipTextSchema(EncoderSchema):
    arch: Text = "ViT-B-32"
    config: Settings | None = None
    pretrained: Text = "openai"
    quick_gelu: Flag | None = None
    max_words: whole(1) | None = None  # null: what the context holds


class RegisteredImageSchema(EncoderSchema):
    arch: Text  # a name in the host's registry of models
    model_type: Text | None = None  # null: the model's only one
    config: Settings | None = None  # a model section in place of model_type
    module: Text | None = None  # imported first: it registers the model
    image_size: whole(1) = 224
    mean: triple() | None = None  # null: CLIP's, which the host's own models take
    std: triple(above=0) | None = None
    method: Text | None = None  # of the model, pixels -> tokens; null: extract_features
    spatial: Flag = True  # false: tokens have no place in the image
    blocks: Text | None = None  # dotted name of the model's list of blocks
    save_weights: Flag = True


class RegisteredTextSchema(EncoderSchema):
    arch: Text
    model_type: Text | None = None
    config: Settings | None = None
    module: Text | None = None
    method: Text | None = None  # of the model, texts -> words, mask, sentence
    max_words: whole(1) = 64
    blocks: Text | None = None
    save_weights: Flag = True


class VitSchema(Section):
    """Sizes of a ViT other than the published ones; what is null stays as published."""

    width: whole(1) | None = None
    depth: whole(1) | None = None
    heads: whole(1) | None = None


class BertSchema(Section):
    """Sizes of a BERT other than the published ones."""

    width: whole(1) | None = None
    layers: whole(1) | None = None
    heads: whole(1) | None = None


class Blip2VitSchema(VitSchema):
    """Sizes of BLIP-2's ViT and of its Q-Former."""

    query_width: whole(1) | None = None
    query_layers: whole(1) | None = None
    query_heads: whole(1) | None = None


class AlbefImageSchema(EncoderSchema):
    image_size: whole(1) = 224
    patch_size: whole(1) = 16
    architecture: VitSchema | None = None
    projected: Flag = False  # tokens in the space of the contrastive loss
    proj_dim: whole(1) = 256
    pretrained: Text | None = None  # a URL, a path, or none (random weights); null: the host's URL


class BlipImageSchema(AlbefImageSchema):
    vit: choice("base", "large") = "base"


class BlipTextSchema(EncoderSchema):
    max_words: whole(1, 510) = 60
    architecture: BertSchema | None = None
    projected: Flag = False
    proj_dim: whole(1) = 256
    pretrained: Text | None = None


class AlbefTextSchema(BlipTextSchema):
    """As BLIP's."""


class Blip2ImageSchema(EncoderSchema):
    vit: choice("eva_clip_g", "clip_L") = "eva_clip_g"
    tokens: choice("queries", "patches") = "queries"
    image_size: whole(14, multiple=14) = 224
    queries: whole(1) = 32
    architecture: Blip2VitSchema | None = None
    pretrained: Text | None = None  # of the Q-Former: a URL, a path, or none (random weights); null: the host's URL
    vit_pretrained: Text | None = None  # the same of the ViT


class Blip2TextSchema(EncoderSchema):
    max_words: whole(1, 510) = 60
    architecture: BertSchema | None = None
    pretrained: Text | None = None


BACKBONE_SCHEMAS: dict[str, dict[str, type[BaseModel]]] = {
    "image": {
        "efficientnet_lite0": EfficientNetLite0Schema,
        "resnet": ResNetSchema,
        "features": FeaturesSchema,
        "blip": BlipImageSchema,
        "albef": AlbefImageSchema,
        "blip2": Blip2ImageSchema,
        "clip": ClipImageSchema,
        "registered": RegisteredImageSchema,
    },
    "text": {
        "minilm_l6": MiniLMSchema,
        "glove_bigru": GloveBiGRUSchema,
        "blip": BlipTextSchema,
        "albef": AlbefTextSchema,
        "blip2": Blip2TextSchema,
        "clip": ClipTextSchema,
        "registered": RegisteredTextSchema,
    },
}

_HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
# How an encoder's pixels are normalised; `registered` says so itself, CLIP's where it does not.
PIXELS: dict[str, dict[str, list[float]]] = {
    "efficientnet_lite0": _HALF,
    "resnet": _IMAGENET,
    **dict.fromkeys(("blip", "albef", "blip2", "clip", "registered"), _CLIP),
}


def clip_size(image: Mapping[str, Any]) -> Any:
    """Side of the pictures of a CLIP architecture, by its config or by its name."""
    if isinstance(image.get("config"), Mapping):
        return (image["config"].get("vision_cfg") or {}).get("image_size")
    name = str(image.get("arch"))
    size = re.search(r"-(\d{3})(-quickgelu)?$", name)
    return int(size[1]) if size else {"RN50x4": 288, "RN50x16": 384}.get(name, 224)


def pixels_of(image: Mapping[str, Any]) -> dict[str, Any]:
    """What a section `model.backbone.image` says of its pixels: image_size, mean, std, as far as it is known."""
    own = {key: image.get(key) for key in ("image_size", "mean", "std")}
    if image.get("name") == "clip" and own["image_size"] is None:
        own["image_size"] = clip_size(image)
    return {**PIXELS.get(image.get("name"), {}), **{key: value for key, value in own.items() if value is not None}}
