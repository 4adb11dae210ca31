"""The state of a training: where it stands, its checkpoints, and how it is taken up again after a kill."""

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lavis.common.logger import MetricLogger

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import CheckpointError, ConfigError, NeucoreError
from neucore_plugin.common.files import sha256_text
from neucore_plugin.common.randomness import random_state, restore_random_state, seed_everything
from neucore_plugin.training.batch_norm import running_statistics
from neucore_plugin.training.parts import RunnerParts
from neucore_plugin.training.run_folder import BEST, LAST, newest_run
from neucore_plugin.training.weight_average import WeightAverage
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


class RunnerState(RunnerParts):
    """Writes checkpoint_last.pth (all that continuing needs) and checkpoint_best.pth (weights); reads them exactly.

    With `run.ema_decay` the best are averaged weights; the last has those of the optimiser, the average beside them.
    """

    def __init__(self, cfg: Any, task: Any, model: torch.nn.Module, datasets: Mapping[str, Any], job_id: str) -> None:
        super().__init__(cfg, task, model, datasets, job_id)
        self.progress = Progress()
        self._frozen: dict[str, str] | None = None
        self._same: dict[str, Any] | None = None
        self._average: WeightAverage | None = None  # while training with run.ema_decay
        self._statistics: list[torch.Tensor] = []  # what forward passes change of the model

    @property
    def epoch(self) -> int:
        """Number of the round that is under way, or was done last; from 0."""
        return max(0, -(-self.progress.iteration // self.round_iters) - 1)

    def _averaged(self) -> contextlib.AbstractContextManager:
        """The model has its averaged weights within, where `run.ema_decay` asks for them."""
        return self._average.applied() if self._average else contextlib.nullcontext()

    # ---- checkpoints ------------------------------------------------------------------------

    def _save_checkpoint(self, cur_epoch: int, is_best: bool = False, meters: MetricLogger | None = None) -> None:
        """checkpoint_best.pth, or checkpoint_last.pth; `meters`: within a round, whose sums so far are kept."""
        progress = asdict(self.progress)
        content: dict[str, Any] = {"progress": progress}
        if not is_best:
            sums = {n: [m.count, m.total] for n, m in meters.meters.items()} if meters else None
            progress["meters"] = distributed.gather(sums) if meters else []
            content |= {
                "rng": distributed.gather(random_state()),
                "same": self._must_be_same(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": {"step": self.progress.step, **asdict(self.lr_scheduler)},
                "scaler": self.scaler.state_dict() if self.scaler else None,
                "average": self._average.state_dict() if self._average else None,
            }
        path = self.output_dir / (BEST if is_best else LAST)
        # Proving that nothing frozen has changed costs a look at all frozen weights: not at every small checkpoint.
        distributed.on_main(lambda: checkpoint.save({**self._weights(verify=meters is None), **content}, path))

    def _weights(self, verify: bool) -> dict[str, Any]:
        model = self.bare_model
        state = checkpoint.trainable_state(model)
        bad = checkpoint.non_finite({n: p for n, p in model.named_parameters() if p.requires_grad})
        if bad:
            raise NeucoreError(
                f"weights became NaN or infinite by iteration {self.progress.iteration}, such as {bad[0]}; no "
                "checkpoint is written of them. Try a lower run.init_lr or run.clip_grad_norm: 1.0"
            )
        if self._frozen is None or verify:
            frozen = checkpoint.frozen_fingerprints(model)
            changed = [name for name in frozen if self._frozen and frozen[name] != self._frozen[name]]
            if changed:
                raise NeucoreError(
                    f"frozen parts of the model changed in training: {', '.join(changed)}. Batch norm follows the "
                    "batches unless it is kept in eval mode, by the model's own train()"
                )
            self._frozen = frozen
        header = model.checkpoint_header() if hasattr(model, "checkpoint_header") else {}
        return {"architecture": header, "model": state, "frozen": self._frozen, "config": self.plain_config()}

    def _must_be_same(self) -> dict[str, Any]:
        """What an interrupted training has to find again, or its data order and schedule would be others."""
        if self._same is None:
            dataset = self.train_loader.dataset
            self._same = {
                "processes": distributed.world_size(),
                "training samples": len(dataset),
                "training data": data_fingerprint(dataset),
                "iterations": self.max_iters,
            }
        return self._same

    def _resume_or_begin(self) -> None:
        path = self.output_dir / LAST
        self._statistics = list(running_statistics(self.bare_model).values())
        if self._run("ema_decay") is not None:
            self._average = WeightAverage(self.bare_model, float(self._run("ema_decay")))
        if not path.is_file():
            if self.folder.continued:
                logging.info("%s was stopped before its first checkpoint: starting from the beginning", self.output_dir)
            distributed.on_main(lambda: self.folder.trim_log(-1))
            self.log_config()
            # Only now: how much was drawn before depends on what was cached already.
            seed_everything(self.seed, distributed.rank())
            self._frozen = distributed.on_main(lambda: checkpoint.frozen_fingerprints(self.bare_model))
            return
        stored = checkpoint.load(path)
        then, now = stored.get("same"), self._must_be_same()
        if then is None or not stored.get("optimizer"):
            raise CheckpointError(f"{path} holds weights only, not the state of a training; use run.resume: never")
        changed = [f"{key} was {then.get(key)}, is {now[key]}" for key in now if then.get(key) != now[key]]
        if changed:
            raise ConfigError(f"{path} cannot be continued: {'; '.join(changed)}. Set it back, or run.resume: never")
        checkpoint.restore_model(self.bare_model, stored["model"], stored["frozen"], path)
        self._frozen = stored["frozen"]
        self.optimizer.load_state_dict(stored["optimizer"])
        if self.scaler and stored["scaler"]:
            self.scaler.load_state_dict(stored["scaler"])
        if self._average:
            self._average.load_state_dict(stored.get("average"))
        self.progress = Progress(**stored["progress"])
        self._adopt_best()
        distributed.on_main(lambda: self.folder.trim_log(self.progress.iteration))
        restore_random_state(stored["rng"][distributed.rank()])
        logging.info("continuing %s after %d of %d iterations", path, self.progress.iteration, self.max_iters)

    def _adopt_best(self) -> None:
        """checkpoint_best.pth itself says which metric it has: it may be newer than checkpoint_last.pth."""
        path = self.output_dir / BEST
        best = checkpoint.load(path)["progress"] if path.is_file() else {}
        self.progress.best_metric, self.progress.best_epoch = best.get("best_metric"), best.get("best_epoch")

    def _reload_best_model(self, model: torch.nn.Module) -> torch.nn.Module:
        path = self.output_dir / BEST
        stored = checkpoint.load(path)
        checkpoint.restore_model(model, stored["model"], stored["frozen"], path)
        return model

    def _load_weights_to_evaluate(self) -> Path | str | None:
        """What model.checkpoint has put into the model, else run.resume (a checkpoint, a run folder, or auto)."""
        resume = str(self._run("resume", "never"))
        model_cfg = getattr(self.config, "model_cfg", None) or {}
        if model_cfg.get("checkpoint"):
            return model_cfg.get("checkpoint")
        if resume == "auto":
            root, fingerprint = self._run("output_dir", "output"), self.folder.record["fingerprint"]
            found = distributed.on_main(lambda: newest_run(root, fingerprint))
            if found is None:
                return model_cfg.get("checkpoint")
            resume = str(found.path)
        if resume == "never":
            return model_cfg.get("checkpoint")
        path = Path(resume).expanduser().absolute()
        if path.is_dir():
            path = path / BEST
        stored = checkpoint.load(path)
        checkpoint.restore_model(self.bare_model, stored["model"], stored["frozen"], path)
        self.progress.best_epoch = stored.get("progress", {}).get("best_epoch")
        return path


def data_fingerprint(dataset: Any) -> str | None:
    """A data set's own `fingerprint` (an attribute or a method), of all parts where it is concatenated; else None."""
    value = getattr(dataset, "fingerprint", None)
    if value is None and getattr(dataset, "datasets", None):
        parts = [data_fingerprint(part) for part in dataset.datasets]
        return sha256_text("\n".join(parts)) if all(parts) else None
    value = value() if callable(value) else value
    return None if value is None else str(value)
