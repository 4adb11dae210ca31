"""What the schemas of several encoders share: how they are trained, keys of both sides of a model, sizes of trials."""

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from neucore_plugin.config.kinds import Probability, Real, Settings, Text
from neucore_plugin.config.section import Section

BRINGING = ("hf-hub:", "local-dir:")  # architectures of open_clip that come with weights


class LoraSchema(Section):
    """Low-rank adapters (the extra `lora`): the encoder stays frozen, two thin matrices a linear layer are trained."""

    rank: int = Field(8, ge=1, description="rank of the adapters")
    alpha: Real = Field(16.0, gt=0, description="the adapters' output is scaled by alpha / rank")
    dropout: Probability = Field(0.0, description="dropout before the adapters")


class EncoderSchema(Section):
    """Base of all encoders' schemas.

    encoder: the class below `neucore_plugin.models.backbones` that takes the settings. pixel_statistics: mean and
    deviation of its pictures, where it has its own. pixels_from: the function beside the class that finds in the
    model's files what its pictures look like, where they say it.
    """

    encoder: ClassVar[str]
    pixel_statistics: ClassVar[tuple[tuple[float, ...], tuple[float, ...]] | None] = None
    pixels_from: ClassVar[str | None] = None

    name: Text = Field(description="which encoder; the keys below are this one's")
    freeze: bool = Field(True, description="nothing of it is trained, so that its features can be cached")


class BlocksSchema(EncoderSchema):
    """Of an encoder that can be trained in part."""

    train_blocks: int | None = Field(
        None, ge=1, description="with freeze: false, how many of the last blocks are trained; null: everything"
    )
    layer_decay: Real = Field(1.0, gt=0, le=1, description="learning rate of a block over that of the block after it")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.freeze and self.train_blocks is not None:
            yield "train_blocks", f"got {self.train_blocks}; it needs freeze: false"


class TunedSchema(BlocksSchema):
    """Of a transformer that can be fine-tuned."""

    checkpoint_activations: bool = Field(
        False, description="compute the blocks' activations again in the backward pass: less memory, more time"
    )
    lora: LoraSchema | None = Field(None, description="low-rank adapters, with freeze: false; null: none")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.lora is not None and self.train_blocks is not None:
            yield "lora", "is given beside train_blocks; allowed: one of the two"


class ClipSchema(TunedSchema):
    """What both towers of CLIP take."""

    name: Literal["clip"] = Field(description="clip")
    arch: Text = Field("ViT-B-32", description="one of the host's architectures")
    config: Settings | None = Field(None, description="an architecture in place of `arch`, as in the host's files")
    pretrained: Text = Field("openai", description="a tag of the host's table, a path, a URL, or none (random)")
    quick_gelu: bool | None = Field(
        None, description="OpenAI's activation; null: as the names of arch and pretrained say"
    )


class RegisteredSchema(TunedSchema):
    """What both sides of a model of the host's registry take."""

    name: Literal["registered"] = Field(description="registered")
    arch: Text = Field(description="name of the model in the host's registry")
    model_type: Text | None = Field(None, description="its type; null: its only one")
    config: Settings | None = Field(None, description="a `model` section in place of model_type")
    module: Text | None = Field(None, description="module to import first: it registers the model")
    method: Text | None = Field(
        None, description="dotted name of the model's method that encodes; null: extract_features"
    )
    blocks: Text | None = Field(None, description="dotted name of the model's list of blocks, to tune it in part")
    save_weights: bool = Field(
        True, description="frozen weights travel in checkpoints; false where arch always brings the same"
    )


class EmbedderSchema(EncoderSchema):
    """A universal multimodal embedder of sentence-transformers (the extra `embedder`), the same model on both sides."""

    name: Literal["embedder"] = Field(description="embedder")
    repo: Text = Field(description="OWNER/NAME on the hub, or a folder as sentence-transformers saves it")
    revision: Text | None = Field(None, description="commit, branch or tag on the hub; null: main")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="of weights and computation")
    prompt: Text | None = Field(None, description="what the model is told of a query; null: what its files say")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if not self.freeze:
            yield "freeze", "got false; an embedder is used as it is"


class OpenClipSchema(TunedSchema):
    """What both towers of a model of open_clip (the extra `open_clip`) take."""

    name: Literal["open_clip"] = Field(description="open_clip")
    arch: Text = Field(
        "ViT-B-32",
        description="a name of open_clip's, hf-hub:OWNER/NAME, or local-dir:FOLDER with open_clip_config.json",
    )
    config: Settings | None = Field(None, description="an architecture in place of `arch`, as in open_clip's files")
    pretrained: Text | None = Field(
        None, description="a tag of open_clip's, the path of a file, or none (random); null: what `arch` brings"
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.pretrained is None and (self.config is not None or not self.arch.startswith(BRINGING)):
            yield "pretrained", "got null; allowed: a tag of open_clip's, the path of a file, or none"


class HuggingFaceSchema(TunedSchema):
    """What both sides of a model of transformers (the extra `huggingface`) take."""

    name: Literal["huggingface"] = Field(description="huggingface")
    repo: Text | None = Field(None, description="OWNER/NAME on the hub, or a folder as save_pretrained writes it")
    revision: Text | None = Field(None, description="commit, branch or tag on the hub; null: main")
    config: Settings | None = Field(None, description="a config in place of the repository's: model_type and sizes")
    pretrained: Literal["none"] | None = Field(
        None, description="null: the repository's weights (name a folder in repo for your own); none: random ones"
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="what its weights are kept and computed in; less than float32 only while it is frozen"
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from super().conflicts()
        if self.repo is None and self.config is None:
            yield "repo", "got null; allowed: OWNER/NAME on the hub, or the path of a folder"
        if self.config is not None and self.pretrained is None:
            yield "pretrained", "got null; a config of your own has no weights: allowed is none"
        if self.dtype != "float32" and not self.freeze:
            yield "dtype", f"got {self.dtype}; it needs freeze: true (in training use run.amp)"


class VitSchema(Section):
    """Sizes of a ViT other than the published ones; what is null stays as published."""

    width: int | None = Field(None, ge=1, description="width of the ViT")
    depth: int | None = Field(None, ge=1, description="its blocks")
    heads: int | None = Field(None, ge=1, description="its attention heads, which divide the width")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.width and self.heads and self.width % self.heads:
            yield "heads", f"got {self.heads}; allowed: a divisor of its width {self.width}"


class Blip2VitSchema(VitSchema):
    """Sizes of BLIP-2's ViT and of its Q-Former."""

    query_width: int | None = Field(None, ge=1, description="width of the Q-Former")
    query_layers: int | None = Field(None, ge=1, description="its layers")
    query_heads: int | None = Field(None, ge=1, description="its attention heads")


class BertSchema(Section):
    """Sizes of a BERT other than the published ones; what is null stays as published."""

    width: int | None = Field(None, ge=1, description="width of the BERT")
    layers: int | None = Field(None, ge=1, description="its layers")
    heads: int | None = Field(None, ge=1, description="its attention heads, which divide the width")

    conflicts = VitSchema.conflicts
