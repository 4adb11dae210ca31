"""The host's runners, mended: `runner_cir` counts epochs, `runner_cir_iter` iterations.

An iteration is one batch; a step is one update of the weights, from a window of `accum_grad_iters` iterations; a round
lies between two validations: an epoch, or `iters_per_inner_epoch` iterations. Both runners share one loop: the place in
the training is the number of iterations done, and epoch, batch of the epoch and learning rate follow from it.

After each round come, in this order: log, validation, checkpoint_best.pth if better, checkpoint_last.pth. What a kill
between two of these loses is done again from checkpoint_last.pth, with the same outcome.
"""

import contextlib
import datetime
import inspect
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lavis.common.logger import MetricLogger, SmoothedValue
from lavis.datasets.data_utils import apply_to_sample
from tqdm import tqdm

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import ConfigError, NeucoreError
from neucore_plugin.common.files import write_json
from neucore_plugin.host.registration import register_runner
from neucore_plugin.training.loaders import datasets_by_split
from neucore_plugin.training.resume import Progress, RunnerState, data_fingerprint
from neucore_plugin.training.run_folder import BEST, LAST, METRICS, versions
from neucore_plugin.weights import checkpoint


@register_runner("runner_cir")
class RunnerCir(RunnerState):
    """Trains for `max_epoch` epochs, validates after each, tests the best weights.

    Best is the highest mean `agg_metrics` over `run.valid_splits`, whatever their names and sign; without a
    validation split it is the last. Raises NeucoreError for whatever the user can mend.
    """

    def __init__(self, cfg: Any, task: Any, model: torch.nn.Module, datasets: Mapping[str, Any], job_id: str) -> None:
        super().__init__(cfg, task, model, datasets, job_id)
        self._prepared = False
        self._batches: Iterator[Any] = iter(())

    @property
    def round_iters(self) -> int:
        return len(self.train_loader)

    @property
    def max_iters(self) -> int:
        return self._whole("max_epoch") * self.round_iters

    # ---- training ---------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Train to the end (from where an interrupted run stands), test, report. Returns {test split: metrics}."""
        if self.evaluate_only:
            return self.evaluate(skip_reload=True)
        if self.folder.finished:
            return self._already_finished()
        self._prepare()
        self._resume_or_begin()
        self._batches = self._endless_batches()
        while self.progress.iteration < self.max_iters:
            started = time.time()
            self.train_round()
            with self._averaged():
                better = self._validate()
                self.progress.seconds += time.time() - started
                if better:
                    self._save_checkpoint(self.epoch, is_best=True)
            self._save_checkpoint(self.epoch)
        self._batches, self._train_loader = iter(()), None  # lets the workers go
        return self.evaluate()

    def _prepare(self) -> None:
        """Once: model on its device, the task's own preparation (feature caches), then the loaders."""
        if self._prepared:
            return
        model = self.bare_model
        if not self.evaluate_only:
            self.precision, self.optimizer  # noqa: B018 - wrong settings show before the task spends time
        if hasattr(self.task, "prepare"):
            self.task.prepare(model, self._by_name, self.config, self.output_dir)
            self._by_split = datasets_by_split(self._by_name)  # in case it has put others in their place
        self.dataloaders  # noqa: B018 - made now, so that what is wrong with a split shows before the training
        self._prepared = True

    def _endless_batches(self) -> Iterator[Any]:
        while True:
            epoch, start = divmod(self.progress.iteration, len(self.train_loader))
            self.train_loader.set_position(epoch, start)
            yield from self.train_loader

    def train_round(self) -> None:
        """Train up to the end of the round and log its means."""
        self.model.train()
        progress, epoch = self.progress, self.progress.iteration // self.round_iters
        end = min((epoch + 1) * self.round_iters, self.max_iters)
        every = int(self._run("checkpoint_every_iters", 0))
        meters = self._meters()
        with self._display(f"epoch {epoch}", epoch * self.round_iters, end) as show:
            while progress.iteration < end:
                before = progress.iteration
                self._update(min(self.accum_grad_iters, end - before), meters)
                show(meters)
                if every and before // every < progress.iteration // every and progress.iteration < end:
                    self._save_checkpoint(epoch, meters=meters)
        meters.synchronize_between_processes()
        self.log_stats({name: meter.global_avg for name, meter in meters.meters.items()}, "train", epoch)

    def _update(self, count: int, meters: MetricLogger) -> None:
        """One step from the mean loss of `count` batches."""
        rate = self.lr_scheduler.rate(self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        for number in range(count):
            samples = self._on_device(next(self._batches))
            last = number == count - 1
            # Processes exchange gradients once a window.
            with contextlib.nullcontext() if last or not self.use_distributed else self.model.no_sync():
                with self.precision.autocast():
                    out = self.task.train_step(model=self.model, samples=samples)
                losses = out if isinstance(out, Mapping) else {"loss": out}
                self._check_finite(losses["loss"].detach())
                self.precision.backward(losses["loss"] / count)
            shown = {name: value.detach() for name, value in losses.items() if "loss" in name}
            meters.update(**shown, lr=rate)
            self.progress.iteration += 1
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.precision.step(self.optimizer, parameters, self._run("clip_grad_norm"))
        distributed.from_main(self._statistics)
        if self._average:
            self._average.update()
        self.progress.step += 1

    def _on_device(self, samples: Any) -> Any:
        if self.cuda_enabled:
            samples = apply_to_sample(lambda tensor: tensor.to(self.device, non_blocking=True), samples)
        if isinstance(samples, dict):  # models of the host read these
            epoch, number = divmod(self.progress.iteration, self.round_iters)
            samples.update(epoch=epoch, num_iters_per_epoch=self.round_iters, iters=number)
        return samples

    def _check_finite(self, loss: torch.Tensor) -> None:
        if loss.ndim == 0 and math.isfinite(float(loss)):
            return
        if loss.ndim:
            raise NeucoreError(f"the task's loss has the shape {tuple(loss.shape)}; one number is needed")
        last = self.output_dir / LAST
        kept = f"The last good state is kept in {last}" if last.exists() else "No checkpoint was written yet"
        raise NeucoreError(
            f"the loss is {float(loss)} at iteration {self.progress.iteration} (step {self.progress.step}). Try a "
            f"lower run.init_lr, more run.warmup_steps, run.clip_grad_norm: 1.0, or run.amp: false. {kept}"
        )

    # ---- display ----------------------------------------------------------------------------

    def _meters(self) -> MetricLogger:
        meters = MetricLogger(delimiter="  ")
        stored = self.progress.meters[distributed.rank()] if self.progress.meters else {}
        meters.meters.default_factory = lambda: SmoothedValue(window_size=20, fmt="{avg:.4f}")
        meters.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.3g}"))
        for name, (count, total) in stored.items():
            meters.meters[name].count, meters.meters[name].total = int(count), total
        self.progress.meters = []
        return meters

    @contextlib.contextmanager
    def _display(self, title: str, start: int, end: int) -> Iterator[Any]:
        """A progress bar on a terminal, else a line every `log_freq` iterations; on the main process alone."""
        first, began, progress = self.progress.iteration, time.time(), self.progress
        on_terminal = self.is_main and sys.stderr.isatty()
        bar = tqdm(total=end - start, initial=first - start, desc=title, disable=not on_terminal, unit="batch")
        shown, shown_at = first, began

        def show(meters: MetricLogger) -> None:
            nonlocal shown, shown_at
            done, now, at_end = progress.iteration, time.time(), progress.iteration == end
            if on_terminal and (now - shown_at > 0.2 or at_end):
                shown_at = now
                bar.set_postfix_str(str(meters), refresh=False)
                bar.update(done - start - bar.n)
            elif self.is_main and not on_terminal and (done - shown >= self.log_freq or at_end):
                shown = done
                pace = (now - began) / (done - first)
                left = datetime.timedelta(seconds=int(pace * (self.max_iters - done)))
                place = f"[{done - start}/{end - start}]"
                logging.info("%s  %s  %s  %.3f s a batch  training ends in %s", title, place, meters, pace, left)

        with bar:
            yield show

    def log_stats(self, stats: Mapping[str, Any], split_name: str, epoch: Any = None) -> None:
        """One line in log.txt: {"epoch", "iteration", "<split>_<name>": value, ...}."""
        if self.is_main:
            named = {f"{split_name}_{name}": value for name, value in stats.items()}
            self.folder.log({"epoch": epoch, "iteration": self.progress.iteration, **named})
            numbers = {k: v for k, v in named.items() if isinstance(v, (int, float))}
            logging.info("epoch %s  %s", epoch, "  ".join(f"{k} {v:.5g}" for k, v in numbers.items()))

    def log_config(self) -> None:
        """First line of log.txt."""
        if self.is_main:
            self.folder.log({"config": self.plain_config()})

    # ---- evaluation -------------------------------------------------------------------------

    def _validate(self) -> bool:
        """Evaluate the validation splits; True where these are the best weights so far."""
        progress = self.progress
        if not self.valid_splits:
            progress.best_epoch = self.epoch
            return progress.iteration >= self.max_iters
        results = {split: self.eval_epoch(split, self.epoch, skip_reload=True) for split in self.valid_splits}
        value = sum(self._aggregate(metrics, split) for split, metrics in results.items()) / len(results)
        better = progress.best_metric is None or value > progress.best_metric
        if better:
            progress.best_metric, progress.best_epoch = value, self.epoch
        for split, metrics in results.items():
            self.log_stats({**metrics, "best_epoch": progress.best_epoch}, split, self.epoch)
        return better

    def _aggregate(self, metrics: Mapping[str, Any], split: str) -> float:
        value = metrics.get("agg_metrics")
        if isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
        raise NeucoreError(
            f"the task {type(self.task).__name__} gave agg_metrics = {value!r} on {split!r}; a finite number is needed "
            "to select the best weights. Check that the split has queries and the model gives finite scores"
        )

    @torch.no_grad()
    def eval_epoch(self, split_name: str, cur_epoch: Any, skip_reload: bool = False) -> dict[str, Any]:
        """Metrics of one split, in every process the same; of the best weights where `cur_epoch` is "best"."""
        model = self.bare_model
        if not skip_reload and cur_epoch == "best":
            self._reload_best_model(model)
        model.eval()
        self.task.before_evaluation(model=model, dataset=self.datasets[split_name])
        options = {
            "cuda_enabled": self.cuda_enabled,
            "split_name": split_name,
            "testing": cur_epoch in ("best", "given"),
        }
        known = inspect.signature(self.task.evaluation).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
            options = {name: value for name, value in options.items() if name in known}  # tasks of the host
        result = self.task.evaluation(model, self.dataloaders[split_name], **options)
        metrics = self.task.after_evaluation(val_result=result, split_name=split_name, epoch=cur_epoch)
        return distributed.gather(checkpoint.plain(metrics or {}, "metrics"))[0]

    def evaluate(self, cur_epoch: Any = "best", skip_reload: bool = False) -> dict[str, Any]:
        """Evaluate the test splits with the best weights, write metrics and results. Returns {split: metrics}.

        With `run.evaluate`: the weights that `run.resume` names, else those the model has. `skip_reload` in a training
        run: those the model has now, without writing results.
        """
        self._prepare()
        started = time.time()
        source: Path | str | None = self.output_dir / BEST
        if self.evaluate_only:
            source, cur_epoch = self._load_weights_to_evaluate(), "given"
        elif skip_reload:
            cur_epoch = self.epoch
        else:
            self._reload_best_model(self.bare_model)
        splits = self.eval_splits if self.evaluate_only else self.test_splits
        metrics = {}
        for split in splits:
            metrics[split] = self.eval_epoch(split, cur_epoch, skip_reload=True)
            self.log_stats(metrics[split], split, cur_epoch)
        if self.evaluate_only or not skip_reload:
            provenance = self._provenance(source, splits, self.progress.seconds + time.time() - started)
            distributed.on_main(lambda: self._write_results(metrics, provenance))
        return metrics

    def _write_results(self, metrics: dict[str, Any], provenance: dict[str, Any]) -> None:
        record = checkpoint.jsonable({"metrics": metrics, "provenance": provenance, "files": []})
        write_json(self.output_dir / METRICS, record)
        if hasattr(self.task, "finish"):
            files = self.task.finish(
                metrics, model=self.bare_model, output_dir=self.output_dir, cfg=self.config, provenance=provenance
            )
            if isinstance(files, (list, tuple)):
                record["files"] = [str(Path(path).absolute()) for path in files]
                write_json(self.output_dir / METRICS, record)
        self.folder.write(status="finished", finished=time.time())
        logging.info("run folder: %s", self.output_dir)

    def _provenance(self, source: Path | str | None, splits: list[str], seconds: float) -> dict[str, Any]:
        """What the metrics depend on, in plain containers."""
        state, frozen = checkpoint.model_state(self.bare_model)
        return {
            "config": self.plain_config(),
            "checkpoint": {
                "path": None if source is None else str(source),
                "fingerprint": checkpoint.fingerprint(state, extra=frozen),
                "epoch": self.progress.best_epoch,
            },
            "data": {split: data_fingerprint(self.datasets[split]) for split in splits},
            "versions": versions(),
            "seed": self.seed,
            "world_size": distributed.world_size(),
            "seconds": round(seconds, 1),
            "run_folder": str(self.output_dir),
        }

    def _already_finished(self) -> dict[str, Any]:
        stored = distributed.on_main(lambda: self.folder.stored_metrics(self.test_splits))
        if stored is None:
            logging.info("%s is trained already; its result files are gone: testing it again", self.output_dir)
            best = checkpoint.load(self.output_dir / BEST)
            self.progress = Progress(**best["progress"])
            return self.evaluate()
        held = {split: data_fingerprint(*self._by_split[split].values()) for split in stored["metrics"]}
        if held != stored["data"]:
            raise ConfigError(
                f"{self.output_dir} is finished, but its data have changed since. Start a new run: "
                "--options run.resume=never, or another run.output_dir"
            )
        stored = stored["metrics"]
        logging.info("%s is finished already (run.resume: never starts a new run)", self.output_dir)
        if hasattr(self.task, "show_finished"):
            distributed.on_main(lambda: self.task.show_finished(self.output_dir, self.config))
            return stored
        for split, metrics in stored.items():
            numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
            logging.info("%s  %s", split, "  ".join(f"{name} {value:.5g}" for name, value in numbers.items()))
        return stored


@register_runner("runner_cir_iter")
class RunnerCirIter(RunnerCir):
    """Trains for exactly `max_iters` iterations; validates after each `iters_per_inner_epoch`, and at the end."""

    @property
    def round_iters(self) -> int:
        return self._whole("iters_per_inner_epoch")

    @property
    def max_iters(self) -> int:
        return self._whole("max_iters")
