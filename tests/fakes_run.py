"""Runs made by hand: a full night, an empty one, and small pieces to build others from."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from nightpress.search.records import Latency, Quality, RunRecord, TrialRecord, TrialState, Verified

START = datetime(2026, 11, 21, 22, 30, tzinfo=UTC)
REFERENCE = {"accuracy": 0.5, "latency_ms": 1.0, "size_bytes": 1_200_000}
BLOCKS = 9
STAGE_CHANNELS = (16, 32, 64)


def quality(
    accuracy: float, *, rung: str = "short", split: str = "search", samples: int = 2000, losses: int = 10
) -> Quality:
    error = float(np.sqrt(max(accuracy * (1 - accuracy), 0.0) / samples))
    curve = tuple(round(0.3 + 1.4 * 0.72**step * (1.1 - accuracy), 4) for step in range(losses))
    return Quality(
        rung=rung,
        split=split,
        accuracy=accuracy,
        accuracy_se=error,
        samples=samples,
        seconds=42.0,
        losses=curve,
    )


def predicted(latency_ms: float) -> Latency:
    return Latency(latency_ms=latency_ms, low_ms=0.92 * latency_ms, high_ms=1.1 * latency_ms, measured=False)


def measured(latency_ms: float, *, repeat_error: float = 0.012, reference_ms: float | None = 0.87) -> Latency:
    return Latency(
        latency_ms=latency_ms,
        low_ms=latency_ms,
        high_ms=latency_ms * (1 + repeat_error),
        measured=True,
        repeat_error=repeat_error,
        reference_ms=reference_ms,
    )


def trial(
    number: int,
    accuracy: float | None = 0.9,
    latency_ms: float | None = 0.5,
    size_bytes: int | None = 500_000,
    **fields: Any,
) -> TrialRecord:
    """A complete trial of the search, its latency predicted; any field can be given."""
    known: dict[str, Any] = {
        "number": number,
        "state": TrialState.COMPLETE,
        "role": "search",
        "name": None,
        "digest": f"{number:012x}",
        "policy": policy({"stem": 0.25}),
        "qualities": () if accuracy is None else (quality(accuracy),),
        "predicted": None if latency_ms is None else predicted(latency_ms),
        "size_bytes": size_bytes,
        "started": START.timestamp() + 60 * number,
        "finished": START.timestamp() + 60 * number + 55,
    }
    return TrialRecord(**{**known, **fields})


def verify(record: TrialRecord, *, struck_out: str | None = None, **fields: Any) -> TrialRecord:
    """The same trial after export and re-measurement: a little slower than predicted, as accurate."""
    seen = record.quality or quality(0.5)
    latency = record.predicted or predicted(0.5)
    known: dict[str, Any] = {
        "quality": quality(seen.accuracy, rung="long", split="test", samples=10_000, losses=0),
        "simulated": quality(seen.accuracy, rung="long", split="test", samples=10_000, losses=0),
        "search_quality": quality(seen.accuracy, rung="long"),
        "latency": measured(latency.latency_ms * 1.02),
        "size_bytes": record.size_bytes or 0,
        "top1_agreement": 0.998,
        "max_abs_diff": 0.034,
        "bits_used": {"stem": "8/8", "stage1.0.conv1": "8/8", "head": "32/32"},
        "model_file": f"artifacts/{record.number}/model.onnx",
        "struck_out": struck_out,
    }
    return replace(record, verified=Verified(**{**known, **fields}))


def policy(
    prune: Mapping[str, float] | None = None,
    bits: Mapping[str, tuple[int, int]] | None = None,
    removed_blocks: Sequence[str] = (),
) -> dict[str, Any]:
    """A policy's JSON form."""
    return {
        "schema": 1,
        "model": "0123456789ab",
        "prune": dict(prune or {}),
        "bits": {name: {"weights": w, "activations": a} for name, (w, a) in (bits or {}).items()},
        "removed_blocks": list(removed_blocks),
        "importance": "l2",
        "distill": {"method": "logit", "alpha": 0.7, "temperature": 3.0, "schedule": "halving"},
        "finetune": {"learning_rate": 0.02},
    }


