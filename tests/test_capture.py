"""What a user reads when a model cannot be exported, and that looking at a model leaves it as it was."""

import copy
import operator
import re
import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from nightpress.evaluators.capture import CONSTANT, capture
from nightpress.evaluators.inspect import inspect
from nightpress.evaluators.lower import _Lowering, lower  # pyright: ignore[reportPrivateUsage]
from nightpress.evaluators.task import Task
from nightpress.spaces.errors import InputError
from strategies import images, seeded, task_of

Forward = Callable[[Tensor], object]


class Inside(nn.Module):
    """A convolution, then the function that a test is about."""

    def __init__(self, then: Forward) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.then = then

    def forward(self, x: Tensor) -> object:
        return self.then(self.conv(x))


class Outside(nn.Module):
    """Has the module that a test is about at ``body.1``."""

    def __init__(self, then: Forward) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), Inside(then))

    def forward(self, x: Tensor) -> object:
        return self.body(x)


def sentence(then: Forward) -> str:
    """What inspection says of a model with this function inside."""
    with pytest.raises(InputError, match=r"^The ") as caught:
        inspect(task_of(seeded(lambda: Outside(then)), images(2)), cache=False)
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".")
    return said


def counted(x: Tensor) -> Tensor:
    for _ in range(int(x.abs().sum().item()) % 3):
        x = x + 1
    return x


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("no such thing.\nmore of it")


def one_image(x: Tensor) -> Tensor:
    if x.shape[0] != 1:
        raise ValueError("one image, please")
    return x


@pytest.mark.parametrize("then", [lambda x: x if x.sum() > 0 else -x, counted, lambda x: x[: int(x.argmax())]])
def test_control_flow_on_values_names_the_module_and_the_remedy(then: Forward) -> None:
    assert sentence(then) == (
        "The forward of body.1 (Inside) branches on the values of a tensor, which no exported file can do: "
        "replace the branch by torch.where, or move it out of the model given to nightpress."
    )


def test_leaving_torch_names_the_module() -> None:
    said = sentence(lambda x: torch.from_numpy(np.tanh(x.detach().numpy())))

    assert said.startswith("The model Outside cannot be traced: ")
    assert "(in body.1 (Inside)). Its forward must not branch on tensor values nor leave torch; " in said


def test_a_batch_size_that_is_fixed_is_told() -> None:
    assert sentence(lambda x: x.reshape(2, -1)) == (
        "The forward of Outside works for one batch size only: it must not use the size of the batch as a number, "
        "as x.reshape(32, -1) would."
    )


@pytest.mark.parametrize(
    ("then", "reason"), [(one_image, "one image, please"), (failing, "no such thing")]
)  # fmt: skip
def test_a_model_that_fails_on_two_examples_is_told_with_its_own_reason(then: Forward, reason: str) -> None:
    assert sentence(then) == (
        f"The model Outside cannot run a batch of 2 examples of shape (3, 8, 8): {reason} "
        "(in body.1 (Inside)). Its forward must take one tensor, a batch of any size in fp32."
    )


@pytest.mark.parametrize(
    ("then", "what"),
    [
        (lambda x: (x, x), "a tuple of 2"),
        (lambda x: {"out": x, "aux": -x}, "a dict of 2"),
        (lambda x: [x], "a list of 1"),
        (lambda x: {"out": x}, "a dict of 1"),
    ],
)
def test_more_than_a_tensor_names_the_way_out(then: Forward, what: str) -> None:
    way = "['out']" if "dict" in what else "[0]"
    assert sentence(then) == (
        f"The model must return one tensor, but Outside returns {what}; Task.output picks the one that counts: "
        f"Task(output=lambda outputs: outputs{way}, …)."
    )


def added_in_place(x: Tensor) -> Tensor:
    y = torch.relu(x)
    x.add_(y)
    return x


def dropped_in_place(x: Tensor) -> Tensor:
    same = F.dropout(x, training=False)
    x.mul_(2.0)
    return same


def view_read_afterwards(x: Tensor) -> Tensor:
    view = x.flatten(2)
    x.add_(1.0)
    return view


def changed_through_a_view(x: Tensor) -> Tensor:
    x.flatten(2).mul_(2.0)
    return x


def changed_in_part(x: Tensor) -> Tensor:
    x[:, :2] += 1
    return x


@pytest.mark.parametrize("then", [added_in_place, dropped_in_place])
def test_a_tensor_changed_in_place_is_what_is_read_afterwards(then: Callable[[Tensor], Tensor]) -> None:
    inspect(task_of(seeded(lambda: Outside(then)), images(2)), cache=False, verify=False)


