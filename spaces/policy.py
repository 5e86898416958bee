"""A policy: one choice for everything that can be compressed. Data, not code."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, cast

from .errors import InputError

SCHEMA = 1
IMPORTANCES = ("l2", "l1", "bn")
DISTILL_METHODS = ("none", "logit")
SCHEDULES = ("constant", "halving", "linear")
WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8, 32)
ACTIVATION_BITS = (8, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBits:
    """Bit widths of one layer; 32 means that it stays in fp32."""

    weights: int = 32
    activations: int = 32

    @property
    def int8(self) -> bool:
        """Whether the layer runs on integer kernels: both operands are quantised."""
        return self.weights <= 8 and self.activations <= 8


FP32 = LayerBits()
INT8 = LayerBits(weights=8, activations=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill:
    """Logit distillation: α·T²·KL(teacher ‖ student at T) + (1−α)·loss (Hinton et al. 2015, eq. 2).

    ``schedule`` moves T over the fine-tune: ``constant``, ``halving`` (halved every
    quarter of it) or ``linear`` (from T down to 1.5, never up).
    """

    method: str = "logit"
    alpha: float = 0.7
    temperature: float = 3.0
    schedule: str = "constant"


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTune:
    """Hyperparameters of the fine-tune that follows compression."""

    learning_rate: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One choice for everything.

    ``prune`` maps a group's name to the ratio of its channels that are removed, in [0, 1);
    ``bits`` a layer's name to its bit widths; what is not named keeps all channels and fp32.
    ``model`` is the digest of the model that the names belong to.
    """

    model: str
    prune: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    bits: Mapping[str, LayerBits] = field(default_factory=lambda: MappingProxyType({}))
    removed_blocks: tuple[str, ...] = ()
    importance: str = "l2"
    distill: Distill = Distill()
    finetune: FineTune = FineTune()

    def __getstate__(self) -> dict[str, object]:
        """Mappings may be read-only views, which do not pickle: plain dictionaries travel."""
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**state, "prune": dict(self.prune), "bits": dict(self.bits)}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """The policy as JSON-ready data; zero ratios and fp32 layers are left out."""
    ratios = {k: min(round(v, 6), 0.999999) for k, v in sorted(policy.prune.items())}  # a ratio of 1 could not be read
    distill, finetune = policy.distill, policy.finetune
    return {
        "schema": SCHEMA,
        "model": policy.model,
        "prune": {k: v for k, v in ratios.items() if v > 0},
        "bits": {k: asdict(v) for k, v in sorted(policy.bits.items()) if v != FP32},
        "removed_blocks": sorted(set(policy.removed_blocks)),
        "importance": policy.importance,
        "distill": {**asdict(distill), "alpha": float(distill.alpha), "temperature": float(distill.temperature)},
        "finetune": {"learning_rate": float(finetune.learning_rate)},
    }


def policy_to_json(policy: Policy) -> str:
    """The policy file's text."""
    return json.dumps(policy_to_dict(policy), indent=2) + "\n"


