"""The host's runner, mended: `runner_cir` counts epochs, `runner_cir_iter` iterations.

An iteration is one batch; a step is one update of the weights, from a window of `accum_grad_iters` iterations; a round
lies between two validations: an epoch, or `iters_per_inner_epoch` iterations. Both runners share one loop: the place in
the training is the number of iterations done, and epoch, batch of the epoch and learning rate follow from it.

After each round come, in this order: log, validation, checkpoint_best.pth if better, checkpoint_last.pth. What a kill
between two of these loses is done again from checkpoint_last.pth, with the same outcome (`checkpointer.py`).
"""

import contextlib
import inspect
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lavis.common.logger import MetricLogger, SmoothedValue
from lavis.common.registry import registry
from lavis.datasets.data_utils import apply_to_sample
from lavis.datasets.datasets.base_dataset import ConcatDataset
from lavis.runners.runner_base import RunnerBase

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import ConfigError, NeucoreError
from neucore_plugin.common.files import expanded
from neucore_plugin.common.randomness import seed_everything
from neucore_plugin.config.run import RunSchema
from neucore_plugin.host.registration import register_runner
from neucore_plugin.training.checkpointer import Checkpointer, Progress, load_weights, resumed_weights
from neucore_plugin.training.display import round_display
from neucore_plugin.training.grad_cache import GradCache
from neucore_plugin.training.loaders import batch_loader, chosen_datasets, data_fingerprint
from neucore_plugin.training.optimisation import Optimisation
from neucore_plugin.training.run_folder import BEST, LAST, RunFolder, versions
from neucore_plugin.weights import checkpoint