@pytest.mark.parametrize("then", [view_read_afterwards, changed_through_a_view, changed_in_part])
def test_a_change_in_place_that_a_view_shows_is_told(then: Forward) -> None:
    said = sentence(then)
    assert said.startswith("The forward of body.1 changes a tensor in place (")
    assert said.endswith(") that is read through another view of it; make a new tensor instead, as x = x + y does.")


class Impure(nn.Module):
    """Changes its input, or counts its calls."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.conv, self.counts = nn.Conv2d(3, 8, 3), counts
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.calls += 1
            return self.conv(x) * self.calls
        return self.conv(x.sub_(0.5))


@pytest.mark.parametrize(
    ("counts", "what"), [(False, "its input in place (sub_)"), (True, "its state calls in place (add_)")]
)
def test_a_forward_that_changes_more_than_its_output_is_refused(counts: bool, what: str) -> None:
    with pytest.raises(InputError, match=f"^The forward of Impure changes {re.escape(what)}; make a new tensor"):
        inspect(task_of(seeded(lambda: Impure(counts)), images(2)), cache=False)


@pytest.mark.parametrize(("then", "what"), [(lambda x: None, "None"), (lambda x: 3.0, "3.0")])
def test_no_tensor_at_all_is_told(then: Forward, what: str) -> None:
    assert sentence(then) == f"The model must return one tensor, but Outside returns {what}."


@pytest.mark.parametrize(
    "then",
    [torch.mean, torch.flatten, lambda x: x.mean(0), lambda x: x.reshape(4, -1), lambda x: torch.cat([x, x])],
)
def test_an_output_without_a_row_for_each_example_is_told(then: Forward) -> None:
    assert sentence(then) == (
        "The model must return a row for each example, but what Outside returns has not the size of the batch along "
        "its first axis."
    )


@pytest.mark.parametrize(
    ("then", "what"),
    [
        (lambda x: torch.cumsum(x, 1), "cumsum"),
        (lambda x: torch.sort(x, 1)[0], "sort"),
        (lambda x: F.conv_transpose2d(x, torch.ones(8, 4, 4, 4), stride=2, padding=1),
         "a transposed convolution whose kernel is not its stride"),
        (lambda x: F.conv_transpose2d(x, torch.ones(8, 4, 2, 2), stride=2, dilation=2),
         "a transposed convolution whose kernel is not its stride"),
        (lambda x: F.conv_transpose2d(x, torch.ones(8, 4, 2, 2), stride=2, groups=2),
         "a transposed convolution in groups"),
        (lambda x: x.double(), "a cast to float64"),
        (lambda x: x**x, "a power that depends on the input"),
        (lambda x: 2**x, "a power that depends on the input"),
        (lambda x: x.clamp(max=x.shape[0]), "a clamp whose bound depends on the input"),
        (lambda x: F.softplus(x, 2), "a softplus of another sharpness"),
        (lambda x: torch.rsub(x, 1, alpha=2), "a subtraction of a multiple, or from what depends on the batch"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], "max_pool2d_with_indices"),
        (lambda x: x - x[-1:], "a part of the batch"),
        (lambda x: x - x[-1], "a part of the batch"),
        (lambda x: x - x.narrow(0, 0, 1), "a part of the batch"),
        (lambda x: F.instance_norm(x, torch.zeros(8), torch.ones(8), use_input_stats=False),
         "an instance norm with running statistics"),
        (lambda x: F.instance_norm(x.reshape(1, -1, 6, 6)).reshape(-1, 8, 6, 6),
         "a norm over channels without a batch before them"),
        (lambda x: F.pad(x.mean(1), (1, 1, 2, 2), mode="replicate"),
         "padding by 'replicate' of anything but all axes behind the channels"),
        (lambda x: F.adaptive_avg_pool1d(x.mean((2, 3)), 4),
         "adaptive_avg_pool1d of a tensor without a batch before its channels"),
        (lambda x: F.adaptive_avg_pool2d(x.mean(1), 1),
         "adaptive_avg_pool2d of a tensor without a batch before its channels"),
        (lambda x: F.max_pool1d(x.mean((2, 3)), 2), "max_pool1d of a tensor without a batch before its channels"),
        (lambda x: F.pixel_shuffle(x.reshape(-1, 2, 4, 6, 6), 2), "a pixel shuffle of anything but a batch of images"),
        (lambda x: x * x.shape[0], "mul with a number that depends on the batch"),
        (lambda x: torch.add(x, x.relu(), alpha=2), r"add with {'alpha': 2}"),
        (lambda x: x * x.mean(), "a mean over the batch"),
        (lambda x: F.max_pool2d(x, 2, dilation=2), "max_pool2d with dilation or a divisor"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "avg_pool2d with dilation or a divisor"),
        (lambda x: F.adaptive_avg_pool2d(x, 4), "adaptive pooling from (6, 6) to (4, 4)"),
        (lambda x: x * x.amax((0, 1), keepdim=True), "an amax over the batch"),
        (lambda x: F.adaptive_max_pool2d(x, 4), "adaptive pooling from (6, 6) to (4, 4)"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="circular"), "padding by 'circular'"),
        (lambda x: F.pad(x, (1, 1), value=2.0), "padding with 2.0"),
        (lambda x: F.interpolate(x, scale_factor=1.7), "resizing by (1.7, 1.7) to a rounded size"),
        (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"), "resizing by (1.7, 1.7) to a rounded size"),
        (lambda x: F.layer_norm(x, (6, 6)), "a layer norm over 2 axes"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), "causal or grouped attention"),
        (lambda x: F.batch_norm(x, None, None, training=True), "a batch norm without running statistics"),
    ],
)  # fmt: skip
def test_an_operation_that_cannot_be_exported_is_named_with_its_module(then: Forward, what: str) -> None:
    assert sentence(then) == (
        f"The model uses {what} in body.1 (Inside), which nightpress cannot export yet; replace it, or leave it out of "
        "the model given to nightpress."
    )


class Recurrent(nn.Module):
    """The rows of an image as a sequence, or its first row alone."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.inner = kind(6, 4, batch_first=True) if kind in {nn.LSTM, nn.GRU, nn.RNN} else kind(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.inner, nn.RNNBase):
            return self.inner(x[:, 0])[0]
        first, state = x[:, 0, 0], torch.zeros(x.shape[0], 4)
        return self.inner(first, (state, state))[0] if isinstance(self.inner, nn.LSTMCell) else self.inner(first, state)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_a_recurrent_layer_is_named(kind: type[nn.Module]) -> None:
    captured = capture(nn.Sequential(Recurrent(kind)), images(1, side=6))

    with pytest.raises(InputError, match=rf"^The model uses a recurrent layer in 0\.inner \({kind.__name__}\), which "):
        lower(captured)


