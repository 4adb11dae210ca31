"""What the encoders have in common; the protocol is told in `__init__.py`. Knows no host.

B batch, L words, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neucore_plugin.config.encoders import BACKBONE_SCHEMAS
from neucore_plugin.weights.checkpoint import fingerprint


class Encoder(nn.Module):
    """Base of encoders, which set `settings`: what beside the weights their output depends on."""

    settings: str
    in_checkpoint = False
    blocks: Sequence[nn.Module] = ()
    tail: Sequence[nn.Module | nn.Parameter] = ()
    lora_targets: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of the settings, and of the weights as they are now."""
        return f"{self.settings}:{fingerprint(self.state_dict())}"


class TextEncoder(Encoder):
    """Base of text encoders; a concept word is read as a text of one word, unless a subclass embeds it in another way.

    A subclass sets `width` and `word_width`, which are the same then.
    """

    def __init__(self) -> None:
        super().__init__()
        self._words: dict[str, Tensor] = {}  # embeddings of single words, while the weights are those of `_words_of`
        self._words_of: tuple[int, ...] = ()

    @property
    def words_live(self) -> bool:
        """Whether the embeddings of words change in training."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def embed_words(self, words: Sequence[str]) -> Tensor:
        """words -> [n,word_width], each encoded by itself; remembered while the encoder is frozen."""
        if self.words_live:
            return self(words)["sentence"]
        weights = tuple(0 if p.is_inference() else p._version for p in self.parameters())
        if weights != self._words_of:  # a checkpoint has been loaded since
            self._words, self._words_of = {}, weights
        with torch.no_grad():
            for word in words:
                if word not in self._words:  # one at a time: the last bits must not depend on what else is asked for
                    self._words[word] = self([word])["sentence"][0].cpu()
        device = next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
        if not words:
            return torch.zeros(0, self.word_width, device=device)
        return torch.stack([self._words[word] for word in words]).to(device)

    def known(self, text: str) -> bool:
        """Whether the encoder reads anything in a text; here, in all that are not blank."""
        return bool(text.strip())

    def no_texts(self, like: Tensor) -> dict[str, Tensor]:
        """What `forward` gives for an empty list, on the device of `like`."""
        zero = like.new_zeros
        return {"words": zero(0, 0, self.width), "mask": zero(0, 0).bool(), "sentence": zero(0, self.width)}


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of an image encoder's pixels, as the schemas have them."""
    return BACKBONE_SCHEMAS["image"][name].pixel_statistics


def check_pixels(pixels: Tensor, name: str, image_size: int) -> None:
    """Raise ValueError unless pixels are [B,3,image_size,image_size]."""
    if tuple(pixels.shape[1:]) != (3, image_size, image_size):
        raise ValueError(f"{name} expects {image_size} px squares, given {list(pixels.shape)}")


def with_vectors(embedded: Tensor, ids: Tensor, placeholder: str, pieces: Sequence[int], vectors: Tensor) -> Tensor:
    """Input embeddings [B,S,Dw] of word pieces [B,S], a row of vectors [B,Dw] at the first `placeholder` of each text.

    pieces: those of the placeholder. ValueError unless they are one, which every text holds as far as it is read.
    """
    if len(pieces) != 1:
        raise ValueError(f"the placeholder {placeholder!r} is {len(pieces)} word pieces; give a sign that is one")
    found = ids == pieces[0]  # [B,S]
    if not found.any(1).all():
        place = int((~found.any(1)).nonzero()[0])
        raise ValueError(f"text {place}: what is read of it holds no {placeholder!r}")
    first = found & (found.cumsum(1) == 1)
    return torch.where(first[..., None], vectors.to(embedded)[:, None], embedded)
