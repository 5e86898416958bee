"""The user's side: what a task must satisfy, and the file that it comes from."""

import dataclasses
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from nightpress.evaluators.data import materialise
from nightpress.evaluators.task import Task, check_task, load_task, picked, task_digest
from nightpress.spaces.errors import InputError

CIFAR10_EXAMPLE = Path(__file__).parents[1] / "examples" / "cifar10_folders.py"
TASK_FILE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from nightpress.evaluators.task import Task

def build():
    data = TensorDataset(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))
    return Task(name="toy", model=nn.Linear(3, 2), example_input=torch.zeros(1, 3), train=data, test=data)
"""


def dataset(labels: list[int] | list[float], shape: tuple[int, ...] = (3,)) -> TensorDataset:
    return TensorDataset(torch.zeros(len(labels), *shape), torch.tensor(labels))


@pytest.fixture
def task() -> Task:
    """A linear classifier of three numbers into two classes."""
    return Task(
        name="toy",
        model=nn.Linear(3, 2),
        example_input=torch.zeros(1, 3),
        train=dataset([0, 1, 0, 1]),
        test=dataset([1, 0]),
    )


class WithTargets:
    """torchvision's convention; reading an item would be slow, so here it is an error beyond the first."""

    def __init__(self, targets: list[int]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index > 0:
            raise RuntimeError("this item was not needed")
        return torch.zeros(3), self.targets[index]


class Transformed(WithTargets):
    """The items hold other labels than ``targets``."""

    target_transform = staticmethod(lambda label: label - 5)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(3), self.target_transform(self.targets[index])


def test_a_good_task_passes_and_is_left_as_it_was(task: Task) -> None:
    task.model.train()

    check_task(task)

    assert task.model.training


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x, "logits": self.head(x)}


def test_of_a_model_that_returns_more_than_a_tensor_the_task_picks_one(task: Task) -> None:
    picking = dataclasses.replace(
        task, model=TwoHeads(), teacher=TwoHeads(), output=lambda returned: returned["logits"]
    )

    check_task(picking)

    example = task.example_input
    assert torch.equal(picked(picking, picking.model)(example), picking.model(example)["logits"])
    assert picked(task, task.model) is task.model


