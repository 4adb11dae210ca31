"""What a config may say: one pydantic model a section, with defaults and ranges. Knows neither torch nor lavis.

Other builders, models, backbones and processors add theirs with the `register_*_schema` functions; what has no schema
is passed through unchecked (the host's own).
"""

from typing import Annotated

from pydantic import PlainValidator

from neucore_plugin.config.values import Flag, Section, Text, choice, device_name, factors, real, whole, words

LR_SCHEDULERS = ("linear_warmup_cosine_lr", "linear_warmup_step_lr", "constant_lr")
OUR_RUNNERS = ("runner_cir", "runner_cir_iter")
OUR_TASKS = ("composed_image_retrieval",)


# --- run --------------------------------------------------------------------------------------------------------------


class RunSchema(Section):
    """The `run` section for our runners."""

    runner: Text = "runner_cir"
    task: Text = "composed_image_retrieval"
    # length: max_epoch for runner_cir, the other two for runner_cir_iter
    max_epoch: whole(1) | None = None
    max_iters: whole(1) | None = None
    iters_per_inner_epoch: whole(1) | None = None
    # learning rate, computed per step
    lr_sched: choice(*LR_SCHEDULERS) = "linear_warmup_cosine_lr"
    init_lr: real(above=0) = 5e-4
    min_lr: real(low=0) = 0.0
    warmup_lr: real(low=-1) = 0.0  # negative means init_lr, as in the host
    warmup_steps: whole(0) = 0
    lr_decay_rate: real(above=0, high=1) = 0.5
    lr_decay_steps: whole(1) | None = None
    lr_scales: Annotated[dict[str, float], PlainValidator(factors)] = {}
    # optimiser
    weight_decay: real(low=0) = 0.01
    beta2: real(above=0, below=1) = 0.999
    accum_grad_iters: whole(1) = 1
    clip_grad_norm: real(above=0) | None = None
    grad_cache_chunk: whole(1) | None = None  # pairs encoded at a time; the loss still sees the whole batch
    ema_decay: real(above=0, below=1) | None = None  # moving average of the weights, which is validated and tested
    amp: choice(False, True, "bf16", "fp16") = False
    # data
    batch_size_train: whole(1) = 32
    batch_size_eval: whole(1) = 64
    num_workers: whole(0) = 0
    train_splits: words() = ["train"]
    valid_splits: words() = []
    test_splits: words() = []
    cache_features: Flag = True
    cache_dir: Text | None = None
    score_chunk: whole(1) = 256
    # the run itself
    seed: whole(0, 2**31 - 1) = 42
    output_dir: Text = "output"
    resume: Text = "never"  # never, auto, or the path of a checkpoint
    evaluate: Flag = False
    report: Flag = True
    log_freq: whole(1) = 50
    checkpoint_every_iters: whole(1) | None = None
    # processes
    device: Annotated[str, PlainValidator(device_name)] = "auto"
    distributed: Flag = True
    world_size: whole(1) = 1
    dist_url: Text = "env://"
    dist_backend: choice("auto", "gloo", "nccl") = "auto"
    use_dist_eval_sampler: Flag = True


# --- registries -------------------------------------------------------------------------------------------------------
