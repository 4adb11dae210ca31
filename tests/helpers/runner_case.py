"""A tiny training for the tests of the runners: real host classes, no encoder; also what the child processes run."""

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from lavis.models.base_model import BaseModel
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import Dataset

from neucore_plugin.common import distributed, files
from neucore_plugin.common.errors import ConfigError, NeucoreError
from neucore_plugin.config.loading import Config
from neucore_plugin.config.run import RunSchema
from neucore_plugin.training.runner import RunnerCir, RunnerCirIter
from neucore_plugin.weights import checkpoint

WIDTH = 6


class Points(Dataset):
    """x [WIDTH] -> y [1]; augmented with each of the three generators, and by the epoch."""

    def __init__(self, size: int, seed: int = 0, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, WIDTH, generator=generator)
        self.y = self.x.sum(1, keepdim=True).tanh()
        self.noise, self.epoch, self.fingerprint = noise, 0, f"points-{size}-{seed}"

    def __len__(self) -> int:
        return len(self.x)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        draw = torch.rand(WIDTH) + random.random() + np.random.rand() + 0.01 * self.epoch
        return {"x": self.x[index] + self.noise * draw, "y": self.y[index], "index": index}

    def collater(self, samples: list) -> dict:
        return {"x": torch.stack([s["x"] for s in samples]), "y": torch.stack([s["y"] for s in samples]),
                "index": [s["index"] for s in samples], "collated": True}  # fmt: skip


class Frozen(nn.Module):
    """A frozen encoder with batch norm that is kept in eval mode, as one should."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))


class TinyModel(BaseModel):
    def __init__(self, dropout: float = 0.2, seed: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.encoder = Frozen()
            self.hidden, self.norm, self.out = nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.Linear(8, 1)
            self.idle = nn.Linear(2, 2)  # trainable, never used
        self.dropout = nn.Dropout(dropout)

    def parameter_groups(self) -> list:
        head = [pair for name in ("hidden", "norm") for pair in getattr(self, name).named_parameters(prefix=name)]
        return [{"name": "head", "params": head}, {"name": "last", "params": list(self.out.parameters())}]

    def checkpoint_header(self) -> dict:
        return {"arch": "tiny"}

    def encode_pairs(self, samples: dict) -> dict:
        assert samples["collated"]
        hidden = self.dropout(self.norm(self.hidden(self.encoder(samples["x"])).relu()))
        return {"output": hidden, "error": self.out(hidden) - samples["y"]}

    def losses(self, encoded: dict, samples: dict) -> dict:
        loss = encoded["error"].square().mean()
        return {"loss": loss, "loss_part": loss.detach(), "output": encoded["output"]}

    def forward(self, samples: dict) -> dict:
        return self.losses(self.encode_pairs(samples), samples)


class TinyTask(BaseTask):
    """Higher is better: minus the mean squared error, which is below 0."""

    def __init__(self, metrics: list | None = None, kill_at_batch: int = -1) -> None:
        super().__init__()
        self.seen, self.prepared, self.finished = {}, 0, []
        self.given, self.kill_at_batch, self.batches = list(metrics or []), kill_at_batch, 0
        self.train_indices: list[list[int]] = []

    def prepare(self, model, datasets, cfg, output_dir) -> None:
        self.prepared += 1
        assert model.device.type in str(cfg.run_cfg.device)
        torch.rand(7)  # a cache that is built the first time only draws as well

    def train_step(self, model, samples):
        if self.batches == self.kill_at_batch:
            os.kill(os.getpid(), signal.SIGKILL)
        self.batches += 1
        self.train_indices.append(samples["index"])
        return model(samples)

    def evaluation(self, model, data_loader, cuda_enabled=True):
        assert not model.training
        assert not cuda_enabled or torch.cuda.is_available()
        errors = {i: e for b in data_loader for i, e in zip(b["index"], self._errors(model, b), strict=True)}
        parts = distributed.gather(errors)
        assert sum(map(len, parts)) == len(data_loader.dataset)
        torch.rand(3)  # an evaluation that draws
        return {index: error for part in parts for index, error in part.items()}

    @staticmethod
    def _errors(model, batch):
        pairs = zip(batch["x"].to(model.device), batch["y"].to(model.device), strict=True)
        return [float(model({**batch, "x": x[None], "y": y[None]})["loss"]) for x, y in pairs]

    def after_evaluation(self, val_result, split_name, epoch):
        self.seen[split_name] = sorted(val_result)
        value = -sum(val_result[i] for i in sorted(val_result)) / len(val_result)
        given = self.given.pop(0) if self.given else value
        return {"agg_metrics": given, "error": np.float64(-value), "nested": {"count": np.int64(len(val_result))}}

    def finish(self, test_metrics, model, output_dir, cfg, provenance):
        self.finished.append((test_metrics, provenance))
        path = Path(output_dir) / "results.json"
        files.write_json(path, checkpoint.jsonable(test_metrics))
        return [path]


RUN = {
    "task": "tiny", "init_lr": 0.02, "min_lr": 0.001, "warmup_lr": 0.0, "warmup_steps": 3, "weight_decay": 0.05,
    "lr_scales": {"last": 0.5}, "batch_size_train": 4, "batch_size_eval": 3, "accum_grad_iters": 2, "seed": 5,
    "clip_grad_norm": 1.0, "log_freq": 2, "valid_splits": ["dev"], "test_splits": ["test"], "device": "cpu",
    "resume": "auto",
}  # fmt: skip
EPOCHS = {"runner": "runner_cir", "max_epoch": 3}
ITERS = {"runner": "runner_cir_iter", "max_iters": 13, "iters_per_inner_epoch": 4, "checkpoint_every_iters": 2}
KINDS = {"epochs": EPOCHS, "iters": ITERS}


def make_config(output_dir, **run) -> Config:
    """A whole config, its `run` section validated and completed by the schema."""
    run = RunSchema.model_validate({**RUN, "output_dir": str(output_dir), **run}).model_dump()
    return Config({"model": {"arch": "tiny"}, "datasets": {"points": {}}, "run": run})


def make_datasets(train: int = 22) -> dict:
    return {"points": {"train": Points(train), "dev": Points(7, 1, 0.0), "test": Points(8, 2, 0.0)}}


def make_runner(output_dir, task=None, model=None, datasets=None, job_id="job", **run):
    run = {**EPOCHS, **run} if "max_iters" not in run else run
    kind = RunnerCirIter if "max_iters" in run else RunnerCir
    torch.set_num_threads(1)
    return kind(
        cfg=make_config(output_dir, **run),
        job_id=job_id,
        task=task or TinyTask(),
        model=model or TinyModel(),
        datasets=datasets or make_datasets(),
    )


def final_state(folder) -> dict:
    """All that must be the same, bit for bit, at the end of a run: weights of both checkpoints, optimiser, log."""
    last = checkpoint.load(Path(folder) / "checkpoint_last.pth")
    best = checkpoint.load(Path(folder) / "checkpoint_best.pth")
    return {
        "last": checkpoint.fingerprint(last["model"]),
        "best": checkpoint.fingerprint(best["model"]),
        "moments": [v.tolist() for s in last["optimizer"]["state"].values() for v in s.values()],
        "average": checkpoint.fingerprint(last["average"]["weights"]) if last["average"] else None,
        "rng": checkpoint.fingerprint({"torch": last["rng"][0]["torch"]}),
        "progress": {k: v for k, v in last["progress"].items() if k != "seconds"},
        "log": (Path(folder) / "log.txt").read_text().splitlines()[1:],  # the first has the output folder
    }


def clean_processes():
    """Context of processes that have run nothing yet: a server imports the host once, they are forked from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runner_case", "batch_case"])
    here = str(Path(__file__).parent)
    if here not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return context