INT8 = policy({}, {"stem": (8, 8)})


def run(trials: Sequence[TrialRecord] = (), **fields: Any) -> RunRecord:
    """A finished run of these trials, without limits, target or sensitivity unless given."""
    known: dict[str, Any] = {
        "path": Path("runs/plates"),
        "config": {"task": "plates.py:build", "limits": None, "seed": 0},
        "state": {
            "state": "done",
            "phase": "report",
            "started": START.isoformat(),
            "deadline": (START + timedelta(hours=8)).isoformat(),
            "reference": REFERENCE,
        },
        "trials": tuple(trials),
        "decisions": (),
        "target": None,
        "sensitivity": None,
    }
    return RunRecord(**{**known, **fields})


def empty_run() -> RunRecord:
    """A night that ended before its first trial, and before it wrote anything about itself."""
    return run(state={}, config={})


def one_trial_run() -> RunRecord:
    return run([trial(0)])


def limited(trials: list[TrialRecord], **limits: float) -> RunRecord:
    return run(trials, config={"limits": limits})


def original(accuracy: float = 0.9, latency_ms: float = 1.0, **fields: Any) -> TrialRecord:
    """The uncompressed model as a baseline."""
    known: dict[str, Any] = {
        "number": 0,
        "name": "uncompressed",
        "role": "baseline",
        "policy": policy(),
        **fields,
    }
    return trial(accuracy=accuracy, latency_ms=latency_ms, size_bytes=1_000_000, **known)


@st.composite
def runs(draw: st.DrawFn) -> RunRecord:
    """Runs of a few trials with ties, unknown values, all states, some verified, some struck out."""
    records: list[TrialRecord] = []
    for number in range(draw(st.integers(0, 8))):
        record = trial(
            number,
            draw(st.sampled_from([0.5, 0.8, 0.85, 0.9, None])),
            draw(st.sampled_from([0.2, 0.4, 0.6, None])),
            draw(st.sampled_from([100, 200, None])),
            role=draw(st.sampled_from(["baseline", "seed", "search"])),
            state=draw(st.sampled_from([TrialState.COMPLETE, *TrialState])),
        )
        if record.state is TrialState.COMPLETE and draw(st.integers(0, 3)) == 0:
            record = verify(record, struck_out=draw(st.sampled_from([None, None, "slower"])))
        records.append(record)
    limits = {
        "max_latency_ms": draw(st.sampled_from([None, 0.5])),
        "min_accuracy": draw(st.sampled_from([None, 0.8])),
    }
    return run(records, config={"limits": limits})


# A full night


def anatomy() -> dict[str, Any]:
    """A small residual network: a stem, three stages of three blocks, a head."""
    groups = [{"name": "stem", "channels": 16, "layers": ["stem"]}]
    layers = [{"name": "stem", "kind": "conv", "macs": 442_368, "params": 464}]
    blocks: list[dict[str, Any]] = []
    for index in range(BLOCKS):
        stage = index // 3
        name, channels = f"stage{stage + 1}.{index % 3}", STAGE_CHANNELS[stage]
        convs = [f"{name}.conv1", f"{name}.conv2"]
        groups.append({"name": convs[0], "channels": channels, "layers": [convs[0]]})
        layers += [{"name": conv, "kind": "conv", "macs": 2_359_296, "params": 9 * channels**2} for conv in convs]
        if index % 3:
            blocks.append({"name": name, "layers": convs})
    layers.append({"name": "head", "kind": "linear", "macs": 640, "params": 650})
    return {"groups": groups, "layers": layers, "blocks": blocks}


