"""Lowering of what moves, cuts, joins, pools and resizes tensors."""

from typing import Any

from torch import fx

from .lower_convs import ConvLowering, beside
from .lowering import BINARY
from .nodes import arguments, dims, pair, plain_argument, shape_of, target_name, unsupported

PADDING = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
"""Ways to pad, and what ONNX calls them."""
LARGEST = frozenset({"max", "adaptive_max_pool2d"})
SEVERAL = LARGEST | {"unbind", "chunk", "split", "split_with_sizes"}
"""What makes several tensors, of which others take one."""
POOLS = {
    "max_pool2d": ("kernel", "stride", "padding", "dilation", "ceil"),
    "avg_pool2d": ("kernel", "stride", "padding", "ceil", "count_include_pad", "divisor"),
    "max_pool1d": ("kernel", "stride", "padding", "dilation", "ceil"),
    "avg_pool1d": ("kernel", "stride", "padding", "ceil", "count_include_pad"),
}


class ShapeLowering(ConvLowering):
    """The operations that compute nothing new, or only means and maxima."""

    # Channels and positions

    def _cat(self, node: fx.Node) -> None:
        joined: Any = node.args[0]
        self._emit(node, "cat", joined, attrs={"axis": int(plain_argument(node, "dim", 1, 0)) % len(shape_of(node)[0])})

    def _slice(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "dim", "start", "end", "step"))
        source = shape_of(given["input"])[0]
        if shape_of(node) == shape_of(given["input"]):
            self._same(node, given["input"])
            return
        axis = _within(node, given["input"], given.get("dim", 0))
        start, step = given.get("start"), int(given.get("step", 1))
        start = max(0, int(start) + source[axis]) if start is not None and int(start) < 0 else int(start or 0)
        self._emit(node, "slice", (given["input"],), attrs={"axis": axis, "start": start, "step": step})

    def _narrow(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "dim", "start", "length"))
        axis = _within(node, given["input"], given["dim"])
        attrs = {"axis": axis, "start": int(given["start"]), "step": 1}
        self._emit(node, "slice", (given["input"],), attrs=attrs)

    def _select(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "dim", "index"))
        self._pick(node, given["input"], int(given["dim"]), int(given["index"]))

    def _pick(self, node: fx.Node, source: fx.Node, axis: int, index: int) -> None:
        axis = _within(node, source, axis)
        self._emit(node, "select", (source,), attrs={"axis": axis, "index": index % shape_of(source)[0][axis]})

    def _getitem(self, node: fx.Node) -> None:
        """One part of a chunk, split or unbind."""
        whole, number = node.args
        if not isinstance(whole, fx.Node) or not isinstance(number, int):
            raise unsupported(node)
        source: Any = whole.args[0]
        if target_name(whole) in LARGEST and number == 0:  # the second part are their places
            self._largest(node, whole)
            return
        if target_name(whole) not in SEVERAL - LARGEST:
            raise unsupported(whole)
        axis = int(plain_argument(whole, "dim", 1 if target_name(whole) == "unbind" else 2, 0))
        if target_name(whole) == "unbind":
            self._pick(node, source, axis, number)
            return
        axis = _within(whole, source, axis)
        sizes = [dims(part)[0][axis] for part in whole.meta["val"]]
        attrs = {"axis": axis, "start": sum(sizes[:number]), "step": 1}
        self._emit(node, "slice", (source,), attrs=attrs)

    def _pixel_shuffle(self, node: fx.Node) -> None:
        shape, batch = shape_of(node)
        if len(shape) != 4 or batch != 0:
            raise unsupported(node, "a pixel shuffle of anything but a batch of images")
        attrs = {"factor": int(arguments(node, ("input", "factor"))["factor"])}
        self._emit(node, "pixel_shuffle", (node.args[0],), attrs=attrs)

    def _reshaped(self, node: fx.Node) -> None:
        if shape_of(node) == shape_of(node.args[0]):
            self._same(node, node.args[0])  # type: ignore[arg-type]
            return
        shape, axis = shape_of(node)
        flat = len(shape) == 2 and axis == 0 and shape[0] == 1 and shape_of(node.args[0])[1] == 0
        self._emit(node, "flatten" if flat else "reshape", (self._stored(node.args[0]),))  # type: ignore[arg-type]

    def _permute(self, node: fx.Node) -> None:
        order: Any = node.args[1]
        self._emit(node, "permute", (node.args[0],), attrs={"order": tuple(int(i) % len(order) for i in order)})

    def _transpose(self, node: fx.Node) -> None:
        order = list(range(len(shape_of(node)[0])))
        one, other = (int(i) % len(order) for i in node.args[1:3])  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
        self._emit(node, "permute", (node.args[0],), attrs={"order": tuple(order)})

    def _expand(self, node: fx.Node) -> None:
        if shape_of(node) == shape_of(node.args[0]) or all(_broadcasts(user, node) for user in node.users):
            self._same(node, node.args[0])  # type: ignore[arg-type]
            return
        shape, batch = shape_of(node)
        if batch is not None and shape[batch] != 1:
            raise unsupported(node, "an expansion to several for each example")
        self._emit(node, "expand", (node.args[0],))

    def _roll(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "shifts", "dims"))
        if len(given.get("dims", ())) != len(given["shifts"]):
            raise unsupported(node, "roll over all axes at once")
        count = len(shape_of(node)[0])
        attrs = {"shifts": tuple(int(s) for s in given["shifts"]), "axes": tuple(int(d) % count for d in given["dims"])}
        self._emit(node, "roll", (given["input"],), attrs=attrs)

    def _pad(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "pad", "mode", "value"))
        amounts = [int(a) for a in given["pad"]]
        mode = given.get("mode", "constant")
        if mode not in PADDING:
            raise unsupported(node, f"padding by {mode!r}")
        if mode != "constant" and len(amounts) != 2 * (len(shape_of(node)[0]) - 2):
            raise unsupported(node, f"padding by {mode!r} of anything but all axes behind the channels")
        if given.get("value") not in (None, 0, 0.0):
            raise unsupported(node, f"padding with {given['value']}")
        if not any(amounts):
            self._same(node, given["input"])
            return
        rank = len(shape_of(node)[0])
        before, after = [0] * rank, [0] * rank
        for i, (low, high) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
            before[rank - 1 - i], after[rank - 1 - i] = low, high
        channels_only = before[0] == after[0] == 0 and not any(before[2:] + after[2:]) and min(before[1], after[1]) >= 0
        if mode == "constant" and rank == 4 and (before[1] or after[1]) and channels_only:
            self._padded_shortcut(node, given["input"], before[1])
            return
        attrs = {"before": tuple(before), "after": tuple(after), "mode": mode}
        self._emit(node, "pad", (given["input"],), attrs=attrs)

    _constant_pad_nd = _pad

    # Pooling and resizing

    def _pool(self, node: fx.Node, kind: str) -> None:
        given = arguments(node, ("input", *POOLS[kind]))
        sequence = _is_sequence(node, given["input"])

        def extents(value: Any, height: int = 1) -> tuple[int, int]:
            return beside(value, height) if sequence else pair(value)

        if extents(given.get("dilation", 1)) != (1, 1) or given.get("divisor") is not None:
            raise unsupported(node, f"{kind} with dilation or a divisor")
        attrs: dict[str, Any] = {
            "kernel": extents(given["kernel"]), "stride": extents(given.get("stride") or given["kernel"]),
            "padding": extents(given.get("padding", 0), 0), "ceil": int(given.get("ceil", False)),
        }  # fmt: skip
        if kind.startswith("avg"):
            attrs["count_include_pad"] = int(given.get("count_include_pad", True))
        self._emit(node, kind[:-2], (given["input"],), attrs=attrs, image=sequence)

    def _adaptive_avg_pool2d(self, node: fx.Node) -> None:
        """Adaptive pooling to 1×1 is a global pool; to the size that is there already, nothing."""
        source: Any = node.args[0]
        before, after = shape_of(source)[0], shape_of(node)[0]
        sequence = _is_sequence(node, source)
        if before == after and set(after[2:]) != {1}:
            self._same(node, source)
        elif set(after[2:]) == {1}:
            self._emit(node, "global_pool", (source,), image=sequence)
        elif (kernel := _window(before, after)) is not None:
            attrs = {"kernel": kernel, "stride": kernel, "padding": (0, 0), "ceil": 0, "count_include_pad": 1}
            self._emit(node, "avg_pool", (source,), attrs=attrs, image=sequence)
        else:
            raise unsupported(node, f"adaptive pooling from {before[2:]} to {after[2:]}")

    _adaptive_avg_pool1d = _adaptive_avg_pool2d

    def _mean(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "dims", "keepdim"))
        source = given["input"]
        axes = _axes(node, source, given.get("dims"), "a mean")
        keepdim, shape = bool(given.get("keepdim", False)), shape_of(source)[0]
        sequence = source.name in self.images
        if (len(shape) != 4 and not sequence) or axes != tuple(range(2, len(shape))):
            self._emit(node, "mean", (source,), attrs={"axes": axes, "keepdim": keepdim})
        elif keepdim:
            self._emit(node, "global_pool", (source,), image=sequence)
        else:
            pooled = self._before(node, "global_pool", (self._stored(source),), (*shape[:2], 1, 1))
            self._emit(node, "flatten", (pooled,))

    def _sum(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "dims", "keepdim"))
        attrs = {"axes": _axes(node, given["input"], given.get("dims"), "a sum"),
                 "keepdim": bool(given.get("keepdim", False))}  # fmt: skip
        self._emit(node, "sum", (given["input"],), attrs=attrs)

    def _amax(self, node: fx.Node) -> None:
        given = arguments(node, ("input", "dims", "keepdim"))
        self._maximum_over(node, given["input"], given.get("dims"), bool(given.get("keepdim", False)))

    def _maximum_over(self, node: fx.Node, source: fx.Node, dims: Any, keepdim: bool) -> None:
        attrs = {"axes": _axes(node, source, dims, "an amax"), "keepdim": keepdim}
        self._emit(node, "amax", (source,), attrs=attrs)

    def _largest(self, node: fx.Node, whole: fx.Node) -> None:
        source: Any = whole.args[0]
        if target_name(whole) == "max":
            given = arguments(whole, ("input", "dim", "keepdim"))
            self._maximum_over(node, source, given["dim"], bool(given.get("keepdim", False)))
            return
        _is_sequence(whole, source)
        before, after = shape_of(source)[0], shape_of(node)[0]
        if after[2:] == (1, 1):
            self._maximum_over(node, source, (2, 3), keepdim=True)
            return
        kernel = _window(before, after)
        if kernel is None:
            raise unsupported(whole, f"adaptive pooling from {before[2:]} to {after[2:]}")
        self._emit(
            node, "max_pool", (source,), attrs={"kernel": kernel, "stride": kernel, "padding": (0, 0), "ceil": 0}
        )

    def _upsample_nearest2d(self, node: fx.Node) -> None:
        self._resized(node, "nearest", None)

    def _upsample_bilinear2d(self, node: fx.Node) -> None:
        self._resized(node, "linear", bool(arguments(node, ("input", "size", "align_corners"))["align_corners"]))

    def _resized(self, node: fx.Node, mode: str, align_corners: bool | None) -> None:
        source: Any = node.args[0]
        before, after = shape_of(source)[0], shape_of(node)[0]
        factors: Any = node.args[-1] if isinstance(node.args[-1], list | tuple) else ()
        if len(node.args) > 2 and any(of * f != to for of, f, to in zip(before[2:], factors, after[2:], strict=False)):
            raise unsupported(node, f"resizing by {tuple(factors)} to a rounded size")
        if before == after:
            self._same(node, source)
            return
        attrs = {"mode": mode, "align_corners": align_corners, "size": after[2:]}
        self._emit(node, "resize", (source,), attrs=attrs)


