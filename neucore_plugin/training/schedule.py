"""Learning rates in closed form of the step. Knows no host.

A step is one update of the weights (one window of `accum_grad_iters` batches), counted from 0 over the whole training.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Learning rate of every step.

    For step < warmup_steps: warmup_lr + (init_lr - warmup_lr) * step / warmup_steps, whatever the kind. After it
    linear_warmup_cosine_lr: min_lr + (init_lr - min_lr) * (1 + cos(pi * p)) / 2 with
    p = (step - warmup_steps) / (total_steps - warmup_steps);
    linear_warmup_step_lr: max(min_lr, init_lr * decay_rate ** (step // decay_steps)); constant_lr: init_lr.

    Args:
        kind: one of `config.run.LR_SCHEDULERS`.
        total_steps: steps of the whole training.
        warmup_lr: rate of step 0; negative means init_lr, as in the host.
        decay_steps: steps between two decays.
    """

    kind: str
    total_steps: int
    init_lr: float
    min_lr: float
    warmup_lr: float
    warmup_steps: int
    decay_rate: float
    decay_steps: int

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
