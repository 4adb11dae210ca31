"""Any model of the host's registry as an encoder: by its `extract_features`, or by a method that the config names.

Widths and the number of tokens are found by encoding a blank image and a word at construction.

B batch, N image tokens, L words, D width.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar

import torch
from lavis.models.base_model import BaseModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from neucore_plugin.common.errors import ConfigError, NeucoreError, nearest
from neucore_plugin.models.backbones.clip import MEAN, STD
from neucore_plugin.models.backbones.host_model import HostModel, reason
from neucore_plugin.weights.checkpoint import fingerprint


class _Registered(nn.Module):
    """What both sides share."""

    side: ClassVar[str]
    contract: ClassVar[str]
    hint = "set freeze: true (extract_features may be under no_grad), or name a differentiable `method` of the model"

    def __init__(
        self, host: HostModel, settings: Mapping[str, Any], method: str | None, blocks: str | None, save_weights: bool
    ) -> None:
        super().__init__()
        self.setting, self.settings = f"model.backbone.{self.side}", dict(settings, method=method)
        self.host, self.method, self.block_path, self.in_checkpoint = host, method, blocks, save_weights
        arch = settings["arch"]
        if method is None and not callable(getattr(host.model, "extract_features", None)):
            raise ConfigError(
                f"{self.setting}: the host's model {arch!r} has no extract_features; name the method to call in "
                f"{self.setting}.method: {self.contract}"
            )
        if method is not None and not callable(_at(host.model, method)):
            own = [name for name in dir(host.model) if name[0] != "_" and not hasattr(BaseModel, name)]
            raise ConfigError(f"{self.setting}.method: {arch} has no method {method!r}.{nearest(method, own)}")
        if blocks is not None and not isinstance(_at(host.model, blocks), nn.ModuleList | nn.Sequential):
            own = [name for name, part in host.model.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
            raise ConfigError(f"{self.setting}.blocks: {arch} has no list of modules {blocks!r}.{nearest(blocks, own)}")

    @property
    def blocks(self) -> list[nn.Module]:
        """The model's blocks, first to last, where the config names them."""
        return [] if self.block_path is None else list(_at(self.host.model, self.block_path))

    @property
    def tail(self) -> list[nn.Module | nn.Parameter]:
        """Nothing is known to follow the blocks."""
        return []

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the linear layers within the blocks."""
        names = {
            name.rpartition(".")[2]
            for block in self.blocks
            for name, part in block.named_modules()
            if name and isinstance(part, nn.Linear)
        }
        return tuple(sorted(names))

    @property
    def idle(self) -> list[nn.Parameter]:
        """Parameters without influence on the output: never to be trained."""
        return [parameter for name, parameter in self.host.model.named_parameters() if name in (self.host.idle or ())]

    @property
    def fingerprint(self) -> str:
        """Of the settings, and of the weights as they are now."""
        settings = json.dumps(self.settings, sort_keys=True, default=str)
        return f"registered_{self.side}:{settings}:{fingerprint(self.host.model.state_dict())}"

    def _ask(self, key: str, value: Any, other: str) -> Any:
        """The model's answer to images or texts, whatever its form."""
        if self.method is not None:
            return _at(self.host.model, self.method)(value)
        extract = self.host.model.extract_features
        if "mode" in inspect.signature(extract).parameters:
            return extract({key: value, other: None}, mode=self.side)  # some demand both keys
        return extract({key: value})

    def _probe(self, encode: Callable[[], Any], frozen: bool, features: Callable[[Any], Tensor]) -> Any:
        """The answer to a blank input, in eval mode; where the encoder is trained, settles what of it is."""
        training = self.host.training
        self.host.eval()
        try:
            with torch.no_grad():
                found = encode()
            if not frozen:
                self.host.train_what_matters(lambda: features(encode()), self.setting, self.hint)
        except NeucoreError:
            raise
        except Exception as error:  # of any model's code
            raise ConfigError(
                f"{self.setting}: {self.settings['arch']} cannot encode a blank input ({reason(error)}); needed is "
                f"extract_features as the host's feature extractors have it, or a `method`: {self.contract}"
            ) from error
        finally:
            self.host.train(training)
        return found


