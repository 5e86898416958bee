"""How this machine trains: device, precision and memory layout."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

EVALUATION_BATCH = 256
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """How this machine trains fastest: see :func:`nightpress.evaluators.training.probe`."""

    device: str = "cpu"
    bf16: bool = False
    channels_last: bool = False
    evaluation_batch: int = EVALUATION_BATCH

    def cast(self, value: Tensor) -> Tensor:
        value = value.to(self.device, non_blocking=True)
        return value.contiguous(memory_format=torch.channels_last) if self._image(value) else value

    def module(self, module: Module) -> Module:
        module = module.to(self.device)
        return module.to(memory_format=torch.channels_last) if self.channels_last else module  # type: ignore[call-overload]

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def _image(self, value: Tensor) -> bool:
        return self.channels_last and value.dim() == 4


def has_fast_bf16(device: str) -> bool:
    """Whether bf16 is worth a try. A processor without its instructions emulates it: there a training step took fifteen
    times as long as in fp32, and a probe of it more than a minute."""
    capabilities = torch.cpu.get_capabilities()
    return device != "cpu" or any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
