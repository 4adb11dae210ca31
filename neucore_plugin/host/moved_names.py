"""Names of transformers that the host imports from where they no longer are; lent there while the host is imported.

The host's lines: `from transformers.modeling_utils import apply_chunking_to_forward, find_pruneable_heads_and_indices,
prune_linear_layer` (models/med.py, blip2_models/Qformer.py, blip_models/nlvr_encoder.py), moved to `pytorch_utils`, and
`from transformers.pytorch_utils import find_pruneable_heads_and_indices` and
`from transformers.utils.model_parallel_utils import ...` (blip2_models/modeling_t5.py), both gone from transformers 5.
Under the transformers that the host asks for nothing is lent.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NoReturn

from neucore_plugin.common.errors import NeucoreError

MOVED = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")
DROPPED_MODULE = "transformers.utils.model_parallel_utils"
OF_DROPPED_MODULE = ("assert_device_map", "get_device_map")


@contextlib.contextmanager
def lent_names() -> Iterator[None]:
    """While this is open, transformers has the names where the host looks for them."""
    from transformers import modeling_utils, pytorch_utils

    lent: list[tuple[ModuleType, str]] = []

    def lend(module: ModuleType, name: str, value: Any) -> None:
        if not hasattr(module, name):
            setattr(module, name, value)
            lent.append((module, name))

    for name in MOVED:
        lend(pytorch_utils, name, _dropped(name))
        lend(modeling_utils, name, getattr(pytorch_utils, name))
    try:
        importlib.import_module(DROPPED_MODULE)
        placed = False
    except ModuleNotFoundError:
        sys.modules[DROPPED_MODULE] = module = ModuleType(DROPPED_MODULE)
        for name in OF_DROPPED_MODULE:
            setattr(module, name, _dropped(name))
        placed = True
    try:
        yield
    finally:
        for module, name in lent:
            delattr(module, name)
        if placed:
            del sys.modules[DROPPED_MODULE]


def _dropped(name: str) -> Any:
    def gone(*args: Any, **kwargs: Any) -> NoReturn:
        raise NeucoreError(f"{name} is in no transformers of today; it needs: pip install 'transformers<5'")

    return gone
