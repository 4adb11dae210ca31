"""Fusion clause by clause: the image's vector, changed by one clause of the caption after the other.

B batch, N reference tokens, C clauses, D width. Masks are true where something is valid.
"""

import torch
from torch import Tensor, nn

from neucore_plugin.models.layers import check_positive, check_shape


class ClauseFusion(nn.Module):
    """A chain of blocks of one architecture, each instantiated by a clause and what it attends in the reference:

    a = softmax_n( x_n . K m_c / sqrt(D) ),  r_c = sum_n a_n x_n,  h = [m_c ; r_c],
    f_0 = p,  f_c = sigmoid(G [f_{c-1} ; h]) * f_{c-1} + w R [f_{c-1} ; h],  d = sum_c T [p ; h],

    p the reference's pooled vector, x_n its tokens as the concept alignment has them, m_c the sentence of clause c; G,
    R and T are MLPs that all clauses share. Each f_c is a vector like an image's, so that the next clause can begin
    from it: trained on captions of one change, it composes those of two. d is the change that is asked for, by itself.

    Args:
        dim: D. places: whether a clause attends the tokens; without it r_c is left out. fuses, changes: whether f and d
            are asked for; else they are p and 0, and nothing is trained for them.

    >>> fusion = ClauseFusion(dim=8, places=True)
    >>> tokens, pooled, sentence = torch.randn(3, 16, 8), torch.randn(3, 8), torch.randn(3, 2, 8)
    >>> present = torch.tensor([[True, True], [True, False], [True, True]])
    >>> fused, change = fusion(tokens, pooled, sentence, present)
    >>> fused.shape, change.shape
    (torch.Size([3, 8]), torch.Size([3, 8]))

    Source: progressive fusion, Zhao & Xu 2023, one step a clause; its block: the gated residual of TIRG (Vo et al.,
    CVPR 2019) without norms; r_c and d: ours.
    """

    def __init__(self, *, dim: int, places: bool, fuses: bool = True, changes: bool = True):
        super().__init__()
        check_positive(dim=dim)
        self.dim, inputs = dim, (3 if places else 2) * dim
        self.key = nn.Linear(dim, dim) if places else None  # K

        def mlp(*widths: int) -> nn.Sequential:
            layers = [nn.Linear(*pair) for pair in zip((inputs, *widths), (*widths, dim), strict=True)]
            return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])

        self.gate = mlp(2 * dim) if fuses else None  # G
        self.residual = mlp(2 * dim, 2 * dim) if fuses else None  # R
        self.weight = nn.Parameter(torch.ones(())) if fuses else None  # w
        self.change = mlp(dim) if changes else None  # T

    def forward(self, tokens: Tensor, pooled: Tensor, sentence: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B,N,D], pooled [B,D], sentence [B,C,D], present [B,C], which clauses there are -> fused and change,
        both [B,D]."""
        check_shape("pooled vectors [B,D]", pooled, None, self.dim)
        check_shape("image tokens [B,N,D]", tokens, pooled.shape[0], None, self.dim)
        check_shape("sentence vectors [B,C,D]", sentence, pooled.shape[0], None, self.dim)
        check_shape("clauses that there are [B,C]", present, *sentence.shape[:2])
        fused, change = pooled, torch.zeros_like(pooled)
        for number, here in enumerate(present.unbind(1)):
            # Most captions have one clause: what follows is for the others' rows alone. A traced graph cannot choose.
            whole = torch.compiler.is_exporting() or bool(here.all())
            if not whole and not bool(here.any()):
                continue
            rows = slice(None) if whole else here.nonzero().flatten()
            f, asked = self._step(tokens[rows], pooled[rows], fused[rows], sentence[rows, number])
            if whole:
                fused, change = torch.where(here[:, None], f, fused), change + asked * here[:, None]
            else:
                fused = fused.index_copy(0, rows, f.to(fused.dtype))
                change = change.index_add(0, rows, asked.to(change.dtype))
        return fused, change

    def looks_at(self, tokens: Tensor, sentence: Tensor) -> Tensor:
        """What a clause attends: tokens [B,N,D], sentence [B,D] -> a [B,N]."""
        return (torch.einsum("bnd,bd->bn", tokens, self.key(sentence)) / self.dim**0.5).softmax(dim=-1)

    def _step(self, tokens: Tensor, pooled: Tensor, fused: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        given = [sentence]
        if self.key is not None:
            given.append(torch.einsum("bn,bnd->bd", self.looks_at(tokens, sentence), tokens))
        h = torch.cat([fused, *given], dim=-1)
        if self.gate is not None:
            fused = self.gate(h).sigmoid() * fused + self.weight * self.residual(h)
        change = torch.zeros_like(pooled) if self.change is None else self.change(torch.cat([pooled, *given], dim=-1))
        return fused, change