class Returning(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> object:
        return self.value


class Pairs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


# Values that no annotation allows come from users without a type checker.
BAD_TASKS: list[tuple[dict[str, object], str]] = [
    ({"model": "net"}, r"model must be a torch\.nn\.Module, but got a value of type str"),
    ({"example_input": [0.0]}, "example_input must be a tensor, but got a value of type list"),
    ({"example_input": torch.zeros(2, 3)}, r"of shape \(1, \.\.\.\), but got shape \(2, 3\)"),
    ({"example_input": torch.tensor(0.0)}, r"of shape \(1, \.\.\.\), but got shape \(\)"),
    (
        {"example_input": torch.zeros(1, 4)},
        r"model \w+ cannot run a batch of 1 example of shape \(4,\): .*mat1 and mat2.*\. Its forward must take",
    ),
    ({"model": nn.Sequential(nn.Linear(3, 2), nn.Flatten(0))}, r"\(1, classes\), but got shape \(2,\)"),
    ({"model": nn.LSTM(3, 2)}, r"model must return one tensor, but LSTM returns a tuple of 2; .*outputs\[0\]"),
    ({"model": Returning({"scores": 1, "aux": 2})}, r"but Returning returns a dict of 2; .*outputs\['scores'\]"),
    ({"model": Returning(SimpleNamespace(kind="x", scores=torch.zeros(1, 2)))}, r"Namespace of 1; .*outputs\.scores, "),
    ({"model": Returning(None)}, "must return one tensor, but Returning returns None"),
    ({"model": nn.Linear(3, 2).half()}, r"weights must be float32, but weight is float16: call model\.float\(\) first"),
    ({"model": nn.DataParallel(nn.Linear(3, 2))}, r"it is a DataParallel: give its \.module"),
    (
        {"model": nn.Sequential(Pairs())},
        r"cannot run .*missing 1 required .* \(in 0 \(Pairs\)\)\. Its forward",
    ),
    ({"train": dataset([])}, "training set is empty"),
    ({"test": dataset([])}, "test set is empty"),
    ({"train": iter([])}, "training set must be a map-style data set, but type list_iterator has no __len__"),
    ({"test": TensorDataset(torch.zeros(2, 3))}, r"Item 0 of the test set must be \(input, target\)"),
    ({"train": [{"image": 0}]}, r"Item 0 of the training set must be \(input, target\).* type dict"),
    (
        {"test": dataset([0, 1], shape=(4,))},
        r"test set .* example_input\[0\], \(3,\), but item 0 has \(4,\)",
    ),
    ({"train": dataset([0, 1, 2, 3])}, r"in \[0, 2\).*training set has label 2 at index 2"),
    ({"test": dataset([0, -1])}, r"in \[0, 2\).*test set has label -1 at index 1"),
    (
        {"test": dataset([0.5, 1.0])},
        r"labels must be integers.*has 0\.5 \(torch\.float32\) at index 0",
    ),
    ({"test": [(torch.zeros(3), True)]}, "labels must be integers.*test set has True"),
    ({"test": [(torch.zeros(3), [0, 1])]}, r"one an item, but the test set has targets of shape \(2,\)"),
    ({"test": [(torch.zeros(3), 0), (torch.zeros(3), 7)]}, "test set has label 7 at index 1"),
    ({"test": Subset(dataset([0, 9, 1, 5]), [2, 0, 3])}, "test set has label 5 at index 2"),
    ({"train": WithTargets([0, 0, 4])}, "training set has label 4 at index 2"),
    ({"teacher": "big"}, r"teacher must be a torch\.nn\.Module, but got a value of type str"),
    ({"teacher": nn.Linear(3, 4)}, r"teacher must give .*shape \(1, 2\), but it gives shape \(1, 4\)"),
    ({"teacher": nn.Linear(5, 2)}, "The teacher Linear cannot run a batch of 1 example"),
    (
        {"augment": lambda x: x[:1]},
        r"augment must keep .* shape \(2, 3\), but it returned shape \(1, 3\)",
    ),
    ({"augment": lambda x: x.no_such}, "augment fails on a batch of shape .*: AttributeError"),
    ({"normalise": lambda x: x[:, :2]}, r"normalise must keep .* shape \(2, 3\), but it returned shape \(2, 2\)"),
    ({"normalise": lambda x: x.long()}, r"normalise must return numbers of type float, but it returned torch\.int64"),
    ({"normalise": lambda x: x / "2"}, "normalise fails on a batch of shape .*: TypeError"),
    ({"output": lambda returned: returned["logits"]}, "Task.output fails on what the model returns: IndexError"),
    (
        {"output": lambda returned: [returned]},
        "Task.output must pick one tensor, but it returns a value of type list",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_TASKS)
def test_each_mistake_in_a_task_is_one_sentence(task: Task, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_task(dataclasses.replace(task, **change))

    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text


def test_with_an_own_loss_outputs_and_targets_are_free(task: Task) -> None:
    free = dataset([0.5, 7.0])

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    check_task(dataclasses.replace(task, model=nn.Flatten(0), train=free, test=free, loss=loss))


def test_labels_come_from_targets_without_reading_the_items(task: Task) -> None:
    check_task(dataclasses.replace(task, train=WithTargets([0, 1, 1])))


def test_labels_behind_a_target_transform_come_from_the_items(task: Task) -> None:
    check_task(dataclasses.replace(task, train=Transformed([5, 6, 5])))

    with pytest.raises(InputError, match="training set has label 3 at index 1"):
        check_task(dataclasses.replace(task, train=Transformed([5, 8])))


def test_checking_takes_no_random_numbers_from_the_run(task: Task) -> None:
    noisy = dataclasses.replace(task, augment=lambda inputs: inputs + torch.rand_like(inputs))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)

    check_task(noisy)

    assert torch.equal(torch.rand(1), expected)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a task file named plates.py."""

    def write_file(text: str) -> Path:
        path = tmp_path / "plates.py"
        path.write_text(textwrap.dedent(text))
        return path

    return write_file


def test_a_task_is_loaded_relative_to_a_folder(write: Callable[[str], Path], tmp_path: Path) -> None:
    write(TASK_FILE)

    loaded = load_task("plates.py:build", tmp_path)

    assert loaded.name == "toy"
    check_task(loaded)


def test_an_absolute_path_needs_no_folder(write: Callable[[str], Path]) -> None:
    assert load_task(f"{write(TASK_FILE)}:build", Path("elsewhere")).name == "toy"


def test_a_task_file_may_import_its_neighbours(write: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "plates_helper.py").write_text("NAME = 'from the neighbour'")
    text = TASK_FILE.replace("def build():", "def build():\n    from plates_helper import NAME")
    write(text.replace('"toy"', "NAME"))
    before = list(sys.path)

    assert load_task("plates.py:build", tmp_path).name == "from the neighbour"
    assert sys.path == before


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "plates.py").write_text(TASK_FILE.replace("toy", folder))
    first, second = (load_task(f"{folder}/plates.py:build", tmp_path) for folder in ("a", "b"))

    assert (first.name, second.name) == ("a", "b")


@pytest.mark.parametrize(
    ("text", "ref", "message"),
    [
        ("", "dishes.py:build", r"task file .*/dishes\.py does not exist"),
        (
            "",
            "plates.py",
            r"given as plates\.py:function, but 'plates\.py' names no function",
        ),
        ("", "plates.py:", r"'plates\.py:' names no function"),
        ("def build(): ...", "plates.py:biuld", r"no function biuld in .*plates\.py; the nearest is build\."),
        ("def build(): ...", "plates.py:zzz", r"no function zzz in .*/plates\.py\.$"),
        ("build = 3", "plates.py:build", r"build in .*/plates\.py must be a function, but it is of type int"),
        ("def build(): ...", "plates.py:build", r"must return a nightpress\.evaluators\.Task, but .* None"),
        (
            "def build(): return 1, 2",
            "plates.py:build",
            r"build in .*/plates\.py must return .* a value of type tuple",
        ),
        (
            "import no_such_lib",
            "plates.py:build",
            r"ModuleNotFoundError: .*_lib.* \(.*/plates\.py:1\)",
        ),
        ("x = 1\ny = (", "plates.py:build", r"Importing .* raised SyntaxError: .*\(.*/plates\.py:2\)"),
        ("import sys\nsys.exit('bye')", "plates.py:build", r"raised SystemExit: bye \(.*/plates\.py:2\)"),
        (
            "def read():\n    raise OSError('first\\nno disk.')\ndef build():\n    read()",
            "plates.py:build",
            r"build in .*/plates\.py raised OSError: no disk \(.*/plates\.py:2\)\.$",
        ),
        (
            "def build(x): ...",
            "plates.py:build",
            r"build in .* raised TypeError: .* missing 1 .*'x'",
        ),
        (
            "import torch\ndef build():\n    torch.ones(2) @ torch.ones(3)",
            "plates.py:build",
            r"plates\.py:3\)",
        ),
    ],
)
def test_each_mistake_in_a_task_file_is_one_sentence(
    write: Callable[[str], Path], tmp_path: Path, text: str, ref: str, message: str
) -> None:
    write(text)

    with pytest.raises(InputError, match=message) as caught:
        load_task(ref, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_users_own_input_error_is_passed_on(write: Callable[[str], Path], tmp_path: Path) -> None:
    error = "from nightpress.spaces.errors import InputError\n"
    write(error + "def build():\n    raise InputError('DATA_DIR must be set.')")

    with pytest.raises(InputError, match=r"^DATA_DIR must be set\.$"):
        load_task("plates.py:build", tmp_path)


def test_a_file_that_failed_can_be_mended_and_loaded(write: Callable[[str], Path], tmp_path: Path) -> None:
    write("oops")
    with pytest.raises(InputError, match="NameError: name 'oops' is not defined"):
        load_task("plates.py:build", tmp_path)

    write(TASK_FILE)
    assert load_task("plates.py:build", tmp_path).name == "toy"


def test_the_digest_changes_with_weights_names_types_and_structure() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    first = task_digest(model)
    renamed = nn.Sequential()
    renamed.add_module("a", model[0])
    renamed.add_module("1", model[1])
    others = [renamed, nn.Sequential(model[0], nn.ReLU6()), nn.Sequential(model[0], nn.ReLU()).bfloat16()]

    assert len(first) == 16
    assert len({first, *map(task_digest, others)}) == 4


def test_the_digest_is_the_same_for_the_same_model() -> None:
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    assert task_digest(one) != task_digest(two)

    two.load_state_dict(one.state_dict())

    assert task_digest(one) == task_digest(two)


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three images in each of two classes, and where the example finds them."""
    for split in ("train", "test"):
        for name, grey in (("cat", 0), ("dog", 255)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (32, 32), (grey, grey, grey)).save(folder / f"{index}.png")
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    monkeypatch.setenv("CIFAR10_WEIGHTS", str(tmp_path / "net.th"))
    return tmp_path


def test_the_cifar10_example_reads_folders_and_weights(cifar10: Path) -> None:
    shapes = {"conv1.weight": (16, 3, 3, 3), "linear.weight": (10, 64), "linear.bias": (10,)}
    weights = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
    blocks = [f"layer{stage}.{block}." for stage in (1, 2, 3) for block in (0, 1, 2)]
    for prefix in ["", *blocks]:
        stage = int(prefix[5]) if prefix else 1
        width = 8 * 2**stage
        for norm in ("bn1", "bn2") if prefix else ("bn1",):
            for part in ("weight", "bias", "running_mean", "running_var"):
                weights[f"{prefix}{norm}.{part}"] = torch.ones(width)
            weights[f"{prefix}{norm}.num_batches_tracked"] = torch.tensor(1)
        if prefix:
            narrow = width // 2 if prefix in ("layer2.0.", "layer3.0.") else width
            weights[f"{prefix}conv1.weight"] = torch.zeros(width, narrow, 3, 3)
            weights[f"{prefix}conv2.weight"] = torch.zeros(width, width, 3, 3)
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, cifar10 / "net.th")

    task = load_task(f"{CIFAR10_EXAMPLE}:build")

    check_task(task)
    train = materialise(task.train)
    assert train.inputs.shape == (6, 3, 32, 32)
    assert train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.inputs.dtype == torch.uint8
    assert task.model_inputs(train.inputs)[3, :, 0, 0].tolist() == pytest.approx([2.249, 2.429, 2.640], abs=1e-3)
    assert task.augment is not None
    assert task.augment(train.inputs).shape == train.inputs.shape


def test_the_cifar10_example_says_what_is_missing(cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"weights file .*/net\.th of CIFAR10_WEIGHTS does not exist"):
        load_task(f"{CIFAR10_EXAMPLE}:build")
    monkeypatch.setenv("CIFAR10_DIR", str(cifar10 / "cat"))
    with pytest.raises(InputError, match=r"folders train and test, but there is no .*/cat/train"):
        load_task(f"{CIFAR10_EXAMPLE}:build")
    monkeypatch.delenv("CIFAR10_DIR")
    with pytest.raises(InputError, match="environment variable CIFAR10_DIR must be set"):
        load_task(f"{CIFAR10_EXAMPLE}:build")