def _is_sequence(node: fx.Node, source: fx.Node) -> bool:
    """Whether a pooling is over sequences; else over images. torch takes both without a batch, too."""
    kind = target_name(node)
    shape, batch = shape_of(source)
    if len(shape) != int(kind[-2]) + 2 or batch != 0:
        raise unsupported(node, f"{kind} of a tensor without a batch before its channels")
    return kind.endswith("1d")


def _within(node: fx.Node, source: fx.Node, axis: Any) -> int:
    """The axis of which a part is taken; never the batch."""
    shape, batch = shape_of(source)
    axis = int(axis) % len(shape)
    if axis == batch:
        raise unsupported(node, "a part of the batch")
    return axis


def _broadcasts(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operation would make as much of the tensor before it was expanded."""
    others = [arg for arg in user.args if isinstance(arg, fx.Node) and arg is not node]
    return target_name(user) in BINARY.values() and [shape_of(other) for other in others] == [shape_of(node)]


def _axes(node: fx.Node, source: fx.Node, dims: Any, what: str) -> tuple[int, ...]:
    """The axes that are reduced, in order; never the batch."""
    shape, batch = shape_of(source)
    axes = tuple(sorted(int(d) % len(shape) for d in ([dims] if isinstance(dims, int) else dims or range(len(shape)))))
    if batch in axes:
        raise unsupported(node, f"{what} over the batch")
    return axes


def _window(before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...] | None:
    """The extent of the windows of adaptive pooling where they are all alike; a sequence has the height 1."""
    sizes = list(zip(before[2:], after[2:], strict=True))
    if any(of % to for of, to in sizes):
        return None
    found = tuple(of // to for of, to in sizes)
    return found if len(found) == 2 else (1, *found)
