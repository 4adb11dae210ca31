"""CLIP (Radford et al., 2021), the host's class: a ViT or ResNet image tower, a causal text transformer.

B batch, P patches, N image tokens (1 + P of a ViT, the cells of a ResNet's map), L words, E width of the joint space.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lavis.models.clip_models import model as host_clip
from lavis.models.clip_models import pretrained as published
from lavis.models.clip_models.tokenizer import _tokenizer as tokenizer
from torch import Tensor, nn

from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.common.files import expanded
from neucore_plugin.models.backbones.encoder import Encoder, check_pixels, normalisation, with_vectors
from neucore_plugin.models.backbones.vit import resized_positions
from neucore_plugin.weights.files import is_torchscript
from neucore_plugin.weights.pretrained import NONE, fit, is_url, read_pretrained

DOWNSCALE = 32  # of a ResNet's last map
_VISION, _TEXT = (
    {field.name for field in dataclasses.fields(part) if not field.name.startswith("timm")}
    for part in (host_clip.CLIPVisionCfg, host_clip.CLIPTextCfg)
)
# The tower that is not wanted is built as small as the host's class allows, and dropped.
_NO_VISION = {"layers": 1, "width": 64, "patch_size": 1, "image_size": 1}
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
_TEXT_PARTS = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
_START, _END = (tokenizer.encoder[name] for name in ("<start_of_text>", "<end_of_text>"))


class _Clip(Encoder):
    """What both towers share: which architecture, which weights, which activation."""

    side: ClassVar[str]

    def __init__(self, arch: str, config: Mapping[str, Any] | None, pretrained: str, quick_gelu: bool | None) -> None:
        super().__init__()
        self.setting = f"model.backbone.{self.side}"
        self.config = _architecture(arch, config, self.setting)
        self.source = _source(arch if config is None else None, pretrained, f"{self.setting}.pretrained")
        self.in_checkpoint = not is_url(self.source)
        named = "quickgelu" in Path(self.source).name.lower()  # open_clip's files say so in their names
        self._gelu_chosen = quick_gelu is not None
        self.quick_gelu = (
            bool(self.config.get("quick_gelu")) or pretrained.lower() == "openai" or named
            if quick_gelu is None
            else quick_gelu
        )
        kind = json.dumps([self.config, self.quick_gelu], sort_keys=True)
        self.settings, self.joint_space = f"clip_{self.side}:{kind}", f"clip:{kind}:{self.source}"

    def _read(self) -> tuple[dict[str, Tensor], Path] | None:
        """(the file's weights by the host's names, the file); None for random weights."""
        found = read_pretrained(self.source, f"{self.setting}.pretrained", f"CLIP's {self.side} tower", _openai_sums())
        if found and is_torchscript(found[1]) and not (self.quick_gelu or self._gelu_chosen):
            raise ConfigError(f"{found[1]} is OpenAI's, trained with quick GELU: set {self.setting}.quick_gelu: true")
        return found

    @property
    def resolved(self) -> dict[str, Any]:
        """Settings that followed from others, for the checkpoint: the file of weights may lie elsewhere later."""
        return {"quick_gelu": self.quick_gelu}


class ClipImage(_Clip):
    """CLIP's image tower.

    A ViT gives every token in the joint space, class token (the pooled vector) first; a ResNet gives the cells of its
    last map, and its attention pool as pooled. Tokens alone are trained on: that pool keeps its weights.

    Args:
        arch: name of one of the host's architectures, such as ViT-B-32 or RN50.
        image_size: side of the square input, a multiple of the patch size (of 32 for a ResNet); None means the
            architecture's. Positions are interpolated to another size.
        config: an architecture in place of `arch`: {"embed_dim", "vision_cfg", "text_cfg"}, as in the host's files.
        pretrained: a tag of the host's table (openai, laion400m_e32, ...), a URL, the path of a state dict by the
            host's names or of OpenAI's own file, or "none" (random weights, with a warning).
        quick_gelu: OpenAI's activation; None means what `arch` and `pretrained` were trained with, by their names.
        load: whether to read `pretrained`; a checkpoint of ours may bring the weights.

    Raises ConfigError for settings that cannot be, CheckpointError for weights that are missing or of another network.
    """

    side = "image"
    mean, std = normalisation("clip")

    def __init__(
        self,
        arch: str,
        image_size: int | None,
        config: Mapping[str, Any] | None,
        pretrained: str,
        quick_gelu: bool | None,
        load: bool = True,
    ) -> None:
        super().__init__(arch, config, pretrained, quick_gelu)
        vision, self.pooled_width = self.config["vision_cfg"], self.config["embed_dim"]
        self.is_vit = isinstance(vision["layers"], int)
        cell = vision["patch_size"] if self.is_vit else DOWNSCALE
        self.image_size = image_size or vision["image_size"]
        if self.image_size % cell:
            raise ConfigError(
                f"{self.setting}.image_size is {self.image_size}; this CLIP takes a multiple of {cell}, such as "
                f"{max(1, round(self.image_size / cell)) * cell}"
            )
        side = self.image_size // cell
        self.grid, self.num_tokens = (side, side), side**2 + self.is_vit
        self.width = self.pooled_width if self.is_vit else vision["width"] * DOWNSCALE
        self.visual = _host_model(
            self.config, self.setting, self.quick_gelu, vision_cfg={**vision, "image_size": self.image_size}
        ).visual
        if load and (found := self._read()):
            state, path = found
            state = {name: value for name, value in state.items() if name.startswith("visual.")}
            table = f"visual.{'' if self.is_vit else 'attnpool.'}positional_embedding"
            if table in state:
                state[table] = resized_positions(state[table], self.grid, path=path)
            fit(self.visual, state, path, prefix="visual.", exact=True)
        if not self.is_vit:
            self.visual.attnpool.requires_grad_(False)  # tokens do not depend on it: it would be idle in training

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks, or bottlenecks, first to last."""
        visual = self.visual
        if self.is_vit:
            return list(visual.transformer.resblocks)
        return [block for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4) for block in layer]

    @property
    def tail(self) -> list[nn.Module | nn.Parameter]:
        """What follows the blocks, on the way to the tokens."""
        return [self.visual.ln_post, self.visual.proj] if self.is_vit else []

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Linear layers of a block that can be adapted; a ResNet has none."""
        return ("c_fc", "c_proj") if self.is_vit else ()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels [B,3,H,W], H = W = image_size -> tokens [B,N,width], pooled [B,E]. Raises ValueError."""
        check_pixels(pixels, "clip", self.image_size)
        visual = self.visual
        if not self.is_vit:
            cells = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels)))))
            return {"tokens": cells.flatten(2).transpose(1, 2), "pooled": visual.attnpool(cells)}
        patches = visual.conv1(pixels).flatten(2).transpose(1, 2)  # [B,P,width]
        first = visual.class_embedding.to(patches).expand(len(patches), 1, -1)
        x = torch.cat([first, patches], dim=1) + visual.positional_embedding.to(patches)  # [B,1+P,width]
        x = visual.transformer(visual.ln_pre(x).transpose(0, 1)).transpose(0, 1)  # the host's blocks take [N,B,width]
        tokens = visual.ln_post(x) @ visual.proj  # [B,1+P,E]
        return {"tokens": tokens, "pooled": tokens[:, 0]}


