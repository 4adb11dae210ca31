"""Everything that bends to the host, salesforce-lavis 1.0.2: registration, mended defaults, processes, main flow.

Nothing here imports lavis or torch before a function needs it, so that the folders and errors below can be had without.
"""

import importlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from neucore_plugin import MEMBERS, config
from neucore_plugin.errors import ConfigError, NeucoreError

JOIN_TIMEOUT = timedelta(minutes=30)  # how long a process waits for the others to start
WORK_TIMEOUT = timedelta(hours=12)  # and later, while the first renders drawings or fills a feature cache
STOCK_CACHE_ROOT = "/export/home/.cache/lavis"
_busy = [False]


class HostError(NeucoreError, ImportError):
    """The host cannot be imported, or something else holds one of our names in it."""


def cache_dir(override: str | Path | None = None) -> Path:
    """Folder for caches: `override`, else $NEUCORE_CACHE, else ~/.cache/neucore; it is not created here."""
    chosen = override or os.environ.get("NEUCORE_CACHE") or "~/.cache/neucore"
    return Path(chosen).expanduser().absolute()


# --- importing the host -------------------------------------------------------------------------------------------


def before_import() -> None:
    """Silence the deprecation warnings that the host's old dependencies raise while they are imported."""
    for module in (r"fairscale\.", r"timm\.", r"torch\.jit", r"torch\.cuda\.amp", r"transformers\.", r"webdataset\."):
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=module)
    warnings.filterwarnings("ignore", message=".*pkg_resources.*")


def explain_import_failure(error: BaseException) -> HostError:
    """One message with the remedy for what usually keeps `import lavis` from working."""
    if isinstance(error, HostError):
        return error
    bounds = {"numpy": ((0,), (2,)), "transformers": ((4, 25), (4, 27)), "pyarrow": ((0,), (26,))}
    for package, (low, high) in bounds.items():
        version = _installed_version(package)
        if version is not None and not low <= version < high:
            wanted = f"{package}>={'.'.join(map(str, low))}," if low > (0,) else package
            wanted += f"<{'.'.join(map(str, high))}"
            return HostError(
                f"`import lavis` failed with {package} {metadata.version(package)}, which salesforce-lavis 1.0.2 "
                f"cannot work with; run: pip install '{wanted}'  ({type(error).__name__}: {error})"
            )
    if isinstance(error, ModuleNotFoundError):
        remedy = "salesforce-lavis==1.0.2" if error.name == "lavis" else "-e . (or `pip install neucore-plugin`)"
        return HostError(f"`import lavis` failed: no module named {error.name}; run: pip install {remedy}")
    return HostError(
        f"`import lavis` failed ({type(error).__name__}: {error}); the tested set of packages is in constraints.txt: "
        "`sh run.sh setup` makes an environment of it"
    )


def _installed_version(package: str) -> tuple[int, ...] | None:
    try:
        parts = metadata.version(package).split(".")
    except metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in parts[:2] if part.isdigit())


def import_host() -> None:
    """Import lavis with the parts that `import lavis` leaves out (runners, schedulers).

    Raises `HostError` with the remedy where that fails.
    """
    before_import()
    try:
        lavis = importlib.import_module("lavis")
        if not getattr(lavis, "__file__", None):  # a mere folder of that name, such as the one with our two modules
            raise ModuleNotFoundError("No module named 'lavis'", name="lavis")
        importlib.import_module("lavis.common.optims")
        importlib.import_module("lavis.runners")
    except Exception as error:
        raise explain_import_failure(error) from error


# --- registration -------------------------------------------------------------------------------------------------


def register_all() -> None:
    """Import the host, mend it, import every module of ours that registers something; calling it again is harmless."""
    if _busy[0]:
        return
    _busy[0] = True
    try:
        import_host()
        _mend_host()
        for name in MEMBERS:
            importlib.import_module(name)
        _extend_zoos()
    finally:
        _busy[0] = False


def _guarded(kind: str, name: str) -> Callable[[type], type]:
    """The host's decorator `register_<kind>`, harmless where the same class is registered already.

    The same class comes twice by `importlib.reload` (the new one takes the place) and by `python -m` of its module
    (the file is loaded as `__main__` too: the one under its proper name stays).
    """

    def wrap(cls: type) -> type:
        from lavis.common.registry import registry

        mapping = registry.mapping[f"{kind}_name_mapping"]
        holder = mapping.get(name)
        if holder is None:
            return getattr(registry, f"register_{kind}")(name)(cls)
        if holder.__qualname__ != cls.__qualname__ or not _same_source(holder, cls):
            raise HostError(
                f"the {kind} name {name!r} is held by {holder.__module__}.{holder.__qualname__} already, so "
                f"{cls.__module__}.{cls.__qualname__} cannot have it; choose another name or do not import both"
            )
        if holder.__module__ == cls.__module__:
            mapping[name] = cls
        return cls

    return wrap


