"""What the vision transformers of the host's models have in common."""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from neucore_plugin.common.errors import CheckpointError


def sized(name: str, defaults: Mapping[str, int], given: Mapping[str, int] | None) -> dict[str, int]:
    """`defaults` overruled by what an `architecture` says. Raises ValueError for what no attention can have."""
    sizes = {**defaults, **{key: value for key, value in (given or {}).items() if value is not None}}
    for prefix in ("", "query_"):
        width, heads = sizes.get(f"{prefix}width", 0), sizes.get(f"{prefix}heads", 1)
        if width % heads:
            raise ValueError(f"{name}: architecture.{prefix}width {width} is no multiple of {prefix}heads {heads}")
    return sizes


def resized_positions(
    table: Tensor,
    grid: tuple[int, int],
    extra: int = 1,
    *,
    align_corners: bool = False,
    path: str | Path = "the file",
) -> Tensor:
    """A table of positions [..., extra + P, D] of a square of patches for another grid (rows, columns), bicubic.

    The first `extra` rows (class token) stay as they are. path: named in the CheckpointError of another table.
    """
    kept, patches = table[..., :extra, :], table[..., extra:, :]
    side = round(patches.shape[-2] ** 0.5)
    if side * side != patches.shape[-2]:
        raise CheckpointError(
            f"{path}: its table of {patches.shape[-2]} positions is no square of patches; it cannot be resized"
        )
    if (side, side) == tuple(grid):
        return table
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    square = F.interpolate(square, size=tuple(grid), mode="bicubic", align_corners=align_corners)
    rows = square.permute(0, 2, 3, 1).reshape(*table.shape[:-2], grid[0] * grid[1], table.shape[-1])
    return torch.cat([kept, rows.to(table.dtype)], dim=-2)
