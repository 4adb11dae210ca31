"""How a query is composed without any training, from what a pretrained model compares itself. Knows no host.

`reads` names what a composer takes beside the reference's pooled vector, the sentence or the texts; or `pixels`, with
the texts, of one that reads a pair as a whole: for it the reference or the text may be None.

B batch, Q queries, E width of the joint space, Dw width of a word's input embedding.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neucore_plugin.common.errors import CheckpointError, ConfigError
from neucore_plugin.common.files import expanded
from neucore_plugin.config.model import PLACEHOLDER
from neucore_plugin.models.backbones import Backbone
from neucore_plugin.weights.files import SCALARS, read, state_of


class Average(nn.Module):
    """The mean of both unit vectors in a two-tower model's own joint space: nothing is learned.

    Args:
        text_weight: the caption's share, 0 to 1; the reference has the rest.
    """

    reads = "sentence"

    def __init__(self, *, backbone: Backbone, text_weight: float) -> None:
        super().__init__()
        joint_space(backbone, "average")
        self.text_weight = text_weight

    def forward(self, pooled: Tensor, sentence: Tensor) -> Tensor:
        """Both [Q,E], of any length -> [Q,E]; a text of which nothing is read has a zero vector, and no part in it."""
        image, text = F.normalize(pooled, dim=-1), F.normalize(sentence, dim=-1)
        return (1 - self.text_weight) * image + self.text_weight * text


class Inversion(nn.Module):
    """Textual inversion: phi makes a word of the reference, which the text tower reads in a sentence with the caption.

    Args:
        weights: file of phi, see `read_phi`. prompt: the sentence: PLACEHOLDER where the word is, {} where the caption
            is. normalised: the reference has unit length before phi (a switch of LinCIR's training).

    Source: Saito et al., "Pic2Word", CVPR 2023, section 3; Baldrati et al., "Zero-Shot Composed Image Retrieval with
    Textual Inversion" (SEARLE), ICCV 2023, section 3; Gu et al., "Language-only Training of Zero-shot Composed Image
    Retrieval" (LinCIR), CVPR 2024, section 3.
    """

    reads = "texts"

    def __init__(self, *, backbone: Backbone, weights: str, prompt: str, normalised: bool) -> None:
        super().__init__()
        joint_space(backbone, "inversion")
        text = backbone.text
        self.before, self.after = prompt.split("{}")
        self.read = getattr(text, "sentence_with", None)
        if self.read is None:
            raise ConfigError(
                "model.method inversion puts a vector in place of a word, which this text encoder does not take; "
                "those of clip, open_clip and huggingface do"
            )
        self.phi, self.normalised = read_phi(weights, backbone.image.pooled_width, text.word_width), normalised
        self._try(text.word_width)

    @torch.no_grad()
    def _try(self, width: int) -> None:
        """Raise ConfigError where, whatever the caption, the word would not stand where the prompt has it."""
        words, vector = self.before[: self.before.index(PLACEHOLDER)], torch.zeros(1, width)
        try:
            self.read([self.before], PLACEHOLDER, vector)
        except ValueError as error:
            raise ConfigError(f"model.inversion.prompt: {error}") from error
        try:
            self.read([words], PLACEHOLDER, vector)
        except ValueError:
            return
        raise ConfigError(f"model.inversion.prompt: the text encoder reads a word of {words!r} as {PLACEHOLDER}")

    def forward(self, pooled: Tensor, texts: Sequence[str]) -> Tensor:
        """References [Q,E], relative captions -> [Q,E]; without a caption the sentence ends behind the word."""
        head = self.before[: self.before.index(PLACEHOLDER) + len(PLACEHOLDER)]
        prompts = [f"{self.before}{text}{self.after}" if text.strip() else head for text in texts]
        return self.read(prompts, PLACEHOLDER, self.phi(F.normalize(pooled, dim=-1) if self.normalised else pooled))


class Joint(nn.Module):
    """The fused vector of an encoder that reads picture and text together."""

    reads = "pixels"

    def __init__(self, *, backbone: Backbone) -> None:
        super().__init__()
        joint_space(backbone, "joint")
        self.fuse = getattr(backbone.image, "fuse", None)
        if self.fuse is None:
            raise ConfigError(
                "model.method joint needs an encoder that reads picture and text together, on both sides: "
                "model.backbone.image.name=embedder model.backbone.text.name=embedder"
            )

    def forward(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """References [Q,3,H,W], relative captions -> [Q,E]."""
        return self.fuse(pixels, texts)


COMPOSERS: dict[str, type[nn.Module]] = {"average": Average, "inversion": Inversion, "joint": Joint}


def joint_space(backbone: Backbone, method: str) -> str:
    """Name of the space in which both sides' vectors can be compared as they are. Raises ConfigError for none."""
    image, text = (getattr(side, "joint_space", None) for side in (backbone.image, backbone.text))
    if image is None or image != text:
        what = "that two different models give" if image and text else "that were never trained to be compared"
        raise ConfigError(
            f"model.method {method} trains nothing: it compares the encoders' own vectors, here ones {what}. Take both "
            "towers of one model, with the same weights, such as model.backbone.image.name=clip "
            "model.backbone.text.name=clip"
        )
    return image


# What the published files call phi's linear layers, the last one's name, and what stands between two layers. pic2word's
# order Linear, Dropout, ReLU is that of Linear, ReLU here, since dropout rests in an evaluation.
_FAMILIES: tuple[tuple[str, str, str | None, type[nn.Module]], ...] = (
    ("SEARLE's or LinCIR's phi", r"layers\.(\d+)", None, nn.GELU),
    ("pic2word's IM2TEXT", r"layers\.(\d+)\.0", "fc_out", nn.ReLU),
)
_HOLDERS = ("Phi", "state_dict_img2text")  # where the published files keep it, beside other things


def read_phi(path: str | Path, image_width: int, word_width: int) -> nn.Sequential:
    """The network of a file, [B,image_width] -> [B,word_width], frozen; its layout and sizes are the file's.

    Layouts: `layers.0`, `layers.3`, `layers.6` with GELU between (SEARLE, LinCIR), or `layers.0.0`, `layers.1.0`, ...
    and `fc_out` with ReLU between (pic2word); bare, or below "Phi" or "state_dict_img2text".
    Raises CheckpointError for a file that is missing, damaged, of no known layout, or made for another model.
    """
    path = expanded(path)
    value = read(path, allowed=SCALARS)
    if isinstance(value, Mapping):
        value = next((value[key] for key in _HOLDERS if isinstance(value.get(key), Mapping)), value)
    state = state_of(value, path)
    for _, pattern, last, activation in _FAMILIES:
        names = [match for name in state if (match := re.fullmatch(rf"({pattern})\.weight", name))]
        layers = [match[1] for match in sorted(names, key=lambda match: int(match[2]))] + ([last] if last else [])
        if len(layers) > 1 and set(state) == {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}:
            return _built(state, layers, activation, path, image_width, word_width)
    raise CheckpointError(
        f"{path} holds no phi of a known layout.\n  found: {_listed(state)}\n  expected: layers.0, layers.3, layers.6 "
        f"({_FAMILIES[0][0]}), or layers.0.0, layers.1.0, ..., fc_out ({_FAMILIES[1][0]}), each with weight and bias"
    )


def _built(
    state: Mapping[str, Tensor],
    layers: Sequence[str],
    activation: type[nn.Module],
    path: Path,
    image_width: int,
    word_width: int,
) -> nn.Sequential:
    shapes = [tuple(state[f"{layer}.weight"].shape) for layer in layers]  # out, in
    fits = all(len(shape) == 2 for shape in shapes) and (shapes[0][1], shapes[-1][0]) == (image_width, word_width)
    fits = fits and all(one[0] == other[1] for one, other in pairwise(shapes))
    if not fits or any(state[f"{layer}.bias"].shape != shape[:1] for layer, shape in zip(layers, shapes, strict=True)):
        raise CheckpointError(
            f"{path} holds the phi of another model.\n  found: {_listed(state)}\n  expected: a first layer that takes "
            f"width {image_width} (the images'), a last one that gives {word_width} (the words'), and each layer "
            "taking what the one before gives. Take the phi that was trained for this model"
        )
    parts: list[nn.Module] = []
    for layer, (width_out, width_in) in zip(layers, shapes, strict=True):
        linear = nn.utils.skip_init(nn.Linear, width_in, width_out)
        with torch.no_grad():
            linear.weight.copy_(state[f"{layer}.weight"])
            linear.bias.copy_(state[f"{layer}.bias"])
        parts += [linear, activation()]
    return nn.Sequential(*parts[:-1]).requires_grad_(False)


def _listed(state: Mapping[str, Tensor]) -> str:
    shown = [f"{name} {list(value.shape)}" for name, value in list(state.items())[:10]]
    return ", ".join(shown) + (f" and {len(state) - 10} more" if len(state) > 10 else "")
