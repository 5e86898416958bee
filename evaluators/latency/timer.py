"""Times ONNX files in windows that are spread in time. Runs as a process of its own and does nothing else.

Needs only numpy and onnxruntime, and nothing of nightpress, so that it can run on another device. Requests and
answers are JSON, one line each, on standard input and output. A request:
``{"models": {key: path}, "threads": 1, "batch": 1, "disabled_optimizers": [], "least_rounds": 4,
"most_rounds": 12, "window_ms": 25, "round_ms": 600, "agree": 0.02}``;
the answer ``{"windows_ms": {key: [...]}}`` or ``{"error": sentence}``.
"""

import json
import sys
import time

import numpy as np
import onnxruntime


def open_session(path, request):  # type: ignore[no-untyped-def]
    """A session and the random input that it is fed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=request["disabled_optimizers"]
    )
    source = session.get_inputs()[0]
    shape = [request["batch"], *source.shape[1:]]
    feed = {source.name: np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    return session, feed


def window(session, feed, window_ms):  # type: ignore[no-untyped-def]
    """Low percentile of the run times within one window, in ms: bursts of other work only ever add."""
    session.run(None, feed)  # caches of the model before are gone: not counted
    times, end = [], time.perf_counter() + window_ms / 1000
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return float(np.percentile(times, 10)) * 1000


def agreed(windows, share):  # type: ignore[no-untyped-def]
    """Whether the two lowest windows lie within a share of each other."""
    lowest = sorted(windows)[:2]
    return len(lowest) == 2 and lowest[1] <= lowest[0] * (1 + share)


def measure(request):  # type: ignore[no-untyped-def]
    """All models in turn, round after round, until the two lowest windows of each agree or the rounds are up."""
    sessions = {key: open_session(path, request) for key, path in request["models"].items()}
    for session, feed in sessions.values():
        session.run(None, feed)
    windows = {key: [] for key in sessions}
    for number in range(request["most_rounds"]):
        start = time.perf_counter()
        for key, (session, feed) in sessions.items():
            windows[key].append(window(session, feed, request["window_ms"]))
        if number + 1 >= request["least_rounds"] and all(agreed(w, request["agree"]) for w in windows.values()):
            break
        time.sleep(max(0.0, request["round_ms"] / 1000 - (time.perf_counter() - start)))
    return {"windows_ms": windows}


def main():  # type: ignore[no-untyped-def]
    """Answer requests until standard input closes."""
    for line in sys.stdin:
        try:
            answer = measure(json.loads(line))
        except Exception as error:  # noqa: BLE001  the runtime raises types of its own that share no base
            answer = {"error": (str(error).splitlines() or [type(error).__name__])[0]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