def test_only_rules_bear_the_names_of_torchs_operations() -> None:
    """A node's operation is looked up among the methods: one that does something else must be called otherwise."""
    everything = torch._C._dispatch_get_all_op_names()  # pyright: ignore[reportPrivateUsage]
    names = {name.partition("::")[2].partition(".")[0] for name in everything}
    rules = {name: getattr(_Lowering, name) for name in dir(_Lowering) if name[:1] == "_" and name[1:] in names}

    assert {"_conv2d", "_mean"} <= rules.keys()
    for name, rule in rules.items():
        assert list(signature(rule).parameters) == ["self", "node"], name


def test_a_forward_that_changes_its_weights_is_told() -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.other.weight.data.copy_(self.one.weight)
            return self.other(self.one(x))

    with pytest.raises(InputError, match=r"^The forward of Sharing writes into its weights or keeps a tensor of one "):
        capture(Sharing(), images(1))


@pytest.mark.parametrize(("wrap", "inside"), [(nn.DataParallel, "module"), (torch.compile, "_orig_mod")])
def test_a_wrapped_model_is_to_be_unwrapped(wrap: Callable[[nn.Module], nn.Module], inside: str) -> None:
    with pytest.raises(InputError, match=rf"^The model must be a plain module, but it is a \w+: give its \.{inside}\."):
        capture(wrap(nn.Conv2d(3, 5, 8)), images(1))


def test_torchscript_is_refused_wherever_it_stands() -> None:
    with warnings.catch_warnings(action="ignore"):  # torch would rather have it exported too
        scripted = torch.jit.script(nn.Conv2d(3, 5, 8))

    with pytest.raises(InputError, match=r"^The model must be a Python module, but its part 0 is TorchScript: build "):
        capture(nn.Sequential(scripted), images(1))


def test_weights_that_are_computed_from_the_input_are_told() -> None:
    assert "are computed from the input, which nightpress cannot compress." in sentence(
        lambda x: F.conv2d(x, x.mean((2, 3))[:, :, None, None])
    )


def test_an_operation_of_the_model_itself_is_named_too() -> None:
    with pytest.raises(InputError, match=r"^The model uses cumsum in the model's own forward, which "):
        inspect(task_of(seeded(lambda: Inside(lambda x: torch.cumsum(x, 1))), images(2)), cache=False)


# Task.output


