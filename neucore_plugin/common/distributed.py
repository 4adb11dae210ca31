"""The few exchanges between processes that training needs; each is a no-op in one process. Knows no host."""

import os
import re
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from neucore_plugin.common.errors import ConfigError, NeucoreError

Result = TypeVar("Result")


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
        if isinstance(outcome[1], NeucoreError):
            outcome[1].shared = True
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


JOIN_TIMEOUT = timedelta(minutes=30)  # how long a process waits for the others to start
WORK_TIMEOUT = timedelta(hours=12)  # and later, while the first renders drawings or fills a feature cache


def init_distributed(run_cfg: Any) -> None:
    """Join the process group that torchrun or srun announces, and choose the device.

    Sets run_cfg.{distributed, rank, world_size, gpu, device, dist_backend}. gloo on a CPU, nccl on CUDA; the stock
    function knows nccl alone. Raises `ConfigError` where CUDA is demanded and not there, `NeucoreError` where the
    announcement is incomplete or the others cannot be met.
    """
    rank, world_size, local_rank = _announced_ranks()
    wanted = str(run_cfg.get("device") or "auto")
    kind, _, chosen = pick_device(wanted if world_size == 1 else wanted.partition(":")[0]).partition(":")
    index = int(chosen or 0) if world_size == 1 else local_rank
    if kind == "mps" and world_size > 1:
        raise ConfigError(f"run.device is mps, on which one process trains, but {world_size} were started; start one")
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise ConfigError(
            f"process {rank} of {world_size} wants CUDA device {index}, but there are {torch.cuda.device_count()}; "
            "start fewer processes or use `run.device=cpu`"
        )
    run_cfg.rank, run_cfg.world_size, run_cfg.gpu = rank, world_size, index
    run_cfg.distributed = world_size > 1
    run_cfg.device = f"cuda:{index}" if kind == "cuda" else kind
    if kind == "cuda":
        torch.cuda.set_device(index)
    if world_size == 1:
        return
    backend = str(run_cfg.get("dist_backend") or "auto")
    run_cfg.dist_backend = ("nccl" if kind == "cuda" else "gloo") if backend == "auto" else backend
    if run_cfg.dist_backend == "nccl" and kind != "cuda":
        raise ConfigError(f"run.dist_backend is nccl, which joins GPUs, but the device is {kind}; use auto or gloo")
    if not dist.is_initialized():
        _join(run_cfg.dist_backend, str(run_cfg.get("dist_url") or "env://"), rank, world_size)
    dist.barrier()


def leave() -> None:
    """Undo `init_distributed`."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _join(backend: str, url: str, rank: int, world_size: int) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if url == "env://" and not os.environ.get(name)]
    if missing:
        raise NeucoreError(
            f"process {rank} of {world_size} is to join the others, but lacks {' and '.join(missing)}. Start with "
            "`torchrun --nproc_per_node=N -m lavis.train ...`, which sets them, or give run.dist_url a meeting place "
            "(tcp://HOST:PORT or file://PATH); for one process unset RANK and WORLD_SIZE"
        )
    try:
        if url.startswith("file://") and not Path(url.removeprefix("file://")).parent.is_dir():
            raise FileNotFoundError("the file's folder does not exist")  # torch would wait for it
        store, rank, world_size = next(iter(dist.rendezvous(url, rank, world_size, timeout=JOIN_TIMEOUT)))
        store.set(f"joined/{rank}", "")
        # The group itself would not give up.
        store.wait([f"joined/{other}" for other in range(world_size)], JOIN_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=WORK_TIMEOUT)
        store.set_timeout(WORK_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        place = ":".join(os.environ[key] for key in ("MASTER_ADDR", "MASTER_PORT")) if url == "env://" else url
        reason = str(error).strip().splitlines()[0][:200] or type(error).__name__
        raise NeucoreError(
            f"process {rank} of {world_size} could not meet the others at {place} ({reason}). Check that all "
            f"{world_size} processes were started with the same address and a free port, one of each rank"
        ) from error


def pick_device(wanted: str) -> str:
    """ "auto" becomes "cuda" or "cpu"; anything else is kept. Raises `ConfigError` where it cannot be had."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return "cuda" if count else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", wanted):
        raise ConfigError(f"device: got {wanted!r}; allowed: auto, cpu, cuda, cuda:N or mps")
    kind, _, index = wanted.partition(":")
    has_mps = hasattr(torch.backends, "mps") and torch.backends.mps.is_available()
    if not {"cpu": True, "cuda": int(index or 0) < count, "mps": has_mps}[kind]:
        there = ["cpu", *(f"cuda:{number}" for number in range(count)), *(["mps"] if has_mps else [])]
        raise ConfigError(
            f"device: got {wanted}, but torch sees no such device here; there is {', '.join(there)}; use one of them, "
            "or auto"
        )
    return wanted


def _announced_ranks() -> tuple[int, int, int]:
    """Rank, number of processes, rank on this machine. Raises `NeucoreError` for half an announcement."""
    environment = os.environ
    if "RANK" in environment or "WORLD_SIZE" in environment:  # torchrun
        defaults = {"RANK": None, "WORLD_SIZE": None, "LOCAL_RANK": environment.get("RANK")}
    elif "SLURM_PROCID" in environment and "MASTER_ADDR" in environment:  # srun of several tasks
        defaults = {"SLURM_PROCID": None, "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    else:
        return 0, 1, 0
    given = {name: environment.get(name, default) for name, default in defaults.items()}
    if all(value is not None and value.isdecimal() for value in given.values()):
        rank, world_size, local_rank = (int(value) for value in given.values())
        if rank < world_size:
            return rank, world_size, local_rank
    shown = ", ".join(f"{name} {'not set' if value is None else repr(value)}" for name, value in given.items())
    raise NeucoreError(
        f"the environment announces several processes, but not properly: {shown}. Ranks are whole numbers below the "
        "number of processes. Start with `torchrun --nproc_per_node=N -m lavis.train ...`; for one process unset these"
    )
