"""Any model of the host's registry as an encoder: by a method that the config names, or by its `extract_features`.

`extract_features({"image", "text_input"}, mode)` is asked as the host's feature extractors document it: an object with
`image_embeds` [B,N,D], or `text_embeds` [B,L,D] of a BERT's word pieces. Widths and the number of tokens are found by
encoding a blank image and a word at construction.

B batch, N image tokens, L words, D width.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar

import torch
from lavis.models.base_model import BaseModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertTokenizer, PreTrainedTokenizerBase

from neucore_plugin.common.errors import ConfigError, NeucoreError, nearest
from neucore_plugin.models.backbones.bert_words import words_of
from neucore_plugin.models.backbones.encoder import Encoder, TextEncoder, check_pixels, normalisation
from neucore_plugin.models.backbones.host_model import HostModel, reason
from neucore_plugin.weights.checkpoint import fingerprint


class _Registered(Encoder):
    """What both sides share.

    Args:
        answer: the field of `extract_features`'s answer. identity: the settings that the output depends on.
        shared: the other side's model, where both sides are one.
    """

    side: ClassVar[str]
    contract: ClassVar[str]
    hint = "set freeze: true (extract_features may be under no_grad), or name a differentiable `method` of the model"

    def __init__(
        self,
        arch: str,
        model_type: str | None,
        config: Mapping[str, Any] | None,
        module: str | None,
        method: str | None,
        blocks: str | None,
        save_weights: bool,
        shared: HostModel | None = None,
        **identity: Any,
    ) -> None:
        super().__init__()
        self.setting, self.arch, self.method = f"model.backbone.{self.side}", arch, method
        self.block_path, self.in_checkpoint = blocks, save_weights
        identity = {"arch": arch, "model_type": model_type, "config": config, **identity, "method": method}
        self.settings = f"registered_{self.side}:{json.dumps(identity, sort_keys=True, default=str)}"
        self.host = shared or HostModel(self.setting, arch, model_type, config, module)
        model = self.host.model
        if method is None and not callable(getattr(model, "extract_features", None)):
            raise ConfigError(
                f"{self.setting}: the host's model {arch!r} has no extract_features; name the method to call in "
                f"{self.setting}.method: {self.contract}"
            )
        if method is not None and not callable(_at(model, method)):
            own = [name for name in dir(model) if name[0] != "_" and not hasattr(BaseModel, name)]
            raise ConfigError(f"{self.setting}.method: {arch} has no method {method!r}.{nearest(method, own)}")
        if blocks is not None and not isinstance(_at(model, blocks), nn.ModuleList | nn.Sequential):
            own = [name for name, part in model.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
            raise ConfigError(f"{self.setting}.blocks: {arch} has no list of modules {blocks!r}.{nearest(blocks, own)}")

    @property
    def blocks(self) -> list[nn.Module]:
        """The model's blocks, first to last, where the config names them; nothing is known to follow them."""
        return [] if self.block_path is None else list(_at(self.host.model, self.block_path))

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
        """Of the settings, and of the model's weights as they are now."""
        return f"{self.settings}:{fingerprint(self.host.model.state_dict())}"

    def _features(self, field: str, **samples: Any) -> Any:
        """A field of what `extract_features` gives; the host's extractors demand both keys of the samples."""
        samples = {"image": None, "text_input": None, **samples}
        return getattr(self.host.model.extract_features(samples, mode=self.side), field, None)

    def _probe(self, encode: Callable[[], Any], frozen: bool, total: Callable[[Any], Tensor]) -> Any:
        """The answer to a blank input, in eval mode; where the encoder is trained, settles what of it is.

        total: a number that depends on all of the answer.
        """
        training = self.host.training
        self.host.eval()
        try:
            with torch.no_grad():
                found = encode()
            if not frozen:
                self.host.train_what_matters(lambda: total(encode()), self.setting, self.hint)
        except NeucoreError:
            raise
        except Exception as error:  # of any model's code
            raise ConfigError(
                f"{self.setting}: {self.arch} cannot encode a blank input ({reason(error)}); needed is "
                f"extract_features as the host's feature extractors have it, or a `method`: {self.contract}"
            ) from error
        finally:
            self.host.train(training)
        return found


