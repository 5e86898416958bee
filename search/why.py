"""Why a finalist is as it is: what each of its choices saves, and what it probably costs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from ..evaluators.latency.measure import MeasurementError, measure_policies
from ..spaces.anatomy import Anatomy
from ..spaces.plans import choices_of
from ..spaces.policy import FP32, Policy
from ..spaces.space import bits_name, canonical
from .costs import ManyCosts
from .finalists import surrogate_of
from .folder import WHY
from .proposals import Sensitivity
from .session import Session
from .store import policy_of
from .surrogate import Surrogate

MEASURED = 3
"""Choices of each finalist whose saving is measured: those that save most."""


def record_why(session: Session) -> None:
    """Write ``why.json``: for each verified trial of the search its choices, the one that saves most first."""
    chosen = [t for t in session.store.trials() if t.verified is not None and t.role != "baseline"]
    if not chosen:
        return
    surrogate = surrogate_of(session)
    policies = {t.number: policy_of(t) for t in chosen}
    found = {
        number: choices(policy, surrogate, session.costs_of, session.sensitivity) for number, policy in policies.items()
    }
    needed = session.profile.seconds_each * (MEASURED + 1) * len(found)
    if not session.profile.remote and session.clock.left_before("report") > needed:
        _measure(session, policies, found)
    session.folder.write_json(WHY, {str(number): entries for number, entries in found.items()})


def choices(policy: Policy, surrogate: Surrogate, costs: ManyCosts, sensitivity: Sensitivity) -> list[dict[str, Any]]:
    """Each choice with what undoing it alone would change: ``saved_ms`` (predicted latency without it less that with
    it; a choice whose kernels nobody can price is left out) and ``accuracy_cost`` (the surrogate's median without it
    less that with it)."""
    encoder = surrogate.describer.encoder
    anatomy = encoder.space.anatomy
    without = _undone(policy, anatomy)
    if not without:
        return []
    every = [policy, *(other for _, other in without)]
    with threadpool_limits(limits=1, user_api="blas"):
        median = surrogate.accuracy(np.stack([encoder.row(p) for p in every]))[0]
        latency_ms = costs(choices_of(anatomy, every))[:, 0]
    entries = [
        {
            **what, "sensitivity": _damage(what, sensitivity), "saved_ms": float(slower - latency_ms[0]),
            "accuracy_cost": float(value - median[0]), "measured": False,
        }
        for (what, _), value, slower in zip(without, median[1:], latency_ms[1:], strict=True)
        if np.isfinite(slower - latency_ms[0])
    ]  # fmt: skip
    return sorted(entries, key=lambda entry: -entry["saved_ms"])


def _undone(policy: Policy, anatomy: Anatomy) -> list[tuple[dict[str, Any], Policy]]:
    """Each choice of the policy, with the policy that does without it."""
    found: list[tuple[dict[str, Any], Policy]] = []
    for name, ratio in policy.prune.items():
        rest = {other: r for other, r in policy.prune.items() if other != name}
        found.append(({"kind": "group", "name": name, "choice": ratio}, replace(policy, prune=rest)))
    found += [
        ({"kind": "block", "name": name, "choice": "removed"}, _with_block(policy, name, anatomy))
        for name in policy.removed_blocks
    ]
    for name, pair in policy.bits.items():
        wide = {other: p for other, p in policy.bits.items() if other != name}
        found.append(({"kind": "layer", "name": name, "choice": bits_name(pair)}, replace(policy, bits=wide)))
    return [(what, canonical(other, anatomy)) for what, other in found]


def _with_block(policy: Policy, name: str, anatomy: Anatomy) -> Policy:
    """The policy with a removed block back in full width, at the bits that most of its layers of the same kind have; of
    as many, those that more of all its layers have. A policy says nothing of what it removes, and in fp32 among
    integers the block would look dearer than it is."""
    kept = tuple(other for other in policy.removed_blocks if other != name)
    gone, still = (
        {layer for block in anatomy.blocks if block.name in names for layer in block.layers}
        for names in (policy.removed_blocks, kept)
    )
    there = [(layer.kind, policy.bits.get(layer.name, FP32)) for layer in anatomy.layers if layer.name not in gone]
    of_kind, of_all = Counter(there), Counter(pair for _, pair in there)
    back = {
        layer.name: max(of_all, key=lambda pair: (of_kind[layer.kind, pair], of_all[pair]), default=FP32)
        for layer in anatomy.layers
        if layer.name in gone - still
    }
    return replace(policy, removed_blocks=kept, bits={**policy.bits, **back})


def _damage(what: Mapping[str, Any], sensitivity: Sensitivity) -> float | None:
    """What the probe of this choice alone showed, in nats; None where it was not probed."""
    if what["kind"] == "layer":
        return sensitivity.bits.get(what["name"], {}).get(what["choice"])
    return (sensitivity.groups if what["kind"] == "group" else sensitivity.blocks).get(what["name"])


def _measure(session: Session, policies: Mapping[int, Policy], found: dict[int, list[dict[str, Any]]]) -> None:
    """Replace the largest savings by measured ones, each beside the finalist itself."""
    anatomy, target = session.prepared.anatomy, session.config.target
    asked: dict[str, Policy] = {}
    for number, entries in found.items():
        without = {(w["kind"], w["name"]): p for w, p in _undone(policies[number], anatomy)}
        asked[f"{number}"] = policies[number]
        asked |= {_key(number, e): without[e["kind"], e["name"]] for e in entries[:MEASURED]}
    try:
        timings, _ = session.on_target("verify", lambda timer: measure_policies(anatomy, asked, target, timer))
    except MeasurementError:  # what is predicted is still worth saying
        return
    level_ms = session.profile.reference_ms
    ratios = {key: timings[key].latency_ms / (timings[key].reference_ms or level_ms) for key in asked}
    for number, entries in found.items():
        for entry in entries[:MEASURED]:
            saved = ratios[_key(number, entry)] - ratios[f"{number}"]
            entry |= {"saved_ms": saved * level_ms, "measured": True}


def _key(number: int, entry: Mapping[str, Any]) -> str:
    return f"{number}:{entry['kind']}:{entry['name']}"
