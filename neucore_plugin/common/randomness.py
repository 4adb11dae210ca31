"""Seeds and random states: what is drawn depends on (seed, rank) for training and on (seed, epoch, sample) for data."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed python, numpy and torch (CPU and CUDA), differently for each process; cuDNN picks deterministic kernels."""
    value = int(seed) + int(rank)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def mix(*numbers: int) -> int:
    """One 63-bit seed out of several integers; unlike a sum, (1, 2) and (2, 1) give unrelated ones."""
    words = np.random.SeedSequence([abs(int(number)) for number in numbers]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def seed_sample(*numbers: int) -> None:
    """Seed the generators a dataset may draw from. CUDA's are left alone: samples are made on the CPU."""
    value = mix(*numbers)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)


@contextmanager
def preserved() -> Iterator[None]:
    """Restore the CPU generators on leaving, so that making samples does not disturb those of the training."""
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])


def random_state() -> dict[str, Any]:
    """State of all generators of this process, in plain containers and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None,
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since `random_state` gave `state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
