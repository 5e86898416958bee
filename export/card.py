"""The model card: what this export is, what was measured, and how, in words."""

import json
from collections.abc import Mapping
from typing import Any

from ..evaluators.latency.target import Target
from ..evaluators.latency.timer import PROVIDERS, session_config
from ..search.records import NOTE, PICK, REJECT, Latency, Verified
from ..spaces.policy import Distill
from .origin import Origin

_CARD = """# {title}

A compressed version of the model of task `{task}`, made by nightpress {version}.

## What was measured
| | this export | the original |
|---|---|---|
| test accuracy | {accuracy} | {original} |
| latency | {latency_ms:.3f} ms ({known}) | {reference_ms:.3f} ms |
| speed | {ratio:.2f}× ({ratio_low:.2f}× to {ratio_high:.2f}×) | 1× |
| file | {size_bytes:,} bytes | {original_bytes} |

- Accuracy: {runtime_name} on the whole test split ({samples} examples), weights from the rung `{rung}`{longer}.
{judged_against}- Latency: batch {batch}, {threads} thread(s), {cpu}, {runtime_id} {runtime}; {how}.
- Speed: within the interval is what another measurement on this device may well give; below it `verify.py` fails.
- Agreement with the fake-quantised torch model on the whole test split: top-1 {agreement:.2%}, largest difference of an
  output {difference:.2g}.
- Layers that run on integer kernels, read back from the optimised graph: {integer_layers} of {layers}.

## How to run it
```python
{program}   # batch: float32, shape (n, …), preprocessed as in training
```
The session options are part of the measurement (`runtime.json`): with others the speed and the numbers may differ.
`python verify.py --data test.npz` checks files, accuracy and speed on the machine that serves it.

## What was done
- policy `{digest}`: {pruned} pruned groups, {quantised} layers below 32 bits, removed blocks: {blocks}
- distillation: {distill}
- fine-tune: learning rate {learning_rate}
- approvals: {approvals}

`policy.json` and `model.safetensors` rebuild the model in torch: `nightpress apply policy.json TASK --weights
model.safetensors --out model.pt`. `finetune.yaml` holds the full-length training.
"""
RUNTIME_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_OPENVINO = """import openvino
options = {{"INFERENCE_NUM_THREADS": {threads}, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}}
model = openvino.Core().compile_model("model.onnx", "CPU", options)
logits = model(batch)[0]"""
_ONNXRUNTIME = """import json, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = {threads}
{config}session = onnxruntime.InferenceSession("model.onnx", options, providers={providers},
                                       disabled_optimizers={disabled!r})
logits = session.run(["logits"], {{"input": batch}})[0]"""
_SAID = {PICK: "approved by", REJECT: "rejected by", NOTE: "note of"}


def card(origin: Origin, verified: Verified, measured: Mapping[str, Any], version: str) -> str:
    """The card's Markdown."""
    policy, target, device = origin.policy, origin.target, origin.device
    return _CARD.format(
        title=f"{_line(origin.name)}, trial {origin.trial}",
        task=_line(origin.task),
        version=version,
        accuracy=_accuracy(verified.quality.accuracy, verified.quality.accuracy_se),
        original=_original(origin.reference_accuracy),
        judged_against=_judged_against(origin.reference_accuracy),
        latency_ms=verified.latency.latency_ms,
        known=_known(verified.latency),
        reference_ms=verified.latency.reference_ms,
        ratio=verified.latency.ratio,
        ratio_low=measured["ratio_low"],
        ratio_high=measured["ratio_high"],
        size_bytes=measured["size_bytes"],
        original_bytes=f"{origin.original_bytes:,} bytes" if origin.original_bytes else "unknown",
        samples=verified.quality.samples,
        rung=verified.quality.rung,
        longer=f" and {origin.epochs:g} more epochs of training" if origin.epochs else "",
        batch=target.batch,
        threads=target.threads,
        cpu=_line(device.get("cpu", "unknown CPU")),
        runtime_name=RUNTIME_NAMES.get(target.runtime, target.runtime),
        runtime_id=target.runtime,
        program=_program(target, device),
        how=_how(verified.latency, origin.forced),
        runtime=_line(device.get("runtime_version", "unknown")),
        agreement=verified.top1_agreement,
        difference=verified.max_abs_diff,
        integer_layers=sum(kind == "int8" for kind in verified.bits_used.values()),
        layers=len(verified.bits_used),
        digest=origin.digest,
        pruned=len(policy["prune"]),
        quantised=len(policy["bits"]),
        blocks=", ".join(policy["removed_blocks"]) or "none",
        distill=_distill(policy["distill"]),
        learning_rate=float(f"{policy['finetune']['learning_rate'] * verified.rate:.3g}"),
        approvals="; ".join(map(_said, origin.approvals)) or "none",
    )


