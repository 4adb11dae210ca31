"""Encode the gallery once, rank it for every query, gather what the processes found."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_world_size, is_dist_avail_and_initialized, is_main_process

from neucore_plugin.common.errors import DataError


def _quiet() -> bool | None:
    return None if is_main_process() else True


def _gather(mine: dict[int, Any]) -> dict[int, Any]:
    """Union of every process's {query index: value}."""
    if not is_dist_avail_and_initialized():
        return mine
    parts: list[Any] = [None] * get_world_size()
    dist.all_gather_object(parts, mine)
    return {index: value for part in parts for index, value in part.items()}


def _gather_keys(found: dict[str, dict[str, dict[int, Any]]]) -> dict[str, dict[str, dict[int, Any]]]:
    """`found` with the kinds and rows of every process, in one order: a process without queries has none."""
    if not is_dist_avail_and_initialized():
        return found
    parts: list[Any] = [None] * get_world_size()
    dist.all_gather_object(parts, {kind: list(rows) for kind, rows in found.items()})
    kinds = {kind: rows for part in parts for kind, rows in part.items()}
    return {kind: {row: found.get(kind, {}).get(row, {}) for row in rows} for kind, rows in sorted(kinds.items())}


def _in_order(values: Mapping[int, Any], count: int) -> Any:
    if sorted(values) != list(range(count)):
        raise DataError(
            f"evaluation saw {len(values)} of {count} queries; the loader must give each query exactly once"
        )
    ordered = [values[index] for index in range(count)]
    return ordered if isinstance(ordered[0], tuple) else torch.tensor(ordered)


def _interleave(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rank r holds rows r, r + W, ...; put the whole gallery back in order."""
    if not is_dist_avail_and_initialized():
        return own
    parts: list[Any] = [None] * get_world_size()
    dist.all_gather_object(parts, own)
    parts = [part for part in parts if part]
    whole = {}
    for name in parts[0]:
        total = sum(len(part[name]) for part in parts)
        whole[name] = parts[0][name].new_empty(total, *parts[0][name].shape[1:])
        for rank, part in enumerate(parts):
            whole[name][rank :: len(parts)] = part[name]
    return whole
