"""A model as a graph of ATen operations, by ``torch.export``: any module whose control flow does not depend on values.

What does not depend on the input (masks, position tables) is computed here once and becomes a constant.
"""

import copy
import io
import logging
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, default_decompositions, export
from torch.fx.node import map_arg
from torch.nn.utils import parametrize

from ..spaces.errors import InputError
from .forwards import cannot_run, check_plain, check_types, culprit, first_line, several

log = logging.getLogger("nightpress")
CONSTANT = "constant."
"""Prefix of the state entries that are not the model's own but were computed from them."""
_SIZED = frozenset({"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like", "new_empty"})
DEPTH = 2
"""How often an operation is written as others: torch's form of a layer may be that of a fused one at first."""
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """The exported graph in evaluation mode, with a dynamic batch.

    ``nodes``: those that depend on the input, in order. ``state``: every parameter and buffer by its name in the model,
    and the constants. ``names``: for each placeholder and each constant node, its entry of ``state``.
    ``renamed``: entries of ``state`` that the model knows under another name.
    """

    nodes: tuple[fx.Node, ...]
    output: fx.Node
    state: dict[str, Tensor]
    names: dict[str, str]
    frozen: frozenset[str]
    renamed: dict[str, str] = field(default_factory=dict[str, str])
    ties: tuple[tuple[str, str], ...] = ()
    """Weights that are used a second time through a computation, and what computes it."""


class _Picked(nn.Module):
    """The model with the task's choice among its outputs."""

    def __init__(self, model: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._pick = pick

    def forward(self, value: Tensor) -> Tensor:
        returned = self.model(value)
        try:
            return self._pick(returned)
        except (LookupError, AttributeError, TypeError) as error:
            raise InputError(
                f"Task.output cannot pick from what {type(self.model).__name__} returns, a {type(returned).__name__}: "
                f"{type(error).__name__}: {first_line(error)}."
            ) from error


def capture(
    model: nn.Module, example_input: Tensor, output: Callable[[Any], Tensor] | None = None,
    known: Callable[[fx.Node], bool] = lambda node: True,
) -> Captured:  # fmt: skip
    """Export a copy of the model. ``example_input`` has shape (1, …); ``output`` picks the tensor that counts.
    Operations that are not ``known`` are written as others where torch can do it.

    Raises InputError saying what cannot be exported, in which module, and what to do.
    """
    check_plain(model)
    copied = copy.deepcopy(model).cpu().eval()
    check_types(copied)
    _settle(copied)
    root = copied if output is None else _Picked(copied, output).eval()
    # Of two examples: sizes of one are taken for constants.
    example = torch.cat([example_input.cpu()] * 2)
    program = _export(root, copied, example)
    _check_output(program, type(model).__name__)
    prefix = "" if output is None else "model."
    captured = _captured(program, copied, prefix)
    _check_mutations(program, set(captured.nodes), type(model).__name__)
    _tell_of_ties(captured)
    written = captured
    for _ in range(DEPTH):
        strange = _strange(written, known)
        if not strange:
            return written
        program = _written_as_others(program, strange)
        written = _captured(program, copied, prefix)
    return captured if _strange(written, known) else written  # what the user wrote is what is complained of


def _strange(captured: Captured, known: Callable[[fx.Node], bool]) -> set[object]:
    return {node.target for node in captured.nodes if node.op == "call_function" and not known(node)}


def _written_as_others(program: ExportedProgram, strange: set[object]) -> ExportedProgram:
    """The program with torch's own decompositions of these operations; all others stay as they are."""
    table = default_decompositions()
    for operation in list(table):
        if operation not in strange:
            del table[operation]
    with torch.no_grad(), _hushed():
        return program.run_decompositions(table)


def _settle(model: nn.Module) -> None:
    """Weights that are computed from others (weight norm, for one) become plain ones, so that they can be trained.

    torch's own removal takes the property from the class, which the user's model shares with its copy.
    """
    for module in [m for m in model.modules() if parametrize.is_parametrized(m)]:
        made = {name: cast("Tensor", getattr(module, name)).detach() for name in cast("Any", module.parametrizations)}
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
        for name, value in made.items():
            module.register_parameter(name, nn.Parameter(value))


def _check_output(program: ExportedProgram, name: str) -> None:
    """Raises InputError for anything but one tensor with the examples along its first axis."""
    nodes = list(program.graph.nodes)[-1].args[0]
    whole = program.call_spec.out_spec
    count = len(program.graph_signature.user_outputs)
    if whole is None or not whole.is_leaf() or count != 1:
        kind = whole.type.__name__ if whole is not None and whole.type is not None else "nothing"
        keys: list[object] = whole.context if whole is not None and isinstance(whole.context, list) else []
        access = f"[{keys[0]!r}]" if keys else "[0]"
        raise InputError(several(name, kind, count, access))
    value = nodes[-1].meta.get("val") if isinstance(nodes[-1], fx.Node) else nodes[-1]
    if not isinstance(value, Tensor):
        raise InputError(f"The model must return one tensor, but {name} returns {value!r}.")
    if value.dim() == 0 or not isinstance(value.shape[0], torch.SymInt) or _of_one(value.shape[0]) != 1:
        raise InputError(
            f"The model must return a row for each example, but what {name} returns has not the size of the batch "
            "along its first axis."
        )


def _check_mutations(program: ExportedProgram, live: set[fx.Node], name: str) -> None:
    """Raises InputError where a tensor is changed in place that is known by another name too.

    What an in-place operation returns stands for the changed tensor in the nodes that follow, but not for views of it,
    for the model's buffers or for the caller's input. What does not depend on the input is not ``live``: it was
    computed as the model does it, views and all.
    """
    storages = {node: _storage(node) for node in program.graph.nodes}
    outside = {storages[node]: node.name for node in storages if node.op == "placeholder"}
    signature = program.graph_signature
    named = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}
    for node in storages:
        if not (node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)):
            continue
        where, what = scope_of(node) or name, getattr(node.target, "__name__", node.name).split(".")[0]
        changed = outside.get(storages[node])
        if changed is not None:
            of = f"its state {named[changed]}" if changed in named else "its input"
            raise InputError(f"The forward of {where} changes {of} in place ({what}); make a new tensor instead.")
        before = {other for other in storages if storages[other] == storages[node] and other < node}
        if node in live and any(user > node for other in before for user in other.users):
            raise InputError(
                f"The forward of {where} changes a tensor in place ({what}) that is read through another view of it; "
                "make a new tensor instead, as x = x + y does."
            )


