"""Inner tensors of a network, for distillation: which ones, and how to get them without touching the network.

A network's tensors are those of its graph where it is a ``torch.fx.GraphModule`` (as compressed modules are), else
the outputs of its modules. Of each resolution the last tensor is taken: the features as they are before the next
stage, and after all blocks of their own.
"""

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .quantise import ActivationQuantiser
from .task import evaluating

MOST_TAPS = 4
OF_SEQUENCES = (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d, nn.AvgPool1d)
Tapped = Callable[[Tensor], tuple[Any, tuple[Tensor, ...]]]
"""Maps a batch of inputs to the network's output and the tapped tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """A tensor to take: a node's or module's name, and its shape without the batch axis: (channels, height, width)
    of images, (tokens, channels) of sequences."""

    name: str
    shape: tuple[int, ...]

    @property
    def resolution(self) -> tuple[int, ...]:
        """(height, width) of images, (tokens,) of sequences, () of vectors."""
        return self.shape[1:] if len(self.shape) > 2 else self.shape[:-1]

    @property
    def channels(self) -> int:
        return self.shape[0 if len(self.shape) > 2 else len(self.shape) - 1]


@torch.no_grad()
def find_taps(module: nn.Module, example: Tensor) -> tuple[Tap, ...]:
    """The last inner tensor of each resolution, in the order in which they are made; of more than four the last.

    ``example`` has shape (1, …), on the module's device. Vectors and 1×1 images have no resolution; the
    output is not an inner tensor.
    """
    with evaluating(module):
        shapes = (
            _node_shapes(module, example) if isinstance(module, fx.GraphModule) else _module_shapes(module, example)
        )
    last: dict[tuple[int, ...], Tap] = {}
    for name, shape in shapes.items():
        tap = Tap(name=name, shape=shape)
        if max(tap.resolution, default=1) > 1:
            last.pop(tap.resolution, None)
            last[tap.resolution] = tap
    return tuple(last.values())[-MOST_TAPS:]


@contextmanager
def tapped(module: nn.Module, taps: tuple[Tap, ...]) -> Generator[Tapped]:
    """The network with its taps open. Parameters, modes and state dict are the module's own; nothing stays behind."""
    names = [tap.name for tap in taps]
    if isinstance(module, fx.GraphModule):
        # The same submodules under a graph with more outputs.
        yield fx.GraphModule(module, _with_outputs(module.graph, names))
        return
    seen: dict[str, Tensor] = {}

    def call(inputs: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        output = module(inputs)
        found = tuple(_as_image(module.get_submodule(name), seen[name]) for name in names)
        seen.clear()
        return output, found

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(module.get_submodule(name).register_forward_hook(_note(seen, name)).remove)
        yield call


def _note(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        if isinstance(output, Tensor):
            seen.pop(name, None)  # a module that is called twice stands where it was last called
            seen[name] = output

    return hook


def _with_outputs(graph: fx.Graph, names: list[str]) -> fx.Graph:
    copies: dict[fx.Node, fx.Node] = {}
    wider = fx.Graph()
    output = wider.graph_copy(graph, copies)
    by_name = {node.name: copies[node] for node in graph.nodes if node.op != "output"}
    wider.output((output, tuple(by_name[name] for name in names)))
    return wider


def _node_shapes(module: fx.GraphModule, example: Tensor) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op not in ("placeholder", "output", "get_attr") and _inner(module, n) and isinstance(value, Tensor):
                shapes[n.name] = tuple(value.shape[1:])
            return value

    Shapes(module).run(example)
    return shapes


def _inner(module: fx.GraphModule, node: fx.Node) -> bool:
    """Neither the network's output nor a quantiser, whose tensor has the name of what it quantises."""
    quantiser = node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), ActivationQuantiser)
    return not quantiser and not any(user.op == "output" for user in node.users)


def _module_shapes(module: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    seen: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for name, child in module.named_modules():
            if name and not isinstance(child, ActivationQuantiser):
                hooks.callback(child.register_forward_hook(_note(seen, name)).remove)
        output = module(example)
    return {
        name: tuple(_as_image(module.get_submodule(name), value).shape[1:])
        for name, value in seen.items() if value is not output
    }  # fmt: skip


def _as_image(module: nn.Module, value: Tensor) -> Tensor:
    """What layers over sequences make, as an image of height 1: compressed networks have it so."""
    return value.unsqueeze(2) if isinstance(module, OF_SEQUENCES) and value.dim() == 3 else value
