"""What the encoders of other libraries have in common: their parts found by looking, their word pieces, their pixels.

Knows no host. B batch, N image tokens, L words, S word pieces with those that the tokenizer adds, D width.
"""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from neucore_plugin.common.errors import ConfigError, NeucoreError
from neucore_plugin.config.encoders import PIXELS, RESIZING_FITS
from neucore_plugin.models.backbones.encoder import Encoder, TextEncoder, check_pixels, with_vectors


class Tower(Encoder):
    """An encoder whose network is another library's: blocks and what follows them are found in it.

    A subclass sets `network`, the module that holds all weights, and `side`.
    """

    side: ClassVar[str]
    network: nn.Module
    idle: Sequence[nn.Parameter] = ()

    @property
    def setting(self) -> str:
        """The section of the config, for messages."""
        return f"model.backbone.{self.side}"

    @property
    def blocks(self) -> list[nn.Module]:
        """The longest part of the network that is a list, first to last."""
        lists = [part for part in self.network.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
        sizes = [(sum(p.numel() for p in part.parameters()), len(part)) for part in lists]
        return list(lists[sizes.index(max(sizes))]) if max(sizes, default=(0, 0))[1] > 1 else []

    @property
    def tail(self) -> list[nn.Parameter]:
        """The parameters that the network names after those of its blocks."""
        within = {id(parameter) for block in self.blocks for parameter in block.parameters()}
        ordered = list(self.network.parameters())
        last = max((place for place, parameter in enumerate(ordered) if id(parameter) in within), default=len(ordered))
        return ordered[last + 1 :]

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the linear layers in the blocks; not those that torch's attention reads by itself."""
        return tuple(
            sorted(
                {
                    name.rpartition(".")[2]
                    for block in self.blocks
                    for name, part in block.named_modules()
                    if type(part) is nn.Linear
                }
            )
        )

    def probe(self, output: Callable[[], tuple[Tensor, ...]], frozen: bool, trained_by: slice = slice(None)) -> Any:
        """What `output()` gives in eval mode; where the encoder is trained, settles what of it.

        Parameters that output()[trained_by] does not depend on are never trained: idle ones are an error in DDP.
        """
        training = self.training
        self.eval()
        try:
            with torch.set_grad_enabled(not frozen):
                found = output()
                with torch.no_grad():
                    again = zip(found[trained_by], output()[trained_by], strict=True)
                    if not all(torch.allclose(one, other, rtol=1e-3, equal_nan=True) for one, other in again):
                        raise ConfigError(
                            f"{self.setting}: of the same input this model gives other vectors each time, as a masked "
                            "autoencoder does; take another model"
                        )
                if not frozen:
                    free = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
                    total = sum(part.float().sum() for part in found[trained_by])
                    gradients = torch.autograd.grad(total, free, allow_unused=True)
                    self.idle = [one for one, grad in zip(free, gradients, strict=True) if grad is None]
                    for parameter in self.idle:
                        parameter.requires_grad_(False)
        except NeucoreError:
            raise
        except Exception as error:  # of another library, on sizes that do not fit
            raise ConfigError(f"{self.setting}: the model cannot be used so ({short(error)})") from error
        finally:
            self.train(training)
        return [part.detach() for part in found]


class ImageTower(Tower):
    """An image tower; a subclass has `encode(pixels) -> (tokens [B,N,D], pooled [B,Dp])`.

    After `settle`: image_size, mean, std, fit, interpolation, resize (what its pictures look like), width, num_tokens,
    pooled_width and `grid`.
    """

    side = "image"

    def settle(self, pixels: Mapping[str, Any], frozen: bool, cells: tuple[int, int] | None = None) -> None:
        """Take the pixels' settings, and find the sizes by a picture, a ramp of grey.

        cells: rows and columns of the tokens' map; None: found, where they form a square, or it has a token before.
        """
        if pixels["image_size"] is None:
            raise ConfigError(f"{self.setting}.image_size is null, and the model's files say no size; give it")
        for key in PIXELS:
            setattr(self, key, pixels[key])
        self.mean, self.std = tuple(self.mean), tuple(self.std)
        if self.resize is not None and (self.fit not in RESIZING_FITS or self.resize < self.image_size):
            self.resize = None  # of the model's own size
        ramp = torch.linspace(-1, 1, self.image_size**2).view(1, 1, self.image_size, -1).expand(1, 3, -1, -1)
        tokens, pooled = self.probe(lambda: self.encode(ramp), frozen, slice(0, 1))
        self.num_tokens, self.width, self.pooled_width = tokens.shape[1], tokens.shape[2], pooled.shape[1]
        self.grid = cells or _square(self.num_tokens)

    @property
    def resolved(self) -> dict[str, Any]:
        """What the model's files say of its pictures, for the checkpoint."""
        return {key: list(value) if isinstance(value := getattr(self, key), tuple) else value for key in PIXELS}

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels [B,3,H,W], H = W = image_size -> tokens [B,N,D], pooled [B,Dp]. Raises ValueError."""
        check_pixels(pixels, self.library, self.image_size)
        tokens, pooled = self.encode(pixels)
        return {"tokens": tokens, "pooled": pooled}


class TextTower(Tower, TextEncoder):
    """A text tower; a concept word is the mean of the input embeddings of its pieces.

    A subclass has `table` (these embeddings [V,Dw]), `pieces_of(word)`, and `encode(texts) -> (hidden states [B,S,D],
    which of them are words [B,S], sentences [B,D])`.
    """

    side = "text"
    words_live = True

    def settle(self, frozen: bool) -> None:
        """Find the widths by one word."""
        self._pieces: dict[str, list[int]] = {}
        hidden, _, sentence = self.probe(lambda: self.encode(["word"]), frozen, slice(0, 3, 2))
        self.word_width, self.width = self.table.shape[1], sentence.shape[1]
        if hidden.shape[2] != self.width:
            raise ConfigError(
                f"{self.setting}: words are {hidden.shape[2]} wide and sentences {self.width}; they must be the same"
            )

    def forward(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """texts -> words [B,L,D], mask [B,L], sentence [B,D]; an empty text has no word and a zero sentence."""
        if not len(texts):
            return self.no_texts(self.table.float())
        hidden, words, sentence = self.encode(list(texts))
        counts = words.sum(1)  # [B]
        mask = torch.arange(int(counts.max()), device=words.device) < counts[:, None]
        rows = pad_sequence([row[kept] for row, kept in zip(hidden, words, strict=True)], batch_first=True)
        return {"words": rows, "mask": mask, "sentence": sentence * mask.any(1)[:, None]}

    def sentence_with(self, texts: Sequence[str], placeholder: str, vectors: Tensor) -> Tensor:
        """texts, vectors [B,Dw] -> [B,D]: each vector instead of the embedding of the first `placeholder` of its text.

        Raises ValueError where a text, as far as it is read, has none, or where the placeholder is not one word piece.
        """
        pieces = self.pieces_of(placeholder)
        embedding = next(part for part in self.network.modules() if getattr(part, "weight", None) is self.table)
        hook = embedding.register_forward_hook(
            lambda _, given, output: with_vectors(output, given[0], placeholder, pieces, vectors)
        )
        try:
            return self.encode(list(texts))[2]
        finally:
            hook.remove()

    def embed_words(self, words: Sequence[str]) -> Tensor:
        """words -> [n,Dw]: the mean of each one's input embeddings; with gradient where they are trained."""
        for word in words:
            if word not in self._pieces:
                self._pieces[word] = self.pieces_of(word)
        table, rows = self.table, [self._pieces[word] for word in words]
        if not any(rows):
            return table.new_zeros(len(rows), self.word_width, dtype=torch.float32)
        ids = torch.tensor([piece for row in rows for piece in row], device=table.device)
        starts = torch.tensor([0, *map(len, rows)][:-1], device=table.device).cumsum(0)
        return F.embedding_bag(ids, table, starts, mode="mean").float()


def with_given(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The pixels' settings of a model, overruled by those that a section `model.backbone.image` gives."""
    chosen = {key: given.get(key) for key in PIXELS}
    pixels = {key: own.get(key) if value is None else value for key, value in chosen.items()}
    if chosen["resize"] is None and (pixels["fit"] != own.get("fit") or chosen["image_size"] is not None):
        pixels["resize"] = None  # it belongs to the model's own fit and size
    return pixels


def required(library: str, package: str, least: tuple[int, ...], setting: str, extra: str) -> None:
    """Raise ConfigError where an optional package is missing or too old."""
    wanted = ".".join(map(str, least))
    remedy = f"it needs {package} {wanted} or later; run: pip install 'neucore-plugin[{extra}]' (Python 3.12 or later)"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"{setting}: {library} needs {package}, which is not installed: {remedy}") from error
    numbers = tuple(int(part) for part in found.split(".")[: len(least)] if part.isdecimal())
    if numbers < least:
        raise ConfigError(f"{setting}: {package} {found} is too old for {library}: {remedy}")


def short(error: BaseException) -> str:
    """An error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _square(tokens: int) -> tuple[int, int] | None:
    """The square map that the last tokens form, with at most a class token before it."""
    for count in (tokens, tokens - 1):
        side = round(max(count, 0) ** 0.5)
        if side >= 2 and side * side == count:
            return side, side
    return None