def _storage(node: fx.Node) -> int | None:
    """What says whether two nodes' tensors share memory; None for what is no tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return value.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]  fake tensors have no address


def _of_one(size: Any) -> int:
    """A size for a batch of one."""
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _export(root: nn.Module, model: nn.Module, example: Tensor) -> ExportedProgram:
    try:
        with torch.no_grad(), _hushed():
            return export(root, (example,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)
    except InputError:
        raise
    except Exception as error:  # the user's own forward runs here
        raise InputError(_why(error, model, example)) from error


@contextmanager
def _hushed() -> Generator[None]:
    """Torch reports at length, on several ways, what it raises anyway."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _why(error: Exception, model: nn.Module, example: Tensor) -> str:
    """One sentence: what, in which module, and what to do."""
    kind, text = type(error).__name__, first_line(error)
    where = culprit(error, model)
    if "DataDependent" in kind or "data-dependent" in text or "Could not guard" in text:
        return (
            f"The forward of {where} branches on the values of a tensor, which no exported file can do: "
            "replace the branch by torch.where, or move it out of the model given to nightpress."
        )
    if "specialized" in str(error) or "Constraint" in kind or "specializ" in text:
        return (
            f"The forward of {where} works for one batch size only: it must not use the size of the batch as a "
            "number, as x.reshape(32, -1) would."
        )
    if "fake tensor" in text:
        return (
            f"The forward of {where} writes into its weights or keeps a tensor of one call for the next; it must "
            "compute its output from its input and leave everything else as it is."
        )
    try:
        with torch.no_grad():
            model(example)
    except Exception as plain:  # noqa: BLE001  the user's own forward again, without the tracer
        return cannot_run(model, example, plain)
    return (
        f"The model {type(model).__name__} cannot be traced: {text} (in {where}). Its forward must not branch on "
        "tensor values nor leave torch; move such a part out of the model given to nightpress."
    )


