"""What the `run` section may say for our runners."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from neucore_plugin.config.kinds import Device, Factors, Names, Real, Text
from neucore_plugin.config.section import Section

# What gives a training its length, by runner.
LENGTHS = {"runner_cir": ("max_epoch",), "runner_cir_iter": ("max_iters", "iters_per_inner_epoch")}
RUNNERS, TASKS = tuple(LENGTHS), ("composed_image_retrieval",)


class RunSchema(Section):
    """The `run` section for our runners."""

    runner: Text = Field(RUNNERS[0], description="runner_cir counts epochs, runner_cir_iter iterations")
    task: Text = Field(TASKS[0], description="the host's task")
    # --- length
    max_epoch: int | None = Field(None, ge=1, description="epochs; required by runner_cir")
    max_iters: int | None = Field(None, ge=1, description="batches; required by runner_cir_iter")
    iters_per_inner_epoch: int | None = Field(
        None, ge=1, description="batches between two validations; required by runner_cir_iter"
    )
    # --- learning rate, computed per step: a step is one update of the weights
    lr_sched: Literal["linear_warmup_cosine_lr", "linear_warmup_step_lr", "constant_lr"] = Field(
        "linear_warmup_cosine_lr", description="course of the rate after warm-up"
    )
    init_lr: Real = Field(5e-4, gt=0, description="learning rate after warm-up")
    min_lr: Real = Field(0.0, ge=0, description="the rate never falls below it; at most init_lr")
    warmup_lr: Real = Field(0.0, ge=-1, description="rate of the first step; negative: init_lr, as in the host")
    warmup_steps: int = Field(0, ge=0, description="steps from warmup_lr to init_lr")
    lr_decay_rate: Real = Field(0.5, gt=0, le=1, description="factor of a decay of linear_warmup_step_lr")
    lr_decay_steps: int | None = Field(None, ge=1, description="steps between two decays; null: those of an epoch")
    lr_scales: Factors = Field(
        {}, description="factors on the rate by parameter group: backbone_image, backbone_text, head"
    )
    # --- optimiser: AdamW
    weight_decay: Real = Field(0.01, ge=0, description="of matrices; biases and norms have none")
    decay_all: bool = Field(False, description="weight_decay of biases and norms too, as in the released code")
    keep_optimizer: bool = Field(
        False,
        description="AdamW goes on with its state in model.checkpoint, a checkpoint_last.pth; weights that were frozen "
        "there begin anew",
    )
    beta2: Real = Field(0.999, gt=0, lt=1, description="AdamW's second moment")
    accum_grad_iters: int = Field(1, ge=1, description="batches whose gradients make one step")
    clip_grad_norm: Real | None = Field(None, gt=0, description="largest norm of the gradient; null: any")
    grad_cache_chunk: int | None = Field(
        None, ge=1, description="pairs encoded at a time; the loss still sees the whole batch. null: all at once"
    )
    ema_decay: Real | None = Field(
        None, gt=0, lt=1, description="moving average of the weights, which is validated and tested; null: none"
    )
    amp: bool | Literal["bf16", "fp16"] = Field(
        False, description="mixed precision in training; true: bf16 where the device has it, else fp16"
    )
    # --- data
    batch_size_train: int = Field(32, ge=1, description="pairs a batch and process: each other's negatives")
    batch_size_eval: int = Field(64, ge=1, description="images or queries encoded at a time")
    num_workers: int = Field(0, ge=0, description="processes that load images")
    loader_timeout: int = Field(600, ge=0, description="seconds that these may take for a batch; 0: no limit")
    train_splits: Names = Field(["train"], description="splits to train on")
    valid_splits: Names = Field([], description="splits that choose the best checkpoint, by the mean of their metrics")
    test_splits: Names = Field([], description="splits of the final results")
    cache_features: bool = Field(True, description="a frozen encoder reads each image and caption once, ever")
    cache_dir: Text | None = Field(None, description="folder of these features; null: $NEUCORE_CACHE, ~/.cache/neucore")
    score_chunk: int = Field(256, ge=1, description="queries scored against the gallery at a time")
    # --- the run itself
    seed: int = Field(
        42, ge=0, le=2**31 - 1, description="of weights, order and noise; the same bits need the same OMP_NUM_THREADS"
    )
    output_dir: Text = Field("output", description="every run makes a folder of its own in it")
    resume: Text = Field("never", description="never, auto (the latest run of the same config), or a checkpoint's path")
    evaluate: bool = Field(False, description="evaluate model.checkpoint instead of training")
    report: bool = Field(True, description="write results.json and report.html into output_dir")
    log_freq: int = Field(50, ge=1, description="batches between two lines of the log")
    checkpoint_every_iters: int | None = Field(
        None, ge=1, description="batches between two checkpoints within an epoch; null: only at its end"
    )
    # --- processes
    device: Device = Field("auto", description="auto (cuda where there is one), cpu, cuda, cuda:N or mps")
    distributed: bool = Field(True, description="join the processes that torchrun or srun announces")
    world_size: int = Field(1, ge=1, description="set by the launcher")
    dist_url: Text = Field("env://", description="where processes meet")
    dist_backend: Literal["auto", "gloo", "nccl"] = Field("auto", description="auto: nccl on cuda, gloo elsewhere")
    use_dist_eval_sampler: bool = Field(True, description="processes share the work of an evaluation")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if not self.evaluate:
            for key in LENGTHS.get(self.runner, ()):
                if getattr(self, key) is None:
                    yield key, f"is required by {self.runner} but not given"
            if not self.train_splits:
                yield "train_splits", "got []; training needs a split; name one, or set run.evaluate=true"
        elif not self.test_splits and not self.valid_splits:
            yield "test_splits", "got []; run.evaluate=true needs a split to evaluate"
        if self.min_lr > self.init_lr:
            yield "min_lr", f"got {self.min_lr}; allowed: at most run.init_lr ({self.init_lr})"