class Two(nn.Module):
    """Answers with a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.aux = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.conv(x), "aux": torch.cumsum(self.aux(x), 1)}


def out_of(outputs: Any) -> Tensor:
    return outputs["out"]


def test_a_tasks_output_is_all_that_has_to_be_exported() -> None:
    model = seeded(Two)
    task = task_of(model, images(2))
    picked = Task(
        name="two", model=model, example_input=task.example_input, train=task.train, test=task.test,
        output=out_of,
    )  # fmt: skip

    anatomy, network = inspect(picked, cache=False)

    assert [layer.name for layer in anatomy.layers] == ["conv"]
    assert set(network.state) == {"conv.weight", "conv.bias"}


def test_an_output_that_is_not_there_is_told() -> None:
    model = seeded(Two)
    task = task_of(model, images(2))
    with pytest.raises(
        InputError, match=r"^Task\.output cannot pick from what Two returns, a dict: KeyError: 'missing'\.$"
    ):
        capture(model, task.example_input, operator.itemgetter("missing"))


# What is left as it was


def test_looking_at_a_model_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Dropout(), nn.Conv2d(12, 5, 6)))
    model.train()
    model.get_submodule("1").eval()
    model.get_parameter("0.weight").requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    trains = [parameter.requires_grad for parameter in model.parameters()]
    identities = [id(value) for value in (*model.parameters(), *model.buffers())]
    task = task_of(nn.Sequential(model, nn.Flatten()).train(mode=True), images(2))
    model.get_submodule("1").eval()

    _, network = inspect(task, cache=False)

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert [id(value) for value in (*model.parameters(), *model.buffers())] == identities
    assert network.frozen == {"0.0.weight", "0.1.running_mean", "0.1.running_var"}
    assert capfd.readouterr() == ("", "")


def test_a_failure_is_told_once_and_nothing_else_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for then in (lambda x: x if x.sum() > 0 else -x, lambda x: x.reshape(2, -1), failing):
        sentence(then)

    assert capfd.readouterr() == ("", "")


def test_what_does_not_depend_on_the_input_becomes_a_constant() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            ramp = torch.linspace(0, 1, x.shape[-1]).expand(1, 1, x.shape[-2], x.shape[-1])
            return x + torch.sin(ramp) + torch.zeros(x.shape[1], 1, 1)

    captured = capture(seeded(Positions), images(1))
    ops, _ = lower(captured)

    constants = {op.params["value"] for op in ops if op.kind == "param"}
    assert constants
    assert all(name.startswith(CONSTANT) for name in constants)
    assert constants <= captured.frozen
    assert [op.kind for op in ops if op.kind != "param"] == ["input", "conv", "add", "add"]


def test_a_model_whose_forward_is_not_what_its_graph_shows_is_refused() -> None:
    """The export sees one answer, and the model gives another each time."""

    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return self.conv(x) * float(len(calls))

    calls: list[int] = []
    task = task_of(seeded(Drifting), images(2))

    with pytest.raises(InputError, match=r"^The model Drifting does something that its graph does not show: rebuilt"):
        inspect(task, cache=False)


# Weights that are not plain ones


def test_weights_of_another_type_are_told() -> None:
    with pytest.raises(InputError, match=r"^The model's weights must be float32, but 0\.weight is bfloat16: call "):
        capture(nn.Sequential(nn.Linear(4, 2)).to(torch.bfloat16), torch.zeros(1, 4))


def test_a_weight_that_is_computed_from_others_becomes_one_that_can_be_trained() -> None:
    model = seeded(lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 12, 3)), nn.ReLU(), nn.Conv2d(12, 5, 6)))

    anatomy, network = inspect(task_of(model, images(2)), cache=False, verify=False)

    assert [group.name for group in anatomy.groups] == ["0"]
    assert torch.equal(network.state["0.weight"], cast("nn.Conv2d", model.get_submodule("0")).weight)
    assert not network.frozen


class Autoencoder(nn.Module):
    """Its decoder is the encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(192, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.encoder(x.flatten(1))), self.encoder.weight.t())


def test_a_weight_that_is_tied_through_a_computation_is_told(caplog: pytest.LogCaptureFixture) -> None:
    capture(seeded(Autoencoder), images(1))

    [told] = [record.message for record in caplog.records if record.name == "nightpress"]
    assert told == (
        "encoder.weight is also used through t, which becomes a constant: where the weight itself is trained, the two "
        "are no longer tied"
    )


def test_what_is_tied_as_it_is_or_computed_from_constants_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(192, 192)
            self.scale = nn.Parameter(torch.ones(192))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.relu(self.inner(x.flatten(1)))) * self.scale.exp()

    capture(seeded(Twice), images(1))

    assert not [record for record in caplog.records if record.name == "nightpress"]
