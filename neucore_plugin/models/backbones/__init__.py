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
- `fingerprint`.
"""

from typing import Any

from torch import nn

from neucore_plugin.errors import ConfigError
from neucore_plugin.names import nearest

IMAGE_ENCODERS = ("efficientnet_lite0",)
TEXT_ENCODERS = ("minilm_l6",)


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


def build_backbone(config: dict[str, Any]) -> Backbone:
    """Build from `{"image": {"name", "freeze", ...}, "text": {...}}`; raises ConfigError on unknown names."""
    from neucore_plugin.models.backbones import embedded

    sides = {}
    for side, known, classes in (
        ("image", IMAGE_ENCODERS, {"efficientnet_lite0": embedded.EfficientNetLite0}),
        ("text", TEXT_ENCODERS, {"minilm_l6": embedded.MiniLM}),
    ):
        settings = dict(config[side])
        name, freeze = settings.pop("name"), settings.pop("freeze", True)
        if not freeze:
            raise ConfigError(
                f"model.backbone.{side}.freeze: false is not supported yet; encoders are used frozen. Leave it true"
            )
        if name not in classes:
            raise ConfigError(f"model.backbone.{side}.name: {name!r} is no {side} encoder.{nearest(name, known)}")
        sides[side] = (classes[name](**settings), freeze)
    return Backbone(sides["image"][0], sides["text"][0], freeze_image=sides["image"][1], freeze_text=sides["text"][1])
