"""Which networks can be compressed: 32 of torchvision, timm and CIFAR, each through the whole engine.

Each network runs in a process of its own, whose memory is capped at 8 GB: inspect, then a random joint policy (ratios
0 to 0.7, mixed bits, a removed block where there is one) is applied, trains one step, is exported and run in ONNX
Runtime, and its answers are compared with torch. Weights are random, from a fixed seed; since a deep network of random
weights is chaotic (one integer that rounds the other way grows from layer to layer), the batch norms are shifted by
one, which keeps most activations above zero. Then outputs hardly differ from image to image, and even those of
another image are alike: ``apart`` is the lower cosine once the mean over the images is taken off both sides.

    python benchmarks/zoo.py --out docs/results/zoo.txt            # about 20 minutes on one core
    python benchmarks/zoo.py --only resnet18,swin_t
"""

import argparse
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

MEMORY_BYTES = 8 * 1024**3
SECONDS = 900
TORCHVISION = (
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg11", "vgg16_bn", "densenet121", "googlenet",
    "inception_v3", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet1_0",
    "shufflenet_v2_x1_0", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "convnext_tiny", "vit_b_16",
    "swin_t", "ssdlite320_backbone", "deeplabv3_backbone",
)  # fmt: skip
TIMM = ("resnet18", "efficientnet_lite0", "repvgg_a0", "ghostnet_100", "vit_tiny_patch16_224",
        "deit_tiny_patch16_224", "mobilevit_xs")  # fmt: skip
CIFAR = ("cifar_resnet20", "cifar_resnet56")
NAMES = (*TORCHVISION, *(f"timm.{name}" for name in TIMM), *CIFAR)
LEAST_COVERAGE, MOST_ERROR, LEAST_COSINE = 0.70, 1e-3, 0.99


def build(name: str) -> tuple[Any, int, Any]:
    """Model with random weights, side of its images, and what picks its output (None where it returns one tensor)."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    pick, side = None, 224
    if name.startswith("timm."):
        timm = importlib.import_module("timm")  # an extra: only this script needs it here
        model, side = timm.create_model(name.removeprefix("timm.")), 256 if "mobilevit" in name else 224
    elif name in CIFAR:
        from option_a import CifarResNet

        model, side = CifarResNet({"cifar_resnet20": 3, "cifar_resnet56": 9}[name]), 32
    else:
        from torchvision import models

        if name == "ssdlite320_backbone":
            network = models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
            model, side, pick = network.backbone, 320, _third
        elif name == "deeplabv3_backbone":
            network = models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)
            model, pick = network.backbone, _out
        else:
            extra = {"aux_logits": False, "init_weights": False} if name in {"googlenet", "inception_v3"} else {}
            model, side = models.get_model(name, weights=None, **extra), 299 if name == "inception_v3" else 224
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.ones_(module.bias)
        elif isinstance(module, nn.Linear) and not bool(module.weight.any()):
            nn.init.normal_(module.weight, std=0.02)  # torchvision's transformers start with a head of zeros
    return model.eval(), side, pick


def _third(outputs: Any) -> Any:
    """SSDLite's second feature map, behind which its extra layers stand."""
    return outputs["1"]


def _out(outputs: Any) -> Any:
    return outputs["out"]


def try_one(name: str) -> dict[str, Any]:
    """All figures of one network."""
    import numpy as np
    import torch
    from torch.utils.data import TensorDataset

    from nightpress.evaluators import Task
    from nightpress.evaluators.apply import compressor
    from nightpress.evaluators.inspect import inspect
    from nightpress.spaces.policy import FP32, INT8, LayerBits
    from nightpress.spaces.space import Space

    torch.set_num_threads(1)
    model, side, pick = build(name)
    images = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(images, torch.zeros(4, dtype=torch.int64))
    task = Task(name=name, model=model, example_input=images[:1], train=data, test=data, output=pick)
    start = time.perf_counter()
    anatomy, network = inspect(task, cache=False)
    row: dict[str, Any] = {
        "name": name, "inspect_s": time.perf_counter() - start, "groups": len(anatomy.groups),
        "blocks": len(anatomy.blocks), "layers": len(anatomy.layers), "coverage": anatomy.coverage,
    }  # fmt: skip
    made = compressor(anatomy, network, images[:1])
    pairs = (FP32, INT8, LayerBits(weights=4, activations=8), LayerBits(weights=8, activations=32))
    policy = Space(anatomy=anatomy, max_ratio=0.7, bit_choices=pairs).random(np.random.default_rng(1))
    policy = replace(policy, removed_blocks=tuple(block.name for block in anatomy.blocks[:1]))
    with tempfile.TemporaryDirectory() as folder:
        exact = run_policy(task, made, replace(policy, bits={}), images, Path(folder))
        mixed = run_policy(task, made, policy, images, Path(folder))
        whole = replace(policy, bits={layer.name: INT8 for layer in anatomy.layers})
        integer = run_policy(task, made, whole, images, Path(folder))
    row |= {
        "params_kept": mixed["params"] / sum(p.numel() for p in model.parameters()), "fp32_error": exact["error"],
        "mixed_cosine": mixed["cosine"], "int8_cosine": integer["cosine"], "int8_layers": integer["int8"],
        "mixed_int8_layers": mixed["int8"], "cosine_apart": min(mixed["cosine_apart"], integer["cosine_apart"]),
    }  # fmt: skip
    row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    row["seconds"] = time.perf_counter() - start
    return row


