"""Images ordered by a model's scores: ranks, and an index over one's own pictures.

Takes any model with the methods of `encoding.RetrievalModel`. Names are imported on first use, so that importing this
package does not cost torch.
"""

from importlib import import_module
from typing import Any

_HOME = {"GalleryIndex": "index", "Hit": "index", "Failure": "encoding", "RetrievalModel": "encoding"}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