def _random_policy(rng: np.random.Generator, parts: Mapping[str, Any]) -> tuple[dict[str, Any], float, float]:
    """A policy with the shares of width that it keeps and of layers that run in 8 bits."""
    strength, share = rng.uniform(0.0, 0.6), rng.choice([1.0, rng.uniform(0.2, 1.0)])
    prune = {
        group["name"]: round(float(np.clip(rng.normal(strength, 0.15), 0, 0.8)) * 16) / 16 for group in parts["groups"]
    }
    bits = {layer["name"]: (8, 8) for layer in parts["layers"] if rng.random() < share}
    removed = [block["name"] for block in parts["blocks"] if rng.random() < 0.12]
    kept = 1 - float(np.mean(list(prune.values()))) - 0.06 * len(removed)
    return policy(prune, bits, removed), max(kept, 0.1), len(bits) / len(parts["layers"])


def _worth(rng: np.random.Generator, kept: float, share: float) -> tuple[float, float, int]:
    accuracy = 0.889 - 0.42 * (1 - kept) ** 2.4 - 0.006 * share + rng.normal(0, 0.004)
    latency_ms = 0.11 + 0.76 * kept**1.2 * (1 - 0.62 * share) * rng.uniform(0.95, 1.08)
    return float(accuracy), float(latency_ms), int(1_090_000 * kept**1.6 * (1 - 0.72 * share)) + 9_000


def _baselines(parts: Mapping[str, Any]) -> list[TrialRecord]:
    all_bits = {layer["name"]: (8, 8) for layer in parts["layers"]}
    every = [group["name"] for group in parts["groups"]]
    rows: list[tuple[str, dict[str, Any], float, float, int]] = [
        ("uncompressed", policy(), 0.888, 0.868, 1_099_000),
        ("uniform INT8", policy({}, all_bits), 0.8868, 0.41, 301_000),
        ("uniform width 0.75", policy(dict.fromkeys(every, 0.25)), 0.8428, 0.633, 640_000),
        ("uniform width 0.50", policy(dict.fromkeys(every, 0.5)), 0.7468, 0.304, 295_000),
        ("uniform width 0.75, INT8", policy(dict.fromkeys(every, 0.25), all_bits), 0.8427, 0.37, 190_000),
    ]
    return [
        verify(trial(i, accuracy, latency_ms, size, role="baseline", name=name, policy=how, macs=40_000_000))
        for i, (name, how, accuracy, latency_ms, size) in enumerate(rows)
    ]


def _searched(parts: Mapping[str, Any], count: int) -> list[TrialRecord]:
    rng = np.random.default_rng(7)
    made: list[TrialRecord] = []
    for number in range(5, 5 + count):
        how, kept, share = _random_policy(rng, parts)
        accuracy, latency_ms, size = _worth(rng, kept, share)
        times = {
            "started": START.timestamp() + 1500 + 380 * number,
            "finished": START.timestamp() + 1800 + 380 * number,
        }
        record = trial(
            number,
            accuracy,
            latency_ms,
            size,
            policy=how,
            macs=int(4e7 * kept),
            params=int(2.7e5 * kept),
            **times,
        )
        both = (quality(accuracy - 0.06, rung="bn", losses=0), quality(accuracy))
        made.append(replace(record, qualities=both, role="seed" if number < 10 else "search"))
    for i, (state, reason) in enumerate(
        [
            (TrialState.FAILED, "RuntimeError: mat1 and mat2 shapes cannot be multiplied (8x60 and 64x10)"),
            (TrialState.INFEASIBLE, "predicted 0.98 ms is over the limit of 0.80 ms"),
            (TrialState.STOPPED, "even an optimistic end is dominated by trial 12"),
            (TrialState.STOPPED, "even an optimistic end is dominated by trial 17"),
        ]
    ):
        made[6 * i + 4] = replace(made[6 * i + 4], state=state, reason=reason, qualities=())
    return made