def _program(target: Target, device: Mapping[str, Any]) -> str:
    """How to load and run the file with the settings of the measurement."""
    if target.runtime == "openvino":
        return _OPENVINO.format(threads=target.threads)
    return _ONNXRUNTIME.format(
        threads=target.threads, providers=json.dumps(PROVIDERS[target.runtime]),
        disabled=list(target.disabled_optimizers),
        config="".join(f'options.add_session_config_entry("{name}", "{value}")  # or integers would saturate\n'
                       for name, value in session_config(device).items()),
    )  # fmt: skip


def _known(latency: Latency) -> str:
    """How far the latency is known, in a word."""
    if not latency.measured:
        return "predicted"
    return f"repeat error {latency.repeat_error:.1%}" if latency.repeat_error is not None else "repeat error unknown"


def _how(latency: Latency, forced: str | None) -> str:
    """How the latency is known, and what does not hold of the profile that the search went by."""
    overridden = f"; {_line(forced)}" if forced else ""
    if latency.measured:
        noisy = "" if latency.settled else "; the machine was so noisy that the two lowest windows never agreed"
        told = f";\n  **found by a profile that does not hold** (--force){overridden}" if forced else ""
        return f"lowest of windows that were spread in time\n  and interleaved with the original{noisy}{told}"
    return (
        f"**predicted, not measured** ({latency.low_ms:.3f} to {latency.high_ms:.3f} ms in 90 % of cases{overridden})"
        ":\n  `python verify.py` measures it on the device"
    )


def _accuracy(value: float, error: float | None) -> str:
    return f"{value:.4f} ± {error:.4f} (standard error)" if error is not None else f"{value:.4f}"


def _original(known: Mapping[str, float | None] | None) -> str:
    if known is None:
        return "unknown"
    longer = known["trained_longer"]
    after = f", after the same extra training {longer:.4f}" if longer is not None else ""
    return f"{known['counted']:.4f} (given weights {known['given']:.4f}{after})"


def _judged_against(known: Mapping[str, float | None] | None) -> str:
    """What the original's accuracy is that of, in a sentence."""
    if known is None:
        return ""
    if known["trained_longer"] is None:
        return "  The original's is that of the given weights; it had no extra training.\n"
    longer = "of the uncompressed model after the same extra training"
    return f"  The original's is the better of the given weights and {longer}.\n"


def _distill(settings: Mapping[str, Any]) -> str:
    told = Distill(**settings)
    logits = f", α {told.alpha}, T {told.temperature} ({told.schedule})" if told.logit else ""
    return told.method + logits + (f", β {told.feature_weight}" if told.inner else "")


def _said(entry: Mapping[str, Any]) -> str:
    note = f": {_line(entry['note'])}" if entry.get("note") else ""
    return f"{_SAID[entry['action']]} {_line(entry['who'])}, {_line(entry['time'])}{note}"


def _line(value: object) -> str:
    """A user's text in one line, so that it cannot begin a heading or leave a table."""
    return " ".join(str(value).split()).replace("|", "\\|")