class RegisteredImage(_Registered):
    """The image side of a model of the host's registry.

    Its tokens are `extract_features({"image": pixels}, mode="image").image_embeds`, or what `method` gives.

    Args:
        arch, model_type, config, module: see HostModel.
        image_size, mean, std: what the model's pixels must look like; None means CLIP's mean and std, as most of the
            host's models take.
        method: dotted name of a callable of the model, pixels [B,3,H,W] -> tokens [B,N,D], or {"tokens": [B,N,D]} with
            "pooled" [B,Dp] if it likes.
        spatial: whether the last tokens form a square map of the image, if their number allows (queries of a Q-former
            have no place).
        blocks: dotted name of the model's list of blocks, for train_blocks, layer_decay and lora.
        save_weights: frozen weights travel in checkpoints; false where `arch` always brings the same.
        frozen: nothing is trained; false demands that gradients reach the model.

    Raises ConfigError for a model that is unknown, cannot be built, or does not answer as said.
    """

    side = "image"
    contract = "pixels [B,3,H,W] -> tokens [B,N,D], or {'tokens': [B,N,D], 'pooled': [B,D]}"

    def __init__(
        self,
        arch: str,
        model_type: str | None = None,
        config: Mapping[str, Any] | None = None,
        module: str | None = None,
        image_size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        method: str | None = None,
        spatial: bool = True,
        blocks: str | None = None,
        save_weights: bool = True,
        frozen: bool = True,
    ) -> None:
        settings = {"arch": arch, "model_type": model_type, "config": config, "image_size": image_size}
        host = HostModel(f"model.backbone.{self.side}", arch, model_type, config, module)
        super().__init__(host, settings, method, blocks, save_weights)
        self.image_size, self.mean, self.std = image_size, tuple(mean or MEAN), tuple(std or STD)
        blank = torch.zeros(1, 3, image_size, image_size)
        tokens, pooled = self._probe(lambda: self._encode(blank), frozen, _everything)
        self.num_tokens, self.width = tokens.shape[1:]
        self.grid, self.has_class_token = _square(self.num_tokens) if spatial else (None, False)
        self.pooled_width = self.width if pooled is None else pooled.shape[-1]

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self._ask("image", pixels.to(self.host.device), "text_input")
        tokens, pooled = _field(found, "tokens", "image_embeds"), _field(found, "pooled")
        if isinstance(tokens, Tensor) and tokens.ndim == 2:
            tokens = tokens[:, None]  # one vector an image
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or len(tokens) != len(pixels):
            shape = list(tokens.shape) if isinstance(tokens, Tensor) else type(found).__name__
            raise ConfigError(f"{self.setting}: {self.settings['arch']} gives {shape}, wanted: {self.contract}")
        return tokens, None if isinstance(found, Tensor) else pooled

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels [B,3,H,W], H = W = image_size -> tokens [B,N,D], pooled [B,Dp]. Raises ValueError.

        Where the model gives no pooled vector it is the class token before a square map, else the mean.
        """
        if tuple(pixels.shape[1:]) != (3, self.image_size, self.image_size):
            raise ValueError(f"{self.settings['arch']} expects {self.image_size} px squares, given {[*pixels.shape]}")
        tokens, pooled = self._encode(pixels)
        if pooled is None:
            pooled = tokens[:, 0] if self.has_class_token else tokens.mean(1)
        return {"tokens": tokens, "pooled": pooled}


class RegisteredText(_Registered):
    """The text side of a model of the host's registry.

    By default `extract_features({"text_input": texts}, mode="text").text_embeds`. The model's own `tokenizer`, if it is
    one of transformers, tells words from padding and special tokens; without one each text is encoded by itself. The
    sentence is the vector of [CLS] where the tokenizer has it, else the mean of the words.

    Args:
        arch, model_type, config, module, blocks, save_weights, frozen: as of RegisteredImage.
        method: dotted name of a callable, list of texts -> {"words": [B,L,D], "mask": [B,L] bool, "sentence": [B,D]}.
        max_words: word pieces (words, without a tokenizer) kept of a text; a longer one is cut.
        shared: the image side's HostModel, where both sides name the same model.
    """

    side = "text"
    contract = "list of texts -> {'words': [B,L,D], 'mask': [B,L], 'sentence': [B,D]}"
    shares, same_for_both = "host", ("arch", "model_type", "config", "module", "blocks")

    def __init__(
        self,
        arch: str,
        model_type: str | None = None,
        config: Mapping[str, Any] | None = None,
        module: str | None = None,
        method: str | None = None,
        max_words: int = 64,
        blocks: str | None = None,
        save_weights: bool = True,
        frozen: bool = True,
        shared: HostModel | None = None,
    ) -> None:
        settings = {"arch": arch, "model_type": model_type, "config": config, "max_words": max_words}
        if arch in ("clip", "clip_feature_extractor") and method is None:
            raise ConfigError(
                f"model.backbone.text: the host's {arch} loses the end of long texts; use its own adapter, name: clip"
            )
        host = shared or HostModel(f"model.backbone.{self.side}", arch, model_type, config, module)
        super().__init__(host, settings, method, blocks, save_weights)
        self.max_words = max_words
        tokenizer = getattr(host.model, "tokenizer", None)
        self.tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        self._words: dict[str, Tensor] = {}  # sentence vectors of single words, while frozen
        words, sentence = self._probe(
            lambda: self._encode(["word"]), frozen, lambda found: found[0][0].sum() + found[1].sum()
        )
        self.width = self.word_width = words[0].shape[-1]
        if sentence.shape[-1] != self.width:
            raise ConfigError(
                f"{self.setting}: words are {self.width} wide and sentences {sentence.shape[-1]}; they must be the same"
            )

    @property
    def words_live(self) -> bool:
        """Whether the model is trained, so that no embedding of a word can be remembered."""
        return any(parameter.requires_grad for parameter in self.host.parameters())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._words.clear()  # they were those of other weights
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """texts -> words [B,L,D], mask [B,L], sentence [B,D]; an empty text has no word and a zero sentence."""
        texts = [self._cut(text) for text in texts]
        spoken = [place for place, text in enumerate(texts) if text]
        zero = torch.zeros(0, self.width, device=self.host.device)
        rows, sentence = [zero] * len(texts), zero.new_zeros(len(texts), self.width)
        if spoken:
            words, found = self._encode([texts[place] for place in spoken])
            for place, row in zip(spoken, words, strict=True):
                rows[place] = row
            found = found * torch.tensor([[len(row) > 0] for row in words], device=found.device)
            sentence = sentence.to(found).index_copy(0, torch.tensor(spoken, device=found.device), found)
        counts = torch.tensor([len(row) for row in rows], dtype=torch.long)
        length = int(counts.max()) if len(counts) else 0
        words = pad_sequence(rows, batch_first=True) if rows else zero.new_zeros(0, 0, self.width)  # [B,L,D]
        return {"words": words, "mask": (torch.arange(length) < counts[:, None]).to(words.device), "sentence": sentence}

    def embed_words(self, words: Sequence[str]) -> Tensor:
        """words -> [n,D], each one's sentence vector; remembered while the model is frozen."""
        if self.words_live:
            return self(words)["sentence"]
        with torch.no_grad():
            for word in words:
                if word not in self._words:  # one at a time: the last bits must not depend on what else is asked for
                    self._words[word] = self([word])["sentence"][0].cpu()
        if not words:
            return torch.zeros(0, self.word_width, device=self.host.device)
        return torch.stack([self._words[word] for word in words]).to(self.host.device)

    def _cut(self, text: str) -> str:
        words = text.split()
        if self.tokenizer is None or len(pieces := self.tokenizer.tokenize(text)) <= self.max_words:
            return " ".join(words if self.tokenizer is not None else words[: self.max_words])
        return self.tokenizer.convert_tokens_to_string(pieces[: self.max_words])

    def _encode(self, texts: list[str]) -> tuple[list[Tensor], Tensor]:
        """Each text's words [L_i,D], and sentences [B,D]."""
        if self.method is not None:
            found = self._ask("text_input", texts, "image")
            words, mask, sentence = (_field(found, name) for name in ("words", "mask", "sentence"))
            if isinstance(found, Tensor) or any(part is None for part in (words, mask, sentence)):
                raise ConfigError(f"{self.setting}.method: {self.method} must give {self.contract}")
            mask = mask.bool().to(words.device)
            return [row[kept] for row, kept in zip(words, mask, strict=True)], sentence
        if self.tokenizer is None:  # padding cannot be told from words: there must be none
            words = [self._hidden([text])[0] for text in texts]
            return words, _means(words)
        batch = self.tokenizer(texts, padding=True, return_special_tokens_mask=True, return_tensors="pt")
        seen, special = batch["attention_mask"].bool(), batch["special_tokens_mask"].bool()
        hidden = self._hidden(texts)
        if hidden.shape[:2] != seen.shape:  # the model cuts or pads in its own way
            hidden = pad_sequence([self._hidden([text])[0] for text in texts], batch_first=True)
        length = min(hidden.shape[1], seen.shape[1])
        kept = (seen & ~special)[:, :length].to(hidden.device)
        words = [row[mask] for row, mask in zip(hidden[:, :length], kept, strict=True)]
        starts_with_class = self.tokenizer.cls_token_id in batch["input_ids"][:, 0].tolist()
        return words, hidden[:, 0] if starts_with_class else _means(words)

    def _hidden(self, texts: list[str]) -> Tensor:
        """The model's vectors of texts [B,L,D]; one a text is one word."""
        found = _field(self._ask("text_input", texts, "image"), "text_embeds")
        if isinstance(found, Tensor) and found.ndim == 2:
            found = found[:, None]
        if not isinstance(found, Tensor) or found.ndim != 3 or len(found) != len(texts):
            raise ConfigError(
                f"{self.setting}: extract_features of {self.settings['arch']} gives no text_embeds [B,L,D]; name a "
                f"`method`: {self.contract}"
            )
        return found