def _finalists(trials: list[TrialRecord]) -> list[TrialRecord]:
    """Verify what is not dominated in accuracy and latency, and strike one out."""
    complete = [t for t in trials if t.state is TrialState.COMPLETE and t.quality and t.predicted]
    values = {t.number: (t.quality.accuracy, t.predicted.latency_ms) for t in complete if t.quality and t.predicted}
    best = [n for n, (a, ms) in values.items() if not any(b >= a and other < ms for b, other in values.values())]
    return [
        verify(t, struck_out="slower than the uncompressed model" if t.number == best[0] else None)
        if t.number in best
        else t
        for t in trials
    ]


def _decisions() -> tuple[dict[str, Any], ...]:
    said = [
        (
            "inspect",
            "left out 2 groups",
            "a dry run changed the output's shape",
            {"groups": ["stage2", "stage3"]},
        ),
        ("calibrate", "predict latency", "1,000 measurements would take 14 of 480 minutes", {"models": 80}),
        ("search", "rungs: 0, 400, 1600 steps", "so that 60 trials fit into 5 h 20 min", None),
        ("search", "sampler: nightpress", "60 trials in 30 dimensions", None),
        ("finalists", "8 finalists", "each adds hypervolume; a long fine-tune takes 6 min", {"share": 0.2}),
    ]
    return tuple(
        {
            "time": (START + timedelta(minutes=17 * i)).isoformat(),
            "phase": phase,
            "decision": decision,
            "reason": reason,
            "evidence": evidence,
        }
        for i, (phase, decision, reason, evidence) in enumerate(said)
    )


def _target(rng: np.random.Generator) -> dict[str, Any]:
    points = [
        {
            "predicted_ms": ms,
            "low_ms": 0.9 * ms,
            "high_ms": 1.12 * ms,
            "measured_ms": float(ms * rng.normal(1, 0.035)),
            "held_out": i % 3 == 0,
        }
        for i, ms in enumerate(rng.uniform(0.15, 0.9, 75).tolist())
    ]
    heldout = {
        "n": 25,
        "mape": 0.031,
        "within_5": 0.84,
        "within_10": 1.0,
        "spearman": 0.991,
        "interval_coverage": 0.92,
    }
    return {"runtime": "onnxruntime", "threads": 1, "batch": 1, "points": points, "heldout": heldout}


def full_run(count: int = 58, **fields: Any) -> RunRecord:
    """A night with baselines, ``count`` trials of the search, finalists and everything around them."""
    parts, rng = anatomy(), np.random.default_rng(3)
    noise = [
        {
            "time": (START + timedelta(minutes=31 * i)).isoformat(),
            "reference_ms": float(rng.normal(0.87, 0.012)) * (1.09 if i == 9 else 1),
            "repeat_error": 0.071 if i == 9 else float(rng.uniform(0.004, 0.03)),
            "phase": "baselines" if i < 2 else "search" if i < 12 else "verify",
        }
        for i in range(15)
    ]
    phases = {"inspect": 12, "calibrate": 840, "baselines": 1260, "sensitivity": 410, "search": 20_400}
    known: dict[str, Any] = {
        "config": {
            "task": "plates.py:build",
            "limits": {"max_latency_ms": 0.8, "min_accuracy": None, "max_size_bytes": None},
            "seed": 0,
        },
        "state": {
            **run().state,
            "seconds": {**phases, "finalists": 3100, "verify": 640, "report": 4},
            "noise": noise,
            "anatomy": parts,
            "host": "bench-1",
            "environment": {
                "python": "3.11.9",
                "onnxruntime": "1.31.1",
                "cpu": "x86-64, 2 cores, AVX512-VNNI",
            },
        },
        "decisions": _decisions(),
        "target": _target(rng),
        "sensitivity": {
            "groups": {group["name"]: float(rng.gamma(1.2, 0.02)) for group in parts["groups"]},
            "blocks": {block["name"]: float(rng.gamma(1.5, 0.04)) for block in parts["blocks"]},
        },
        "approvals": (),
    }
    trials = [*_baselines(parts), *_finalists(_searched(parts, count))]
    known["why"] = {str(t.number): _why(t) for t in trials if t.verified is not None and t.role != "baseline"}
    return run(trials, **{**known, **fields})