def _same_source(one: type, other: type) -> bool:
    if one.__module__ == other.__module__:
        return True
    files = [getattr(sys.modules.get(cls.__module__), "__file__", None) for cls in (one, other)]
    return None not in files and os.path.realpath(files[0]) == os.path.realpath(files[1])


def register_model(name: str) -> Callable[[type], type]:
    """Class decorator: the host's `register_model`, safe against reload and double import."""
    return _guarded("model", name)


def register_task(name: str) -> Callable[[type], type]:
    """Class decorator: the host's `register_task`, safe against reload and double import."""
    return _guarded("task", name)


def register_runner(name: str) -> Callable[[type], type]:
    """Class decorator: the host's `register_runner`, safe against reload and double import."""
    return _guarded("runner", name)


def register_builder(name: str) -> Callable[[type], type]:
    """Class decorator: the host's `register_builder`, safe against reload and double import."""
    return _guarded("builder", name)


def register_processor(name: str) -> Callable[[type], type]:
    """Class decorator: the host's `register_processor`, safe against reload and double import."""
    return _guarded("processor", name)


def register_lr_scheduler(name: str) -> Callable[[type], type]:
    """Class decorator: the host's `register_lr_scheduler`, safe against reload and double import."""
    return _guarded("lr_scheduler", name)


def _extend_zoos() -> None:
    """The host's zoos are snapshots taken while it was imported: add what has been registered since."""
    from lavis.common.registry import registry
    from lavis.datasets.builders import dataset_zoo
    from lavis.models import model_zoo

    for name, cls in registry.mapping["model_name_mapping"].items():
        if name not in model_zoo.model_zoo and hasattr(cls, "PRETRAINED_MODEL_CONFIG_DICT"):
            model_zoo.model_zoo[name] = list(cls.PRETRAINED_MODEL_CONFIG_DICT)
    for name, cls in registry.mapping["builder_name_mapping"].items():
        if name not in dataset_zoo.dataset_zoo and hasattr(cls, "DATASET_CONFIG_DICT"):
            dataset_zoo.dataset_zoo[name] = list(cls.DATASET_CONFIG_DICT)


def _mend_host() -> None:
    import torch
    import torch.distributed as dist
    from lavis import models
    from lavis.common import dist_utils, logger
    from lavis.common.registry import registry

    # `load_model("neucore")`: the host demands a model type. In place, so that references imported earlier have it too.
    for function in (models.load_model, models.load_model_and_preprocess):
        if inspect.signature(function).parameters["model_type"].default is inspect.Parameter.empty:
            function.__defaults__ = (None, *function.__defaults__)

    # The stock cache is a fixed folder of another site; `register_path` refuses to change it.
    paths = registry.mapping["paths"]
    stock = os.path.join(paths["repo_root"], STOCK_CACHE_ROOT)
    if paths.get("cache_root") == stock and (os.environ.get("NEUCORE_CACHE") or not os.path.isdir(stock)):
        paths["cache_root"] = str(cache_dir())

    def synchronize_between_processes(self: Any) -> None:
        """Sum count and total over processes, on the device of the process group (the stock one demands CUDA)."""
        if not dist_utils.is_dist_avail_and_initialized():
            return
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        sums = torch.tensor([self.count, self.total], dtype=torch.float64, device=device)
        dist.barrier()
        dist.all_reduce(sums)
        self.count, self.total = int(sums[0].item()), sums[1].item()

    logger.SmoothedValue.synchronize_between_processes = synchronize_between_processes