def _at(model: nn.Module, path: str) -> Any:
    """What a dotted name leads to; None where there is nothing."""
    try:
        return attrgetter(path)(model)
    except AttributeError:
        return None


def _field(found: Any, *names: str) -> Any:
    """The first of these fields that an answer (tensor, mapping or object) has; a tensor is itself."""
    if isinstance(found, Tensor):
        return found
    values = (found.get(name) if isinstance(found, Mapping) else getattr(found, name, None) for name in names)
    return next((value for value in values if value is not None), None)


def _square(tokens: int) -> tuple[tuple[int, int] | None, bool]:
    """Grid of the last tokens, at least 2 x 2, and whether a class token precedes it."""
    for count in (tokens, tokens - 1):
        side = round(max(count, 0) ** 0.5)
        if side >= 2 and side * side == count:
            return (side, side), count < tokens
    return None, False


def _means(rows: list[Tensor]) -> Tensor:
    """Mean of each [L_i,D] -> [B,D]; zero where there is nothing."""
    return torch.stack([row.sum(0) / max(len(row), 1) for row in rows])


def _everything(found: tuple[Tensor, Tensor | None]) -> Tensor:
    """A number that depends on tokens and on the pooled vector, where there is one."""
    tokens, pooled = found
    return tokens.sum() if pooled is None else tokens.sum() + pooled.sum()
