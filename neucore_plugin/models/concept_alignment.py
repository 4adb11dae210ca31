"""Multi-modal concept alignment: where the concepts of a text lie in a reference and a target image.

Source: Zhao & Xu, "NEUCORE: Neural Concept Reasoning for Composed Image Retrieval", PMLR 243 (arXiv 2310.01358).

Shapes: B batch, N image tokens, C concept vocabulary, D width, Dw width of a concept's embedding, H heads.
Masks are true where a token is valid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neucore_plugin.common.errors import ConfigError
from neucore_plugin.models.layers import EncoderBlock, check_positive, check_shape, masked_softmax

POSITION_ROWS = 197  # rows of the released form's position table
BAGS = ("union", "joint")


class ConceptEncoder(nn.Module):
    """Transformer E over image tokens: [B,N,D] -> [B,N,D]; invalid tokens come out as zeros.

    With `class_token` it is the released form: a class token is prepended and dropped again, and one row of a position
    table, n+1 for n tokens, is added to every token, which limits the number of tokens to 195.
    """

    def __init__(
        self,
        dim: int,
        depth: int = 4,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        class_token: bool = False,
    ):
        super().__init__()
        check_positive(dim=dim, heads=heads)
        if not isinstance(depth, int) or depth < 0:
            raise ConfigError(f"concept encoder depth is {depth!r}, expected a whole number of at least 0")
        self.dim = dim
        self.cls_token = self.pos_embed = None
        if class_token:
            self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, POSITION_ROWS, dim), std=0.02))
        self.blocks = nn.ModuleList(EncoderBlock(dim, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        check_shape("image tokens [B,N,D]", tokens, None, None, self.dim)
        batch, count, _ = tokens.shape
        if mask is not None:
            check_shape("image token mask [B,N]", mask, batch, count)
            mask = mask.bool()
            tokens = tokens.masked_fill(~mask[..., None], 0.0)  # whatever stands at padding cannot spread
        x, valid = tokens, mask
        if self.cls_token is not None:
            if count + 1 > POSITION_ROWS - 1:
                raise ValueError(
                    f"{count} image tokens are too many for the released concept encoder, whose position table ends at "
                    f"{POSITION_ROWS - 2}; use fewer tokens or the default form, which takes any number"
                )
            x = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1) + self.pos_embed[:, count + 1]
            valid = None if mask is None else F.pad(mask, (1, 0), value=True)
        for block in self.blocks:
            x = block(x, valid)
        x = self.norm(x[:, x.shape[1] - count :])  # [B,N,D]
        return x if mask is None else x.masked_fill(~mask[..., None], 0.0)


class MILPooling(nn.Module):
    """Multiple-instance pooling: sum_n a_n x_n with a = softmax_n(u . tanh(V x_n + b) + c).

    [B,N,D] -> ([B,D], weights [B,N]); a bag with no valid token gives zeros. `hidden`: rows of V, D/2 unless given.
    """

    def __init__(self, dim: int, hidden: int | None = None):
        super().__init__()
        hidden = max(dim // 2, 1) if hidden is None else hidden
        check_positive(dim=dim, hidden=hidden)
        self.dim = dim
        self.attention = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_shape("instances [B,N,D]", x, None, None, self.dim)
        if mask is not None:
            check_shape("instance mask [B,N]", mask, *x.shape[:2])
            x = x.masked_fill(~mask.bool()[..., None], 0.0)
        weights = masked_softmax(self.attention(x).squeeze(-1), mask)  # [B,N]
        return torch.einsum("bn,bnd->bd", weights, x), weights


class ConceptClassifier(nn.Module):
    """Multi-label classification against projected concept embeddings; words never seen in training project alike."""

    def __init__(self, word_dim: int, dim: int):
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


def focal_concept_loss(
    logits: Tensor, labels: Tensor, alpha: float = 0.5, gamma: float = 1.0, reduce: bool = True
) -> Tensor:
    """Focal loss, mean over B and C (with `reduce`; else [B], mean over C), of logits [B,C] against labels [B,C].

    Labels are 0 and 1; the loss is not weighted.

    With p = sigmoid(logit), a label 1 costs -alpha (1-p)^gamma log p, a label 0 costs -(1-alpha) p^gamma log(1-p).
    """
    check_shape("concept logits [B,C]", logits, None, None)
    check_shape("concept labels [B,C]", labels, *logits.shape)
    if logits.numel() == 0:
        raise ValueError(f"concept logits have shape {list(logits.shape)}: an empty batch or vocabulary has no loss")
    labels = labels.to(logits.dtype)
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    # Powers are taken as exponentials of logarithms: finite, with finite gradients, at any logit and any gamma >= 0.
    positive = alpha * torch.exp(gamma * log_not_p) * log_p
    negative = (1.0 - alpha) * torch.exp(gamma * log_p) * log_not_p
    rows = -(labels * positive + (1.0 - labels) * negative).mean(dim=1)
    return rows.mean() if reduce else rows


class ConceptAlignmentLoss(nn.Module):
    """`weight` times the focal concept loss."""

    def __init__(self, weight: float = 200.0, alpha: float = 0.5, gamma: float = 1.0):
        super().__init__()
        if weight < 0 or not 0 <= alpha <= 1 or gamma < 0:
            raise ConfigError(
                f"concept loss: weight {weight}, alpha {alpha}, gamma {gamma}; "
                "weight and gamma must not be negative, alpha must lie in 0..1"
            )
        self.weight, self.alpha, self.gamma = weight, alpha, gamma

    def forward(self, logits: Tensor, labels: Tensor, reduce: bool = True) -> Tensor:
        return self.weight * focal_concept_loss(logits, labels, self.alpha, self.gamma, reduce)


class ConceptAlignment(nn.Module):
    """Encodes single images and pools the bag of a reference and a target; classifies the bag by concepts.

    `bag` says how the two images' tokens come together: "union" pools their separate encodings, "joint" encodes the raw
    tokens of both together (twice the cost). In both, learned segment vectors tell reference from target; the released
    form has none, and only knows "joint".
    """

    def __init__(
        self,
        dim: int,
        word_dim: int,
        depth: int = 4,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        bag: str = "union",
        released: bool = False,
    ):
        super().__init__()
        if bag not in BAGS:
            raise ConfigError(f"concept_alignment.bag is {bag!r}, expected one of: {', '.join(BAGS)}")
        if released and bag != "joint":
            raise ConfigError(f'concept_alignment.bag is {bag!r}, but the released form needs "joint"')
        self.bag = bag
        self.encoder = ConceptEncoder(dim, depth, heads, mlp_ratio, dropout, class_token=released)
        self.fg_pool = MILPooling(dim)
        self.bg_pool = MILPooling(dim)
        self.classifier = ConceptClassifier(word_dim, dim)
        self.segments = None if released else nn.Parameter(0.02 * torch.randn(2, dim))

    def encode(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """tokens [B,N,D], mask [B,N] -> tokens E(tokens) [B,N,D], fg [B,D], bg [B,D], fg_weights [B,N]."""
        encoded = self.encoder(tokens, mask)
        fg, weights = self.fg_pool(encoded, mask)
        bg, _ = self.bg_pool(encoded, mask)
        return {"tokens": encoded, "fg": fg, "bg": bg, "fg_weights": weights}

    def align(
        self,
        reference: dict[str, Tensor],
        target: dict[str, Tensor],
        reference_tokens_raw: Tensor | None = None,
        target_tokens_raw: Tensor | None = None,
        masks: tuple[Tensor | None, Tensor | None] | None = None,
    ) -> dict[str, Tensor]:
        """Pool the bag of both images -> pooled [B,D], weights [B,Nr+Nt] (reference first).

        reference, target: what `encode` gave. The raw tokens (the input of `encode`) are needed by "joint" only.
        masks: (reference [B,Nr], target [B,Nt]), either may be None.
        """
        if self.bag == "joint":
            if reference_tokens_raw is None or target_tokens_raw is None:
                raise ValueError("a joint bag encodes the raw tokens of both images: pass them to align()")
            parts = [reference_tokens_raw, target_tokens_raw]
        else:
            parts = [reference["tokens"], target["tokens"]]
        check_shape("target tokens [B,N,D]", parts[1], parts[0].shape[0], None, parts[0].shape[2])
        mask = self._bag_mask(parts, masks)
        if self.segments is not None:
            parts = [part + segment for part, segment in zip(parts, self.segments, strict=True)]
        bag = torch.cat(parts, dim=1)  # [B,Nr+Nt,D]
        pooled, weights = self.fg_pool(self.encoder(bag, mask) if self.bag == "joint" else bag, mask)
        return {"pooled": pooled, "weights": weights}

    @staticmethod
    def _bag_mask(parts: list[Tensor], masks: tuple[Tensor | None, Tensor | None] | None) -> Tensor | None:
        if masks is None or all(mask is None for mask in masks):
            return None
        full = [torch.ones(p.shape[:2], dtype=torch.bool, device=p.device) for p in parts]
        return torch.cat([f if mask is None else mask.bool() for f, mask in zip(full, masks, strict=True)], dim=1)
