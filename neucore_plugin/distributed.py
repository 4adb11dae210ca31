"""The few exchanges between processes that training needs; each is a no-op in one process. Knows no host."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks, in every process. They must be picklable."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def own_first(parts: list[Result]) -> list[Result]:
    """The parts of all processes, by rank -> this process's part first, then the next ranks' in turn."""
    return parts[rank() :] + parts[: rank()]


def on_main(function: Callable[[], Result]) -> Result:
    """Run `function` in the main process alone; every process gets its result, or raises its exception."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@torch.no_grad()
def from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite tensors with those of the main process, in one exchange a number type."""
    if world_size() == 1:
        return
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for members in kinds.values():
        flat = torch.cat([tensor.flatten() for tensor in members])
        dist.broadcast(flat, src=0)
        for tensor, part in zip(members, flat.split([tensor.numel() for tensor in members]), strict=True):
            tensor.copy_(part.view_as(tensor))


def wrap_model(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """`model` with the main process's weights, and gradients averaged over the processes; itself where there is one.

    A parameter that some batch does not use gets no gradient there; without `find_unused_parameters` the processes
    would wait for it for ever. With it, a parameter that no process used keeps no gradient, as in one process.
    """
    if world_size() == 1:
        return model
    devices = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, find_unused_parameters=True)