def registry_tables() -> config.Tables:
    """What the host's registry knows, for the checks of a config: names, default files, splits."""
    from lavis.common.registry import registry
    from lavis.common.utils import get_abs_path

    def files(kind: str, attribute: str) -> dict[str, dict[str, str]]:
        found = {}
        for name, cls in registry.mapping[f"{kind}_name_mapping"].items():
            table = getattr(cls, attribute, None) or {}
            found[name] = {key: get_abs_path(path) for key, path in table.items()}
        return found

    builders = registry.mapping["builder_name_mapping"]
    splits = {name: tuple(cls.splits) for name, cls in builders.items() if getattr(cls, "splits", None)}
    return config.Tables(
        models=files("model", "PRETRAINED_MODEL_CONFIG_DICT"),
        datasets=files("builder", "DATASET_CONFIG_DICT"),
        splits={**config.DATASET_SPLITS, **splits},
        tasks=tuple(registry.list_tasks()),
        runners=tuple(registry.list_runners()),
        processors=tuple(registry.list_processors()),
    )


def section_of(path: str | Path, said: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint of ours holds of its model: {"config": the `model` section, "image_processor", ...}.

    said: the user's own section. None for a file that is not there, which the check of the config tells, or that is
    none of our models'. Raises `CheckpointError` for one that is damaged, hostile, or asks for what nobody named.
    """
    from neucore_plugin import checkpoint
    from neucore_plugin.models.trust import refuse_strangers

    if not Path(path).expanduser().is_file():
        return None
    held = checkpoint.load(Path(path).expanduser()).get("architecture") or {}
    if not isinstance(held.get("config"), Mapping):
        return None
    refuse_strangers(path, held["config"], said)
    return held


# --- processes, log ----------------------------------------------------------------------------------------------


def init_distributed(run_cfg: Any) -> None:
    """Join the process group that torchrun or srun announces, and settle the device.

    Sets run_cfg.{distributed, rank, world_size, gpu, device, dist_backend}. gloo on a CPU, nccl on CUDA; the stock
    function knows nccl alone. Raises `ConfigError` where CUDA is demanded and not there, `NeucoreError` where the
    announcement is incomplete or the others cannot be met.
    """
    import torch

    rank, world_size, local_rank = _announced_ranks()
    kind, _, chosen = pick_device(str(run_cfg.get("device") or "auto")).partition(":")
    index = int(chosen or 0) if world_size == 1 else local_rank
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise ConfigError(
            f"process {rank} of {world_size} wants CUDA device {index}, but there are {torch.cuda.device_count()}; "
            "start fewer processes or use `run.device=cpu`"
        )
    run_cfg.rank, run_cfg.world_size, run_cfg.gpu = rank, world_size, index
    run_cfg.distributed = world_size > 1
    run_cfg.device = f"cuda:{index}" if kind == "cuda" else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(index)
    if world_size == 1:
        return
    backend = str(run_cfg.get("dist_backend") or "auto")
    run_cfg.dist_backend = ("nccl" if kind == "cuda" else "gloo") if backend == "auto" else backend
    if run_cfg.dist_backend == "nccl" and kind != "cuda":
        raise ConfigError("run.dist_backend is nccl, which joins GPUs, but the device is cpu; use auto or gloo")
    if not torch.distributed.is_initialized():
        _join(run_cfg.dist_backend, str(run_cfg.get("dist_url") or "env://"), rank, world_size)
    torch.distributed.barrier()


def _join(backend: str, url: str, rank: int, world_size: int) -> None:
    import torch.distributed as dist

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if url == "env://" and not os.environ.get(name)]
    if missing:
        raise NeucoreError(
            f"process {rank} of {world_size} is to join the others, but lacks {' and '.join(missing)}. Start with "
            "`torchrun --nproc_per_node=N -m lavis.train ...`, which sets them, or give run.dist_url a meeting place "
            "(tcp://HOST:PORT or file://PATH); for one process unset RANK and WORLD_SIZE"
        )
    try:
        if url.startswith("file://") and not Path(url.removeprefix("file://")).parent.is_dir():
            raise FileNotFoundError("the file's folder does not exist")  # torch would wait for it
        store, rank, world_size = next(iter(dist.rendezvous(url, rank, world_size, timeout=JOIN_TIMEOUT)))
        store.set(f"joined/{rank}", "")
        store.wait(
            [f"joined/{other}" for other in range(world_size)], JOIN_TIMEOUT
        )  # the group itself would not give up
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=WORK_TIMEOUT)
        store.set_timeout(WORK_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        place = ":".join(os.environ[key] for key in ("MASTER_ADDR", "MASTER_PORT")) if url == "env://" else url
        reason = str(error).strip().splitlines()[0][:200] or type(error).__name__
        raise NeucoreError(
            f"process {rank} of {world_size} could not meet the others at {place} ({reason}). Check that all "
            f"{world_size} processes were started with the same address and a free port, one of each rank"
        ) from error


def pick_device(wanted: str) -> str:
    """ "auto" becomes "cuda" or "cpu"; anything else is kept. Raises `ConfigError` where it cannot be had."""
    import torch

    has_cuda = torch.cuda.is_available()
    if wanted == "auto":
        return "cuda" if has_cuda else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", wanted):
        raise ConfigError(f"device: got {wanted!r}; allowed: auto, cpu, cuda or cuda:N")
    if wanted != "cpu" and not has_cuda:
        raise ConfigError(f"device: got {wanted}, but torch sees no CUDA device here; use auto or cpu")
    return wanted


def _announced_ranks() -> tuple[int, int, int]:
    """Rank, number of processes, rank on this machine. Raises `NeucoreError` for half an announcement."""
    environment = os.environ
    if "RANK" in environment or "WORLD_SIZE" in environment:  # torchrun
        defaults = {"RANK": None, "WORLD_SIZE": None, "LOCAL_RANK": environment.get("RANK")}
    elif "SLURM_PROCID" in environment and "MASTER_ADDR" in environment:  # srun of several tasks
        defaults = {"SLURM_PROCID": None, "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    else:
        return 0, 1, 0
    given = {name: environment.get(name, default) for name, default in defaults.items()}
    if all(value is not None and value.isdecimal() for value in given.values()):
        rank, world_size, local_rank = (int(value) for value in given.values())
        if rank < world_size:
            return rank, world_size, local_rank
    shown = ", ".join(f"{name} {'not set' if value is None else repr(value)}" for name, value in given.items())
    raise NeucoreError(
        f"the environment announces several processes, but not properly: {shown}. Ranks are whole numbers below the "
        "number of processes. Start with `torchrun --nproc_per_node=N -m lavis.train ...`; for one process unset these"
    )


def setup_logging(is_main: bool = True) -> None:
    """Messages of INFO from the main process, warnings from the others; chatty libraries from WARNING on."""
    level = logging.INFO if is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s [%(levelname)s] %(message)s", datefmt="%H:%M:%S")
    logging.getLogger().setLevel(level)
    for name in ("PIL", "matplotlib", "urllib3", "timm", "transformers", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)


def new_job_id() -> str:
    """Seconds and a random suffix, the same in every process (in the stock ten-minute bucket runs overwrite runs)."""
    import torch.distributed as dist

    box = [f"{datetime.now():%Y%m%d-%H%M%S}-{os.urandom(3).hex()}"]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


# --- main flow ----------------------------------------------------------------------------------------------------


def run(cfg_path: str | Path, options: list[str] | None = None, evaluate: bool | None = None) -> Any:
    """Train (or evaluate) what a config file describes; returns what the runner returned.

    `evaluate=True` sets run.evaluate. An evaluation takes the model from its checkpoint; what the file says of it must
    agree. The config is checked whole before data or weights are touched: `ConfigError`.
    A file whose arch, task and runner are the host's own goes the host's stock way, unchecked where it is not ours.
    """
    config.read_yaml(cfg_path)  # a missing or broken file is told before the seconds that importing the host takes
    chosen = [*config.dotlist(options), *(["run.evaluate=true"] if evaluate else [])]
    register_all()
    import torch
    from lavis.common.registry import registry

    from neucore_plugin.randomness import seed_everything

    cfg = config.load_config(cfg_path, chosen, registry_tables(), section_of)
    registry.register("configuration", cfg)
    try:
        init_distributed(cfg.run_cfg)
        setup_logging(cfg.run_cfg.rank == 0)
        seed = int(cfg.run_cfg.get("seed") or 0)
        seed_everything(seed, cfg.run_cfg.rank)
        job_id = new_job_id()
        task = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg)
        datasets = task.build_datasets(cfg)
        seed_everything(seed, cfg.run_cfg.rank)  # what was drawn so far may depend on what caches hold
        takes_datasets = "datasets" in inspect.signature(task.build_model).parameters
        model = task.build_model(cfg, datasets) if takes_datasets else task.build_model(cfg)
        if cfg.run_cfg.rank == 0:
            cfg.pretty_print()  # now that nothing is left to be refused
        runner_class = registry.get_runner_class(cfg.run_cfg.get("runner") or "runner_base")
        runner = runner_class(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)
        return runner.evaluate(skip_reload=True) if cfg.run_cfg.get("evaluate") else runner.train()
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
