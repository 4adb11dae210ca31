"""What a runner is made of: settings, device, model, optimiser, schedule, loaders, run folder."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.datasets.datasets.base_dataset import ConcatDataset
from lavis.runners.runner_base import RunnerBase

from neucore_plugin.common import distributed
from neucore_plugin.common.errors import ConfigError, nearest
from neucore_plugin.config.compare import config_fingerprint
from neucore_plugin.training.grad_cache import GradCache
from neucore_plugin.training.loaders import BatchLoader, datasets_by_split
from neucore_plugin.training.precision import Precision
from neucore_plugin.training.run_folder import RunFolder
from neucore_plugin.training.schedule import SCHEDULES, Schedule, parameter_groups
from neucore_plugin.weights import checkpoint


class RunnerParts(RunnerBase):
    """The host's runner with every property that breaks on a CPU, in one process or elsewhere replaced.

    Nothing here depends on how the training is counted, but `round_iters` and `max_iters`, which the runners give.
    """

    round_iters: int  # iterations between two validations
    max_iters: int  # iterations of the whole training

    def __init__(self, cfg: Any, task: Any, model: torch.nn.Module, datasets: Mapping[str, Any], job_id: str) -> None:
        self._precision: Precision | None = None
        self._train_loader: BatchLoader | None = None
        self._by_name = datasets
        self.config = cfg
        self._check_settings()
        self._by_split = datasets_by_split(datasets)
        self._check_splits()
        super().__init__(cfg, task, model, datasets, job_id)  # calls setup_output_dir

    # ---- settings ---------------------------------------------------------------------------

    def _run(self, key: str, default: Any = None) -> Any:
        value = self.config.run_cfg.get(key, default)
        return default if value is None else value

    def _whole(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self._run(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < least:
            raise ConfigError(f"run.{key} is {value!r}; a whole number of {least} or more is needed")
        return int(value)

    def _check_settings(self) -> None:
        for key, default in (("batch_size_train", None), ("batch_size_eval", None), ("accum_grad_iters", 1)):
            self._whole(key, default)
        for key in ("num_workers", "seed", "warmup_steps"):
            self._whole(key, 0, least=0)
        for key in ("checkpoint_every_iters", "grad_cache_chunk"):
            if self._run(key) is not None:
                self._whole(key)
        decay = self._run("ema_decay")
        if decay is not None and not (isinstance(decay, (int, float)) and 0 < decay < 1):
            raise ConfigError(f"run.ema_decay is {decay!r}; it must lie between 0 and 1, or be null for no average")
        kind = str(self._run("lr_sched", "constant_lr"))
        if kind not in SCHEDULES:
            raise ConfigError(f"run.lr_sched is {kind!r}.{nearest(kind, SCHEDULES)}")
        clip = self._run("clip_grad_norm")
        if clip is not None and not (isinstance(clip, (int, float)) and clip > 0):
            raise ConfigError(f"run.clip_grad_norm is {clip!r}; it must be a number above 0, or null for no clipping")

    def _check_splits(self) -> None:
        """Before the task prepares anything: that may take long."""
        for split in [*([] if self.evaluate_only else self.train_splits), *self.eval_splits]:
            if split not in self._by_split:
                raise ConfigError(f"the data sets have no split {split!r}.{nearest(split, self._by_split)}")
        for split in self.eval_splits:
            if len(self._by_split[split]) > 1:
                names = ", ".join(self._by_split[split])
                raise ConfigError(f"split {split!r} is in several data sets ({names}): evaluate them one at a time")
        if not self.evaluate_only and not self.train_splits:
            raise ConfigError("run.train_splits is empty; name a split, or set run.evaluate: true")
        if self.evaluate_only and not self.eval_splits:
            raise ConfigError("run.evaluate is true, but neither run.test_splits nor run.valid_splits names a split")

    @property
    def seed(self) -> int:
        """run.seed; 0 where not given."""
        return self._whole("seed", 0, least=0)

    @property
    def evaluate_only(self) -> bool:
        return bool(self._run("evaluate", False))

    @property
    def train_splits(self) -> list[str]:
        return list(self._run("train_splits", []))

    @property
    def valid_splits(self) -> list[str]:
        return list(self._run("valid_splits", []))

    @property
    def test_splits(self) -> list[str]:
        return list(self._run("test_splits", []))

    @property
    def eval_splits(self) -> list[str]:
        """Splits that this run evaluates, each once; without training the test splits, or else the validation ones."""
        if self.evaluate_only:
            return list(dict.fromkeys(self.test_splits or self.valid_splits))
        return list(dict.fromkeys([*self.valid_splits, *self.test_splits]))

    # ---- processes, device, model -----------------------------------------------------------

    @property
    def device(self) -> torch.device:
        if self._device is None:
            name = str(self._run("device", "auto"))
            if name == "auto":
                name = "cuda" if torch.cuda.is_available() else "cpu"
            # With an index, so that it compares equal to the device of a tensor.
            self._device = torch.device(f"cuda:{torch.cuda.current_device()}" if name == "cuda" else name)
        return self._device

    @property
    def use_distributed(self) -> bool:
        return distributed.world_size() > 1

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files."""
        return distributed.rank() == 0

    @property
    def model(self) -> torch.nn.Module:
        """The model on its device, as it is trained: in chunks if asked for, its gradients averaged over processes."""
        if self._wrapped_model is None:
            self._model = self._wrapped_model = self._model.to(self.device)
            if not self.evaluate_only and any(p.requires_grad for p in self._model.parameters()):
                chunk = self._run("grad_cache_chunk")
                stepped = GradCache(self._model, self._whole("grad_cache_chunk")) if chunk else self._model
                self._wrapped_model = distributed.wrap_model(stepped, self.device)
        return self._wrapped_model

    def unwrap_dist_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return self.bare_model if model is self.model else model

    @property
    def bare_model(self) -> torch.nn.Module:
        """The model itself, on its device."""
        self.model  # noqa: B018 - puts it there
        return self._model

    # ---- optimisation -----------------------------------------------------------------------

    @property
    def precision(self) -> Precision:
        """Number format of the training steps, from run.amp."""
        if self._precision is None:
            self._precision = Precision(self._run("amp", False), self.device)
        return self._precision

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        return self.precision.scaler

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            decay, scales = float(self._run("weight_decay", 0.0)), self._run("lr_scales", {})
            groups = parameter_groups(self.bare_model, decay, scales)
            count = sum(parameter.numel() for group in groups for parameter in group["params"])
            logging.info("trainable parameters: %s", f"{count:,}")
            betas = (0.9, float(self._run("beta2", 0.999)))
            self._optimizer = torch.optim.AdamW(groups, lr=self.init_lr, betas=betas)
        return self._optimizer

    @property
    def min_lr(self) -> float:
        return float(self._run("min_lr", 0.0))

    @property
    def lr_scheduler(self) -> Schedule:
        if self._lr_sched is None:
            rounds, rest = divmod(self.max_iters, self.round_iters)
            steps_a_round = -(-self.round_iters // self.accum_grad_iters)
            self._lr_sched = Schedule(
                kind=str(self._run("lr_sched", "constant_lr")),
                total_steps=rounds * steps_a_round + -(-rest // self.accum_grad_iters),
                init_lr=self.init_lr,
                min_lr=self.min_lr,
                warmup_lr=float(self._run("warmup_lr", -1)),
                warmup_steps=self._whole("warmup_steps", 0, least=0),
                decay_rate=float(self._run("lr_decay_rate", 1.0)),
                decay_steps=self._whole("lr_decay_steps", steps_a_round),
            )
        return self._lr_sched

    # ---- data -------------------------------------------------------------------------------

    @property
    def train_loader(self) -> BatchLoader:
        if self._train_loader is None:
            parts = [part for split in self.train_splits for part in self._by_split[split].values()]
            dataset = parts[0] if len(parts) == 1 else ConcatDataset(parts)
            self._train_loader = self._loader(dataset, f"train split {', '.join(self.train_splits)}", train=True)
        return self._train_loader

    @property
    def dataloaders(self) -> dict[str, BatchLoader]:
        """{split: loader} of the splits that are evaluated."""
        if self._dataloaders is None:
            self.datasets = {split: next(iter(self._by_split[split].values())) for split in self.eval_splits}
            self._dataloaders = {
                split: self._loader(d, f"split {split}", train=False) for split, d in self.datasets.items()
            }
        return self._dataloaders

    def _loader(self, dataset: Any, name: str, train: bool) -> BatchLoader:
        shared = train or self.use_dist_eval_sampler
        return BatchLoader(
            dataset,
            self._whole("batch_size_train" if train else "batch_size_eval"),
            name=name,
            shuffle=train,
            seed=self.seed,
            num_workers=self._whole("num_workers", 0, least=0),
            rank=distributed.rank() if shared else 0,
            world=distributed.world_size() if shared else 1,
            pin_memory=self.cuda_enabled,
        )

    # ---- run folder -------------------------------------------------------------------------

    def plain_config(self) -> dict[str, Any]:
        """The config as plain containers, less what a process notes in it: it can be given as a config again."""
        config = checkpoint.plain(self.config.to_dict(), "config")
        config["run"] = {key: value for key, value in config["run"].items() if key not in ("rank", "gpu")}
        return config

    def setup_output_dir(self) -> None:
        """Choose the run folder under run.output_dir (relative to the current directory), keep others out of it."""
        config = self.plain_config()
        own = getattr(self.config, "fingerprint", None)
        fingerprint = own() if callable(own) else config_fingerprint(config)

        def choose() -> RunFolder:
            folder = RunFolder.choose(
                self._run("output_dir", "output"),
                self.job_id,
                config,
                fingerprint,
                self._run("resume"),
                self.evaluate_only,
            )
            (folder.path / "result").mkdir(exist_ok=True)  # tasks of the host write there
            return folder

        self.folder: RunFolder = distributed.on_main(choose)
        if not self.folder.finished:
            distributed.on_main(self.folder.lock)
        self.output_dir, self.result_dir = self.folder.path, self.folder.path / "result"
        # register_path refuses a second runner in the same process.
        registry.mapping["paths"].update(output_dir=str(self.output_dir), result_dir=str(self.result_dir))
