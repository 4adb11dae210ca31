"""Backbones: frozen or trainable encoders behind one protocol, built by name with lazy imports.

B batch, N image tokens, L words, Di / Dt / Dw widths of image tokens, words and concept embeddings.

An image encoder is an `nn.Module` with
- `width` (Di), `grid` (rows, columns of the map that the last rows*columns tokens form), `num_tokens` (N),
- `image_size`, `mean`, `std`: what its pixels must look like,
- `forward(pixels [B,3,H,W]) -> {"tokens": [B,N,Di], "pooled": [B,Di]}`,
- `fingerprint`: a text that changes whenever its output may change (weights, size, pooling).
A text encoder is an `nn.Module` with
- `width` (Dt, words and sentence) and `word_width` (Dw),
- `forward(texts) -> {"words": [B,L,Dt], "mask": [B,L] bool, "sentence": [B,Dt]}`, L may be 0,
- `embed_words(words) -> [n,Dw]`: one embedding a concept word, for any word,
- `fingerprint`,
- `words_live` (False where absent): `embed_words` is cheap and its weights may change, so nothing is remembered of it.
An encoder with `trainable` takes `frozen` (hold the weights as buffers) and `load` (read the file of its weights).
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from neucore_plugin.errors import ConfigError, NeucoreError
from neucore_plugin.names import nearest

IMAGE_ENCODERS = ("efficientnet_lite0", "resnet", "features")
TEXT_ENCODERS = ("minilm_l6", "glove_bigru")


class Backbone(nn.Module):
    """An image encoder and a text encoder side by side; `freeze_*` keeps a side in eval mode and out of training."""

    def __init__(self, image: nn.Module, text: nn.Module, freeze_image: bool = True, freeze_text: bool = True) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.freeze_image, self.freeze_text = freeze_image, freeze_text
        for encoder, frozen in ((image, freeze_image), (text, freeze_text)):
            encoder.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """Frozen sides stay in eval mode, so that no dropout acts and no statistics move."""
        super().train(mode)
        if self.freeze_image:
            self.image.eval()
        if self.freeze_text:
            self.text.eval()
        return self


def build_backbone(config: dict[str, Any], words: Sequence[str] | None = None, load: bool = True) -> Backbone:
    """Build from `{"image": {"name", "freeze", ...}, "text": {...}}`; raises ConfigError on what cannot be.

    words: word vocabulary of an encoder that has one. load: whether encoders with a weight file read it; a checkpoint
    brings the weights itself.
    """
    from neucore_plugin.models.backbones import embedded, resnet_gru

    classes = {
        "efficientnet_lite0": embedded.EfficientNetLite0,
        "features": resnet_gru.Features,
        "resnet": resnet_gru.ResNet,
        "minilm_l6": embedded.MiniLM,
        "glove_bigru": resnet_gru.GloveBiGRU,
    }
    sides = {}
    for side, known in (("image", IMAGE_ENCODERS), ("text", TEXT_ENCODERS)):
        settings = dict(config[side])
        name, freeze = settings.pop("name"), settings.pop("freeze", True)
        if name not in known:
            raise ConfigError(f"model.backbone.{side}.name: {name!r} is no {side} encoder.{nearest(name, known)}")
        encoder = classes[name]
        if name == "glove_bigru" and words is not None:
            settings["words"] = words
        if getattr(encoder, "trainable", False):
            settings |= {"frozen": freeze, "load": load}
        elif not freeze:
            raise ConfigError(
                f"model.backbone.{side}.freeze: false is not supported yet by {name}; it is used frozen. Leave it true"
            )
        try:
            sides[side] = (encoder(**settings), freeze)
        except ValueError as error:
            raise (
                error if isinstance(error, NeucoreError) else ConfigError(f"model.backbone.{side}: {error}")
            ) from error
    return Backbone(sides["image"][0], sides["text"][0], freeze_image=sides["image"][1], freeze_text=sides["text"][1])
