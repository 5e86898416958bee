"""``finetune.yaml``: the full-length training of an export's policy, for nightpress and for any other pipeline."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..spaces.errors import InputError
from ..spaces.policy import Policy, policy_from_dict, policy_to_dict
from .origin import Origin

FINETUNE = "finetune.yaml"
EPOCHS = 20.0
"""Of a full-length training, where the user asks for no other number: the longest that a night gives a finalist."""

# What nightpress's trainer does and no key changes: stated for those who train elsewhere.
FIXED: Mapping[str, Any] = {
    "optimizer": {
        "name": "SGD", "momentum": 0.9, "nesterov": True, "weight_decay": 0.0005, "weight_decay_of_vectors": 0.0,
        "clip_grad_norm": 1.0,
    },
    "learning_rate_schedule": {"warm_up": 0.1, "decay": "cosine", "final": 0.0},
    "quantisation": "simulated in every step: weights per channel, activations per tensor, as the plan says",
    "batch_norm": "trained, folded in the export",
}  # fmt: skip

_HEAD = """# The full-length training of this export. `nightpress finetune DIR --out NEW` runs it and writes a new
# export whose numbers are measured again. In a pipeline of your own: `nightpress apply policy.json TASK --weights
# model.safetensors --out model.pt` gives the module; the rest is here. The keys below `fixed` say what nightpress's
# trainer does; the others may be edited.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The editable part. ``task`` as on the command line; ``policy`` with its distillation and learning rate."""

    task: str
    policy: Policy
    epochs: float
    batch_size: int
    seed: int


def recipe_text(origin: Origin, rate: float) -> str:
    """The file's text. The weights were trained at ``rate`` times the policy's learning rate, which was found by
    fine-tunes that are shorter."""
    import yaml

    policy = policy_from_dict(dict(origin.policy), "policy.json")
    data = {
        "schema": 1,
        "task": origin.task,
        "policy": "policy.json",
        "weights": "model.safetensors",
        "epochs": EPOCHS,
        "batch_size": origin.batch_size,
        "seed": origin.seed,
        "learning_rate": float(f"{policy.finetune.learning_rate * rate:.3g}"),
        "distill": asdict(policy.distill),
        "teacher": "the task's teacher, or the uncompressed model",
        "fixed": dict(FIXED),
    }
    return _HEAD + yaml.safe_dump(data, sort_keys=False, width=120)


def read_recipe(path: Path, policy: Mapping[str, Any]) -> Training:
    """The training that the file asks for, with ``policy``'s structure. Raises InputError naming the wrong key."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.") from None
    except yaml.YAMLError:
        raise InputError(f"{path}: is not a YAML file.") from None
    if not isinstance(data, dict) or data.get("schema") != 1:
        raise InputError(f"{path}: must be a mapping with schema: 1, as export writes it.")
    if data.get("fixed") != FIXED:
        raise InputError(f"{path}: the keys below fixed say what nightpress's trainer does and cannot be changed.")
    finetune = {**policy.get("finetune", {}), "learning_rate": data.get("learning_rate")}
    chosen = {**policy, "distill": data.get("distill"), "finetune": finetune}
    return Training(
        task=_text(path, data, "task"),
        policy=policy_from_dict(chosen, str(path)),
        epochs=_number(path, data, "epochs", 0, 100_000),
        batch_size=int(_number(path, data, "batch_size", 2, 1_000_000)),
        seed=int(_number(path, data, "seed", 0, 2**63 - 1)),
    )


def with_policy(origin: Origin, training: Training, digest: str) -> Origin:
    """The origin of what this training makes."""
    policy = policy_to_dict(training.policy)
    trained = origin.trained(digest, policy, training.epochs)
    return replace(trained, batch_size=training.batch_size, seed=training.seed)


def _text(path: Path, data: Mapping[str, Any], key: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise InputError(f"{path}: {key} must be a string, but got {value!r}.")
    return value


def _number(path: Path, data: Mapping[str, Any], key: str, low: float, high: float) -> float:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{path}: {key} must be a number in [{low}, {high}], but got {value!r}.")
    return float(value) if key == "epochs" else int(value)
