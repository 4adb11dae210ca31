"""From a loss to new weights: AdamW over the model's parameter groups, learning rate, number format, moving average.

Knows no host.
"""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import CheckpointError, ConfigError, nearest
from neucore_plugin.config.run import RunSchema
from neucore_plugin.training.batch_norm import running_statistics
from neucore_plugin.training.precision import Precision
from neucore_plugin.training.schedule import learning_rate
from neucore_plugin.training.weight_average import WeightAverage


class Optimisation:
    """The optimiser of one training, and all that a step of it takes.

    Args:
        model: on its device, not wrapped.
        round_iters, max_iters: iterations between two validations, and of the whole training.
    Raises: ConfigError for settings that fit neither the model nor the device.
    """

    def __init__(
        self, model: nn.Module, run: RunSchema, device: torch.device, round_iters: int, max_iters: int
    ) -> None:
        self.precision = Precision(run.amp, device)
        groups = parameter_groups(model, run.weight_decay, run.lr_scales, run.decay_all)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        logging.info("trainable parameters: %s", f"{sum(parameter.numel() for parameter in self._parameters):,}")
        # The plain form calls a dozen small operations for each weight. On mps the fused one was not tried.
        fused = True if device.type in ("cpu", "cuda") else None
        self.optimizer = torch.optim.AdamW(groups, lr=run.init_lr, betas=(0.9, run.beta2), fused=fused)
        self._run = run
        rounds, rest = divmod(max_iters, round_iters)  # the windows of accumulated gradients end with a round
        self._round_steps = -(-round_iters // run.accum_grad_iters)
        self._total_steps = rounds * self._round_steps + -(-rest // run.accum_grad_iters)
        self.average = None if run.ema_decay is None else WeightAverage(model, run.ema_decay)
        self._statistics = list(running_statistics(model).values())  # what a forward pass changes of the model

    def set_rate(self, step: int) -> float:
        """Set the learning rates of update number `step`; returns the one before the groups' own factors."""
        rate = learning_rate(self._run, step, self._total_steps, self._round_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate

    def step(self) -> None:
        """Update the weights from the gradients gathered so far."""
        self.precision.step(self.optimizer, self._parameters, self._run.clip_grad_norm)
        distributed.from_main(self._statistics)
        if self.average:
            self.average.update()

    def averaged(self) -> contextlib.AbstractContextManager:
        """The model has its averaged weights within, where there is an average."""
        return self.average.applied() if self.average else contextlib.nullcontext()

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a checkpoint holds of it, after `step` updates."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {"step": step, "total_steps": self._total_steps},
            "scaler": self.precision.scaler.state_dict() or None,
            "average": self.average.state_dict() if self.average else None,
        }

    def take_over(self, stored: Mapping[str, Any], path: str | Path) -> None:
        """Go on with AdamW's state of each weight that an earlier phase trained too; the others begin anew.

        stored: what `state_dict` gave then, in a checkpoint. Raises CheckpointError where it does not tell the weights.
        """
        state = stored.get("optimizer") or {}
        groups = state.get("param_groups", ())
        if not groups or not all("weights" in group for group in groups):
            raise CheckpointError(
                f"{path} holds no state of an optimiser, or does not say of which weights it is; run.keep_optimizer "
                "takes the checkpoint_last.pth of a training of this version. Set it to false to begin with a new one"
            )
        known = {
            name: state["state"][place]
            for group in groups
            for name, place in zip(group["weights"], group["params"], strict=True)
            if place in state["state"]
        }
        new, taken = self.optimizer.state_dict(), 0
        for group in new["param_groups"]:
            for name, place in zip(group["weights"], group["params"], strict=True):
                if name in known:
                    new["state"][place] = known[name]
                    taken += 1
        self.optimizer.load_state_dict(new)
        logging.info("the optimiser goes on with %s: %d of %d weights", path, taken, len(self._parameters))

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Undo all steps since `state_dict` gave `stored`; the learning rate follows from the step alone."""
        self.optimizer.load_state_dict(stored["optimizer"])
        if stored["scaler"]:
            self.precision.scaler.load_state_dict(stored["scaler"])
        if self.average:
            self.average.load_state_dict(stored.get("average"))


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_scales: Mapping[str, float], decay_all: bool = False
) -> list[dict[str, Any]]:
    """Optimiser groups {"name", "params", "weights", "weight_decay", "lr_scale"} of all trainable parameters, each
    exactly once; `weights` are their names.

    The names come from `model.parameter_groups()` where there is one, whose groups may have an `lr_scale` of their own
    (layer-wise decay) and share a name; parameters it leaves out form the group `other`, and a model without it has the
    one group `all`. Each is split in two: matrices decay, vectors (biases, norms) and whatever is named ln or bn do
    not, as in the host.

    Args:
        lr_scales: {group name: factor on the learning rate}; 1 where not given. decay_all: vectors decay too.
    Raises: ConfigError for an unknown name in `lr_scales`, or where nothing is trainable.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ConfigError("the model has no trainable parameter: everything is frozen. Unfreeze a part of it")
    members = _named_members(model, trainable)
    for name in lr_scales:
        if name not in members:
            raise ConfigError(f"run.lr_scales names {name!r}, which is no parameter group.{nearest(name, members)}")
    groups = []
    for name, parts in members.items():
        for own_scale, names in parts.items():
            for decays in (True, False):
                chosen = [key for key in names if (decay_all or _decays(key, trainable[key])) == decays]
                if chosen:
                    decay, scale = weight_decay if decays else 0.0, lr_scales.get(name, 1.0) * own_scale
                    group = {"name": name, "params": [trainable[key] for key in chosen], "weights": chosen}
                    groups.append({**group, "weight_decay": decay, "lr_scale": scale})
    return groups


def _named_members(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> dict[str, dict[float, list[str]]]:
    """{group: {its own factor on the rate: names of trainable parameters}}, from the model's own groups."""
    if not hasattr(model, "parameter_groups"):
        return {"all": {1.0: list(trainable)}}
    names_of = {id(parameter): name for name, parameter in trainable.items()}
    members: dict[str, dict[float, list[str]]] = {}
    taken: dict[str, str] = {}
    for group in model.parameter_groups():
        for entry in group["params"]:
            name = names_of.get(id(entry[1] if isinstance(entry, tuple) else entry))
            if name is None:
                continue  # frozen
            if name in taken:
                raise ConfigError(f"parameter {name} is in two groups, {taken[name]!r} and {group['name']!r}")
            taken[name] = group["name"]
            members.setdefault(group["name"], {}).setdefault(float(group.get("lr_scale", 1.0)), []).append(name)
    rest = [name for name in trainable if name not in taken]
    if rest:
        members.setdefault("other", {}).setdefault(1.0, []).extend(rest)
    return members


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(part.startswith(("bias", "ln", "bn")) for part in name.split("."))
