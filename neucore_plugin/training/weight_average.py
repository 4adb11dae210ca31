"""Exponential moving average of the trained weights (run.ema_decay). Knows no host."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from neucore_plugin.common.errors import CheckpointError
from neucore_plugin.training.batch_norm import running_statistics


class WeightAverage:
    """average = decay x average + (1 - decay) x weights, after each step; the first step's weights begin it.

    Averaged are the trainable parameters and the running statistics of trained batch norms, as in
    `torch.optim.swa_utils`; frozen weights are not copied. It looks back over about 1 / (1 - decay) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        statistics = {name: value for name, value in running_statistics(model).items() if value.is_floating_point()}
        self._weights: dict[str, Tensor] = {**trained, **statistics}
        self._average = {name: value.detach().clone() for name, value in self._weights.items()}
        self._move, self.steps = get_ema_multi_avg_fn(decay), 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        if self.steps:
            for dtype in {value.dtype for value in self._average.values()}:
                names = [name for name, value in self._average.items() if value.dtype == dtype]
                self._move([self._average[name] for name in names], [self._weights[name] for name in names], None)
        else:
            for name, value in self._average.items():
                value.copy_(self._weights[name])
        self.steps += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights within, its own again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in self._weights.items():
            own = value.detach().clone()
            value.copy_(self._average[name])
            self._average[name].copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers for a checkpoint."""
        return {"steps": self.steps, "weights": dict(self._average)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Raises CheckpointError where `state` is not of the same weights."""
        stored = (state or {}).get("weights", {})
        wrong = sorted(stored.keys() ^ self._average.keys())
        wrong += [name for name, value in stored.items() if name not in wrong and value.shape != self._shape(name)]
        if wrong:
            raise CheckpointError(
                f"the checkpoint's averaged weights are not those of this model: {wrong[0]} and {len(wrong) - 1} "
                "others differ; train with the run.ema_decay and the model it was written with, or run.resume: never"
            )
        for name, value in self._average.items():
            value.copy_(stored[name])
        self.steps = int(state["steps"])

    def _shape(self, name: str) -> torch.Size:
        return self._average[name].shape
