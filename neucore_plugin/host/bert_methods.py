"""Methods that transformers 5 took from PreTrainedModel, for the host's own BERT classes, which call them.

The host's lines: `self.init_weights()`, `self.get_head_mask(...)`, `self.invert_attention_mask(...)` and the tied
output embeddings of models/med.py, blip2_models/Qformer.py and blip_models/nlvr_encoder.py. They are set on the host's
BertPreTrainedModel of each, never on transformers' class, and do what transformers 4.26 did, to the last bit. The
host's text generation is not brought back: transformers 5 generates through interfaces that these classes lack.
"""

import importlib
from typing import Any

import torch

from neucore_plugin.common.errors import NeucoreError

BERTS = ("lavis.models.med", "lavis.models.blip2_models.Qformer", "lavis.models.blip_models.nlvr_encoder")


def add_bert_methods() -> None:
    """Set them, where transformers no longer has them. The host must have been imported."""
    from transformers import PreTrainedModel

    if hasattr(PreTrainedModel, "get_head_mask"):
        return
    for name in BERTS:
        base = importlib.import_module(name).BertPreTrainedModel
        for method in (get_head_mask, invert_attention_mask, init_weights, tie_weights):
            setattr(base, method.__name__, method)


def get_head_mask(self: Any, head_mask: Any, num_hidden_layers: int, is_attention_chunked: bool = False) -> list[None]:
    """No mask of heads, for each layer. Raises NeucoreError for any other: transformers 5 has none."""
    if head_mask is not None:
        raise NeucoreError("masks of attention heads need: pip install 'transformers<5'")
    return [None] * num_hidden_layers


def invert_attention_mask(self: Any, encoder_attention_mask: torch.Tensor) -> torch.Tensor:
    """1 at what may be seen, [B,K] or [B,Q,K] -> 0 there and the lowest number elsewhere, [B,1,1,K] or [B,1,Q,K]."""
    mask = encoder_attention_mask
    mask = mask[:, None, :, :] if mask.dim() == 3 else mask[:, None, None, :]
    return (1.0 - mask.to(dtype=self.dtype)) * torch.finfo(self.dtype).min


def init_weights(self: Any) -> None:
    """Random weights by the class's own `_init_weights`, then the ties."""
    self.apply(self._init_weights)
    self.tie_weights()


def tie_weights(self: Any, *args: Any, **kwargs: Any) -> None:
    """Output embeddings that are the input embeddings, where the config wants them so."""
    head = self.get_output_embeddings()
    if head is not None and self.config.tie_word_embeddings:
        head.weight = getattr(self, self.base_model_prefix, self).get_input_embeddings().weight