class RegisteredImage(_Registered):
    """The image side of a model of the host's registry.

    Its tokens are `extract_features(..., mode="image").image_embeds`, or what `method` gives.

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

    Raises ConfigError for a model that is unknown, cannot be built, or does not answer as above.
    """

    side = "image"
    contract = "pixels [B,3,H,W] -> tokens [B,N,D], or {'tokens': [B,N,D], 'pooled': [B,D]}"

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        spatial: bool,
        frozen: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(**settings, image_size=image_size)
        default = normalisation("registered")
        self.image_size, self.mean, self.std = image_size, tuple(mean or default[0]), tuple(std or default[1])
        blank = torch.zeros(1, 3, image_size, image_size)
        tokens, pooled = self._probe(
            lambda: self._encode(blank), frozen, lambda found: sum(part.sum() for part in found if part is not None)
        )
        self.num_tokens, self.width = tokens.shape[1:]
        self.grid, self.has_class_token = _square(self.num_tokens) if spatial else (None, False)
        self.pooled_width = self.width if pooled is None else pooled.shape[-1]

    def _encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        pixels = pixels.to(self.host.device)
        if self.method is None:
            found = self._features("image_embeds", image=pixels)
        else:
            found = _at(self.host.model, self.method)(pixels)
        tokens, pooled = (found.get("tokens"), found.get("pooled")) if isinstance(found, Mapping) else (found, None)
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or len(tokens) != len(pixels):
            shape = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ConfigError(f"{self.setting}: {self.arch} gives {shape}, wanted: {self.contract}")
        return tokens, pooled

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels [B,3,H,W], H = W = image_size -> tokens [B,N,D], pooled [B,Dp]. Raises ValueError.

        Where the model gives no pooled vector it is the class token before a square map, else the mean.
        """
        check_pixels(pixels, self.arch, self.image_size)
        tokens, pooled = self._encode(pixels)
        if pooled is None:
            pooled = tokens[:, 0] if self.has_class_token else tokens.mean(1)
        return {"tokens": tokens, "pooled": pooled}


class RegisteredText(_Registered, TextEncoder):
    """The text side of a model of the host's registry.

    `extract_features(..., mode="text").text_embeds` are the hidden states of a BERT: the model's `tokenizer` tells its
    words from padding, [CLS] and [SEP]; the sentence is the vector of [CLS]. Or `method` says what they are.

    Args:
        arch, model_type, config, module, blocks, save_weights, frozen: as of RegisteredImage.
        method: dotted name of a callable, list of texts -> {"words": [B,L,D], "mask": [B,L] bool, "sentence": [B,D]}.
        max_words: word pieces (words, without a tokenizer) kept of a text; a longer one is cut.
        shared: the image side's HostModel, where both sides name the same model.
    """

    side = "text"
    contract = "list of texts -> {'words': [B,L,D], 'mask': [B,L], 'sentence': [B,D]}"
    shares, same_for_both = "host", ("arch", "model_type", "config", "module", "blocks")

    def __init__(self, max_words: int, frozen: bool = True, shared: HostModel | None = None, **settings: Any) -> None:
        super().__init__(**settings, shared=shared, max_words=max_words)
        self.max_words = max_words
        tokenizer = getattr(self.host.model, "tokenizer", None)
        self.tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        if self.method is None and getattr(self.tokenizer, "cls_token_id", None) is None:
            raise ConfigError(
                f"{self.setting}: {self.arch} has no tokenizer of a BERT, which could tell words from padding in its "
                f"text_embeds; name a `method`: {self.contract}"
            )
        words, sentence = self._probe(
            lambda: self._encode(["word"]), frozen, lambda found: found[0][0].sum() + found[1].sum()
        )
        self.width = self.word_width = words[0].shape[-1]
        if sentence.shape[-1] != self.width:
            raise ConfigError(
                f"{self.setting}: words are {self.width} wide and sentences {sentence.shape[-1]}; they must be the same"
            )

    def forward(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """texts -> words [B,L,D], mask [B,L], sentence [B,D]; an empty text has no word and a zero sentence."""
        texts = [self._cut(text) for text in texts]
        given = [place for place, text in enumerate(texts) if text]  # no model is asked about an empty text
        zero = torch.zeros(0, self.width, device=self.host.device)
        rows, sentence = [zero] * len(texts), zero.new_zeros(len(texts), self.width)
        if given:
            words, found = self._encode([texts[place] for place in given])
            for place, row in zip(given, words, strict=True):
                rows[place] = row
            found = found * torch.tensor([[len(row) > 0] for row in words], device=found.device)
            sentence = sentence.to(found).index_copy(0, torch.tensor(given, device=found.device), found)
        counts = torch.tensor([len(row) for row in rows], dtype=torch.long)
        length = int(counts.max()) if len(counts) else 0
        words = pad_sequence(rows, batch_first=True) if rows else zero.new_zeros(0, 0, self.width)  # [B,L,D]
        return {"words": words, "mask": (torch.arange(length) < counts[:, None]).to(words.device), "sentence": sentence}

    def _cut(self, text: str) -> str:
        if self.tokenizer is None:
            return " ".join(text.split()[: self.max_words])
        pieces = self.tokenizer.tokenize(text)
        if len(pieces) <= self.max_words:
            return " ".join(text.split())
        if isinstance(self.tokenizer, BertTokenizer):  # transformers 5 would write "do not" as "don't": other pieces
            return " ".join(pieces[: self.max_words]).replace(" ##", "")
        return self.tokenizer.convert_tokens_to_string(pieces[: self.max_words])

    def _encode(self, texts: list[str]) -> tuple[list[Tensor], Tensor]:
        """Each text's words [L_i,D], and sentences [B,D]."""
        if self.method is not None:
            found = _at(self.host.model, self.method)(texts)
            if not isinstance(found, Mapping) or {"words", "mask", "sentence"} - set(found):
                raise ConfigError(f"{self.setting}.method: {self.method} must give {self.contract}")
            words, mask, sentence = found["words"], found["mask"].bool(), found["sentence"]
        else:
            attention = self.tokenizer(texts, padding=True, return_tensors="pt")["attention_mask"]  # [B,L+2]
            hidden = self._features("text_embeds", text_input=texts)  # [B,L+2,D]
            if not isinstance(hidden, Tensor) or hidden.ndim != 3 or hidden.shape[:2] != attention.shape:
                shape = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
                raise ConfigError(
                    f"{self.setting}: extract_features of {self.arch} gives {shape} as text_embeds of "
                    f"{list(attention.shape)} word pieces; name a `method`: {self.contract}"
                )
            words, mask = words_of(hidden, attention.to(hidden.device))
            sentence = hidden[:, 0]
        mask = mask.to(words.device)
        return [row[kept] for row, kept in zip(words, mask, strict=True)], sentence


def _at(model: nn.Module, path: str) -> Any:
    """What a dotted name leads to; None where there is nothing."""
    try:
        return attrgetter(path)(model)
    except AttributeError:
        return None


def _square(tokens: int) -> tuple[tuple[int, int] | None, bool]:
    """Grid of the last tokens, at least 2 x 2, and whether a class token precedes it."""
    for count in (tokens, tokens - 1):
        side = round(max(count, 0) ** 0.5)
        if side >= 2 and side * side == count:
            return (side, side), count < tokens
    return None, False
