"""Learning rates in closed form of the step, and the optimiser's parameter groups. Knows no host.

A step is one update of the weights (one window of `accum_grad_iters` batches), counted from 0 over the whole training.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from neucore_plugin.common.errors import ConfigError, nearest

SCHEDULES = ("linear_warmup_cosine_lr", "linear_warmup_step_lr", "constant_lr")


@dataclass(frozen=True)
class Schedule:
    """Learning rate of every step.

    For step < warmup_steps: warmup_lr + (init_lr - warmup_lr) * step / warmup_steps, whatever the kind. After it
    linear_warmup_cosine_lr: min_lr + (init_lr - min_lr) * (1 + cos(pi * p)) / 2 with
    p = (step - warmup_steps) / (total_steps - warmup_steps);
    linear_warmup_step_lr: max(min_lr, init_lr * decay_rate ** (step // decay_steps)); constant_lr: init_lr.

    Args:
        kind: one of SCHEDULES.
        total_steps: steps of the whole training.
        warmup_lr: rate of step 0; negative means init_lr, as in the host.
        decay_steps: steps between two decays.
    Raises: ConfigError.
    """

    kind: str
    total_steps: int
    init_lr: float
    min_lr: float = 0.0
    warmup_lr: float = -1.0
    warmup_steps: int = 0
    decay_rate: float = 1.0
    decay_steps: int = 1

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ConfigError(f"run.lr_sched is {self.kind!r}.{nearest(self.kind, SCHEDULES)}")
        for name in ("total_steps", "decay_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of the learning rate is {getattr(self, name)}; it must be 1 or more")
        for name in ("init_lr", "min_lr", "warmup_steps", "decay_rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"{name} of the learning rate is {getattr(self, name)}; it must be 0 or more")

    def rate(self, step: int) -> float:
        """Learning rate of the update number `step`, before a group's own factor."""
        if step < self.warmup_steps:
            start = self.warmup_lr if self.warmup_lr >= 0 else self.init_lr
            return start + (self.init_lr - start) * step / self.warmup_steps
        if self.kind == "constant_lr":
            return self.init_lr
        if self.kind == "linear_warmup_step_lr":
            return max(self.min_lr, self.init_lr * self.decay_rate ** (step // self.decay_steps))
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.min_lr + (self.init_lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Optimiser groups {"name", "params", "weight_decay", "lr_scale"} of all trainable parameters, each exactly once.

    The names come from `model.parameter_groups()` where there is one, whose groups may have an `lr_scale` of their own
    (layer-wise decay) and share a name; parameters it leaves out form the group `other`,
    and a model without it has the one group `all`. Each is split in two: matrices decay, vectors (biases, norms) and
    whatever is named ln or bn do not, as in the host.

    Args:
        lr_scales: {group name: factor on the learning rate}; 1 where not given.
    Raises: ConfigError for an unknown name or a bad factor in `lr_scales`, or where nothing is trainable.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise ConfigError("the model has no trainable parameter: everything is frozen. Unfreeze a part of it")
    members = _named_members(model, trainable)
    scales = {str(name): factor for name, factor in (lr_scales or {}).items()}
    for name, factor in scales.items():
        if name not in members:
            raise ConfigError(f"run.lr_scales names {name!r}, which is no parameter group.{nearest(name, members)}")
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise ConfigError(f"run.lr_scales.{name} is {factor!r}; it must be a number of 0 or more")
    groups = []
    for name, parts in members.items():
        for own_scale, names in parts.items():
            for decays in (True, False):
                chosen = [trainable[key] for key in names if _decays(key, trainable[key]) == decays]
                if chosen:
                    decay = float(weight_decay) if decays else 0.0
                    scale = float(scales.get(name, 1.0)) * own_scale
                    groups.append({"name": name, "params": chosen, "weight_decay": decay, "lr_scale": scale})
    return groups


def _named_members(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> dict[str, dict[float, list[str]]]:
    """{group: {its own factor on the rate: names of trainable parameters}}, from the model's own groups."""
    if not hasattr(model, "parameter_groups"):
        return {"all": {1.0: list(trainable)}}
    names_of = {id(parameter): name for name, parameter in trainable.items()}
    members: dict[str, dict[float, list[str]]] = {}
    taken: dict[str, str] = {}
    for group in model.parameter_groups():
        for parameter in _parameters(group["params"]):
            name = names_of.get(id(parameter))
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


def _parameters(params: Iterable[Any]) -> Iterable[nn.Parameter]:
    for entry in params:
        yield entry[1] if isinstance(entry, tuple) else entry


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not any(part.startswith(("bias", "ln", "bn")) for part in name.split("."))
