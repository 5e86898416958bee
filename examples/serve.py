"""Serve a set of exports and switch between them while the load changes, in plain onnxruntime.

    nightpress export runs/mnist5k --set 3 --out set
    python examples/serve.py set

`choose` is the rule of set.json; `Server` applies it to every request: what is left of a request's time, shared with
those that wait behind it, is the budget. While it is calm the most accurate model answers; under load faster ones take
over. The program sends calm, busy and calm load and prints who answered. Copy what you need; numpy and onnxruntime are
all it takes.
"""

import argparse
import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Model:
    """One export of a set. ``latency_ms`` is that of one request here, ``shape`` of one input."""

    name: str
    accuracy: float
    latency_ms: float
    shape: tuple[int, ...]
    session: Any

    def __call__(self, batch: Array) -> Array:
        return self.session.run(None, {self.session.get_inputs()[0].name: batch})[0]


def load_set(folder: Path, items: int = 1, runs: int = 20) -> list[Model]:
    """All models of a set, fastest first, each timed on this machine with batches of ``items`` inputs."""
    models: list[Model] = []
    for entry in json.loads((folder / "set.json").read_text())["models"]:
        part = folder / entry["dir"]
        runtime = json.loads((part / "runtime.json").read_text())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = runtime["threads"]
        options.inter_op_num_threads = 1
        for name, value in runtime["session_config"].items():
            options.add_session_config_entry(name, value)
        session = onnxruntime.InferenceSession(
            str(part / "model.onnx"), options, providers=runtime["providers"],
            disabled_optimizers=runtime["disabled_optimizers"],
        )  # fmt: skip
        shape = tuple(entry["input"]["shape"][1:])
        model = Model(entry["dir"], entry["accuracy"], 0.0, shape, session)
        models.append(Model(model.name, model.accuracy, time_ms(model, items, runs), shape, session))
    return sorted(models, key=lambda model: model.latency_ms)


def time_ms(model: Model, items: int, runs: int) -> float:
    """Median time of a request in ms."""
    batch = np.zeros((items, *model.shape), np.float32)
    model(batch)
    times: list[float] = []
    for _ in range(runs):
        start = time.perf_counter()
        model(batch)
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


def choose(models: Sequence[Model], budget_ms: float, shape: tuple[int, ...] | None = None) -> Model:
    """The most accurate model for inputs of this shape whose latency is within the budget; the fastest when none is.

    Raises LookupError when no model takes such inputs.
    """
    fitting = [model for model in models if shape is None or model.shape == shape]
    if not fitting:
        raise LookupError(f"no model takes inputs of shape {shape}")
    within = [model for model in fitting if model.latency_ms <= budget_ms]
    if not within:
        return min(fitting, key=lambda model: model.latency_ms)
    return max(within, key=lambda model: (model.accuracy, -model.latency_ms))


class Server:
    """Answers requests in order, each within ``budget_ms`` of its arrival as far as the models allow."""

    def __init__(self, models: Sequence[Model], budget_ms: float) -> None:
        self._models, self._budget_ms = models, budget_ms
        self._waiting: queue.SimpleQueue[tuple[Array, float, Future[tuple[Array, str]]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, batch: Array) -> "Future[tuple[Array, str]]":
        """A future of the outputs and the name of the model that gave them."""
        answer: Future[tuple[Array, str]] = Future()
        self._waiting.put((batch, time.perf_counter(), answer))
        return answer

    def close(self) -> None:
        """Answer what waits, then end."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (request := self._waiting.get()) is not None:
            batch, arrived, answer = request
            left_ms = self._budget_ms - 1000 * (time.perf_counter() - arrived)
            model = choose(self._models, left_ms / (1 + self._waiting.qsize()), batch.shape[1:])
            try:
                answer.set_result((model(batch), model.name))
            except Exception as error:  # noqa: BLE001  one bad request must not end the service
                answer.set_exception(error)


@dataclass(frozen=True, slots=True)
class Answered:
    """One request of a load: its phase, how long it took from when it was due, who answered."""

    phase: int
    latency_ms: float
    model: str


def send(server: Server, batch: Array, phases: Sequence[tuple[float, float]]) -> list[Answered]:
    """Send the same batch at (requests a second, seconds) for each phase; arrivals do not wait for answers."""
    done: list[Answered] = []
    futures: list[Future[tuple[Array, str]]] = []
    for phase, due in arrivals(phases):
        time.sleep(max(0.0, due - time.perf_counter()))
        future = server.submit(batch)

        def note(answer: Future[tuple[Array, str]], phase: int = phase, due: float = due) -> None:
            done.append(Answered(phase, 1000 * (time.perf_counter() - due), answer.result()[1]))

        future.add_done_callback(note)
        futures.append(future)
    for future in futures:
        future.result()
    server.close()  # the last callback has run when its thread has ended
    return done


def arrivals(phases: Sequence[tuple[float, float]]) -> Iterator[tuple[int, float]]:
    """(phase, time when a request is due)."""
    start = time.perf_counter()
    for phase, (rate, seconds) in enumerate(phases):
        for number in range(int(rate * seconds)):
            yield phase, start + number / rate
        start += seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Send calm, busy and calm load to a set of exports.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=32, help="inputs in a request")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each phase")
    given = parser.parse_args()
    models = load_set(given.folder, given.items)
    for model in models:
        print(f"{model.name}: {model.latency_ms:.2f} ms a request, accuracy {model.accuracy:.4f}")
    best = choose(models, float("inf"))
    batch = np.zeros((given.items, *best.shape), np.float32)
    capacity = 1000 / best.latency_ms
    phases = [(0.4 * capacity, given.seconds), (1.2 * capacity, given.seconds), (0.4 * capacity, given.seconds)]
    answered = send(Server(models, 5 * best.latency_ms), batch, phases)
    for phase, name in enumerate(("calm", "busy", "calm")):
        part = [answer for answer in answered if answer.phase == phase]
        p95 = np.percentile([answer.latency_ms for answer in part], 95)
        who = ", ".join(f"{model} {count}" for model, count in sorted(Counter(a.model for a in part).items()))
        print(f"{name}: {len(part)} requests, p95 {p95:.1f} ms, answered by {who}")


if __name__ == "__main__":
    main()
