"""The model card: what this export is, what was measured, and how, in words."""

from typing import Any

from ..search.records import RunRecord, TrialRecord, Verified
from ..spaces.policy import Distill

_CARD = """# {title}

A compressed version of the model of task `{task}`, made by nightpress {version}.

## What was measured
| | this export | the original |
|---|---|---|
| test accuracy | {accuracy} | {original} |
| latency | {latency_ms:.3f} ms (repeat error {repeat:.1%}) | {reference_ms:.3f} ms |
| speed | {ratio:.2f}× | 1× |
| file | {size_bytes:,} bytes | {original_bytes} |

- Accuracy: ONNX Runtime on the whole test split ({samples} examples), weights from the rung `{rung}`. The original's
  accuracy is the better of the given weights and of the uncompressed model after the same extra training.
- Latency: batch {batch}, {threads} thread(s), {cpu}, onnxruntime {runtime}; lowest of windows that were spread in time
  and interleaved with the original.
- Agreement with the fake-quantised torch model on the whole test split: top-1 {agreement:.2%}, largest difference of an
  output {difference:.4f}.
- Layers that run on integer kernels, read back from the optimised graph: {integer_layers} of {layers}.

## How to run it
```python
import json, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = {threads}
session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"],
                                       disabled_optimizers={disabled!r})
logits = session.run(["logits"], {{"input": batch}})[0]   # batch: float32, shape (n, …), preprocessed as in training
```
The session options are part of the measurement (`runtime.json`): with others the speed and the numbers may differ.

## What was done
- policy `{digest}`: {pruned} pruned groups, {quantised} layers below 32 bits, removed blocks: {blocks}
- distillation: {distill}
- fine-tune: learning rate {learning_rate}
- approvals: {approvals}

`policy.json` and `model.safetensors` rebuild the model in torch: `nightpress apply policy.json TASK --weights
model.safetensors --out model.pt`.
"""


def card(run: RunRecord, trial: TrialRecord, verified: Verified, version: str, original_bytes: int | None) -> str:
    """The card's Markdown."""
    policy = trial.policy
    target = run.config["target"]
    device = (run.target or {}).get("device", {})
    return _CARD.format(
        title=f"{run.state.get('task', run.config['task'])}, trial {trial.number}",
        task=run.config["task"],
        version=version,
        accuracy=_accuracy(verified.quality.accuracy, verified.quality.accuracy_se),
        original=_original(run),
        latency_ms=verified.latency.latency_ms,
        repeat=verified.latency.repeat_error or 0.0,
        reference_ms=verified.latency.reference_ms,
        ratio=verified.latency.ratio,
        size_bytes=verified.size_bytes,
        original_bytes=f"{original_bytes:,} bytes" if original_bytes else "unknown",
        samples=verified.quality.samples,
        rung=verified.quality.rung,
        batch=target["batch"],
        threads=target["threads"],
        cpu=device.get("cpu", "unknown CPU"),
        runtime=device.get("runtime_version", "unknown"),
        agreement=verified.top1_agreement,
        difference=verified.max_abs_diff,
        integer_layers=sum(kind == "int8" for kind in verified.bits_used.values()),
        layers=len(verified.bits_used),
        disabled=list(target["disabled_optimizers"]),
        digest=trial.digest,
        pruned=len(policy["prune"]),
        quantised=len(policy["bits"]),
        blocks=", ".join(policy["removed_blocks"]) or "none",
        distill=_distill(policy["distill"]),
        learning_rate=policy["finetune"]["learning_rate"],
        approvals="; ".join(_approval(a) for a in run.approvals if a["trial"] == trial.number) or "none",
    )


def _accuracy(value: float, error: float | None) -> str:
    return f"{value:.4f} ± {error:.4f} (standard error)" if error is not None else f"{value:.4f}"


def _original(run: RunRecord) -> str:
    counted = run.state.get("reference_accuracy")
    if counted is None:
        given = (run.state.get("given") or {}).get("test")
        return _accuracy(given["accuracy"], given["accuracy_se"]) + ", given weights" if given else "unknown"
    longer = (
        f", after the same extra training {counted['trained_longer']:.4f}"
        if counted["trained_longer"] is not None
        else ""
    )
    return f"{counted['counted']:.4f} (given weights {counted['given']:.4f}{longer})"


def _distill(settings: dict[str, Any]) -> str:
    told = Distill(**settings)
    logits = f", α {told.alpha}, T {told.temperature} ({told.schedule})" if told.logit else ""
    return told.method + logits + (f", β {told.feature_weight}" if told.inner else "")


def _approval(entry: Any) -> str:
    return f"{entry['who']}, {entry['time']}: {entry['note']}"
