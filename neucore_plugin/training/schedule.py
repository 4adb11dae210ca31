"""Learning rates in closed form of the step. Knows no host.

A step is one update of the weights (one window of `accum_grad_iters` batches), counted from 0 over the whole training.
"""

import math

from neucore_plugin.config.run import RunSchema


def learning_rate(run: RunSchema, step: int, total_steps: int, round_steps: int) -> float:
    """Rate of the update number `step` of `total_steps`, before a group's own factor; a round has `round_steps`.

    For step < warmup_steps: warmup_lr + (init_lr - warmup_lr) * step / warmup_steps, whatever the kind; a negative
    warmup_lr means init_lr, as in the host. After it, by lr_sched:
    linear_warmup_cosine_lr: min_lr + (init_lr - min_lr) * (1 + cos(pi * p)) / 2 with
    p = (step - warmup_steps) / (total_steps - warmup_steps);
    linear_warmup_step_lr: max(min_lr, init_lr * lr_decay_rate ** (step // lr_decay_steps)); constant_lr: init_lr.
    """
    if step < run.warmup_steps:
        start = run.warmup_lr if run.warmup_lr >= 0 else run.init_lr
        return start + (run.init_lr - start) * step / run.warmup_steps
    if run.lr_sched == "constant_lr":
        return run.init_lr
    if run.lr_sched == "linear_warmup_step_lr":
        return max(run.min_lr, run.init_lr * run.lr_decay_rate ** (step // (run.lr_decay_steps or round_steps)))
    done = min(1.0, (step - run.warmup_steps) / max(1, total_steps - run.warmup_steps))
    return run.min_lr + (run.init_lr - run.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
