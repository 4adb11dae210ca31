"""Batch norm's running statistics: the one state that a forward pass of training changes. Knows no host."""

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the norms whose statistics training moves: neither frozen nor without statistics."""
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            own = list(module.parameters())
            if not own or any(parameter.requires_grad for parameter in own):
                yield name, module


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """{name: mean, variance or count} of the `batch_norms`; the tensors that the model holds, not copies."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in batch_norms(model)
        for name, buffer in module.named_buffers(recurse=False)
    }
