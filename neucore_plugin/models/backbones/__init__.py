"""Backbones: frozen or trained encoders behind one protocol, built by name with lazy imports.

B batch, N image tokens, L words, Di / Dp / Dt / Dw widths of image tokens, pooled image, words and concept embeddings.

An image encoder is an `nn.Module` with
- `width` (Di), `num_tokens` (N), `grid`: rows, columns of the map that the last rows*columns tokens form, or None where
  tokens have no place; `pooled_width` (Dp; Di where absent),
- `image_size`, `mean`, `std`: what its pixels must look like; `fit`, `interpolation`, `resize` (those of the processor
  where absent): how pictures become such,
- `forward(pixels [B,3,H,W]) -> {"tokens": [B,N,Di], "pooled": [B,Dp]}`.
A text encoder is an `nn.Module` with
- `width` (Dt, words and sentence) and `word_width` (Dw),
- `forward(texts) -> {"words": [B,L,Dt], "mask": [B,L] bool, "sentence": [B,Dt]}`, L may be 0,
- `embed_words(words) -> [n,Dw]`: one embedding a concept word, for any word,
- `known(text)` (where absent, any text that is not blank): whether anything in a text is read,
- `words_live` (False where absent): `embed_words` is cheap and its weights may change, so nothing is remembered of it,
- for textual inversion, `sentence_with(texts, placeholder, vectors [B,Dw]) -> [B,Dt]`: the sentences of `forward`, but
  for the first word piece of each text that reads `placeholder`, which has its row of `vectors` as input embedding (Dw
  is the width of these then); ValueError where the cut text has no such piece.
Both have
- `joint_space` (None where absent): a text, the same on both sides of one two-tower model and on no other's: pooled
  and sentence are the vectors that this model was trained to compare by their cosine (Dp = Dt),
- of an image encoder that reads queries whole, `fuse(pixels [B,3,H,W] | None, texts | None) -> [B,Dp]`: in that space,
- `fingerprint`: a text that changes whenever the output may change (weights, size, pooling),
- `moving_norms` (False where absent): batch norms follow the batches of a training, though the encoder is frozen,
- `in_checkpoint` (False where absent): frozen weights travel in our checkpoints, since nobody could fetch them again,
- and, to be tuned in part, `blocks` (first to last), `tail` (modules or parameters after them), `idle` (parameters in
  them that nothing here uses) and `lora_targets` (last parts of the names of linear layers).
The bases in `encoder.py` have these defaults. Of `frozen`, `load` (whether to read the file of weights), `words` (a
word vocabulary) and `shared` (the part of the image encoder named by `shares`, when both sides are one model) a
constructor gets what it takes; everything else is required: the schemas (`config/encoders.py`) alone have defaults.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from neucore_plugin.common.errors import ConfigError, NeucoreError, nearest
from neucore_plugin.config.encoders import BACKBONE_SCHEMAS
from neucore_plugin.models.backbones.tuning import Tuning, settle_modes

# {side: {name: class}}; the schemas name the class that takes their settings
ENCODERS = {
    side: {name: schema.encoder for name, schema in schemas.items()} for side, schemas in BACKBONE_SCHEMAS.items()
}
SIDES = tuple(ENCODERS)


class Backbone(nn.Module):
    """An image encoder and a text encoder side by side, each tuned as its `Tuning` says.

    A side that is frozen stays in eval mode and out of training, and so does whatever is frozen below a tuned side.
    """

    def __init__(
        self, image: nn.Module, text: nn.Module, image_tuning: Tuning | None = None, text_tuning: Tuning | None = None
    ) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.tuning = {"image": image_tuning or Tuning(), "text": text_tuning or Tuning()}
        for side, tuning in self.tuning.items():
            tuning.apply(getattr(self, side), f"model.backbone.{side}")
        self.train(self.training)

    @property
    def freeze_image(self) -> bool:
        """Whether nothing of the image side changes in training, so that its features can be cached."""
        return self.tuning["image"].freeze and not getattr(self.image, "moving_norms", False)

    @property
    def freeze_text(self) -> bool:
        """Whether nothing of the text side is trained."""
        return self.tuning["text"].freeze

    def train(self, mode: bool = True) -> "Backbone":
        """Frozen parts stay in eval mode, so that no dropout acts and no statistics move."""
        super().train(mode)
        for side, tuning in self.tuning.items():
            settle_modes(getattr(self, side), tuning.freeze)
        return self


def build_backbone(
    config: Mapping[str, Any], words: Sequence[str] | None = None, load: bool | Mapping[str, bool] = True
) -> Backbone:
    """Build from `{"image": {"name", "freeze", ...}, "text": {...}}`; raises ConfigError on what cannot be.

    words: word vocabulary of an encoder that has one. load: whether encoders read their files of weights, for both
    sides or a side; a checkpoint may bring the weights itself.
    """
    built: dict[str, nn.Module] = {}
    tuned: dict[str, Tuning] = {}
    for side in SIDES:
        settings = dict(config[side])
        name = settings.pop("name")
        tuned[side] = Tuning.taken_from(settings)
        encoder = encoder_class(side, name)
        offered = {
            "frozen": tuned[side].freeze,
            "load": load if isinstance(load, bool) else load[side],
            "words": words,
            "shared": _shared(config, encoder, built.get("image"), tuned),
        }
        takes = inspect.signature(encoder).parameters
        settings |= {key: value for key, value in offered.items() if key in takes and value is not None}
        try:
            built[side] = encoder(**settings)
        except ValueError as error:
            raise (
                error if isinstance(error, NeucoreError) else ConfigError(f"model.backbone.{side}: {error}")
            ) from error
    return Backbone(built["image"], built["text"], tuned["image"], tuned["text"])


def encoder_class(side: str, name: str) -> type[nn.Module]:
    """The class of an encoder, imported now. Raises ConfigError for an unknown name."""
    known = ENCODERS[side]
    if name not in known:
        raise ConfigError(f"model.backbone.{side}.name: {name!r} is no {side} encoder.{nearest(name, known)}")
    module, _, kind = known[name].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)


def own_pixels(image: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's files say of the pictures of a section `model.backbone.image`; nothing where none are asked."""
    schema = BACKBONE_SCHEMAS["image"].get(image.get("name"))
    if schema is None or schema.pixels_from is None:
        return {}
    module, _, function = schema.pixels_from.rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), function)(image, "model.backbone.image")


def _shared(
    config: Mapping[str, Any], encoder: type[nn.Module], image: nn.Module | None, tuned: Mapping[str, Tuning]
) -> nn.Module | None:
    """What the text side takes over from the image side: both are one model, with the same weights."""
    part = getattr(encoder, "shares", None)
    if part is None or image is None or config["image"]["name"] != config["text"]["name"]:
        return None
    sides = [config[side] for side in SIDES]
    if any(sides[0].get(key) != sides[1].get(key) for key in encoder.same_for_both):
        return None
    shared = getattr(image, part, None)
    if shared is not None and tuned["image"] != tuned["text"]:
        raise ConfigError(
            f"model.backbone: image and text are one {config['image']['name']} model, so freeze, train_blocks, "
            "layer_decay and lora must be the same on both sides"
        )
    return shared
