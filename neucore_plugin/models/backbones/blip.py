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

from neucore_plugin.common.errors import nearest
from neucore_plugin.models.backbones import vit
from neucore_plugin.models.backbones.bert_words import POSITION_IDS, BertText
from neucore_plugin.models.backbones.vit import check_pixels, grid_of, sized
from neucore_plugin.weights import pretrained as weights
from neucore_plugin.weights.checkpoint import fingerprint

_ROOT = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models"
URLS = {"base": f"{_ROOT}/model_base_capfilt_large.pth", "large": f"{_ROOT}/model_large.pth"}
VITS = {"base": {"width": 768, "depth": 12, "heads": 12}, "large": {"width": 1024, "depth": 24, "heads": 16}}
DROP_PATH = {"base": 0.0, "large": 0.1}  # the host's stochastic depth in training
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class BlipImage(nn.Module):
    """The class token and the patches of BLIP's ViT; `pooled` is the class token.

    Args:
        vit: "base" or "large". architecture: {"width", "depth", "heads"}, overrules its sizes.
        image_size, patch_size: sides in pixels; the first is a multiple of the second.
        projected: tokens in the space of the contrastive loss, `proj_dim` wide and of unit length.
        pretrained: path or URL of a checkpoint, "none" for random weights; None is the host's URL of `vit`.
        load: whether to read it.
    """

    mean, std = MEAN, STD
    lora_targets = ("qkv", "proj")
    name: ClassVar[str] = "blip"
    urls: ClassVar[dict[str, str]] = URLS

    def __init__(
        self,
        vit: str = "base",
        image_size: int = 224,
        patch_size: int = 16,
        architecture: Mapping[str, int] | None = None,
        projected: bool = False,
        proj_dim: int = 256,
        pretrained: str | None = None,
        load: bool = True,
    ) -> None:
        super().__init__()
        if vit not in self.urls:
            raise ValueError(f"{self.name}.vit: {vit!r} is none.{nearest(vit, self.urls)}")
        sizes = sized(self.name, VITS[vit], architecture)
        self.image_size, self.grid = image_size, grid_of(self.name, image_size, patch_size)
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
        self._settings = f"{self.name}:{image_size}:{patch_size}:{sizes['heads']}"
        source = pretrained or self.urls[vit]
        self.in_checkpoint = not weights.is_url(source)
        if load:
            self._load(source)

    def _load(self, source: str, setting: str = "model.backbone.image.pretrained") -> None:
        if source == weights.NONE:
            return weights.warn_random(setting, self.name)
        path = weights.locate(source, setting)
        state = weights.read_state(path)
        if (positions := "visual_encoder.pos_embed") in state:
            state[positions] = vit.resized_positions(state[positions], self.grid, path=path)
        return weights.fit(self, state, path)

    @property
    def fingerprint(self) -> str:
        """Of the settings, and of the weights as they are now."""
        return f"{self._settings}:{fingerprint(self.state_dict())}"

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
    sizes: ClassVar[dict[str, int]] = {"width": 768, "layers": 12, "heads": 12}
    vocabulary: ClassVar[int] = 30524  # BERT's, [DEC] and [ENC]
    prefix: ClassVar[str] = "text_encoder."  # of the BERT's weights in a checkpoint

    def __init__(
        self,
        max_words: int = 60,
        architecture: Mapping[str, int] | None = None,
        projected: bool = False,
        proj_dim: int = 256,
        pretrained: str | None = None,
        load: bool = True,
    ) -> None:
        super().__init__(max_words)
        sizes = sized(self.name, self.sizes, architecture)
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
        self._settings = f"{self.name}:{max_words}:{sizes['heads']}"
        source = pretrained or self.url
        self.in_checkpoint = not weights.is_url(source)
        if load:
            self._load(source)

    def _load(self, source: str, setting: str = "model.backbone.text.pretrained") -> None:
        if source == weights.NONE:
            return weights.warn_random(setting, self.name)
        path = weights.locate(source, setting)
        state = weights.read_state(path)
        if self.text_proj is not None:
            weights.fit(self.text_proj, state, path, prefix="text_proj.")
        return weights.fit(self.text_encoder, state, path, absent=[POSITION_IDS], prefix=self.prefix)

    @property
    def fingerprint(self) -> str:
        """Of the settings, and of the weights as they are now."""
        return f"{self._settings}:{fingerprint(self.state_dict())}"

    @property
    def tail(self) -> list[nn.Module]:
        """What follows the layers."""
        return [self.text_proj] if self.text_proj is not None else []

    def hidden_states(self, ids: Tensor, attention: Tensor) -> Tensor:
        """ids, attention [B,L] -> [B,L,D]."""
        found = self.text_encoder(ids, attention_mask=attention, return_dict=True, mode="text").last_hidden_state
        return found if self.text_proj is None else F.normalize(self.text_proj(found), dim=-1)
