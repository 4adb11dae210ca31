"""How a baseline composes a query from image and text: small modules that know no host.

`reads` names what a composer takes of the backbone's projected output: pooled or tokens (of the reference), sentence
or words.

Q queries, G gallery images, N image tokens, L words, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neucore_plugin.models.layers import EncoderBlock
from neucore_plugin.models.matching import Matching


class Fixed(nn.Module):
    """A composer without weights: it takes the width as the others do, and has no use for it."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()


class ImageOnly(Fixed):
    """The reference itself: how far the images alone go."""

    reads = ("pooled",)

    def forward(self, pooled: Tensor) -> Tensor:
        """[Q,D] -> [Q,D]."""
        return pooled


class TextOnly(Fixed):
    """The relative caption alone, as in text-to-image retrieval."""

    reads = ("sentence",)

    def forward(self, sentence: Tensor) -> Tensor:
        """[Q,D] -> [Q,D]."""
        return sentence


class Sum(Fixed):
    """Late fusion: the sum of both vectors."""

    reads = ("pooled", "sentence")

    def forward(self, pooled: Tensor, sentence: Tensor) -> Tensor:
        """Both [Q,D] -> [Q,D]."""
        return pooled + sentence


class LoneBatchNorm(nn.BatchNorm1d):
    """Batch norm that takes a training batch of one row as well: it has no variance, so by the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """[B,D] -> [B,D]."""
        if self.training and len(x) == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class Tirg(nn.Module):
    """Gated residual: f = w_g sigmoid(gate(h)) * x + w_r res(h), h = [x;t], x the image and t the text.

    gate = linear . ReLU . norm, res = linear . ReLU . linear . ReLU . norm, each with a batch norm of its own; w_g and
    w_r start at 1 and 10. So the authors compose pooled vectors, and others that report TIRG; the two convolutions in
    the gate of the paper's formula are for feature maps. By the norms a query depends on its batch in training; a
    trained model composes each by itself.

    Source: Vo et al., "Composing Text and Image for Image Retrieval - An Empirical Odyssey", CVPR 2019, section 3.2,
    and the authors' code.
    """

    reads = ("pooled", "sentence")
    changed = "its batch norms are new, as in the authors' code"

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(LoneBatchNorm(2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        wide = nn.Linear(2 * dim, 2 * dim)
        self.residual = nn.Sequential(LoneBatchNorm(2 * dim), nn.ReLU(), wide, nn.ReLU(), nn.Linear(2 * dim, dim))
        self.gate_weight = nn.Parameter(torch.tensor(1.0))
        self.residual_weight = nn.Parameter(torch.tensor(10.0))

    def forward(self, pooled: Tensor, sentence: Tensor) -> Tensor:
        """Both [Q,D] -> [Q,D]."""
        both = torch.cat([pooled, sentence], dim=-1)  # [Q,2D]
        kept = self.gate(both).sigmoid() * pooled
        return self.gate_weight * kept + self.residual_weight * self.residual(both)


class Combiner(nn.Module):
    """CLIP4Cir's fusion: f = out(h) + s t + (1 - s) x, of unit length, with h and s from [P t ; P x] by two branches.

    Args:
        dropout: after each of the four ReLUs, 0.5 as published. The hidden widths are the published 4 D and 8 D.

    Source: Baldrati et al., "Effective Conditioned and Composed Image Retrieval Combining CLIP-Based Features", CVPR
    2022, section 3.2.
    """

    reads = ("pooled", "sentence")

    def __init__(self, *, dim: int, dropout: float) -> None:
        super().__init__()

        def layer(width: int, wider: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, wider), nn.ReLU(), nn.Dropout(dropout))

        self.text, self.image = layer(dim, 4 * dim), layer(dim, 4 * dim)
        self.mix = nn.Sequential(layer(8 * dim, 8 * dim), nn.Linear(8 * dim, dim))
        self.share = nn.Sequential(layer(8 * dim, 8 * dim), nn.Linear(8 * dim, 1))

    def forward(self, pooled: Tensor, sentence: Tensor) -> Tensor:
        """Both [Q,D] -> [Q,D]."""
        both = torch.cat([self.text(sentence), self.image(pooled)], dim=-1)  # [Q,8D]
        share = self.share(both).sigmoid()  # [Q,1], of the text
        return F.normalize(self.mix(both) + share * sentence + (1 - share) * pooled, dim=-1)


class CrossAttention(nn.Module):
    """A plain transformer over [learned token ; reference tokens ; words]; the first output is the query.

    Positions come with the encoders' own output; two segment vectors tell image from text.

    Args:
        depth, heads, mlp_ratio, dropout: of its pre-norm blocks.
    """

    reads = ("tokens", "words")

    def __init__(self, *, dim: int, depth: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(dim) * 0.02)
        self.segments = nn.Parameter(torch.randn(2, dim) * 0.02)
        self.blocks = nn.ModuleList(
            EncoderBlock(dim=dim, heads=heads, mlp_ratio=mlp_ratio, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        """tokens [Q,N,D], words [Q,L,D], word_mask [Q,L] -> [Q,D]."""
        x, mask = self._sequence(tokens, words, word_mask)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x[:, 0])

    def looks_at(self, tokens: Tensor, words: Tensor, word_mask: Tensor) -> Tensor:
        """What the last block's first output takes of each image token, mean over heads: [Q,N]."""
        x, mask = self._sequence(tokens, words, word_mask)
        for block in self.blocks[:-1]:
            x = block(x, mask)
        weights = self.blocks[-1].attn.weights(self.blocks[-1].norm1(x), mask)  # [Q,H,1+N+L,1+N+L]
        return weights.mean(1)[:, 0, 1 : 1 + tokens.shape[1]]

    def _sequence(self, tokens: Tensor, words: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first.expand(tokens.shape[0], 1, -1)
        x = torch.cat([first, tokens + self.segments[0], words + self.segments[1]], dim=1)  # [Q,1+N+L,D]
        seen = word_mask.new_ones(tokens.shape[0], 1 + tokens.shape[1])
        return x, torch.cat([seen, word_mask], dim=1)


class Artemis(Matching):
    """ARTEMIS fuses nothing: a target t is compared with the text m and, as m directs it, with the reference r:

    s(r, m, t) = cos(Tr(m), A_EM(m) * t) + cos(A_IS(m) * r, A_IS(m) * t), A = softmax(MLP(m)): two terms of `Matching`,
    whose `transform` is Tr, `attention` A_EM and `implicit_attention` A_IS.
    The text m is brought to unit length first, as the authors' encoders give it: the attentions' sharpness hangs on it.
    The lengths of r and t do not matter.

    Source: Delmas et al., "ARTEMIS: Attention-based Retrieval with Text-Explicit Matching and Implicit Similarity",
    ICLR 2022, section 3, and the authors' code.
    """

    reads = ("pooled", "sentence")
    changed = "its text has unit length now, as in the authors' code"

    def __init__(self, *, dim: int, temperature: float, learn_temperature: bool) -> None:
        super().__init__(
            dim=dim,
            terms=["explicit", "implicit"],
            temperature=temperature,
            learn_temperature=learn_temperature,
            released=False,
        )
        self.register_buffer("text_length", torch.ones(()))  # stored: weights trained on texts of any length lack it

    def forward(self, pooled: Tensor, sentence: Tensor) -> dict[str, Tensor]:
        """Both [Q,D] -> encoding of a query, four of [Q,D]."""
        return self.weighted(F.normalize(sentence, dim=-1) * self.text_length, pooled)


COMPOSERS: dict[str, type[nn.Module]] = {
    "image_only": ImageOnly,
    "text_only": TextOnly,
    "sum": Sum,
    "tirg": Tirg,
    "artemis": Artemis,
    "combiner": Combiner,
    "cross_attention": CrossAttention,
}
