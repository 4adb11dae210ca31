"""BLIP-2's first-stage encoders (Li et al., 2023), built from the host's classes: a large ViT and the Q-Former.

The Q-Former is two transformers with common self-attention: learned queries that read an image's patches, and a text
encoder. Each side builds its own half; where both sides are one model, the text half uses the image half's attention.

B batch, N image tokens, P patches, L words, D width.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from lavis.models import clip_vit, eva_vit
from lavis.models.blip2_models.Qformer import BertModel
from torch import Tensor, nn
from transformers import BertConfig

from neucore_plugin.models.backbones.bert_words import POSITION_IDS, BertText
from neucore_plugin.models.backbones.encoder import Encoder, check_pixels, normalisation
from neucore_plugin.models.backbones.vit import resized_positions, sized
from neucore_plugin.weights.checkpoint import fingerprint
from neucore_plugin.weights.pretrained import fit, is_url, read_pretrained

_ROOT = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"
URLS = {"eva_clip_g": f"{_ROOT}/blip2_pretrained.pth", "clip_L": f"{_ROOT}/blip2_pretrained_vitL.pth"}
VIT_URLS = {"eva_clip_g": f"{_ROOT}/eva_vit_g.pth", "clip_L": f"{_ROOT}/clip_vit_L.pth"}
VITS = {
    "eva_clip_g": {"width": 1408, "depth": 39, "heads": 16},
    "clip_L": {"width": 1024, "depth": 21, "heads": 16},
}
QFORMER = {"width": 768, "layers": 12, "heads": 12}
# What a low-rank adapter can sit beside: the ViTs use the weights of their other attention layers directly.
VIT_TARGETS = {"eva_clip_g": ("proj",), "clip_L": ("c_fc", "c_proj")}
PATCH = 14
VOCABULARY = 30523  # BERT's and [DEC]


class QFormer(nn.Module):
    """The half of the Q-Former that reads images: patches [B,1+P,vision_width] -> queries [B,N,width].

    Args:
        vision_width: of the patches. queries: N. width, layers, heads: of the transformer.
        source: path or URL of its weights; a text half must have the same.
    """

    def __init__(self, vision_width: int, queries: int, width: int, layers: int, heads: int, source: str) -> None:
        super().__init__()
        self.sizes, self.source = {"width": width, "layers": layers, "heads": heads}, source
        config = _config(self.sizes, add_cross_attention=True, encoder_width=vision_width, query_length=queries)
        self.bert = BertModel(config)
        _remove(self.bert.encoder.layer, "intermediate", "output")
        _remove([self.bert.embeddings], "word_embeddings", "position_embeddings")
        self.query_tokens = nn.Parameter(torch.randn(1, queries, width) * config.initializer_range)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [B,1+P,vision_width] -> [B,N,width]."""
        queries = self.query_tokens.expand(len(patches), -1, -1)
        return self.bert(query_embeds=queries, encoder_hidden_states=patches, return_dict=True).last_hidden_state