def run_policy(task: Any, made: Any, policy: Any, images: Any, folder: Path) -> dict[str, Any]:
    """Apply, train a step, export, run; raises ValueError where a layer does not run as the policy says."""
    import torch

    from nightpress.evaluators.compute import Compute
    from nightpress.evaluators.data import Arrays
    from nightpress.evaluators.evaluate import write_onnx
    from nightpress.evaluators.runtime import Session, bits_used, check_bits, check_grids
    from nightpress.evaluators.training import Trainer

    disabled = ("WeightBiasQuantization",)
    module, planned = made.apply(policy)
    trainer = Trainer(task, Arrays(images, torch.zeros(len(images), dtype=torch.int64)), Compute(), seed=0)
    trainer.reestimate(module)
    train_step(module, images)
    trainer.reestimate(module)
    with torch.no_grad():
        simulated = module(images)
    path = folder / "model.onnx"
    write_onnx(module, planned, policy, path)
    found = Session(path, threads=1, disabled_optimizers=disabled).outputs(images)
    used = bits_used(path, planned, disabled)
    check_bits(used, planned)
    check_grids(path, planned)
    return {
        "error": float((found - simulated).norm() / simulated.norm()),
        "cosine": cosine(found, simulated),
        "cosine_apart": cosine(found - found.mean(0), simulated - simulated.mean(0)),
        "int8": f"{sum(kind == 'int8' for kind in used.values())}/{len(used)}",
        "params": planned.params,
    }


def cosine(found: Any, expected: Any) -> float:
    import torch

    return float(torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0))


def train_step(module: Any, images: Any) -> None:
    """One step of SGD on the mean square of the outputs, which any shape of them allows."""
    import torch

    module.train()
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    loss = module(images).square().mean()
    loss.backward()
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss of the training step is {float(loss)}")
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimiser.step()
    module.eval()


def child(name: str) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        row = try_one(name)
    except Exception as error:  # noqa: BLE001  a table has a line for what failed
        lines = str(error).strip().splitlines() or [""]
        row = {"name": name, "failed": f"{type(error).__name__}: {lines[0]}"}
    print(json.dumps(row))


def passed(row: dict[str, Any]) -> bool:
    """Whether a network meets every figure."""
    return (
        "failed" not in row
        and row["coverage"] >= LEAST_COVERAGE
        and row["fp32_error"] < MOST_ERROR
        and min(row["mixed_cosine"], row["int8_cosine"]) >= LEAST_COSINE
    )


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{row['name']:28} FAILED {row['failed']}"
    return (
        f"{row['name']:28} {'yes' if passed(row) else 'NO':4} {row['coverage']:8.2f} {row['groups']:6} "
        f"{row['blocks']:6} {row['params_kept']:7.2f} {row['fp32_error']:10.1e} {row['int8_cosine']:8.4f} "
        f"{row['int8_layers']:>9} "
        f"{row['mixed_cosine']:8.4f} {row['mixed_int8_layers']:>9} {row['cosine_apart']:7.4f} "
        f"{row['peak_gb']:6.1f} {row['inspect_s']:8.1f} "
        f"{row['seconds']:8.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names, separated by commas")
    parser.add_argument("--out", type=Path, help="also write the table there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    names = options.only.split(",") if options.only else NAMES
    heading = (
        f"{'network':28} {'ok':4} {'coverage':>8} {'groups':>6} {'blocks':>6} {'params':>7} {'fp32 error':>10} "
        f"{'cos int8':>8} {'int8':>9} {'cos mix':>8} {'int8 mix':>9} {'apart':>7} {'GB':>6} "
        f"{'inspect':>8} {'seconds':>8}"
    )
    print(heading, flush=True)
    rows: list[dict[str, Any]] = []
    for name in names:
        command = [sys.executable, __file__, "--child", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
            lines = [text for text in done.stdout.splitlines() if text.startswith("{")]
            row = json.loads(lines[-1]) if lines else {"name": name, "failed": f"ended with code {done.returncode}"}
        except subprocess.TimeoutExpired:
            row = {"name": name, "failed": f"took more than {SECONDS} s"}
        rows.append(row)
        print(line(row), flush=True)
    ok = sum(map(passed, rows))
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "torchvision", "timm", "onnxruntime"))
    summary = f"{ok} of {len(rows)} meet every figure ({versions})"
    print(summary)
    if options.out:
        text = "\n".join([f"$ python {' '.join(sys.argv)}", "", heading, *map(line, rows), "", summary, ""])
        options.out.write_text(text)


if __name__ == "__main__":
    main()
