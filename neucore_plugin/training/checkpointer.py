"""The checkpoints of a training: what they hold, how they are written, how a killed training is taken up again.

checkpoint_last.pth holds all that continuing needs, to the bit; checkpoint_best.pth the weights that are tested. With
`run.ema_decay` the best are averaged weights; the last has those of the optimiser, the average beside them.
Knows no host.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import CheckpointError, ConfigError, NeucoreError
from neucore_plugin.common.files import expanded, file_errors
from neucore_plugin.common.randomness import random_state, restore_random_state
from neucore_plugin.config.run import RunSchema
from neucore_plugin.training.optimisation import Optimisation
from neucore_plugin.training.run_folder import BEST, LAST, RunFolder, newest_run
from neucore_plugin.weights import checkpoint


@dataclass
class Progress:
    """Where the training stands; goes into the checkpoints."""

    iteration: int = 0
    step: int = 0
    seconds: float = 0.0
    best_metric: float | None = None
    best_epoch: int | None = None
    # Sums of the round so far, {name: [count, total]} a process: a round that was cut in two logs the same means.
    meters: list[dict[str, list[float]]] = field(default_factory=list)


class Checkpointer:
    """Writes and reads the two checkpoints of one training.

    Args:
        model: on its device, not wrapped.
        conditions: what a training has to find again, or its data order and schedule would be others.
        config: the config as plain containers.
    """

    def __init__(
        self,
        folder: RunFolder,
        model: nn.Module,
        optimisation: Optimisation,
        conditions: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        self.folder, self.model, self.optimisation = folder, model, optimisation
        self.conditions, self.config = conditions, config
        self._frozen: dict[str, str] = {}  # fingerprints of the frozen weights, as the training began with them

    def save_best(self, progress: Progress) -> None:
        """Write checkpoint_best.pth."""
        self._save(BEST, {"progress": asdict(progress)}, progress)

    def save_last(self, progress: Progress, sums: Mapping[str, list[float]] | None = None) -> None:
        """Write checkpoint_last.pth; `sums`: within a round, its meters so far."""
        content = {
            "progress": {**asdict(progress), "meters": distributed.gather(sums) if sums else []},
            "rng": distributed.gather(random_state()),
            "same": self.conditions,
            "training": self.model.training_state() if hasattr(self.model, "training_state") else None,
            **self.optimisation.state_dict(progress.step),
        }
        # Proving that nothing frozen has changed costs a look at all frozen weights: not at every small checkpoint.
        self._save(LAST, content, progress, verify=not sums)

    def _save(self, name: str, content: Mapping[str, Any], progress: Progress, verify: bool = True) -> None:
        def write() -> None:
            bad = checkpoint.non_finite({n: p for n, p in self.model.named_parameters() if p.requires_grad})
            if bad:
                raise NeucoreError(
                    f"weights became NaN or infinite by iteration {progress.iteration}, such as {bad[0]}; no "
                    "checkpoint is written of them. Try a lower run.init_lr or run.clip_grad_norm: 1.0"
                )
            if verify:
                self._check_frozen()
            header = self.model.checkpoint_header() if hasattr(self.model, "checkpoint_header") else {}
            state = {"architecture": header, "model": checkpoint.trainable_state(self.model), "frozen": self._frozen}
            path = self.folder.path / name
            with file_errors(path, "The training goes on from its last checkpoint with run.resume=auto"):
                checkpoint.save({**state, "config": self.config, **content}, path)

        distributed.on_main(write)

    def _check_frozen(self) -> None:
        now = checkpoint.frozen_fingerprints(self.model)
        changed = [name for name in now if now[name] != self._frozen.get(name, now[name])]
        if changed:
            raise NeucoreError(
                f"frozen parts of the model changed in training: {', '.join(changed)}. Batch norm follows the "
                "batches unless it is kept in eval mode, by the model's own train()"
            )
        self._frozen = now

    def resume(self) -> Progress | None:
        """Put everything back as checkpoint_last.pth has it; None where there is none: the training begins.

        Raises ConfigError where data, processes or length are not those it was written with, CheckpointError where the
        weights are not.
        """
        path = self.folder.path / LAST
        if not path.is_file():
            if self.folder.continued:
                logging.info("%s was stopped before its first checkpoint: starting from the beginning", path.parent)
            distributed.on_main(lambda: self.folder.trim_log(-1))
            self._frozen = distributed.on_main(lambda: checkpoint.frozen_fingerprints(self.model))
            return None
        stored = checkpoint.load(path)
        then, now = stored.get("same"), self.conditions
        if then is None or not stored.get("optimizer"):
            raise CheckpointError(f"{path} holds weights only, not the state of a training; use run.resume: never")
        changed = [f"{key} was {then.get(key)}, is {now[key]}" for key in now if then.get(key) != now[key]]
        if changed:
            raise ConfigError(f"{path} cannot be continued: {'; '.join(changed)}. Set it back, or run.resume: never")
        checkpoint.restore_model(self.model, stored["model"], stored["frozen"], path)
        self._frozen = stored["frozen"]
        self.optimisation.load_state_dict(stored)
        if hasattr(self.model, "restore_training_state"):
            self.model.restore_training_state(stored.get("training"))
        progress = Progress(**stored["progress"])
        # checkpoint_best.pth itself says which metric it has: it may be newer than checkpoint_last.pth.
        best_path = path.with_name(BEST)
        best = checkpoint.load(best_path)["progress"] if best_path.is_file() else {}
        progress.best_metric, progress.best_epoch = best.get("best_metric"), best.get("best_epoch")
        distributed.on_main(lambda: self.folder.trim_log(progress.iteration))
        restore_random_state(stored["rng"][distributed.rank()])
        logging.info("continuing %s after %d of %d iterations", path, progress.iteration, now["iterations"])
        return progress


def load_weights(model: nn.Module, path: Path) -> Progress:
    """Put the weights of either checkpoint into `model`; returns the progress it was written with.

    Raises CheckpointError where they do not fit.
    """
    stored = checkpoint.load(path)
    checkpoint.restore_model(model, stored["model"], stored["frozen"], path)
    return Progress(**stored.get("progress", {}))


def resumed_weights(run: RunSchema, fingerprint: str) -> Path | None:
    """What run.resume names for an evaluation: a checkpoint, or the best one of a run folder or of the newest run."""
    if run.resume == "auto":
        newest = newest_run(run.output_dir, fingerprint)
        return None if newest is None else newest.path / BEST
    path = None if run.resume == "never" else expanded(run.resume).absolute()
    return path / BEST if path and path.is_dir() else path
