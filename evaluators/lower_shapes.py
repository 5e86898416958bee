"""Lowering of what moves, cuts, joins, pools and resizes tensors."""

from typing import Any

import torch
from torch import fx

from .capture import CONSTANT, scope_of
from .lowering import Lowering
from .nodes import arguments, dims, module_of, pair, plain_argument, shape_of, target_name, unsupported

PADDING = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
"""Ways to pad, and what ONNX calls them."""
BROADCASTING = frozenset({"add", "sub", "mul", "div", "maximum", "minimum"})
_POINTWISE = {"kernel": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
_POOLS = {
    "max_pool2d": ("kernel", "stride", "padding", "dilation", "ceil"),
    "avg_pool2d": ("kernel", "stride", "padding", "ceil", "count_include_pad", "divisor"),
}


class ShapeLowering(Lowering):
    """The operations that compute nothing new, or only means and maxima."""

    # Channels and positions

    def _cat(self, node: fx.Node) -> None:
        joined: Any = node.args[0]
        self._put(node, "cat", joined, attrs={"axis": int(plain_argument(node, "dim", 1, 0)) % len(shape_of(node)[0])})

    def _slice(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "dim", "start", "end", "step"))
        source = shape_of(given["input"])[0]
        axis = int(given.get("dim", 0)) % len(source)
        if shape_of(node)[0] == source:
            self.alias[node.name] = self._input(given["input"])
            return
        start, step = given.get("start"), int(given.get("step", 1))
        start = max(0, int(start) + source[axis]) if start is not None and int(start) < 0 else int(start or 0)
        self._put(node, "slice", (given["input"],), attrs={"axis": axis, "start": start, "step": step})

    def _narrow(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "dim", "start", "length"))
        attrs = {"axis": int(given["dim"]) % len(shape_of(node)[0]), "start": int(given["start"]), "step": 1}
        self._put(node, "slice", (given["input"],), attrs=attrs)

    def _select(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "dim", "index"))
        self._pick(node, given["input"], int(given["dim"]), int(given["index"]))

    def _pick(self, node: fx.Node, source: fx.Node, axis: int, index: int) -> None:
        shape = shape_of(source)[0]
        axis %= len(shape)
        self._put(node, "select", (source,), attrs={"axis": axis, "index": index % shape[axis]})

    def _getitem(self, node: fx.Node) -> None:
        """One part of a chunk, split or unbind."""
        whole, number = node.args
        if not isinstance(whole, fx.Node) or not isinstance(number, int):
            raise unsupported(node)
        source: Any = whole.args[0]
        if target_name(whole) in {"max", "adaptive_max_pool2d"} and number == 0:  # the second part are their places
            self._largest(node, whole)
            return
        axis = int(plain_argument(whole, "dim", 1 if target_name(whole) == "unbind" else 2, 0))
        if target_name(whole) == "unbind":
            self._pick(node, source, axis, number)
            return
        if target_name(whole) not in {"chunk", "split", "split_with_sizes"}:
            raise unsupported(whole)
        axis %= len(shape_of(source)[0])
        sizes = [dims(part)[0][axis] for part in whole.meta["val"]]
        attrs = {"axis": axis, "start": sum(sizes[:number]), "step": 1}
        self._put(node, "slice", (source,), attrs=attrs)

    def _stack(self, node: fx.Node) -> None:
        """Each tensor with an axis of one more, joined along it."""
        shape, _ = shape_of(node)
        axis = int(plain_argument(node, "dim", 1, 0)) % len(shape)
        parts: Any = node.args[0]
        one = (*shape[:axis], 1, *shape[axis + 1 :])
        if axis == 0 or any(dims(part.meta["val"])[1] != 0 for part in parts):
            raise unsupported(node, "a stack along the batch")
        self._put(node, "cat", [self._before(node, "reshape", (part,), one) for part in parts], attrs={"axis": axis})

    def _channel_shuffle(self, node: fx.Node) -> None:
        shape = shape_of(node)[0]
        groups = int(arguments(node, ("input", "groups"))["groups"])
        apart = (shape[0], groups, shape[1] // groups, *shape[2:])
        order = (0, 2, 1, *range(3, len(apart)))
        turned = self._before(
            node, "permute", (self._before(node, "reshape", (node.args[0],), apart),),
            tuple(apart[i] for i in order), attrs={"order": order},
        )  # fmt: skip
        self._put(node, "reshape", (turned,))

    def _pixel_shuffle(self, node: fx.Node) -> None:
        attrs = {"factor": int(arguments(node, ("input", "factor"))["factor"])}
        self._put(node, "pixel_shuffle", (node.args[0],), attrs=attrs)

    def _reshaped(self, node: fx.Node) -> None:
        if shape_of(node) == shape_of(node.args[0]):
            self.alias[node.name] = self._input(node.args[0])
            return
        shape, axis = shape_of(node)
        flat = len(shape) == 2 and axis == 0 and shape[0] == 1 and shape_of(node.args[0])[1] == 0
        self._put(node, "flatten" if flat else "reshape", (node.args[0],))

    def _permute(self, node: fx.Node) -> None:
        order: Any = node.args[1]
        self._put(node, "permute", (node.args[0],), attrs={"order": tuple(int(i) % len(order) for i in order)})

    def _transpose(self, node: fx.Node) -> None:
        order = list(range(len(shape_of(node)[0])))
        one, other = (int(i) % len(order) for i in node.args[1:3])  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
        self._put(node, "permute", (node.args[0],), attrs={"order": tuple(order)})

    def _expand(self, node: fx.Node) -> None:
        if shape_of(node) == shape_of(node.args[0]) or all(_broadcasts(user, node) for user in node.users):
            self.alias[node.name] = self._input(node.args[0])
            return
        self._put(node, "expand", (node.args[0],))

    _expand_as = _expand

    def _roll(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "shifts", "dims"))
        if len(given.get("dims", ())) != len(given["shifts"]):
            raise unsupported(node, "roll over all axes at once")
        count = len(shape_of(node)[0])
        attrs = {"shifts": tuple(int(s) for s in given["shifts"]), "axes": tuple(int(d) % count for d in given["dims"])}
        self._put(node, "roll", (given["input"],), attrs=attrs)

    def _pad(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "pad", "mode", "value"))
        amounts = [int(a) for a in given["pad"]]
        mode = given.get("mode", "constant")
        if mode not in PADDING:
            raise unsupported(node, f"padding by {mode!r}")
        if given.get("value") not in (None, 0, 0.0):
            raise unsupported(node, f"padding with {given['value']}")
        if not any(amounts):
            self.alias[node.name] = self._input(given["input"])
            return
        rank = len(shape_of(node)[0])
        before, after = [0] * rank, [0] * rank
        for i, (low, high) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
            before[rank - 1 - i], after[rank - 1 - i] = low, high
        channels_only = before[0] == after[0] == 0 and not any(before[2:] + after[2:])
        if mode == "constant" and rank == 4 and (before[1] or after[1]) and channels_only:
            self._padded_shortcut(node, given["input"], before[1])
            return
        attrs = {"before": tuple(before), "after": tuple(after), "mode": mode}
        self._put(node, "pad", (given["input"],), attrs=attrs)

    _constant_pad_nd = _pad

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
        self._put(node, "conv", (reader,), name=module, module=module,
                  params={"weight": f"{module}.weight"}, attrs=attrs)  # fmt: skip

    def _conv_transpose2d(self, node: fx.Node) -> None:
        """Where the kernel is as large as its step no two outputs meet: exactly a 1×1 convolution that makes all pixels
        of a window as channels, dealt out afterwards. It can be pruned and quantised like any other."""
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
        given = arguments(node, names)
        entry = self._weights(node, given["weight"])
        weight = self.captured.state[entry]
        kernel = tuple(weight.shape[2:])
        padded = any(pair(given.get(name, 0)) != (0, 0) for name in ("padding", "output_padding"))
        if int(given.get("groups", 1)) != 1:
            raise unsupported(node, "a transposed convolution in groups")
        if padded or kernel[0] != kernel[1] or pair(given.get("stride", 1)) != kernel:
            raise unsupported(node, "a transposed convolution whose kernel is not its stride")
        module, params = self._dealt(entry, self._state(given.get("bias")), kernel[0])
        rows, columns = shape_of(given["input"])[0][2:]
        made = self._before(
            node, "conv", (given["input"],), (1, weight.shape[1] * kernel[0] ** 2, rows, columns), name=module,
            module=module, params=params, attrs={**_POINTWISE, "stride": (1, 1)},
        )  # fmt: skip
        self._put(node, "pixel_shuffle", (made,), attrs={"factor": kernel[0]})

    def _dealt(self, weight: str, bias: str | None, factor: int) -> tuple[str, dict[str, str]]:
        """Name and state of the 1×1 convolution that stands for a transposed one; the same each time it is used."""
        if (weight, bias) not in self._as_convs:
            module = self._as_conv(module_of(weight))
            tensors = {
                "weight": (weight, self.captured.state[weight].permute(1, 2, 3, 0).flatten(0, 2)[..., None, None])
            }
            if bias is not None:
                tensors["bias"] = (bias, self.captured.state[bias].repeat_interleave(factor**2))
            for role, (source, value) in tensors.items():
                self.captured.state[f"{module}.{role}"] = value.contiguous()
                if source in self.captured.frozen:
                    self.captured.renamed[f"{module}.{role}"] = CONSTANT + f"{module}.{role}"
            self._as_convs[weight, bias] = module, {role: f"{module}.{role}" for role in tensors}
        return self._as_convs[weight, bias]

    def _as_conv(self, scope: str) -> str:
        """The name of a convolution that the model has not."""
        module = f"{scope}.as_conv".lstrip(".")
        while f"{module}.weight" in self.captured.state:
            module += "_"
        return module

    # Pooling and resizing

    def _pool(self, node: fx.Node, kind: str) -> None:
        given = arguments(node, ("input", *_POOLS[kind]))
        if pair(given.get("dilation", 1)) != (1, 1) or given.get("divisor") is not None:
            raise unsupported(node, f"{kind} with dilation or a divisor")
        attrs: dict[str, Any] = {
            "kernel": pair(given["kernel"]), "stride": pair(given.get("stride") or given["kernel"]),
            "padding": pair(given.get("padding", 0)), "ceil": int(given.get("ceil", False)),
        }  # fmt: skip
        if kind == "avg_pool2d":
            attrs["count_include_pad"] = int(given.get("count_include_pad", True))
        self._put(node, kind.removesuffix("2d"), (given["input"],), attrs=attrs)

    def _adaptive_avg_pool2d(self, node: fx.Node) -> None:
        """Adaptive pooling to 1×1 is a global pool; to the size that is there already, nothing."""
        source: Any = node.args[0]
        before, after = shape_of(source)[0], shape_of(node)[0]
        if before == after and after[2:] != (1, 1):
            self.alias[node.name] = self._input(source)
        elif after[2:] == (1, 1):
            self._put(node, "global_pool", (source,))
        elif (kernel := _window(before, after)) is not None:
            attrs = {"kernel": kernel, "stride": kernel, "padding": (0, 0), "ceil": 0, "count_include_pad": 1}
            self._put(node, "avg_pool", (source,), attrs=attrs)
        else:
            raise unsupported(node, f"adaptive pooling from {before[2:]} to {after[2:]}")

    def _mean(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "dims", "keepdim"))
        source = given["input"]
        axes = _axes(node, source, given.get("dims"), "a mean")
        keepdim, shape = bool(given.get("keepdim", False)), shape_of(source)[0]
        if len(shape) != 4 or axes != (2, 3):
            self._put(node, "mean", (source,), attrs={"axes": axes, "keepdim": keepdim})
        elif keepdim:
            self._put(node, "global_pool", (source,))
        else:
            self._put(node, "flatten", (self._before(node, "global_pool", (source,), (*shape[:2], 1, 1)),))

    def _sum(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "dims", "keepdim"))
        self._reduced(node, "sum", given["input"], given.get("dims"), bool(given.get("keepdim", False)))

    def _amax(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "dims", "keepdim"))
        self._reduced(node, "amax", given["input"], given.get("dims"), bool(given.get("keepdim", False)))

    def _linalg_vector_norm(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "ord", "dims", "keepdim"))
        if given.get("ord", 2) != 2:
            raise unsupported(node, f"a vector norm of order {given['ord']}")
        self._reduced(node, "l2_norm", given["input"], given.get("dims"), bool(given.get("keepdim", False)))

    def _reduced(self, node: fx.Node, kind: str, source: fx.Node, dims: Any, keepdim: bool) -> None:
        attrs = {"axes": _axes(node, source, dims, f"a{'n' * (kind == 'amax')} {kind}"), "keepdim": keepdim}
        self._put(node, kind, (source,), attrs=attrs)

    def _largest(self, node: fx.Node, whole: fx.Node) -> None:
        source: Any = whole.args[0]
        if target_name(whole) == "max":
            given = arguments(whole, ("input", "dim", "keepdim"))
            self._reduced(node, "amax", source, given["dim"], bool(given.get("keepdim", False)))
            return
        before, after = shape_of(source)[0], shape_of(node)[0]
        if after[2:] == (1, 1):
            self._reduced(node, "amax", source, (2, 3), True)
            return
        kernel = _window(before, after)
        if kernel is None:
            raise unsupported(whole, f"adaptive pooling from {before[2:]} to {after[2:]}")
        self._put(node, "max_pool", (source,), attrs={"kernel": kernel, "stride": kernel, "padding": (0, 0), "ceil": 0})

    def _upsample_nearest2d(self, node: fx.Node) -> None:
        self._resize(node, "nearest", None)

    def _upsample_bilinear2d(self, node: fx.Node) -> None:
        self._resize(node, "linear", bool(arguments(node, ("input", "size", "align_corners"))["align_corners"]))

    def _resize(self, node: fx.Node, mode: str, align_corners: bool | None) -> None:
        source: Any = node.args[0]
        before, after = shape_of(source)[0], shape_of(node)[0]
        factors: Any = node.args[-1] if isinstance(node.args[-1], list | tuple) else ()
        if len(node.args) > 2 and any(of * f != to for of, f, to in zip(before[2:], factors, after[2:], strict=False)):
            raise unsupported(node, f"resizing by {tuple(factors)} to a rounded size")
        if before == after:
            self.alias[node.name] = self._input(source)
            return
        attrs = {"mode": mode, "align_corners": align_corners, "size": after[2:]}
        self._put(node, "resize", (source,), attrs=attrs)


def _broadcasts(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operation would make as much of the tensor before it was expanded."""
    others = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not node]
    return target_name(user) in BROADCASTING and [shape_of(other) for other in others] == [shape_of(node)]


def _axes(node: fx.Node, source: fx.Node, dims: Any, what: str) -> tuple[int, ...]:
    """The axes that are reduced, in order; never the batch."""
    shape, batch = shape_of(source)
    axes = tuple(sorted(int(d) % len(shape) for d in ([dims] if isinstance(dims, int) else dims or range(len(shape)))))
    if batch in axes:
        raise unsupported(node, f"{what} over the batch")
    return axes


def _window(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, int] | None:
    """The extent of the windows of adaptive pooling where they are all alike."""
    if before[2] % after[2] or before[3] % after[3]:
        return None
    return before[2] // after[2], before[3] // after[3]