def _captured(program: ExportedProgram, model: nn.Module, prefix: str) -> Captured:
    signature = program.graph_signature
    program.graph.eliminate_dead_code()  # what only the outputs need that a task does not pick
    everywhere = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    first = {id(value): name for name, value in reversed(everywhere.items())}  # what is shared goes by its first name
    names = {
        key: first.get(id(everywhere.get(value.removeprefix(prefix))), value.removeprefix(prefix))
        for table in (signature.inputs_to_parameters, signature.inputs_to_buffers)
        for key, value in table.items()
    }
    lifted = signature.inputs_to_lifted_tensor_constants
    names |= {key: CONSTANT + value.removeprefix(prefix) for key, value in lifted.items()}
    state = {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}
    stored: dict[str, Any] = {**program.state_dict, **program.constants}
    for name in names.values():
        if name not in state:
            state[name] = stored[prefix + name.removeprefix(CONSTANT)].detach()
    values: dict[fx.Node, Any] = {
        n: state[names[n.name]] for n in program.graph.nodes if n.op == "placeholder" and n.name in names
    }
    nodes: list[fx.Node] = []
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op in {"placeholder", "output"}:
                if node.op == "placeholder" and node.name not in names:
                    nodes.append(node)
            elif _constant(node, values):
                values[node] = _compute(node, values)
            else:
                nodes.append(node)
    for node in dict.fromkeys(source for n in nodes for source in n.all_input_nodes):
        if isinstance(values.get(node), Tensor) and node.name not in names:
            names[node.name] = CONSTANT + node.name
            state[CONSTANT + node.name] = values[node].detach().contiguous()
    result = next(n for n in program.graph.nodes if n.op == "output").args[0][-1]
    used = {names[source.name] for n in nodes for source in n.all_input_nodes if source.name in names}
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
    frozen |= {name for name, _ in model.named_buffers()}
    constants = {name for name in used if name.startswith(CONSTANT)}
    return Captured(
        nodes=tuple(nodes), output=result, state={name: state[name] for name in sorted(used)}, names=names,
        frozen=frozenset(frozen | constants), ties=tuple(_ties(model, names, values, used, nodes)),
    )  # fmt: skip


def _tell_of_ties(captured: Captured) -> None:
    """Warn of a weight that is used as it is and, by a computation that does not depend on the input, a second time
    (transposed, for one): the second use becomes a constant, which training leaves behind."""
    for weight, through in captured.ties:
        log.warning(
            "%s is also used through %s, which becomes a constant: where the weight itself is trained, the two "
            "are no longer tied", weight, through,
        )  # fmt: skip


def _ties(
    model: nn.Module, names: dict[str, str], values: dict[fx.Node, Any], used: set[str], nodes: list[fx.Node]
) -> Generator[tuple[str, str]]:
    trained = {name for name, value in model.named_parameters() if value.requires_grad} & used
    behind: dict[fx.Node, set[str]] = {}
    for node in values:
        own = {names[node.name]} & trained if node.op == "placeholder" else set[str]()
        behind[node] = own.union(*(behind.get(source, set()) for source in node.all_input_nodes))
    for node in dict.fromkeys(source for live in nodes for source in live.all_input_nodes):
        if node.op != "placeholder":
            for name in sorted(behind.get(node, ())):
                yield name, getattr(node.target, "__name__", node.name).split(".")[0]


def _constant(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether a node's value is the same for every input."""
    if node.op != "call_function":
        return False
    shape = getattr(node.meta.get("val"), "shape", ())
    if any(isinstance(size, torch.SymInt) for size in shape):
        return False
    name = getattr(node.target, "__name__", "").split(".")[0]
    if name in _SIZED and not name.endswith("_like"):  # of the tensor it takes only the type
        return not any(isinstance(size, fx.Node) for size in cast("Any", node.args[1]))
    return all(source in values for source in node.all_input_nodes)


def _compute(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: values.get(n, torch.zeros(())))
    return cast("Callable[..., Any]", node.target)(*args, **kwargs)


def scope_of(node: fx.Node) -> str:
    """Dotted name of the module in whose forward a node was made; empty for the model itself."""
    stack: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path != _NO_MODULE]
    path = paths[-1] if paths else ""
    return path.removeprefix("model.") if any(kind == f"{__name__}._Picked" for _, kind in stack.values()) else path


def described_scope(node: fx.Node) -> str:
    """The module of :func:`scope_of` with its class, as in ``encoder.lstm (LSTM)``; empty for the model itself."""
    path = scope_of(node)
    if not path:
        return ""
    stack: dict[str, tuple[str, Any]] = node.meta["nn_module_stack"]
    kind = [kind for inner, kind in stack.values() if inner != _NO_MODULE][-1]
    return f"{path} ({str(getattr(kind, '__name__', kind)).rpartition('.')[2]})"