def run_child(target, *arguments, **named) -> int:
    """Exit code of a clean process."""
    child = clean_processes().Process(target=target, args=arguments, kwargs=named)
    child.start()
    child.join(120)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def expect_other_process(root) -> None:
    """In a child process: fails unless the run in `root` is refused because another process has it."""
    try:
        make_runner(root)
    except ConfigError as error:
        sys.exit(0 if "another process" in str(error) else 3)
    sys.exit(4)


def train_and_die(output_dir, run: dict, batch: int = -1, rename: int = -1, after: bool = False) -> None:
    """In a child process: train, and get SIGKILL at a batch, or just before (or after) a file takes its place."""
    count = [0]
    replace = os.replace

    def counting(source, target) -> None:
        if count[0] == rename and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if count[0] == rename and after:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1

    os.replace = counting
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a command of its own
    make_runner(output_dir, task=TinyTask(kill_at_batch=batch), **run).train()


def train_in_group(output_dir, run: dict, kill_at_batch: int = -1) -> dict:
    """In each process of a group: train; what this process saw and ended with."""
    run = dict(run)
    task = TinyTask(kill_at_batch=kill_at_batch)
    runner = make_runner(output_dir, task=task, model=TinyModel(dropout=run.pop("dropout", 0.2)), **run)
    seen = {"metrics": runner.train(), "seen": task.seen, "indices": task.train_indices, "finished": len(task.finished)}
    seen["state"] = {name: value.numpy() for name, value in runner.bare_model.state_dict().items()}
    return {**seen, "folder": str(runner.output_dir)}


def in_group(tmp_path, job, *arguments, world: int = 2, killed: bool = False) -> list:
    """What `job(*arguments)` gives, or the NeucoreError it raises, in each of `world` clean gloo processes, by rank.

    killed: every process gets SIGKILL on its way; returns [].
    """
    context = clean_processes()
    results, store = context.Queue(), str(tmp_path / f"store-{os.urandom(4).hex()}")
    group = [context.Process(target=_join, args=(rank, world, store, results, job, arguments)) for rank in range(world)]
    for process in group:
        process.start()
    seen = dict(results.get(timeout=120) for _ in range(0 if killed else world))
    for process in group:
        process.join(60)
    assert [process.exitcode for process in group] == [-signal.SIGKILL if killed else 0] * world
    return [seen[rank] for rank in sorted(seen)]


def _join(rank: int, world: int, store: str, results, job, arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    distributed.init_distributed(OmegaConf.create({"device": "cpu", "dist_url": f"file://{store}"}))
    try:
        results.put((rank, job(*arguments)))
    except NeucoreError as error:
        results.put((rank, error))
    finally:
        distributed.leave()
