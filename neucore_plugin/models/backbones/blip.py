"""BLIP's encoders (Li et al., 2022), built from the host's classes: a ViT for images, a BERT for texts.

Only what reads images alone or texts alone is built: no cross-attention, no heads, nothing that training would leave
without a gradient.

B batch, N image tokens (class token, then P patches), L words, D width.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from lavis.models.med import BertModel
from lavis.models.vit import VisionTransformerEncoder
from torch import Tensor, nn
from transformers import BertConfig

from neucore_plugin.models.backbones.bert_words import POSITION_IDS, BertText
from neucore_plugin.models.backbones.encoder import Encoder, check_pixels, normalisation
from neucore_plugin.models.backbones.vit import resized_positions, sized
from neucore_plugin.weights.pretrained import fit, is_url, read_pretrained

_ROOT = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models"
URLS = {"base": f"{_ROOT}/model_base_capfilt_large.pth", "large": f"{_ROOT}/model_large.pth"}
VITS = {"base": {"width": 768, "depth": 12, "heads": 12}, "large": {"width": 1024, "depth": 24, "heads": 16}}
DROP_PATH = {"base": 0.0, "large": 0.1}  # the host's stochastic depth in training


class BlipImage(Encoder):
    """The class token and the patches of BLIP's ViT; `pooled` is the class token.

    Args:
        vit: "base" or "large". architecture: {"width", "depth", "heads"}, overrules its sizes.
        image_size, patch_size: sides in pixels; the first is a multiple of the second.
        projected: tokens in the space of the contrastive loss, `proj_dim` wide and of unit length.
        pretrained: path or URL of a checkpoint, "none" for random weights; None is the host's URL of `vit`.
        load: whether to read it.
    """

    mean, std = normalisation("blip")
    lora_targets = ("qkv", "proj")
    name: ClassVar[str] = "blip"
    urls: ClassVar[dict[str, str]] = URLS

    def __init__(
        self,
        vit: str,
        image_size: int,
        patch_size: int,
        architecture: Mapping[str, int] | None,
        projected: bool,
        proj_dim: int,
        pretrained: str | None,
        load: bool = True,
    ) -> None:
        super().__init__()
        sizes = sized(self.name, VITS[vit], architecture)
        self.image_size, self.grid = image_size, (image_size // patch_size,) * 2
        self.num_tokens = 1 + self.grid[0] * self.grid[1]
        self.visual_encoder = VisionTransformerEncoder(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=sizes["width"],
            depth=sizes["depth"],
            num_heads=sizes["heads"],
            drop_path_rate=DROP_PATH[vit],
        )
        self.vision_proj = nn.Linear(sizes["width"], proj_dim) if projected else None
        self.width = self.pooled_width = proj_dim if projected else sizes["width"]
        self.settings = f"{self.name}:{image_size}:{patch_size}:{sizes['heads']}"
        source = pretrained or self.urls[vit]
        self.in_checkpoint = not is_url(source)
        self.joint_space = f"{self.name}:{proj_dim}:{source}" if projected else None
        if load and (found := read_pretrained(source, "model.backbone.image.pretrained", self.name)):
            state, path = found
            if (positions := "visual_encoder.pos_embed") in state:
                state[positions] = resized_positions(state[positions], self.grid, path=path)
            fit(self, state, path)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""
        return list(self.visual_encoder.blocks)

    @property
    def tail(self) -> list[nn.Module]:
        """What follows the blocks."""
        return [self.visual_encoder.norm] + ([self.vision_proj] if self.vision_proj is not None else [])

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels [B,3,H,W], H = W = image_size -> tokens [B,N,D], pooled [B,D]."""
        check_pixels(pixels, self.name, self.image_size)
        tokens = self.visual_encoder.forward_features(pixels)  # [B,1+P,D]
        if self.vision_proj is not None:
            tokens = F.normalize(self.vision_proj(tokens), dim=-1)
        return {"tokens": tokens, "pooled": tokens[:, 0]}


class BlipText(BertText):
    """BLIP's BERT without an image: words [B,L,D], and [CLS] as the sentence.

    Args:
        max_words: word pieces kept of a text, at most 510.
        architecture: {"width", "layers", "heads"}, overrules bert-base's sizes.
        projected: words and sentence in the space of the contrastive loss, `proj_dim` wide and of unit length.
        pretrained, load: as for BlipImage; None is the host's URL for a base ViT.
    """

    name: ClassVar[str] = "blip"
    url: ClassVar[str] = URLS["base"]
    layers: ClassVar[int] = 12
    vocabulary: ClassVar[int] = 30524  # BERT's, [DEC] and [ENC]
    prefix: ClassVar[str] = "text_encoder."  # of the BERT's weights in a checkpoint

    def __init__(
        self,
        max_words: int,
        architecture: Mapping[str, int] | None,
        projected: bool,
        proj_dim: int,
        pretrained: str | None,
        load: bool = True,
    ) -> None:
        super().__init__(max_words)
        sizes = sized(self.name, {"width": 768, "layers": self.layers, "heads": 12}, architecture)
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=sizes["width"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            intermediate_size=4 * sizes["width"],
            add_type_embeddings=False,
            add_cross_attention=False,
        )
        self.text_encoder = BertModel(config, add_pooling_layer=False)
        self.text_proj = nn.Linear(sizes["width"], proj_dim) if projected else None
        self.word_width = sizes["width"]
        self.width = proj_dim if projected else sizes["width"]
        self.settings = f"{self.name}:{max_words}:{sizes['heads']}"
        source = pretrained or self.url
        self.in_checkpoint = not is_url(source)
        self.joint_space = f"{self.name}:{proj_dim}:{source}" if projected else None
        if load and (found := read_pretrained(source, "model.backbone.text.pretrained", self.name)):
            if self.text_proj is not None:
                fit(self.text_proj, *found, prefix="text_proj.")
            fit(self.text_encoder, *found, absent=[POSITION_IDS], prefix=self.prefix)

    @property
    def tail(self) -> list[nn.Module]:
        """What follows the layers."""
        return [self.text_proj] if self.text_proj is not None else []

    def hidden_states(self, ids: Tensor, attention: Tensor) -> Tensor:
        """ids, attention [B,L] -> [B,L,D]."""
        found = self.text_encoder(ids, attention_mask=attention, return_dict=True, mode="text").last_hidden_state
        return found if self.text_proj is None else F.normalize(self.text_proj(found), dim=-1)
