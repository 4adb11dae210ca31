"""Gradient caching: a contrastive loss over a large batch in the memory of a small one. Knows no host.

The batch is encoded in chunks whose activations are not kept; the loss is taken on all encodings together; each chunk
is then encoded again with its activations, and the loss's gradients of its encodings go through it. One more forward
pass buys memory that grows with the chunk, not with the batch. Losses and gradients are those of the plain step.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021. The two
passes over a chunk are those of `torch.utils.checkpoint`, which runs the second within the backward pass. So autocast,
gradient scaling, accumulation and the averaging over processes work as in the plain step.

B batch.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neucore_plugin.common.errors import ConfigError, DataError
from neucore_plugin.training.batch_norm import batch_norms, running_statistics


class GradCache(nn.Module):
    """`model`, called on a batch of samples, with at most `chunk` pairs' activations in memory at a time.

    The model has `encode_pairs(samples) -> {name: tensor [B,...]}`, each row from its own pair alone, and
    `losses(encodings, samples) -> {"loss": scalar, ...}`. Both passes over a chunk draw the same from torch's
    generators (dropout). Batch norm that is trained sees a chunk, not the batch: a warning says so.

    Raises: ConfigError for a model without these two methods.
    """

    def __init__(self, model: nn.Module, chunk: int) -> None:
        super().__init__()
        lacking = [name for name in ("encode_pairs", "losses") if not callable(getattr(model, name, None))]
        if lacking:
            raise ConfigError(
                f"run.grad_cache_chunk is {chunk}, but {type(model).__name__} has no {' and no '.join(lacking)}, which "
                "gradient caching needs; set it to null, and run.accum_grad_iters for fewer pairs at a time"
            )
        norms = [name for name, _ in batch_norms(model)]
        if norms:
            logging.warning(
                "run.grad_cache_chunk: %s and %d other batch norms take their statistics from chunks of %d pairs, not "
                "from the whole batch; a frozen encoder's are fixed",
                norms[0],
                len(norms) - 1,
                chunk,
            )
        self.model, self.chunk = model, chunk

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """The model's losses of a batch."""
        size = rows(samples)
        if size <= self.chunk:
            return self.model(samples)
        anchor = next(self.model.parameters())
        parts = [
            checkpoint(self._encode, part, anchor, use_reentrant=False, context_fn=self._contexts)
            for part in chunks(samples, size, self.chunk)
        ]
        return self.model.losses({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, samples)

    def _encode(self, part: Mapping[str, Any], anchor: Tensor) -> dict[str, Tensor]:
        # `anchor` tells torch of the device whose generator it has to restore: samples may lie on the CPU still.
        return self.model.encode_pairs(part)

    def _contexts(self) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        return contextlib.nullcontext(), self._statistics_kept()

    @contextlib.contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """Running statistics have moved in the first pass: not again in the second."""
        before = [(value, value.clone()) for value in running_statistics(self.model).values()]
        try:
            yield
        finally:
            with torch.no_grad():
                for value, kept in before:
                    value.copy_(kept)


def rows(samples: Mapping[str, Any]) -> int:
    """B, the length of every tensor and list of a batch. Raises DataError where they differ."""
    lengths = {name: len(value) for name, value in samples.items() if _has_rows(value)}
    if len(set(lengths.values())) != 1:
        raise DataError(f"the parts of a batch must have one row a pair to be encoded in chunks; given rows: {lengths}")
    return next(iter(lengths.values()))


def chunks(samples: Mapping[str, Any], size: int, chunk: int) -> Iterator[dict[str, Any]]:
    """The batch's rows in parts of at most `chunk`; what has no rows is in each of them."""
    for start in range(0, size, chunk):
        yield {name: value[start : start + chunk] if _has_rows(value) else value for name, value in samples.items()}


def _has_rows(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, Tensor) and value.ndim > 0)
