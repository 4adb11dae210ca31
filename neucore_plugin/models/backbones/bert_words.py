"""BERT's word pieces without a network: the vocabulary that installs with the package, for BLIP, ALBEF and BLIP-2.

B texts, L word pieces.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from neucore_plugin.models.backbones.embedded import MINILM_VOCABULARY, MINILM_VOCABULARY_SHA256, packaged_file


def bert_tokenizer():
    """bert-base-uncased's tokenizer, from the installed vocabulary (30,522 word pieces, the hub's own)."""
    from transformers import BertTokenizer

    return BertTokenizer(str(packaged_file(MINILM_VOCABULARY, MINILM_VOCABULARY_SHA256)), do_lower_case=True)


def word_pieces(tokenizer, texts: Sequence[str], max_words: int) -> tuple[Tensor, Tensor]:
    """texts -> ids [B,L] with [CLS] and [SEP], attention mask [B,L]; a longer text is cut, its [SEP] kept."""
    if not len(texts):
        return torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.long)
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=max_words + 2, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def words_of(hidden: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [B,L,D] of ids with [CLS] first and [SEP] last -> words [B,L-2,D] zero at padding, mask [B,L-2]."""
    counts = attention.sum(1) - 2  # [B]
    length = max(int(counts.max()), 0) if len(counts) else 0
    mask = torch.arange(length, device=hidden.device)[None] < counts[:, None]
    return hidden[:, 1 : 1 + length] * mask[..., None], mask