class ClipText(_Clip):
    """CLIP's text tower: every word piece and the end token (the sentence) in the joint space.

    Args: as of ClipImage; max_words: word pieces kept of a text, at most the context less start and end token (None);
        a longer text is cut, its end token kept.
    """

    side = "text"
    words_live = True
    lora_targets = ("c_fc", "c_proj")

    def __init__(
        self,
        arch: str,
        config: Mapping[str, Any] | None,
        pretrained: str,
        quick_gelu: bool | None,
        max_words: int | None,
        load: bool = True,
    ) -> None:
        super().__init__(arch, config, pretrained, quick_gelu)
        text, self.width = self.config["text_cfg"], self.config["embed_dim"]
        self.word_width, most = text["width"], text["context_length"] - 2
        self.max_words = most if max_words is None else max_words
        if not 1 <= self.max_words <= most:
            raise ConfigError(f"{self.setting}.max_words is {max_words}; this CLIP keeps 1 to {most} word pieces")
        model = _host_model(self.config, self.setting, self.quick_gelu, text_cfg=text)
        for name in _TEXT_PARTS:
            setattr(self, name, getattr(model, name))
        self.register_buffer("causal", model.attn_mask, persistent=False)
        self._pieces: dict[str, list[int]] = {}  # of concept words
        if load and (found := self._read()):
            state, path = found
            state = {name: value for name, value in state.items() if name.partition(".")[0] in _TEXT_PARTS}
            fit(self, state, path, exact=True)

    @property
    def blocks(self) -> list[nn.Module]:
        """Transformer blocks, first to last."""
        return list(self.transformer.resblocks)

    @property
    def tail(self) -> list[nn.Module | nn.Parameter]:
        """What follows the blocks."""
        return [self.ln_final, self.text_projection]

    @property
    def fingerprint(self) -> str:
        """Of the settings, and of the weights as they are now."""
        return f"{super().fingerprint}:{self.max_words}"  # the place that caches of earlier versions have it at

    def forward(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """texts -> words [B,L,E], mask [B,L], sentence [B,E]; an empty text has no word and a zero sentence."""
        ids, counts = self._numbered(texts)
        x, sentence = self._read_embedded(self.token_embedding(ids), counts)
        mask = torch.arange(ids.shape[1] - 2, device=ids.device) < counts[:, None]
        return {"words": x[:, 1:-1] * mask[..., None], "mask": mask, "sentence": sentence * (counts > 0)[:, None]}

    def sentence_with(self, texts: Sequence[str], placeholder: str, vectors: Tensor) -> Tensor:
        """texts, vectors [B,Dw] -> [B,E]: each vector instead of the embedding of the first `placeholder` of its text.

        Raises ValueError where a text, as far as it is read, has none, or where the placeholder is not one word piece.
        """
        ids, counts = self._numbered(texts)
        pieces = _word_pieces(placeholder)
        x = with_vectors(self.token_embedding(ids), ids, placeholder, pieces, vectors)
        return self._read_embedded(x, counts)[1]

    def _numbered(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """texts -> word pieces [B,L+2] between start and end, and how many of the L each text has [B]."""
        pieces = [_word_pieces(text)[: self.max_words] for text in texts]
        length = max(map(len, pieces), default=0)
        ids = torch.full((len(pieces), length + 2), _END)
        for place, row in enumerate(pieces):
            ids[place, : len(row) + 1] = torch.tensor([_START, *row])  # filled up with end tokens, which nobody sees
        device = self.token_embedding.weight.device
        return ids.to(device), torch.tensor([len(row) for row in pieces], dtype=torch.long).to(device)

    def _read_embedded(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Input embeddings [B,L+2,Dw] -> all outputs [B,L+2,E], and those at the end tokens [B,E]."""
        length = x.shape[1]
        causal = self.causal[:length, :length].to(x.dtype)
        x = x + self.positional_embedding[:length]
        x = self.transformer(x.transpose(0, 1), attn_mask=causal).transpose(0, 1)
        x = self.ln_final(x) @ self.text_projection  # [B,L+2,E]
        return x, x[torch.arange(len(x), device=x.device), counts + 1]

    def embed_words(self, words: Sequence[str]) -> Tensor:
        """words -> [n,Dw]: the mean of each one's input embeddings; with gradient where they are trained."""
        for word in words:
            if word not in self._pieces:
                self._pieces[word] = _word_pieces(word)
        table, rows = self.token_embedding.weight, [self._pieces[word] for word in words]
        if not any(rows):
            return table.new_zeros(len(rows), self.word_width)
        ids = torch.tensor([piece for row in rows for piece in row], device=table.device)
        starts = torch.tensor([0, *map(len, rows)][:-1], device=table.device).cumsum(0)
        return F.embedding_bag(ids, table, starts, mode="mean")


def _word_pieces(text: str) -> list[int]:
    return [piece for piece in tokenizer.encode(text) if piece not in (_START, _END)]  # a text may spell these


def _architecture(arch: str, config: Mapping[str, Any] | None, setting: str) -> dict[str, Any]:
    """The checked {"embed_dim", "vision_cfg", "text_cfg"}; raises ConfigError."""
    if config is None:
        known = {
            name: value for name, value in host_clip._MODEL_CONFIGS.items() if not set(value["vision_cfg"]) - _VISION
        }  # without those that the host's class cannot build, and timm's
        name = arch.replace("/", "-")
        if name not in known:
            raise ConfigError(f"{setting}.arch: {arch!r} is no CLIP of the host.{nearest(name, known)}")
        return copy.deepcopy(known[name])
    config, problems = copy.deepcopy(dict(config)), []
    for name, allowed, needed in (
        ("vision_cfg", _VISION, {"layers", "width", "image_size"}),
        ("text_cfg", _TEXT, _TEXT),
    ):
        part = config.get(name)
        part = set(part) if isinstance(part, Mapping) else set()
        problems += [f"{name} lacks {', '.join(sorted(needed - part))}"] if needed - part else []
        problems += [f"{name} has no {key!r}.{nearest(key, allowed)}" for key in sorted(part - allowed)]
    if not isinstance(config.get("embed_dim"), int):
        problems.append("embed_dim must be a whole number")
    if not problems and isinstance(config["vision_cfg"]["layers"], int) and not config["vision_cfg"].get("patch_size"):
        problems.append("vision_cfg lacks patch_size")
    if not problems and config["text_cfg"]["vocab_size"] < tokenizer.vocab_size:
        problems.append(f"text_cfg.vocab_size is below the tokenizer's {tokenizer.vocab_size}")
    if not problems and not isinstance(config["vision_cfg"]["image_size"], int):
        problems.append("vision_cfg.image_size must be a whole number: images are squares")
    if problems:
        raise ConfigError(f"{setting}.config: {'; '.join(problems)}")
    return config


def _source(arch: str | None, pretrained: str, setting: str) -> str:
    """URL or path of the weights, NONE for random ones. Raises ConfigError for an unknown tag."""
    if pretrained.lower() == NONE:
        return NONE
    tags = published.list_pretrained_model_tags(arch.replace("/", "-")) if arch else []
    if pretrained.lower() in tags:
        return published.get_pretrained_url(arch.replace("/", "-"), pretrained)
    if is_url(pretrained) or Path(pretrained).suffix or expanded(pretrained).is_file():
        return pretrained
    what = f"of {arch}" if arch else "for an architecture given as config"
    raise ConfigError(
        f"{setting}: {pretrained!r} is no tag {what}, no URL and no file.{nearest(pretrained, [*tags, NONE])}"
    )


def _host_model(config: Mapping[str, Any], setting: str, quick_gelu: bool, **towers: Mapping[str, Any]) -> nn.Module:
    """The host's CLIP with the towers that are given, random weights."""
    towers = {"vision_cfg": _NO_VISION, "text_cfg": _NO_TEXT, **towers}
    try:
        return host_clip.CLIP(embed_dim=config["embed_dim"], quick_gelu=quick_gelu, **towers)
    except (AssertionError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:  # sizes that do not fit
        raise ConfigError(f"{setting}: the host cannot build this CLIP ({type(error).__name__}: {error})") from error


def _openai_sums() -> set[str]:
    """sha256 of OpenAI's files: a folder of their URLs."""
    names = published.list_pretrained_tag_models("openai")
    return {published.get_pretrained_url(name, "openai").split("/")[-2] for name in names}
