"""BERT's word pieces without a network, and what BLIP's, ALBEF's and BLIP-2's text encoders have in common.

B texts, L word pieces, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neucore_plugin.models.backbones.embedded import MINILM_VOCABULARY, MINILM_VOCABULARY_SHA256
from neucore_plugin.weights.pretrained import packaged_file

POSITIONS = 512  # of bert-base-uncased, [CLS] and [SEP] among them
POSITION_IDS = "embeddings.position_ids"  # a constant that files of weights may lack


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


class BertText(nn.Module):
    """Base of text encoders that are a BERT: words are its hidden states, the sentence that of [CLS].

    A subclass sets `width`, `word_width` and `text_encoder` (a BERT of the host's), and has
    `hidden_states(ids [B,L], attention [B,L]) -> [B,L,width]`.

    Args:
        max_words: word pieces kept of a text; a longer one is cut.
    """

    words_live = True
    lora_targets: tuple[str, ...] = ("query", "value")

    def __init__(self, max_words: int) -> None:
        super().__init__()
        if not 1 <= max_words <= POSITIONS - 2:
            raise ValueError(f"max_words is 1 to {POSITIONS - 2}, positions without [CLS] and [SEP]; got {max_words}")
        self.max_words = max_words
        self.tokenizer = bert_tokenizer()
        self._pieces: dict[str, list[int]] = {}  # of single words

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The input embeddings of word pieces."""
        return self.text_encoder.embeddings.word_embeddings

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer layers, first to last."""
        return list(self.text_encoder.encoder.layer)

    def forward(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """texts -> words [B,L,D], mask [B,L], sentence [B,D]; an empty text has no word and a zero sentence."""
        zero = self.word_embeddings.weight.new_zeros
        if not len(texts):
            return {"words": zero(0, 0, self.width), "mask": zero(0, 0).bool(), "sentence": zero(0, self.width)}
        ids, attention = (part.to(self.word_embeddings.weight.device) for part in self.word_pieces(texts))
        hidden = self.hidden_states(ids, attention)  # [B,L+2,D]
        words, mask = words_of(hidden, attention)
        spoken = (attention.sum(1) > 2)[:, None]
        return {"words": words, "mask": mask, "sentence": hidden[:, 0] * spoken}

    def word_pieces(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """texts -> ids and attention mask [B,L+2], [CLS] first and [SEP] last."""
        return word_pieces(self.tokenizer, texts, self.max_words)

    def embed_words(self, words: Sequence[str]) -> Tensor:
        """words -> [n,word_width]: the mean of each word's input embeddings, with gradient; without a piece it is 0."""
        for word in words:
            if word not in self._pieces:
                self._pieces[word] = self.tokenizer.encode(word, add_special_tokens=False)
        device = self.word_embeddings.weight.device
        counts = torch.tensor([len(self._pieces[word]) for word in words], dtype=torch.long)  # [n]
        ids = torch.zeros(len(words), int(counts.max()) if len(words) else 0, dtype=torch.long)
        for row, word in enumerate(words):
            ids[row, : counts[row]] = torch.tensor(self._pieces[word], dtype=torch.long)
        ids, counts = ids.to(device), counts.to(device)
        mask = torch.arange(ids.shape[1], device=device)[None] < counts[:, None]
        vectors = self.word_embeddings(ids) * mask[..., None]  # [n,pieces,word_width]
        return vectors.sum(1) / counts.clamp_min(1)[:, None]
