"""Number format of the training steps (run.amp). Knows no host."""

import logging

import torch

from neucore_plugin.common.errors import ConfigError


class Precision:
    """Automatic mixed precision on `device`.

    false: float32. true: bfloat16 where the GPU has it, else float16; float32 on a CPU or on mps, with a warning. bf16:
    bfloat16, there as well. fp16: float16 with a gradient scaler, on a GPU.

    Attributes: dtype (None for float32), scaler (of gradients; it acts in float16 alone).
    Raises: ConfigError for fp16 on a CPU.
    """

    def __init__(self, amp: bool | str, device: torch.device) -> None:
        name = str(amp).lower()
        on_gpu = device.type == "cuda"
        if name == "fp16" and not on_gpu:
            raise ConfigError("run.amp: fp16 needs a CUDA GPU; elsewhere use false or bf16")
        if name == "true" and not on_gpu:
            logging.warning(
                "run.amp: true has no use on %s: training in float32 (amp: bf16 forces bfloat16)", device.type
            )
            name = "false"
        if name == "true":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        self.device_type = device.type
        self.dtype = {"false": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self) -> torch.autocast:
        """Context of a forward pass."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, scaled up where the format needs it."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, parameters: list[torch.Tensor], clip: float | None) -> None:
        """Clip the gradients' common norm to `clip`, update the weights, forget the gradients."""
        if clip is not None:
            self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
