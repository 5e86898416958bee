"""A policy: one choice for everything that can be compressed. Data, not code."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, cast

from .errors import InputError

SCHEMA = 2
READABLE = (1, 2)
IMPORTANCES = ("l2", "l1", "bn", "activation", "weight_activation", "taylor", "hessian", "random")
RANGES = ("minmax", "percentile", "mse")
SCALES = ("fixed", "learned")
DISTILL_METHODS = ("none", "logit", "feature", "attention", "logit+feature", "logit+attention")
SCHEDULES = ("constant", "halving", "linear")
WEIGHT_BITS = ACTIVATION_BITS = (2, 3, 4, 5, 6, 7, 8, 16, 32)
MAX_STAGES = 20


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
    """What the student learns from the teacher; ``method`` names one term or two, joined by a plus.

    ``logit``: α·T²·KL(teacher ‖ student at T) + (1−α)·loss (Hinton et al. 2015, eq. 2). ``schedule`` moves
    T over the fine-tune: ``constant``, ``halving`` (halved every quarter of it) or ``linear`` (from T down
    to 1.5, never up). ``feature`` (Romero et al. 2015) and ``attention`` (Zagoruyko & Komodakis 2017) add
    ``feature_weight`` times the distance between inner tensors to the loss.
    """

    method: str = "logit"
    alpha: float = 0.7
    temperature: float = 3.0
    schedule: str = "constant"
    feature_weight: float = 1.0

    @property
    def logit(self) -> bool:
        """Whether the teacher's logits are learned from."""
        return "logit" in self.method.split("+")

    @property
    def inner(self) -> str | None:
        """``feature``, ``attention``, or None when only outputs are compared."""
        return next((term for term in self.method.split("+") if term in ("feature", "attention")), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTune:
    """Hyperparameters of the fine-tune that follows compression. ``stages`` above 1 prunes step by step with a part
    of the fine-tune after each: see :func:`nightpress.spaces.stages.stage_policies`."""

    learning_rate: float = 0.02
    stages: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One choice for everything.

    ``prune`` maps a group's name to the ratio of its channels that are removed, in [0, 1);
    ``bits`` a layer's name to its bit widths; ``sparsity`` a layer's name to the share of its weights that are zero,
    in [0, 1) (size only: no runtime skips them). What is not named keeps all channels and weights in fp32.
    ``importance`` ranks channels, ``ranges`` says how quantisers find their ranges after training and ``scales``
    whether training moves them. ``model`` is the digest of the model that the names belong to.
    """

    model: str
    prune: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    bits: Mapping[str, LayerBits] = field(default_factory=lambda: MappingProxyType({}))
    sparsity: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    removed_blocks: tuple[str, ...] = ()
    importance: str = "l2"
    ranges: str = "minmax"
    scales: str = "fixed"
    distill: Distill = Distill()
    finetune: FineTune = FineTune()

    def __getstate__(self) -> dict[str, object]:
        """Mappings may be read-only views, which do not pickle: plain dictionaries travel."""
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**state, "prune": dict(self.prune), "bits": dict(self.bits), "sparsity": dict(self.sparsity)}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """The policy as JSON-ready data; zero ratios, fp32 layers and what schema 1 did not know are left out
    where they say nothing, so that a policy keeps its digest from one schema to the next."""
    distill, finetune = policy.distill, policy.finetune
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "model": policy.model,
        "prune": _ratios(policy.prune),
        "bits": {k: asdict(v) for k, v in sorted(policy.bits.items()) if v != FP32},
        "sparsity": _ratios(policy.sparsity),
        "removed_blocks": sorted(set(policy.removed_blocks)),
        "importance": policy.importance,
        "ranges": policy.ranges,
        "scales": policy.scales,
        "distill": {
            "method": distill.method,
            "alpha": float(distill.alpha),
            "temperature": float(distill.temperature),
            "schedule": distill.schedule,
            "feature_weight": float(distill.feature_weight),
        },
        "finetune": {"learning_rate": float(finetune.learning_rate), "stages": finetune.stages},
    }
    for part, key, silent in _SINCE_2:
        if (data[part] if part else data)[key] == silent:
            del (data[part] if part else data)[key]
    return data


# Keys that schema 2 added, with the value that says nothing. These values are part of the file format.
_SINCE_2: tuple[tuple[str, str, object], ...] = (
    ("", "sparsity", {}),
    ("", "ranges", "minmax"),
    ("", "scales", "fixed"),
    ("distill", "feature_weight", 1.0),
    ("finetune", "stages", 1),
)


def _ratios(ratios: Mapping[str, float]) -> dict[str, float]:
    rounded = {k: min(round(v, 6), 0.999999) for k, v in sorted(ratios.items())}  # a ratio of 1 could not be read
    return {k: v for k, v in rounded.items() if v > 0}


def policy_to_json(policy: Policy) -> str:
    """The policy file's text."""
    return json.dumps(policy_to_dict(policy), indent=2) + "\n"


def digest(policy: Policy) -> str:
    """Twelve hexadecimal digits that name the policy: equal policies have equal digests."""
    # Records of earlier versions are found by their digests, which were taken of a file of schema 1.
    canonical = json.dumps({**policy_to_dict(policy), "schema": 1}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def network_digest(policy: Policy) -> str:
    """Names the network that runs: policies that differ in how its weights are found alone take the same time."""
    return digest(
        Policy(model=policy.model, prune=policy.prune, bits=policy.bits, removed_blocks=policy.removed_blocks)
    )


def one_of_each_network(policies: Iterable[Policy]) -> list[Policy]:
    """The first policy of each network (:func:`network_digest`), in order."""
    found: dict[str, Policy] = {}
    for policy in policies:
        found.setdefault(network_digest(policy), policy)
    return list(found.values())


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
    if isinstance(schema, bool) or schema not in READABLE:
        raise InputError(
            f"{source}: schema must be one of {', '.join(map(str, READABLE))}, the versions that this nightpress "
            f"reads, but got {schema!r}."
        )
    # An export says beside the policy which model, data and code it came from.
    reader.known(top, {f.name for f in fields(Policy)} | {"schema", "digests"}, "")
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
        sparsity={
            name: reader.number(value, f"sparsity.{name}", 0, 1, high_open=True)
            for name, value in reader.mapping(top.get("sparsity", {}), "sparsity").items()
        },
        removed_blocks=tuple(sorted(set(cast("list[str]", removed)))),
        importance=reader.one_of(top.get("importance", "l2"), IMPORTANCES, "importance"),
        ranges=reader.one_of(top.get("ranges", "minmax"), RANGES, "ranges"),
        scales=reader.one_of(top.get("scales", "fixed"), SCALES, "scales"),
        distill=_read_distill(reader, top.get("distill", {})),
        finetune=_read_finetune(reader, top.get("finetune", {})),
    )


def _read_distill(reader: "_Reader", value: object) -> Distill:
    given, default = reader.mapping(value, "distill"), Distill()
    reader.known(given, {f.name for f in fields(Distill)}, "distill.")
    weight = given.get("feature_weight", default.feature_weight)
    return Distill(
        method=reader.one_of(given.get("method", default.method), DISTILL_METHODS, "distill.method"),
        alpha=reader.number(given.get("alpha", default.alpha), "distill.alpha", 0, 1),
        temperature=reader.number(given.get("temperature", default.temperature), "distill.temperature", 1, 100),
        schedule=reader.one_of(given.get("schedule", default.schedule), SCHEDULES, "distill.schedule"),
        feature_weight=reader.number(weight, "distill.feature_weight", 0, 1000),
    )


def _read_finetune(reader: "_Reader", value: object) -> FineTune:
    given, default = reader.mapping(value, "finetune"), FineTune()
    reader.known(given, {f.name for f in fields(FineTune)}, "finetune.")
    rate = given.get("learning_rate", default.learning_rate)
    return FineTune(
        learning_rate=reader.number(rate, "finetune.learning_rate", 0, 10),
        stages=reader.count(given.get("stages", default.stages), "finetune.stages", MAX_STAGES),
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

    def count(self, value: object, key: str, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise InputError(f"{self.source}: {key} must be a whole number in [1, {high}], but got {value!r}.")
        return value

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
    """``"; did you mean x"`` when a known name is close, else the list of a few; nothing where none is known."""
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}"
    if not known:
        return ""
    shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
    return f" (known: {shown})"
