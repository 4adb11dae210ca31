"""Multi-modal concept alignment: where the concepts of a text lie in a reference and a target image.

Source: Zhao & Xu, "NEUCORE: Neural Concept Reasoning for Composed Image Retrieval", PMLR 243 (arXiv 2310.01358),
multi-modal concept alignment. The equations and their tests: docs/equations.md.

B batch, N image tokens, C concept vocabulary, D width, Dw width of a concept's embedding.
"""

import torch
from torch import Tensor, nn

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.models.layers import EncoderBlock, check_positive, check_shape

POSITION_ROWS = 197  # rows of the released form's position table
BAGS = ("union", "joint")


class ConceptEncoder(nn.Module):
    """Transformer E over image tokens, a final LayerNorm after its blocks: [B,N,D] -> [B,N,D].

    With `class_token` it is the released form: a class token is prepended and dropped again, and one row of a position
    table, n+1 for n tokens, is added to every token, which limits the number of tokens to 195.
    """

    def __init__(self, *, dim: int, depth: int, heads: int, mlp_ratio: float, dropout: float, class_token: bool):
        super().__init__()
        check_positive(dim=dim, heads=heads)
        if not isinstance(depth, int) or depth < 0:
            raise ConfigError(f"concept encoder depth is {depth!r}, expected a whole number of at least 0")
        self.dim = dim
        self.cls_token = self.pos_embed = None
        if class_token:
            self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, POSITION_ROWS, dim), std=0.02))
        self.blocks = nn.ModuleList(
            EncoderBlock(dim=dim, heads=heads, mlp_ratio=mlp_ratio, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        check_shape("image tokens [B,N,D]", tokens, None, None, self.dim)
        batch, count, _ = tokens.shape
        x = tokens
        if self.cls_token is not None:
            if count + 1 > POSITION_ROWS - 1:
                raise ValueError(
                    f"{count} image tokens are too many for the released concept encoder, whose position table ends at "
                    f"{POSITION_ROWS - 2}; use fewer tokens or the default form, which takes any number"
                )
            x = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1)  # [B,1+N,D]
            x = x + self.pos_embed[:, count + 1]
        for block in self.blocks:
            x = block(x, None)
        return self.norm(x[:, x.shape[1] - count :])  # [B,N,D]


class MILPooling(nn.Module):
    """Multiple-instance pooling: sum_n a_n x_n with a = softmax_n(u . tanh(V x_n + b) + c).

    [B,N,D] -> ([B,D], weights [B,N]); V has `hidden` rows.
    """

    def __init__(self, *, dim: int, hidden: int):
        super().__init__()
        check_positive(dim=dim, hidden=hidden)
        self.dim = dim
        self.attention = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check_shape("instances [B,N,D]", x, None, None, self.dim)
        weights = self.attention(x).squeeze(-1).softmax(dim=-1)  # [B,N]
        return torch.einsum("bn,bnd->bd", weights, x), weights


class ConceptClassifier(nn.Module):
    """Multi-label classification against projected concept embeddings; words never seen in training project alike."""

    def __init__(self, *, word_dim: int, dim: int):
        super().__init__()
        check_positive(word_dim=word_dim, dim=dim)
        self.projection = nn.Linear(word_dim, dim)

    def project(self, embeddings: Tensor) -> Tensor:
        """[...,Dw] -> [...,D]."""
        if embeddings.shape[-1] != self.projection.in_features:
            raise ValueError(
                f"concept embeddings have width {embeddings.shape[-1]}, expected {self.projection.in_features}; "
                "take them from the text encoder the model was built with"
            )
        return self.projection(embeddings)

    def forward(self, pooled: Tensor, vocabulary: Tensor) -> Tensor:
        """pooled [B,D], vocabulary [C,Dw] -> logits [B,C]."""
        check_shape("pooled bag [B,D]", pooled, None, self.projection.out_features)
        check_shape("concept vocabulary [C,Dw]", vocabulary, None, self.projection.in_features)
        return pooled @ self.project(vocabulary).T


class ConceptAlignment(nn.Module):
    """Encodes both images, pools the bag of their tokens, classifies the bag by the concepts of the vocabulary:

    f_a^rt = P(E([f^r ; f^t])),  logits = f_a^rt . W w_c;  P is `MILPooling`, E `ConceptEncoder`, W w_c `project`.

    A text names things of the target (to be added) and of the reference (to be removed): hence one bag of both. Pooling
    weights and products of token and concept show where a concept lies. A foreground and a background pooling of the
    single images, f_a^r and f_a^t, serve the matching.

    Args:
        dim: D. word_dim: Dw. depth, heads, mlp_ratio, dropout: of the encoder.
        bag: how the tokens come together: "joint" encodes the raw tokens of both images together, as above (twice the
            cost); "union" pools their separate encodings, P([E(f^r) ; E(f^t)]).
        released: the authors' form. It knows "joint" alone, and has no segment vectors; in ours, a learned one is added
            to the tokens of each image, to tell reference from target.
        background: whether there is a background pooling.

    >>> alignment = ConceptAlignment(
    ...     dim=8, word_dim=6, depth=1, heads=2, mlp_ratio=2.0, dropout=0.0, bag="union", released=False)
    >>> reference, target, vocabulary = torch.randn(3, 16, 8), torch.randn(3, 16, 8), torch.randn(100, 6)
    >>> r, t, logits = alignment(reference, target, vocabulary)
    >>> r["tokens"].shape, t["fg"].shape, logits.shape
    (torch.Size([3, 16, 8]), torch.Size([3, 8]), torch.Size([3, 100]))

    Source: Zhao & Xu 2023, multi-modal concept alignment, and figure 1; the background pooling: the released code.
    """

    def __init__(
        self,
        *,
        dim: int,
        word_dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        bag: str,
        released: bool,
        background: bool = True,
    ):
        super().__init__()
        if bag not in BAGS:
            raise ConfigError(f"concept_alignment.bag is {bag!r}, expected one of: {', '.join(BAGS)}")
        if released and bag != "joint":
            raise ConfigError(f'concept_alignment.bag is {bag!r}, but the released form needs "joint"')
        self.bag = bag
        self.encoder = ConceptEncoder(
            dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio, dropout=dropout, class_token=released
        )
        self.fg_pool, self.bg_pool = (
            MILPooling(dim=dim, hidden=max(dim // 2, 1)) if used else None for used in (True, background)
        )
        self.classifier = ConceptClassifier(word_dim=word_dim, dim=dim)
        self.segments = None if released else nn.Parameter(0.02 * torch.randn(2, dim))

    def forward(
        self, reference: Tensor, target: Tensor, vocabulary: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """reference, target: tokens [B,N,D]; vocabulary [C,Dw] -> what `encode` gives of both, and logits [B,C]."""
        check_shape("target tokens [B,N,D]", target, *reference.shape)
        both = self.encode(torch.cat([reference, target]))
        r, t = ({name: value.chunk(2)[side] for name, value in both.items()} for side in (0, 1))
        r["raw"], t["raw"] = reference, target  # not parts of `both`: gradients are summed in another order there
        pooled, _ = self.pool_bag(r, t)  # [B,D]
        return r, t, self.classifier(pooled, vocabulary)

    def encode(self, tokens: Tensor) -> dict[str, Tensor]:
        """Images by themselves, [B,N,D] -> raw and tokens, the input and E of it, [B,N,D]; fg and, where there is one,
        bg [B,D]; fg_weights [B,N]."""
        encoded = self.encoder(tokens)
        fg, weights = self.fg_pool(encoded)
        result = {"raw": tokens, "tokens": encoded, "fg": fg, "fg_weights": weights}
        return result if self.bg_pool is None else {**result, "bg": self.bg_pool(encoded)[0]}

    def pool_bag(self, reference: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What `encode` gave of both -> the bag's vector [B,D], and weights [B,2N] of its tokens, reference first."""
        parts = [side["raw" if self.bag == "joint" else "tokens"] for side in (reference, target)]
        if self.segments is not None:
            parts = [part + segment for part, segment in zip(parts, self.segments, strict=True)]
        bag = torch.cat(parts, dim=1)  # [B,2N,D]
        return self.fg_pool(self.encoder(bag) if self.bag == "joint" else bag)
