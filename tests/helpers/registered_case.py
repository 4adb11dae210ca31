"""Models to be registered with the host: a user's own, and the host's feature extractors of tiny parts."""

from types import SimpleNamespace
from typing import ClassVar

import torch
from lavis.models.albef_models.albef_feature_extractor import AlbefFeatureExtractor
from lavis.models.base_model import BaseModel
from lavis.models.blip_models.blip_feature_extractor import BlipFeatureExtractor
from lavis.models.med import BertForMaskedLM, XBertEncoder
from lavis.models.vit import VisionTransformerEncoder
from torch import nn
from transformers import BertConfig

from neucore_plugin.models.backbones.bert_words import bert_tokenizer

BERT = {
    "vocab_size": 30524,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "encoder_width": 16,
    "add_type_embeddings": False,
    "add_cross_attention": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class Mine(BaseModel):
    """A user's model: patches through a linear layer, words by their letters; some parts are for other purposes."""

    def __init__(self, width=12):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.letters = nn.Embedding(128, width)
        self.other = nn.Linear(width, 2)

    @classmethod
    def from_config(cls, cfg=None):
        return cls(cfg.get("width", 12))

    def image(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x

    def extract_features(self, samples, mode="multimodal"):
        return SimpleNamespace(image_embeds=self.image(samples["image"]))

    def encode_pixels(self, images):
        tokens = self.image(images)
        first = tokens.amax(1, keepdim=True)
        return {"tokens": torch.cat([first, tokens], 1), "pooled": self.other(tokens.mean(1))}

    def encode_texts(self, texts):
        words = [self.letters(torch.tensor([ord(word[0]) % 128 for word in text.split()])) for text in texts]
        padded = nn.utils.rnn.pad_sequence(words, batch_first=True, padding_value=7.0)
        mask = torch.arange(padded.shape[1]) < torch.tensor([[len(row)] for row in words])
        return {"words": padded, "mask": mask, "sentence": torch.stack([row.sum(0) for row in words])}

    def as_numbers(self, images):
        return [1.0, 2.0]

    def one_vector(self, images):
        return images.mean((2, 3))

    def broken(self, images):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


class Silent(BaseModel):
    """A user's model that cannot be asked for features."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)


class Typed(Silent):
    """A user's model of several types."""

    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {"small": "s.yaml", "large": "l.yaml"}


class Tiny:
    """What both of the host's feature extractors need to be tiny and offline; `text` is their BERT."""

    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {}

    @classmethod
    def init_tokenizer(cls):
        return bert_tokenizer()

    @classmethod
    def from_config(cls, cfg=None):
        image = VisionTransformerEncoder(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
        image.vision_width = 16
        return cls(image, cls.text(), 8)


class TinyBlip(Tiny, BlipFeatureExtractor):
    @classmethod
    def text(cls):
        return XBertEncoder(BertConfig(**BERT, fusion_layer=0), add_pooling_layer=False)


class TinyAlbef(Tiny, AlbefFeatureExtractor):
    @classmethod
    def text(cls):
        return BertForMaskedLM(BertConfig(**BERT, fusion_layer=1))