@register_runner("runner_cir")
class RunnerCir(RunnerBase):
    """Trains for `max_epoch` epochs, validates after each, tests the best weights.

    Best is the highest mean `agg_metrics` over `run.valid_splits`, whatever their names and sign; without a
    validation split it is the last. Raises NeucoreError for whatever the user can mend.

    Attributes: run (validated settings), folder, datasets {split: data set} of the evaluated splits, progress; while
    it trains also optimisation and checkpointer.
    """

    def __init__(self, cfg: Any, task: Any, model: torch.nn.Module, datasets: Mapping[str, Any], job_id: str) -> None:
        self.run: RunSchema = cfg.run
        train, evaluated = chosen_datasets(datasets, self.run)
        super().__init__(cfg, task, model, datasets, job_id)  # calls setup_output_dir
        # What the host's properties of these names give, without the underscore.
        self._model = self._wrapped_model = model.to(distributed.pick_device(self.run.device))
        self._device = next(model.parameters()).device
        self._dataloaders = {
            split: batch_loader(dataset, self.run, split, self.cuda_enabled) for split, dataset in evaluated.items()
        }
        self._by_name, self.datasets, self._prepared = datasets, evaluated, False
        self.progress = Progress()
        if train:
            joined, names = train[0] if len(train) == 1 else ConcatDataset(train), ", ".join(self.run.train_splits)
            self._train_loader = batch_loader(joined, self.run, names, self.cuda_enabled, training=True)
            self.round_iters, self.max_iters = self._lengths(len(self._train_loader))

    def _lengths(self, epoch_iters: int) -> tuple[int, int]:
        """Iterations between two validations, and of the whole training."""
        return epoch_iters, self.run.max_epoch * epoch_iters

    def setup_output_dir(self) -> None:
        """Choose the run folder under run.output_dir (relative to the current directory), keep others out of it."""

        def choose() -> RunFolder:
            folder = RunFolder.choose(self.run, self.job_id, self.plain_config(), self.config.fingerprint())
            (folder.path / "result").mkdir(exist_ok=True)  # tasks of the host write there
            return folder

        self.folder: RunFolder = distributed.on_main(choose)
        if not self.folder.finished:
            distributed.on_main(self.folder.lock)
        self.output_dir, self.result_dir = self.folder.path, self.folder.path / "result"
        # register_path refuses a second runner in the same process.
        registry.mapping["paths"].update(output_dir=str(self.output_dir), result_dir=str(self.result_dir))

    def plain_config(self) -> dict[str, Any]:
        """The config as plain containers, less what a process notes in it: it can be given as a config again."""
        config = self.config.to_dict()
        return {**config, "run": {key: value for key, value in config["run"].items() if key not in ("rank", "gpu")}}

    @property
    def bare_model(self) -> torch.nn.Module:
        """The model itself, on its device."""
        return self._model

    @property
    def epoch(self) -> int:
        """Number of the round that is under way, or was done last; from 0."""
        return max(0, -(-self.progress.iteration // self.round_iters) - 1)

    # ---- training ---------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train to the end (from where an interrupted run stands), test, report. Returns {test split: metrics}."""
        if self.run.evaluate:
            return self.evaluate()
        if self.folder.finished:
            return self._already_finished()
        self._begin()
        batches = self._endless_batches()
        while self.progress.iteration < self.max_iters:
            started = time.time()
            self.train_round(batches)
            with self.optimisation.averaged():
                better = self._validate()
                self.progress.seconds += time.time() - started
                if better:
                    self.checkpointer.save_best(self.progress)
            self.checkpointer.save_last(self.progress)
        del batches
        self._train_loader = None  # lets the workers go
        return self.evaluate()

    def _begin(self) -> None:
        """All that a training needs, its state as checkpoint_last.pth has it; the seeds anew where there is none."""
        dataset, chunk = self._train_loader.dataset, self.run.grad_cache_chunk
        self.optimisation = Optimisation(self._model, self.run, self.device, self.round_iters, self.max_iters)
        stepped = GradCache(self._model, chunk) if chunk else self._model
        self._wrapped_model = distributed.wrap_model(stepped, self.device)
        self._prepare()  # after what shows wrong settings: it may take long
        conditions = {
            "processes": distributed.world_size(),
            "training samples": len(dataset),
            "training data": data_fingerprint(dataset),
            "iterations": self.max_iters,
        }
        if getattr(dataset, "streamed", False):  # its order depends on them as well
            conditions["run.num_workers"] = self.run.num_workers
        self.checkpointer = Checkpointer(self.folder, self._model, self.optimisation, conditions, self.plain_config())
        progress = self.checkpointer.resume()
        if progress is None:
            if distributed.rank() == 0:
                self.folder.log({"config": self.plain_config()})
            if self.run.keep_optimizer:
                source = expanded(self.config.model_cfg.checkpoint)
                self.optimisation.take_over(checkpoint.load(source), source)
            # Only now: how much was drawn before depends on what was cached already.
            seed_everything(self.run.seed, distributed.rank())
        self.progress = progress or Progress()

    def _prepare(self) -> None:
        """Once: the task's own preparation (feature caches)."""
        if not self._prepared and hasattr(self.task, "prepare"):
            self.task.prepare(self._model, self._by_name, self.config, self.output_dir)
        self._prepared = True

    def _endless_batches(self) -> Iterator[Any]:
        loader = self._train_loader
        while True:
            epoch, start = divmod(self.progress.iteration, len(loader))
            loader.set_position(epoch, start)
            yield from loader

    def train_round(self, batches: Iterator[Any]) -> None:
        """Train up to the end of the round and log its means."""
        self.model.train()
        progress, epoch = self.progress, self.progress.iteration // self.round_iters
        end = min((epoch + 1) * self.round_iters, self.max_iters)
        every = self.run.checkpoint_every_iters
        meters = self._meters()
        span = (epoch * self.round_iters, progress.iteration, end)
        with round_display(f"epoch {epoch}", span, self.max_iters, self.run.log_freq) as show:
            while progress.iteration < end:
                before = progress.iteration
                self._update(batches, min(self.run.accum_grad_iters, end - before), meters)
                show(progress.iteration, meters)
                if every and before // every < progress.iteration // every and progress.iteration < end:
                    sums = {name: [meter.count, meter.total] for name, meter in meters.meters.items()}
                    self.checkpointer.save_last(progress, sums)
        meters.synchronize_between_processes()
        self.log_stats({name: meter.global_avg for name, meter in meters.meters.items()}, "train", epoch)

    def _update(self, batches: Iterator[Any], count: int, meters: MetricLogger) -> None:
        """One step from the mean loss of `count` batches."""
        optimisation, precision = self.optimisation, self.optimisation.precision
        rate = optimisation.set_rate(self.progress.step)
        for number in range(count):
            samples = self._on_device(next(batches))
            # Processes exchange gradients once a window.
            alone = distributed.world_size() == 1 or number == count - 1
            with contextlib.nullcontext() if alone else self.model.no_sync():
                with precision.autocast():
                    out = self.task.train_step(model=self.model, samples=samples)
                losses = out if isinstance(out, Mapping) else {"loss": out}
                self._check_finite(losses["loss"].detach())
                precision.backward(losses["loss"] / count)
            shown = {name: value.detach() for name, value in losses.items() if "loss" in name}
            meters.update(**shown, lr=rate)
            self.progress.iteration += 1
        optimisation.step()
        self.progress.step += 1

    def _on_device(self, samples: Any) -> Any:
        if self.device.type != "cpu":
            samples = apply_to_sample(lambda tensor: tensor.to(self.device, non_blocking=True), samples)
        if isinstance(samples, dict):  # models of the host read these
            epoch, number = divmod(self.progress.iteration, self.round_iters)
            samples.update(epoch=epoch, num_iters_per_epoch=self.round_iters, iters=number)
        return samples

    def _check_finite(self, loss: torch.Tensor) -> None:
        if loss.ndim:
            raise NeucoreError(f"the task's loss has the shape {tuple(loss.shape)}; one number is needed")
        if not math.isfinite(float(loss)):
            last = self.output_dir / LAST
            kept = f"The last good state is kept in {last}" if last.exists() else "No checkpoint was written yet"
            raise NeucoreError(
                f"the loss is {float(loss)} at iteration {self.progress.iteration} (step {self.progress.step}). Try a "
                f"lower run.init_lr, more run.warmup_steps, run.clip_grad_norm: 1.0, or run.amp: false. {kept}"
            )

    def _meters(self) -> MetricLogger:
        """Means of the round; where a kill cut it in two, with the sums of its first part."""
        meters = MetricLogger(delimiter="  ")
        stored = self.progress.meters[distributed.rank()] if self.progress.meters else {}
        meters.meters.default_factory = lambda: SmoothedValue(window_size=20, fmt="{avg:.4f}")
        meters.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.3g}"))
        for name, (count, total) in stored.items():
            meters.meters[name].count, meters.meters[name].total = int(count), total
        self.progress.meters = []
        return meters

    def log_stats(self, stats: Mapping[str, Any], split_name: str, epoch: Any = None) -> None:
        """One line in log.txt: {"epoch", "iteration", "<split>_<name>": value, ...}."""
        if distributed.rank() == 0:
            named = {f"{split_name}_{name}": value for name, value in stats.items()}
            self.folder.log({"epoch": epoch, "iteration": self.progress.iteration, **named})
            logging.info("epoch %s  %s", epoch, _shown(named))

    # ---- evaluation -------------------------------------------------------------------------

    def _validate(self) -> bool:
        """Evaluate the validation splits; True where these are the best weights so far."""
        progress = self.progress
        if not self.run.valid_splits:
            progress.best_epoch = self.epoch
            return progress.iteration >= self.max_iters
        results = {split: self.eval_epoch(split, self.epoch) for split in self.run.valid_splits}
        for split, metrics in results.items():
            value = metrics.get("agg_metrics")
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise NeucoreError(
                    f"the task {type(self.task).__name__} gave agg_metrics = {value!r} on {split!r}; a finite number "
                    "selects the best weights. Check that the split has queries and the model gives finite scores"
                )
        value = sum(metrics["agg_metrics"] for metrics in results.values()) / len(results)
        better = progress.best_metric is None or value > progress.best_metric
        if better:
            progress.best_metric, progress.best_epoch = value, self.epoch
        for split, metrics in results.items():
            self.log_stats({**metrics, "best_epoch": progress.best_epoch}, split, self.epoch)
        return better

    @torch.no_grad()
    def eval_epoch(self, split_name: str, cur_epoch: Any, skip_reload: bool = False) -> dict[str, Any]:
        """Metrics of one split, in every process the same. As in the host, the epoch "best" asks for the best weights
        unless `skip_reload` is set."""
        if cur_epoch == "best" and not skip_reload:
            load_weights(self._model, self.output_dir / BEST)
        self._model.eval()
        self.task.before_evaluation(model=self._model, dataset=self.datasets[split_name])
        options = {"cuda_enabled": self.cuda_enabled, "testing": cur_epoch in ("best", "given")}
        known = inspect.signature(self.task.evaluation).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):  # the host gives a task neither
            options = {parameter.name: options[parameter.name] for parameter in known if parameter.name in options}
        result = self.task.evaluation(self._model, self.dataloaders[split_name], **options)
        metrics = self.task.after_evaluation(val_result=result, split_name=split_name, epoch=cur_epoch)
        return distributed.gather(checkpoint.plain(metrics or {}, "metrics"))[0]

    def evaluate(self, cur_epoch: Any = "best", skip_reload: bool = False) -> dict[str, Any]:
        """Evaluate the test splits, write metrics and results. Returns {split: metrics}.

        Of the best weights, or with run.evaluate of those given. `skip_reload` in a training run: of those the model
        has now, without writing results.
        """
        self._prepare()
        started, source, splits = time.time(), self.output_dir / BEST, self.run.test_splits
        as_they_are = skip_reload and not self.run.evaluate
        if self.run.evaluate:
            source, cur_epoch, splits = self._load_given_weights(), "given", list(self.datasets)
        elif as_they_are:
            cur_epoch = self.epoch
        else:
            load_weights(self._model, source)
        metrics = {}
        for split in splits:
            metrics[split] = self.eval_epoch(split, cur_epoch, skip_reload=True)
            self.log_stats(metrics[split], split, cur_epoch)
        if as_they_are:
            return metrics
        state, frozen = checkpoint.model_state(self._model)
        provenance = {
            "config": self.plain_config(),
            "checkpoint": {
                "path": None if source is None else str(source),
                "fingerprint": checkpoint.fingerprint(state, extra=frozen),
                "epoch": self.progress.best_epoch,
            },
            "data": {split: data_fingerprint(self.datasets[split]) for split in splits},
            "versions": versions(),
            "seed": self.run.seed,
            "world_size": distributed.world_size(),
            "threads": torch.get_num_threads(),  # of each process; another number moves results
            "seconds": round(self.progress.seconds + time.time() - started, 1),
            "run_folder": str(self.output_dir),
        }
        distributed.on_main(lambda: self._write_results(metrics, provenance))
        return metrics

    def _load_given_weights(self) -> Path | str | None:
        """Those of model.checkpoint are in the model already; models of the host know none: theirs run.resume names."""
        path = self.config.model_cfg.get("checkpoint")
        if path is None:
            path = distributed.on_main(lambda: resumed_weights(self.run, self.folder.record["fingerprint"]))
            if path is not None:
                self.progress.best_epoch = load_weights(self._model, path).best_epoch
        return path

    def _write_results(self, metrics: dict[str, Any], provenance: dict[str, Any]) -> None:
        self.folder.store_metrics(metrics, provenance)
        if hasattr(self.task, "finish"):
            files = self.task.finish(
                metrics, model=self._model, output_dir=self.output_dir, cfg=self.config, provenance=provenance
            )
            self.folder.store_metrics(metrics, provenance, files or ())
        self.folder.write(status="finished", finished=time.time())
        logging.info("run folder: %s", self.output_dir)

    def _already_finished(self) -> dict[str, Any]:
        stored = distributed.on_main(lambda: self.folder.stored_metrics(self.run.test_splits))
        if stored is None:
            logging.info("%s is trained already; its result files are gone: testing it again", self.output_dir)
            self.progress = Progress(**checkpoint.load(self.output_dir / BEST)["progress"])
            return self.evaluate()
        metrics = stored["metrics"]
        if stored["data"] != {split: data_fingerprint(self.datasets[split]) for split in metrics}:
            raise ConfigError(
                f"{self.output_dir} is finished, but its data have changed since. Start a new run: "
                "--options run.resume=never, or another run.output_dir"
            )
        logging.info("%s is finished already (run.resume: never starts a new run)", self.output_dir)
        if hasattr(self.task, "show_finished"):
            distributed.on_main(lambda: self.task.show_finished(self.output_dir, self.config))
        else:
            for split, values in metrics.items():
                logging.info("%s  %s", split, _shown(values))
        return metrics


def _shown(metrics: Mapping[str, Any]) -> str:
    return "  ".join(f"{name} {value:.5g}" for name, value in metrics.items() if isinstance(value, (int, float)))


@register_runner("runner_cir_iter")
class RunnerCirIter(RunnerCir):
    """Trains for exactly `max_iters` iterations; validates after each `iters_per_inner_epoch`, and at the end."""

    def _lengths(self, epoch_iters: int) -> tuple[int, int]:
        return self.run.iters_per_inner_epoch, self.run.max_iters