def _why(trial: TrialRecord) -> list[dict[str, Any]]:
    """The choices of a finalist, as ``why.json`` holds them; what saves most was measured."""
    kinds = {
        "group": {name: ratio for name, ratio in trial.policy["prune"].items() if ratio},
        "layer": dict.fromkeys(trial.policy["bits"], "8/8"),
        "block": dict.fromkeys(trial.policy["removed_blocks"], "removed"),
    }
    entries = [
        {"kind": kind, "name": name, "choice": choice} for kind, by in kinds.items() for name, choice in by.items()
    ]
    return [
        {**entry, "sensitivity": None if i % 4 == 3 else 0.01 * i, "saved_ms": 0.05 / (i + 1) - 0.004,
         "accuracy_cost": 0.004 - 0.001 * i, "measured": i < 3}
        for i, entry in enumerate(entries)
    ]  # fmt: skip


def big_run(count: int = 2000, dimensions: int = 120) -> RunRecord:
    """A long night in a large space: half of the dimensions are prune ratios, half are bits of layers."""
    rng = np.random.default_rng(5)
    names = [f"backbone.stage{i // 15}.block{i // 3 % 5}.conv{i % 3}" for i in range(dimensions // 2)]
    parts = {
        "groups": [{"name": name, "channels": 64, "layers": [name]} for name in names],
        "layers": [{"name": name, "kind": "conv", "macs": 1, "params": 1} for name in names],
        "blocks": [],
    }
    records: list[TrialRecord] = []
    for number in range(count):
        how, kept, share = _random_policy(rng, parts)
        accuracy, latency_ms, size = _worth(rng, kept, share)
        record = trial(number, accuracy, latency_ms, size, policy=how, macs=int(4e7 * kept), params=int(2.7e5 * kept))
        record = replace(record, qualities=(quality(accuracy - 0.06, rung="bn", losses=0), quality(accuracy)))
        if number % 3 == 1:
            reason = f"even {accuracy:.4f} would be dominated"
            record = replace(record, state=TrialState.STOPPED, qualities=record.qualities[:1], reason=reason)
        records.append(record)
    return run(_finalists(records), state={**full_run().state, "anatomy": parts}, target=_target(rng))


def hostile_run(attack: str) -> RunRecord:
    """A full night in which every name, reason and note is the attack."""
    night = full_run(24)
    trials = [replace(t, name=attack, reason=attack, digest=attack) for t in night.trials]
    state: dict[str, Any] = {
        **night.state,
        "state": attack,
        "phase": attack,
        "host": attack,
        "seconds": {attack: 3.0},
        "noise": [{"time": attack, "reference_ms": 1.0, "repeat_error": 0.2, "phase": attack}],
        "environment": {attack: attack},
        "anatomy": {"groups": [], "layers": [{"name": attack}], "blocks": [{"name": attack, "layers": []}]},
    }
    how = {**policy({attack: 0.5}, {attack: (8, 8)}, [attack]), "importance": attack}
    worst = verify(replace(trials[-1], policy=how), struck_out=attack, bits_used={attack: attack})
    return replace(
        night,
        path=Path(attack.replace("/", "|")),
        config={"task": attack, "limits": None},
        state=state,
        trials=(*trials[:-1], worst),
        decisions=({"time": attack, "phase": attack, "decision": attack, "reason": attack, "evidence": attack},),
        sensitivity={"groups": {attack: 0.1}, attack: {attack: 0.2}},
        why={str(trials[-1].number): [{"kind": attack, "name": attack, "choice": attack, attack: attack}]},
        target={**(night.target or {}), "runtime": attack},
        approvals=({"trial": 1, "who": attack, "note": attack, "time": attack},),
        unreadable=(attack,),
    )


SAMPLES: dict[str, RunRecord] = {
    "full": full_run(),
    "empty": empty_run(),
    "one trial": one_trial_run(),
    "none feasible": limited([trial(0)], max_latency_ms=0.1),
}
"""Runs that every table and page must cope with."""
