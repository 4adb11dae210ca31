"""The main flow of a run: config -> processes -> task -> data -> model -> runner."""

import inspect
import logging
import multiprocessing
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from neucore_plugin.common import distributed
from neucore_plugin.common.randomness import seed_everything
from neucore_plugin.config import loading
from neucore_plugin.config.published import SPLITS
from neucore_plugin.config.sections import Tables
from neucore_plugin.host.registration import register_all
from neucore_plugin.weights.trust import section_of


def run(
    cfg_path: str | Path,
    options: loading.Options | None = None,
    evaluate: bool = False,
    started: Callable[[Any], None] | None = None,
) -> Any:
    """Train (or evaluate) what a config file describes; returns what the runner returned.

    `evaluate` sets run.evaluate; `started` is given the runner before it begins. An evaluation takes the model from its
    checkpoint; what the file says of it must agree. The config is checked whole before data or weights are touched:
    `ConfigError`.
    A file whose arch, task and runner are the host's own goes the host's stock way, unchecked where it is not ours.
    """
    try:
        cfg, task = prepared(cfg_path, [*loading.dotlist(options), *([("run.evaluate", True)] if evaluate else [])])
        from lavis.common.registry import registry

        job_id = new_job_id()
        datasets = task.build_datasets(cfg)
        _seed(cfg)  # what was drawn so far may depend on what caches hold
        takes_datasets = "datasets" in inspect.signature(task.build_model).parameters
        model = task.build_model(cfg, datasets) if takes_datasets else task.build_model(cfg)
        if cfg.run_cfg.rank == 0:
            cfg.pretty_print()  # now that nothing is left to be refused
        runner_class = registry.get_runner_class(cfg.run_cfg.get("runner") or "runner_base")
        runner = runner_class(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)
        if started:
            started(runner)
        return runner.evaluate(skip_reload=True) if cfg.run_cfg.get("evaluate") else runner.train()
    finally:
        distributed.leave()


def prepared(cfg_path: str | Path, options: loading.Options | None = None) -> tuple[loading.Config, Any]:
    """(the checked config, its task): the host is imported, the processes have met, log and seeds are set."""
    loading.read_yaml(cfg_path)  # a missing or broken file is told before the seconds that importing the host takes
    register_all()
    # Where a server forks the loaders' workers (Python 3.14's default), it imports the host once, not each of them.
    multiprocessing.set_forkserver_preload(["__main__", "neucore_plugin.task"])
    from lavis.common.registry import registry

    cfg = loading.load_config(cfg_path, options, registry_tables(), section_of)
    registry.register("configuration", cfg)
    distributed.init_distributed(cfg.run_cfg)
    setup_logging(cfg.run_cfg.rank == 0)
    _seed(cfg)
    return cfg, registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg)


def _seed(cfg: loading.Config) -> None:
    seed_everything(int(cfg.run_cfg.get("seed") or 0), cfg.run_cfg.rank)


def registry_tables() -> Tables:
    """What the host's registry knows, for the checks of a config: names, default files, splits."""
    from lavis.common.registry import registry
    from lavis.common.utils import get_abs_path

    from neucore_plugin.models.backbones import own_pixels

    def files(kind: str, attribute: str) -> dict[str, dict[str, str]]:
        found = {}
        for name, cls in registry.mapping[f"{kind}_name_mapping"].items():
            table = getattr(cls, attribute, None) or {}
            found[name] = {key: get_abs_path(path) for key, path in table.items()}
        return found

    builders = registry.mapping["builder_name_mapping"]
    splits = {name: tuple(cls.splits) for name, cls in builders.items() if getattr(cls, "splits", None)}
    return Tables(
        models=files("model", "PRETRAINED_MODEL_CONFIG_DICT"),
        datasets=files("builder", "DATASET_CONFIG_DICT"),
        splits={**SPLITS, **splits},
        tasks=tuple(registry.list_tasks()),
        runners=tuple(registry.list_runners()),
        processors=tuple(registry.list_processors()),
        own_pixels=own_pixels,
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
    return distributed.on_main(lambda: f"{datetime.now():%Y%m%d-%H%M%S}-{os.urandom(3).hex()}")
