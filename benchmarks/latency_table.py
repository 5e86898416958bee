"""The table of benchmarks/latency.py: its rows as text, with the goals that each misses."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nightpress.evaluators.latency.target import Fingerprint

TRUTH_POLICIES = 60


def heading(device: Fingerprint) -> Iterator[str]:
    yield "Predicted latency against the truth of 60 fresh policies a network: benchmarks/latency.py."
    yield f"{device.cpu}, {device.cores} cores, {', '.join(device.flags)}; onnxruntime {device.runtime_version},"
    yield "batch 1."
    yield ""
    yield "truth: lowest window of every other pass, four windows each, passes minutes apart (16 windows; with OpenVINO"
    yield "8); the lowest of the passes between and after these is 'truth again'. FLOPs × k: one factor fitted to the"
    yield "calibration. one window: a single measurement of 25 ms. isolated kernels: each layer timed as a model of its"
    yield "own, summed. n: measured policies; cover, ±: of the 90 % interval. Front regret: how much slower than the"
    yield "best the policy is that the predictor would take at each accuracy of the true front, with a stand-in for the"
    yield "accuracy. Seconds of a calibration are those of a clock; refit, policies a second (fresh batches of 10,000)"
    yield "and one prediction are CPU time."


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield (
        f"{'network':16} {'runtime':12} {'thr':>3}  {'method':18} {'n':>3} {'MAPE':>6} {'<5%':>4} {'<10%':>5} "
        f"{'Spearman':>8} {'cover':>6} {'±':>6} {'calib s':>7} {'refit s':>7} {'policies/s':>10} {'one ms':>6} "
        f"{'kB':>5}"
    )
    for row in rows:
        head = f"{row['network']:16} {row['runtime']:12} {row['threads']:3}  "
        for method, errors in row["rows"].items():
            line = (
                f"{errors['mape']:6.1%} {errors['within_5']:4.0%} {errors['within_10']:5.0%} {errors['spearman']:8.4f}"
            )
            if method == "predictor":
                line = (
                    f"{row['policies']:3} {line} {row['coverage']:6.0%} {row['half_width']:6.1%} "
                    f"{row['seconds']:7.0f} {row['refit_seconds']:7.1f} {row['rate']:10,.0f} {row['single_ms']:6.2f} "
                    f"{row['bytes'] / 1000:5.0f}"
                )
            else:
                line = f"{'':3} {line}"
            yield f"{head}{method:18} {line}"
        yield (
            f"{head}front regret: {row['regret']:.2%} ({row['regret_flops']:.1%} by FLOPs), after re-measuring "
            f"{row['remeasured']} of {TRUTH_POLICIES}: {row['regret_remeasured']:.2%}; design: {row['design']}"
        )
        yield (
            f"{head}calibrated {row['calibrated']}, {row['reason']}; its halves differ by "
            f"{row['calibration_noise']['mape']:.1%}; the uncompressed network took {row['reference_then_ms']:.2f} ms "
            f"then, {', '.join(f'{ms:.2f}' for ms in row['reference_ms'])} ms in the passes of the truth "
            f"({row['dates'][0][-5:]} to {row['dates'][-1][-5:]}); {row['refused']} policies refused"
        )
        minutes = row["coverage_by_minute"]
        yield (
            f"{head}coverage had it been calibrated in the minute of each pass: {np.mean(minutes):.0%} "
            f"({', '.join(f'{share:.0%}' for share in minutes)})"
        )
        yield f"{head}{'; '.join(_missed(row)) or 'all goals met'}"
        yield ""


def _missed(row: dict[str, Any]) -> Iterator[str]:
    """Goals that a row misses, with the figure."""
    own, again = row["rows"]["predictor"], row["rows"]["truth again"]
    goals = (
        ("MAPE", own["mape"], own["mape"] <= max(0.04, 1.2 * again["mape"]), f"{max(0.04, 1.2 * again['mape']):.1%}"),
        ("within 10 %", own["within_10"], own["within_10"] >= again["within_10"] - 0.03,
         f"at least {again['within_10'] - 0.03:.0%}"),
        ("coverage", row["coverage"], 0.85 <= row["coverage"] <= 0.95, "85 to 95 %"),
        ("half-width", row["half_width"], row["half_width"] <= 0.12, "12 %"),
        ("regret after re-measuring", row["regret_remeasured"], row["regret_remeasured"] <= 0.005, "0.5 %"),
    )  # fmt: skip
    yield from (f"MISSED {name}: {value:.1%} (goal {goal})" for name, value, met, goal in goals if not met)
    if own["spearman"] < 0.98:
        yield f"MISSED Spearman: {own['spearman']:.4f} (goal 0.98)"
    plain = (
        ("calibration", row["seconds"], 120, "s", row["seconds"] <= 120),
        ("policies a second", row["rate"], 100_000, "", row["rate"] >= 100_000),
        ("a single prediction", row["single_ms"], 5, "ms", row["single_ms"] <= 5),
        ("profile", row["bytes"] / 1e6, 1, "MB", row["bytes"] <= 1e6),
        ("refit", row["refit_seconds"], 5, "s", row["refit_seconds"] < 5),
    )
    yield from (
        f"MISSED {name}: {value:,.3g} {unit} (goal {goal:,})" for name, value, goal, unit, met in plain if not met
    )
