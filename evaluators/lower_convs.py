"""Lowering of what is exactly a convolution over images, written otherwise. It gets weights of its own under a new name
(``….as_conv``), and is pruned, quantised and priced like any other."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .capture import CONSTANT, Captured, scope_of
from .lowering import Lowering
from .nodes import arguments, module_of, pair, shape_of, target_name, unsupported

log = logging.getLogger("nightpress")
CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_POINTWISE = {"kernel": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
_BY_PADDING = frozenset({torch.ops.aten.conv1d.padding, torch.ops.aten.conv2d.padding})


def beside(value: Any, height: int) -> tuple[int, int]:
    """An extent along a sequence as one over an image of height 1."""
    return height, int(value if isinstance(value, int) else value[0])


def conv_attrs(node: fx.Node, given: Mapping[str, Any], kernel: tuple[int, ...]) -> dict[str, Any]:
    """The attributes of a convolution over images. That of a sequence moves along the second axis alone."""
    sequence = target_name(node) == "conv1d"

    def extents(value: Any, height: int) -> tuple[int, int]:
        return beside(value, height) if sequence else pair(value)

    dilation = extents(given.get("dilation", 1), 1)
    attrs: dict[str, Any] = {
        "kernel": kernel, "stride": extents(given.get("stride", 1), 1), "dilation": dilation,
        "groups": int(given.get("groups", 1)),
    }  # fmt: skip
    padding = given.get("padding", "valid" if node.target in _BY_PADDING else 0)
    if padding == "same":  # of an even kernel torch pads more behind than before
        whole = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
        attrs["padding"] = tuple(total // 2 for total in whole)
        if any(total % 2 for total in whole):
            attrs["padding_behind"] = tuple(total - total // 2 for total in whole)
    else:
        attrs["padding"] = (0, 0) if padding == "valid" else extents(padding, 0)
    return attrs


class ConvLowering(Lowering):
    """Shortcuts that pad channels, transposed convolutions, convolutions over sequences."""

    def __init__(self, captured: Captured) -> None:
        super().__init__(captured)
        self._as_convs: dict[tuple[str, str, str | None], tuple[str, dict[str, str]]] = {}
        self._of_entries: dict[tuple[str, str], str] = {}

    def _padded_shortcut(self, node: fx.Node, source: fx.Node, before: int) -> None:
        """Every n-th pixel with channels of zeros around it (the option-A shortcut of He et al. 2016): exactly a 1×1
        convolution with a stride and a frozen identity, which can be pruned and quantised like any other."""
        stride, reader = [1, 1], source
        while target_name(reader) in {"slice", "alias"} and reader.op == "call_function":
            given = arguments(reader, ("input", "dim", "start", "end", "step"))
            inner, outer = shape_of(given["input"])[0], shape_of(reader)[0]
            axis, step = int(given.get("dim", 0)) % 4, int(given.get("step", 1))
            if inner != outer:
                if axis < 2 or int(given.get("start") or 0) != 0 or outer[axis] != -(-inner[axis] // step):
                    break
                stride[axis - 2] *= step
            reader = given["input"]
        wide, narrow = shape_of(node)[0][1], shape_of(reader)[0][1]
        weight = torch.zeros(wide, narrow, 1, 1)
        weight[torch.arange(narrow) + before, torch.arange(narrow)] = 1.0
        module = self._as_conv(scope_of(node))
        self.captured.state[f"{module}.weight"] = weight
        self.captured.renamed[f"{module}.weight"] = CONSTANT + module
        attrs = {**_POINTWISE, "stride": tuple(stride)}
        self._emit(node, "conv", (reader,), name=module, module=module,
                  params={"weight": f"{module}.weight"}, attrs=attrs)  # fmt: skip

    def _conv_transpose2d(self, node: fx.Node) -> None:
        """Where the kernel is as large as its step no two outputs meet: exactly a 1×1 convolution that makes all pixels
        of a window as channels, dealt out afterwards. It can be pruned and quantised like any other."""
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
        given = arguments(node, names)
        entry = self._weights(node, given["weight"])
        weight = self.captured.state[entry]
        kernel = tuple(weight.shape[2:])
        apart = any(pair(given.get(name, 0)) != (0, 0) for name in ("padding", "output_padding"))
        apart |= pair(given.get("dilation", 1)) != (1, 1)
        if int(given.get("groups", 1)) != 1:
            raise unsupported(node, "a transposed convolution in groups")
        if apart or kernel[0] != kernel[1] or pair(given.get("stride", 1)) != kernel:
            raise unsupported(node, "a transposed convolution whose kernel is not its stride")
        factor = kernel[0]
        module, params = self._rewritten(
            node, entry, self._state(given.get("bias")), lambda w: w.permute(1, 2, 3, 0).flatten(0, 2)[..., None, None],
            lambda b: b.repeat_interleave(factor**2),
        )  # fmt: skip
        count, _, rows, columns = shape_of(given["input"])[0]
        made = self._before(
            node, "conv", (given["input"],), (count, weight.shape[1] * factor**2, rows, columns), name=module,
            module=module, params=params, attrs={**_POINTWISE, "stride": (1, 1)},
        )  # fmt: skip
        self._emit(node, "pixel_shuffle", (made,), attrs={"factor": factor})

    def _conv1d(self, node: fx.Node) -> None:
        """A convolution over an image of height 1: the runtime has better kernels for those, and all that follows them
        is shared."""
        given = arguments(node, CONV)
        entry = self._weights(node, given["weight"])
        kernel = (1, int(self.captured.state[entry].shape[2]))
        module, params = self._rewritten(
            node, entry, self._state(given.get("bias")), lambda w: w[:, :, None], lambda b: b
        )
        attrs = conv_attrs(node, given, kernel)
        self._emit(node, "conv", (given["input"],), name=module, module=module, params=params, attrs=attrs, image=True)

    def _rewritten(
        self, node: fx.Node, weight: str, bias: str | None, change: Callable[[Tensor], Tensor],
        change_bias: Callable[[Tensor], Tensor],
    ) -> tuple[str, dict[str, str]]:  # fmt: skip
        """Name and state of the convolution that stands for another layer; the same each time that it is used. Layers
        that share a weight share what is made of it."""
        kind = target_name(node)
        if (kind, weight, bias) not in self._as_convs:
            module = self._as_conv(module_of(weight))
            params = {"weight": self._changed(kind, weight, f"{module}.weight", change)}
            if bias is not None:
                params["bias"] = self._changed(kind, bias, f"{module}.bias", change_bias)
            self._as_convs[kind, weight, bias] = module, params
            self._warn_of_other_uses(kind, weight)
        return self._as_convs[kind, weight, bias]

    def _changed(self, kind: str, source: str, entry: str, change: Callable[[Tensor], Tensor]) -> str:
        """The entry that holds what was made of another, a new one where nobody has made it."""
        known = self._of_entries.setdefault((kind, source), entry)
        if known == entry:
            self.captured.state[entry] = change(self.captured.state[source]).contiguous()
            self._readers[entry] = self._readers[source]
            if source in self.captured.frozen:
                self.captured.renamed[entry] = CONSTANT + entry
        return known

    def _warn_of_other_uses(self, kind: str, weight: str) -> None:
        names = self.captured.names
        readers = (n for n in self.captured.nodes if any(names.get(s.name) == weight for s in n.all_input_nodes))
        others = sorted({target_name(reader) for reader in readers} - {kind})
        if others:
            log.warning(
                "%s is read by %s and by %s, which gets a copy of its own: the two are no longer tied",
                weight, ", ".join(others), kind,
            )  # fmt: skip

    def _as_conv(self, scope: str) -> str:
        """The name of a convolution that the model has not."""
        if scope in self.captured.state:  # a parameter of the model itself
            scope += "_"
        module = f"{scope}.as_conv".lstrip(".")
        while f"{module}.weight" in self.captured.state or any(module == taken for taken, _ in self._as_convs.values()):
            module += "_"
        return module