def digest(policy: Policy) -> str:
    """Twelve hexadecimal digits that name the policy: equal policies have equal digests."""
    canonical = json.dumps(policy_to_dict(policy), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def policy_from_json(text: str, source: str) -> Policy:
    """Read a policy file; ``source`` names it in errors. Raises InputError."""
    try:
        data: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{source}: a policy is a JSON file, but line {error.lineno} is not: {error.msg}.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        raise InputError(f"{source}: a policy is a JSON file, but this one cannot be read: {error}.") from None
    return policy_from_dict(data, source)


def policy_from_dict(data: object, source: str) -> Policy:
    """The inverse of :func:`policy_to_dict`. Raises InputError with the key that is wrong."""
    reader = _Reader(source)
    top = reader.mapping(data, "policy")
    schema = top.get("schema")
    if schema != SCHEMA:
        raise InputError(
            f"{source}: schema must be {SCHEMA}, the version that this nightpress reads, but got {schema!r}."
        )
    # An export says beside the policy which model, data and code it came from.
    reader.known(top, {f.name for f in fields(Policy)} | {"schema", "digests"}, "")
    distill = reader.mapping(top.get("distill", {}), "distill")
    reader.known(distill, {f.name for f in fields(Distill)}, "distill.")
    finetune = reader.mapping(top.get("finetune", {}), "finetune")
    reader.known(finetune, {f.name for f in fields(FineTune)}, "finetune.")
    removed = top.get("removed_blocks", [])
    if not isinstance(removed, list) or not all(isinstance(name, str) for name in cast("list[object]", removed)):
        raise InputError(f"{source}: removed_blocks must be a list of block names, but got {removed!r}.")
    return Policy(
        model=reader.text(top.get("model"), "model"),
        prune={
            name: reader.number(value, f"prune.{name}", 0, 1, high_open=True)
            for name, value in reader.mapping(top.get("prune", {}), "prune").items()
        },
        bits={
            name: reader.bits(value, f"bits.{name}")
            for name, value in reader.mapping(top.get("bits", {}), "bits").items()
        },
        removed_blocks=tuple(sorted(set(cast("list[str]", removed)))),
        importance=reader.one_of(top.get("importance", "l2"), IMPORTANCES, "importance"),
        distill=Distill(
            method=reader.one_of(distill.get("method", "logit"), DISTILL_METHODS, "distill.method"),
            alpha=reader.number(distill.get("alpha", 0.7), "distill.alpha", 0, 1),
            temperature=reader.number(distill.get("temperature", 3.0), "distill.temperature", 1, 100),
            schedule=reader.one_of(distill.get("schedule", "constant"), SCHEDULES, "distill.schedule"),
        ),
        finetune=FineTune(
            learning_rate=reader.number(finetune.get("learning_rate", 0.02), "finetune.learning_rate", 0, 10)
        ),
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Checks of one file; every message names the file and the key."""

    source: str

    def mapping(self, value: object, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise InputError(f"{self.source}: {key} must be a JSON object, but got {value!r}.")
        return cast("dict[str, Any]", value)

    def known(self, value: Mapping[str, object], allowed: set[str], prefix: str) -> None:
        for key in value:
            if key not in allowed:
                raise InputError(f"{self.source}: unknown key {prefix}{key}{nearest(key, sorted(allowed))}.")

    def text(self, value: object, key: str) -> str:
        if not isinstance(value, str):
            raise InputError(f"{self.source}: {key} must be a string, but got {value!r}.")
        return value

    def number(self, value: object, key: str, low: float, high: float, *, high_open: bool = False) -> float:
        closing = ")" if high_open else "]"
        in_range = (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and (low <= value < high if high_open else low <= value <= high)  # never true of NaN
        )
        if not in_range:
            raise InputError(f"{self.source}: {key} must be a number in [{low}, {high}{closing}, but got {value!r}.")
        return float(cast("float", value))

    def one_of(self, value: object, allowed: tuple[str, ...], key: str) -> str:
        if value not in allowed:
            raise InputError(f"{self.source}: {key} must be one of {', '.join(allowed)}, but got {value!r}.")
        return str(value)

    def bits(self, value: object, key: str) -> LayerBits:
        pair = self.mapping(value, key)
        self.known(pair, {"weights", "activations"}, f"{key}.")
        for name, allowed in (("weights", WEIGHT_BITS), ("activations", ACTIVATION_BITS)):
            width = pair.get(name, 32)
            if isinstance(width, bool) or width not in allowed:
                listed = ", ".join(map(str, allowed))
                raise InputError(f"{self.source}: {key}.{name} must be one of {listed}, but got {width!r}.")
        return LayerBits(weights=int(pair.get("weights", 32)), activations=int(pair.get("activations", 32)))


def nearest(word: str, known: list[str]) -> str:
    """``"; did you mean x?"`` when a known name is close, else the list of a few."""
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?".rstrip("?")
    shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
    return f" (known: {shown})"
