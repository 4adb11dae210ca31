"""Layers that several parts share: masked softmax, self-attention, encoder block.

B batch, N tokens, D width, H heads, d width of a head. Masks are true where a token is valid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neucore_plugin.common.errors import ConfigError


def check_shape(name: str, tensor: Tensor, *sizes: int | None) -> None:
    """Raise ValueError unless `tensor` has these sizes; None takes any size."""
    given = tuple(tensor.shape)
    fits = len(given) == len(sizes) and all(
        want is None or want == have for want, have in zip(sizes, given, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in sizes)
        raise ValueError(f"{name} has shape {list(given)}, expected [{wanted}]")


def check_positive(**values: int) -> None:
    """Raise ConfigError where a size is no positive whole number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r}, expected a whole number of at least 1")


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension, restricted to `mask`; a row with nothing valid is all zeros, not NaN."""
    mask = mask.bool().expand_as(logits)
    empty = ~mask.any(dim=-1, keepdim=True)
    weights = logits.masked_fill(~mask, float("-inf")).masked_fill(empty, 0.0).softmax(dim=-1)
    return weights.masked_fill(~mask, 0.0)


class SelfAttention(nn.Module):
    """Multi-head self-attention over [B,N,D]; the one projection holds queries, keys and values in this order.

    An invalid token is attended by none. It takes in nothing itself, or with `uniform_invalid` the mean value of all
    tokens, as a softmax over equally masked logits gives it (the released executors).
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int,
        dropout: float,
        qkv_bias: bool = True,
        uniform_invalid: bool = False,
    ):
        super().__init__()
        check_positive(dim=dim, heads=heads, head_dim=head_dim)
        self.heads, self.head_dim = heads, head_dim
        inner = heads * head_dim
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.proj = nn.Linear(inner, dim)
        self.dropout = dropout
        self.uniform_invalid = uniform_invalid

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B,N,D], mask [B,N] or None where all are valid -> [B,N,D]."""
        batch, count, _ = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)  # each [B,H,N,d]
        keys = None
        if mask is not None:
            # A sample with no valid token attends everywhere, lest it become NaN; its output is set below.
            keys = (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]  # [B,1,1,N]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, dropout_p=dropout)  # [B,H,N,d]
        if mask is not None:
            invalid = v.mean(dim=2, keepdim=True) if self.uniform_invalid else torch.zeros_like(mixed[:, :, :1])
            mixed = torch.where(mask[:, None, :, None], mixed, invalid)
        out = self.proj(mixed.transpose(1, 2).reshape(batch, count, -1))  # [B,N,D]
        return F.dropout(out, self.dropout, self.training)

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What each token takes of each valid one, x [B,N,D], mask [B,N] -> [B,H,N,N], rows of sum 1."""
        batch, count, _ = x.shape
        q, k, _ = self.qkv(x).view(batch, count, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        valid = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        return masked_softmax(q @ k.mT / self.head_dim**0.5, valid[:, None, None, :])


class FeedForward(nn.Module):
    """Two linear layers with a GELU between, on the last dimension."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: attention, then MLP of width `mlp_ratio` D, each with a residual."""

    def __init__(self, *, dim: int, heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        check_positive(dim=dim, heads=heads)
        if dim % heads:
            raise ConfigError(f"width {dim} is not a multiple of {heads} heads; choose another number of heads")
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim=dim, heads=heads, head_dim=dim // heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """As `SelfAttention`."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))