class Blip2Image(Encoder):
    """BLIP-2's queries, or the patches that they read; `pooled` is the queries' mean, or the class token.

    Args:
        vit: "eva_clip_g" or "clip_L". tokens: "queries" (they have no place) or "patches" (class token first).
        image_size: side in pixels, a multiple of 14. queries: how many.
        architecture: {"width", "depth", "heads"} of the ViT, {"query_width", "query_layers", "query_heads"} of the
            Q-Former; overrules their sizes.
        pretrained: path or URL of the Q-Former's checkpoint, "none" for random weights; None is the host's of `vit`.
        vit_pretrained: the same for the ViT; not read where the first one holds a ViT as well (a fine-tuned one).
        load: whether to read them.
    """

    mean, std = normalisation("blip2")

    def __init__(
        self,
        vit: str,
        tokens: str,
        image_size: int,
        queries: int,
        architecture: Mapping[str, int] | None,
        pretrained: str | None,
        vit_pretrained: str | None,
        load: bool = True,
    ) -> None:
        super().__init__()
        defaults = {**VITS[vit], **{f"query_{name}": size for name, size in QFORMER.items()}}
        sizes = sized("blip2", defaults, architecture)
        self.vit, self.image_size = vit, image_size
        patches = (image_size // PATCH,) * 2
        source, vit_source = pretrained or URLS[vit], vit_pretrained or VIT_URLS[vit]
        self.visual_encoder = _vit(vit, image_size, sizes["width"], sizes["depth"], sizes["heads"])
        self.ln_vision = nn.LayerNorm(sizes["width"])
        self.qformer: QFormer | None = None
        self.grid: tuple[int, int] | None = patches
        self.num_tokens, self.width, self.lora_targets = 1 + patches[0] * patches[1], sizes["width"], VIT_TARGETS[vit]
        if tokens == "queries":
            own = {name: sizes[f"query_{name}"] for name in QFORMER}
            self.qformer = QFormer(sizes["width"], queries, **own, source=source)
            self.grid, self.num_tokens, self.width = None, queries, own["width"]
            self.lora_targets = (*self.lora_targets, *BertText.lora_targets)
        self.pooled_width = self.width
        self.settings = f"blip2:{vit}:{tokens}:{image_size}:{sizes['heads']}:{sizes['query_heads']}"
        self.in_checkpoint = not (is_url(source) and is_url(vit_source))
        if load:
            self._load(source, vit_source, patches)

    def _load(self, source: str, vit_source: str, patches: tuple[int, int]) -> None:
        state, head = {}, "visual_encoder."
        if found := read_pretrained(source, "model.backbone.image.pretrained", "blip2"):
            whole, path = found
            fit(self.ln_vision, whole, path, prefix="ln_vision.")
            if self.qformer is not None:
                if "query_tokens" in whole:
                    whole["Qformer.query_tokens"] = whole["query_tokens"]
                fit(self.qformer, whole, path, absent=[f"bert.{POSITION_IDS}"], prefix="Qformer.")
            state = {name.removeprefix(head): value for name, value in whole.items() if name.startswith(head)}
        if not state and (found := read_pretrained(vit_source, "model.backbone.image.vit_pretrained", "blip2")):
            state, path = found
        if state:
            aligned = self.vit == "clip_L"  # as the host does it
            positions = "positional_embedding" if aligned else "pos_embed"
            if positions in state:
                table = resized_positions(state[positions], patches, align_corners=aligned, path=path)
                state[positions] = table
            fit(self.visual_encoder, state, path)

    @property
    def blocks(self) -> list[nn.Module]:
        """The ViT's blocks, then the Q-Former's layers."""
        vit = self.visual_encoder
        blocks = list(vit.transformer.resblocks if self.vit == "clip_L" else vit.blocks)
        return blocks + (list(self.qformer.bert.encoder.layer) if self.qformer is not None else [])

    @property
    def tail(self) -> list[nn.Module | nn.Parameter]:
        """What is neither ViT nor block, and was trained with the Q-Former: trained with its last blocks."""
        if self.qformer is None:
            return [self.ln_vision]
        return [self.ln_vision, self.qformer.bert.embeddings, self.qformer.query_tokens]

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels [B,3,H,W], H = W = image_size -> tokens [B,N,D], pooled [B,D]."""
        check_pixels(pixels, "blip2", self.image_size)
        patches = self.ln_vision(self.visual_encoder(pixels))  # [B,1+P,vision width]
        if self.qformer is None:
            return {"tokens": patches, "pooled": patches[:, 0]}
        tokens = self.qformer(patches)  # [B,N,D]
        return {"tokens": tokens, "pooled": tokens.mean(1)}


class Blip2Text(BertText):
    """The half of the Q-Former that reads texts: words [B,L,D], and [CLS] as the sentence.

    Args:
        max_words: word pieces kept of a text, at most 510.
        architecture: {"width", "layers", "heads"}, overrules the Q-Former's sizes.
        pretrained: path or URL of the Q-Former's checkpoint, "none" for random weights; None is that of `shared`, or
            the host's for eva_clip_g.
        load: whether to read it.
        shared: `qformer` of the image side, with the same weights. Its self-attention and first norm serve here too;
            they stay the image side's own, and are trained or frozen with it.
    """

    shares = "qformer"
    same_for_both = ("pretrained",)

    def __init__(
        self,
        max_words: int,
        architecture: Mapping[str, int] | None,
        pretrained: str | None,
        load: bool = True,
        shared: QFormer | None = None,
    ) -> None:
        super().__init__(max_words)
        source = pretrained or (shared.source if shared else URLS["eva_clip_g"])
        sizes = sized("blip2", shared.sizes if shared else QFORMER, architecture)
        if shared is not None and (sizes, source) != (shared.sizes, shared.source):
            raise ValueError(
                f"blip2: a Q-Former for both sides has one architecture and one file of weights: the image side's are "
                f"{shared.sizes} and {shared.source}, the text side's {sizes} and {source}"
            )
        self.text_encoder = BertModel(_config(sizes))
        layers, embeddings = self.blocks, self.text_encoder.embeddings
        _remove(layers, "intermediate_query", "output_query")
        if shared is not None:
            for own, other in zip(layers, shared.bert.encoder.layer, strict=True):
                _borrow(own, other, "attention")
            _borrow(embeddings, shared.bert.embeddings, "LayerNorm")
            self.lora_targets = ("dense",)
        self.width = self.word_width = sizes["width"]
        self.settings = f"blip2:{max_words}:{sizes['heads']}"
        self.in_checkpoint = not is_url(source)
        if load and (found := read_pretrained(source, "model.backbone.text.pretrained", "blip2")):
            fit(self.text_encoder, *found, absent=[POSITION_IDS], prefix="Qformer.bert.")

    @property
    def fingerprint(self) -> str:
        """Of the settings, and of the weights as they are now, borrowed ones included."""
        used = [self.text_encoder.embeddings.LayerNorm, *(layer.attention for layer in self.blocks)]
        used = {str(place): fingerprint(part.state_dict()) for place, part in enumerate(used)}
        return f"{self.settings}:{fingerprint(self.state_dict(), used)}"

    def hidden_states(self, ids: Tensor, attention: Tensor) -> Tensor:
        """ids, attention [B,L] -> [B,L,D]."""
        return self.text_encoder(ids, attention_mask=attention, return_dict=True).last_hidden_state


def _config(sizes: Mapping[str, int], **more: int) -> BertConfig:
    """bert-base-uncased's settings with other sizes, as the host's Q-Former wants them."""
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=4 * sizes["width"],
        cross_attention_freq=2,
        **more,
    )


def _vit(vit: str, image_size: int, width: int, depth: int, heads: int) -> nn.Module:
    if vit == "clip_L":  # its `layers` counts one that it leaves out
        return clip_vit.VisionTransformer(image_size, PATCH, width, depth + 1, heads, use_grad_checkpointing=False)
    return eva_vit.VisionTransformer(
        img_size=image_size,
        patch_size=PATCH,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=4.3637,
        qkv_bias=True,
        use_mean_pooling=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


def _remove(modules: Iterable[nn.Module], *names: str) -> None:
    """Take out what this half never uses: it would be trained without a gradient."""
    for module in modules:
        for name in names:
            delattr(module, name)


def _borrow(module: nn.Module, owner: nn.Module, name: str) -> None:
    """Use a part of `owner` as if it were `module`'s, without having it: it is saved, moved and trained there alone."""
    delattr(module, name)
    object.__setattr__(module, name, getattr(owner, name))
