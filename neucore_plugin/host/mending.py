"""What is mended in the host, in place. Nothing here imports lavis before a function needs it."""

import inspect
import os
from typing import Any

from neucore_plugin.common.files import cache_dir

STOCK_CACHE_ROOT = "/export/home/.cache/lavis"


def extend_zoos() -> None:
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


def mend_host() -> None:
    """Give `load_model` a default type, the cache a place of the user's, the host's meters their sums without CUDA."""
    import torch
    import torch.distributed as dist
    from lavis import models
    from lavis.common import dist_utils, logger
    from lavis.common.registry import registry

    # `load_model("neucore")`: the host demands a model type. In place, so that references imported earlier have it too.
    for function in (models.load_model, models.load_model_and_preprocess):
        if inspect.signature(function).parameters["model_type"].default is inspect.Parameter.empty:
            function.__defaults__ = (None, *function.__defaults__)

    # The stock cache folder is one of the host's makers; `register_path` refuses to change it.
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
