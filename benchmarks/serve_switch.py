"""Does switching between the models of a set keep the tail short when the load steps up?

    python benchmarks/serve_switch.py SET

Sends the same step load (calm, busy, calm) to a server with the most accurate model alone, with the fastest alone, and
with all of them and the rule of set.json; the three take turns, round after round. The busy phase brings more requests
than the most accurate model can answer. Prints p50 and p95 of each phase, and the mean accuracy of who answered.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from serve import Answered, Model, Server, choose, load_set, send

BUDGET = 6
"""Times the latency of the most accurate model."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Step load with and without switching.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=32, help="inputs in a request")
    parser.add_argument("--seconds", type=float, default=2.5, help="of each phase")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    models = load_set(given.folder, given.items, runs=100)
    best, fastest = choose(models, float("inf")), models[0]
    rate = 1000 / best.latency_ms
    busy = min(1.15 * rate, 0.5 * (rate + 1000 / fastest.latency_ms))
    phases = [(0.5 * rate, given.seconds), (busy, given.seconds), (0.5 * rate, given.seconds)]
    servers: dict[str, list[Model]] = {"most accurate alone": [best], "fastest alone": [fastest], "switching": models}
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, onnxruntime {onnxruntime.__version__}, one thread a model"
    )
    for model in models:
        print(f"  {model.name}: {model.latency_ms:.2f} ms a request of {given.items}, accuracy {model.accuracy:.4f}")
    rates = ", ".join(f"{rate:.0f}" for rate, _ in phases)
    print(f"budget {BUDGET * best.latency_ms:.1f} ms; {rates} requests a second, {given.seconds:g} s each")
    print(f"{given.rounds} rounds, in turns")
    answers: dict[str, list[Answered]] = {name: [] for name in servers}
    batch = np.zeros((given.items, *best.shape), np.float32)
    for _ in range(given.rounds):
        for name, chosen in servers.items():
            answers[name] += send(Server(chosen, BUDGET * best.latency_ms), batch, phases)
    report(answers, models)


def report(answers: dict[str, list[Answered]], models: list[Model]) -> None:
    accuracy = {model.name: model.accuracy for model in models}
    p95 = {name: [quantile(found, phase, 95) for phase in range(3)] for name, found in answers.items()}
    for name, found in answers.items():
        tails = ", ".join(f"{quantile(found, phase, 50):.1f} / {p95[name][phase]:.1f}" for phase in range(3))
        busy = np.mean([accuracy[a.model] for a in found if a.phase == 1])
        calm = np.mean([accuracy[a.model] for a in found if a.phase != 1])
        print(f"{name}: p50 / p95 in ms {tails}; mean accuracy {calm:.4f} calm, {busy:.4f} busy")
    alone, switching = p95["most accurate alone"][1], p95["switching"][1]
    print(f"p95 in the busy phase: {alone:.1f} ms without switching, {switching:.1f} ms with: {alone / switching:.1f}×")


def quantile(found: list[Answered], phase: int, percent: float) -> float:
    return float(np.percentile([answer.latency_ms for answer in found if answer.phase == phase], percent))


if __name__ == "__main__":
    main()
