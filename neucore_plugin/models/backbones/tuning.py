"""How an encoder is trained: not at all, in part, whole, or by low-rank adapters. Knows torch and no host."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recompute

from neucore_plugin.common.errors import ConfigError


@dataclass(frozen=True)
class Tuning:
    """Training mode of an encoder.

    Attributes:
        freeze: nothing is trained.
        train_blocks: without `freeze`, only the last blocks and what follows them; None means everything.
        layer_decay: learning rate of a block over that of the next one; what comes before the first counts as one.
        checkpoint_activations: the blocks' activations are computed again in the backward pass.
        lora: {"rank", "alpha", "dropout"} of low-rank adapters (Hu et al., 2022), which alone are trained then.
    """

    freeze: bool = True
    train_blocks: int | None = None
    layer_decay: float = 1.0
    checkpoint_activations: bool = False
    lora: dict[str, Any] | None = None

    @classmethod
    def taken_from(cls, settings: dict[str, Any]) -> "Tuning":
        """Take our keys out of an encoder's section."""
        return cls(**{field.name: settings.pop(field.name) for field in fields(cls) if field.name in settings})

    def apply(self, encoder: nn.Module, setting: str) -> None:
        """Set what is trained; raises ConfigError for what this encoder cannot do (`setting` names it)."""
        blocks = list(getattr(encoder, "blocks", ()))
        if self.freeze:
            if self.lora is not None:  # trained in an earlier phase
                add_adapters(encoder, blocks, self.lora, setting)
            encoder.requires_grad_(False)
            return
        special = [name for name in ("train_blocks", "lora") if getattr(self, name) is not None]
        special += ["layer_decay"] * (self.layer_decay != 1.0)
        special += ["checkpoint_activations"] * self.checkpoint_activations
        if special and not blocks:
            raise ConfigError(f"{setting}: {', '.join(special)} cannot be had: this encoder has no blocks to name")
        if self.lora is not None:
            add_adapters(encoder, blocks, self.lora, setting)
        elif self.train_blocks is not None:
            if self.train_blocks > len(blocks):
                raise ConfigError(f"{setting}.train_blocks is {self.train_blocks}; the encoder has {len(blocks)}")
            encoder.requires_grad_(False)
            for part in (*blocks[-self.train_blocks :], *getattr(encoder, "tail", ())):
                part.requires_grad_(True)
            for parameter in getattr(encoder, "idle", ()):
                parameter.requires_grad_(False)
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            raise ConfigError(f"{setting}.freeze is false, but the encoder has nothing that could be trained")
        if self.checkpoint_activations:
            if any(isinstance(part, _BatchNorm) for block in blocks for part in block.modules()):
                raise ConfigError(
                    f"{setting}.checkpoint_activations: this encoder has batch norms, whose statistics would count "
                    "each batch twice; set it to false"
                )
            for block in blocks:
                if not isinstance(block.forward, _Recomputed):  # else shared with the other side, which did it
                    block.forward = _Recomputed(block.forward)


class _Recomputed:
    """A block's forward whose inner activations are not kept for the backward pass."""

    def __init__(self, forward: Any) -> None:
        functools.update_wrapper(self, forward)
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.forward.__self__
        if not module.training or not any(parameter.requires_grad for parameter in module.parameters()):
            return self.forward(*args, **kwargs)
        return recompute(self.forward, *args, use_reentrant=False, **kwargs)


def add_adapters(encoder: nn.Module, blocks: Iterable[nn.Module], lora: dict[str, Any], setting: str) -> None:
    """Freeze the encoder and put low-rank adapters beside the `lora_targets` of its blocks, with `peft`."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"{setting}.lora needs peft ({error}); run: pip install 'neucore-plugin[lora]', or set lora: null"
        ) from error
    targets = list(encoder.lora_targets)
    if not targets:
        raise ConfigError(f"{setting}.lora: this encoder has no linear layers for adapters; use train_blocks")
    encoder.requires_grad_(False)
    for block in blocks:
        if any("lora_" in name for name, _ in block.named_parameters()):  # shared with the other side, which did it
            for name, parameter in block.named_parameters():
                parameter.requires_grad_("lora_" in name)
            continue
        config = LoraConfig(
            r=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=targets
        )
        inject_adapter_in_model(config, block)


def settle_modes(encoder: nn.Module, frozen: bool) -> None:
    """Put into eval mode what holds no trained parameter; parts without parameters (dropout) follow their owner.

    Batch norms of an encoder with `moving_norms` stay as they are.
    """
    own = list(encoder.parameters())
    frozen = not any(parameter.requires_grad for parameter in own) if own else frozen
    if frozen:
        norms = getattr(encoder, "moving_norms", False)
        kept = [part for part in encoder.modules() if norms and isinstance(part, _BatchNorm) and part.training]
        encoder.eval()
        for part in kept:
            part.train()
        return
    for child in encoder.children():
        settle_modes(child, frozen)


def rate_scales(encoder: nn.Module, decay: float) -> Iterator[tuple[nn.Parameter, float]]:
    """Each trained parameter with the factor on its learning rate: decay ** (blocks from the end)."""
    scale_of: dict[int, float] = {}
    blocks = list(getattr(encoder, "blocks", ()))
    for place, block in enumerate(reversed(blocks)):
        scale_of |= {id(parameter): decay ** (place + 1) for parameter in block.parameters()}
    for part in getattr(encoder, "tail", ()):
        members: Iterable[Tensor] = part.parameters() if isinstance(part, nn.Module) else [part]
        scale_of |= {id(parameter): 1.0 for parameter in members}
    before = decay ** (len(blocks) + 1)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            yield parameter, scale_of.get(id(parameter), before)


def named_groups(backbone: Any, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """See `CirModel.parameter_groups`; parameters: all of the model's."""
    groups: dict[tuple[str, float], list] = {}
    taken: set[int] = set()
    for side, tuning in backbone.tuning.items():
        for parameter, scale in rate_scales(getattr(backbone, side), tuning.layer_decay):
            if id(parameter) not in taken:  # both sides may be one model
                groups.setdefault((f"backbone_{side}", scale), []).append(parameter)
                taken.add(id(parameter))
    head = [p for p in parameters if p.requires_grad and id(p) not in taken]
    groups[("head", 1.0)] = head
    return [{"name": name, "lr_scale": scale, "params": part} for (name, scale), part in groups.items() if part]
