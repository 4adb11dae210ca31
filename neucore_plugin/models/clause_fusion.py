"""Fusion clause by clause: the image's vector, changed by one clause of the caption after the other.

B batch, N reference tokens, L words, C clauses, K concepts of a query, D width. Masks are true where something is valid.
"""

from typing import Any

import torch
from torch import Tensor, nn

from neucore_plugin.models.layers import check_positive, check_shape
from neucore_plugin.models.progressive_fusion import ProgressiveFusion


class ClauseFusion(nn.Module):
    """Progressive fusion whose result is again an image's vector, so that the next clause can begin from it:

    f_0 = p,  f_c = sigmoid(MLP([f_{c-1} ; m_c])) * f_{c-1} + w F(E(f^r), f_{c-1}, concepts, words of c, m_c),

    p the reference's pooled vector, m_c the sentence of clause c, F the chain of `ProgressiveFusion`, its blocks
    instantiated by what is attended in the words of c; all clauses share it. Trained on captions of one change it
    composes those of two. A caption of one clause passes once.

    Args:
        dim: D. clauses: C at most. concepts: whether the chain also sees the query's concepts as tokens.
        chain: the other keyword arguments of ProgressiveFusion.

    >>> fusion = ClauseFusion(
    ...     dim=8, clauses=2, concepts=True, mode="progressive", steps=1, layers=1, module_depth=1, heads=2, head_dim=4,
    ...     mlp_ratio=2.0, dropout=0.0, released=False, gumbel=False, generator_linears=2, instruction_linears=2,
    ...     attend_padding=False)
    >>> tokens, pooled, concepts = torch.randn(3, 16, 8), torch.randn(3, 8), torch.randn(3, 5, 8)
    >>> words, sentence = torch.randn(3, 7, 8), torch.randn(3, 2, 8)
    >>> clause = torch.tensor([[0, 0, 0, 0, 1, 1, 1]]).expand(3, -1)
    >>> here = {"words": words, "word_mask": torch.ones(3, 7, dtype=torch.bool), "sentence": sentence, "clause": clause}
    >>> fused, present = fusion(tokens, pooled, concepts, torch.ones(3, 5, dtype=torch.bool), **here)
    >>> fused.shape, present.tolist()
    (torch.Size([3, 8]), [[True, True], [True, True], [True, True]])

    Source: the chain: Zhao & Xu 2023; the gate: TIRG (Vo et al., CVPR 2019), without its norms.
    """

    def __init__(self, *, dim: int, clauses: int, concepts: bool, **chain: Any):
        super().__init__()
        check_positive(dim=dim, clauses=clauses)
        self.clauses, self.concepts = clauses, concepts
        self.chain = ProgressiveFusion(dim=dim, **chain)
        self.gate = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.weight = nn.Parameter(torch.ones(()))

    def forward(
        self,
        tokens: Tensor,
        pooled: Tensor,
        concepts: Tensor | None,
        concept_mask: Tensor | None,
        words: Tensor,
        word_mask: Tensor,
        sentence: Tensor,
        clause: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """-> fused [B,D], and which clauses each query has [B,C].

        tokens [B,N,D], pooled [B,D], concepts [B,K,D] and concept_mask [B,K], which may be None without `concepts`, words [B,L,D], word_mask [B,L], sentence
        [B,C,D], clause [B,L], the number of each word's clause.
        """
        check_shape("sentence vectors [B,C,D]", sentence, len(pooled), None, pooled.shape[1])
        check_shape("clauses of the words [B,L]", clause, *word_mask.shape)
        if not self.concepts:
            concepts, concept_mask = tokens[:, :0], pooled[:, :0].bool()
        count = sentence.shape[1]
        own = [word_mask & (clause == number) for number in range(count)]  # each [B,L]
        present = torch.stack([mask.any(1) for mask in own], dim=1)
        fused = pooled
        for number, mask in enumerate(own):
            here = present[:, number]
            # Most captions have one clause: the others' work is for their rows alone. A traced graph has no such choice.
            rows = None if torch.compiler.is_exporting() or bool(here.all()) else here.nonzero().flatten()
            if rows is not None and not len(rows):
                continue
            given = (tokens, fused, concepts, concept_mask, words, mask, sentence[:, number])
            changed = self._changed(*(given if rows is None else [value[rows] for value in given]))
            if rows is None:
                fused = torch.where(here[:, None], changed, fused)
            else:
                fused = fused.index_copy(0, rows, changed.to(fused.dtype))
        return fused, present

    def _changed(self, tokens: Tensor, fused: Tensor, concepts: Tensor, concept_mask: Tensor, *text: Tensor) -> Tensor:
        added = self.chain(tokens, fused, concepts, concept_mask, *text)["fused"]
        kept = self.gate(torch.cat([fused, text[-1]], dim=-1)).sigmoid()
        return kept * fused + self.weight * added
