"""The files that ``nightpress init`` writes."""

TASK = '''"""A nightpress task: the trained model with its data. Replace the three marked parts by your own."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from nightpress.evaluators import Task


def build() -> Task:
    # 1. Your model, with its trained weights.
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )
    # model.load_state_dict(torch.load("weights.pth", weights_only=True))

    # 2. Your training data: any map-style dataset of (input, label).
    train = TensorDataset(torch.randn(512, 3, 32, 32), torch.randint(0, 10, (512,)))

    # 3. Your test data: touched only by the finalists of a night.
    test = TensorDataset(torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,)))

    return Task(name="my-model", model=model, example_input=torch.randn(1, 3, 32, 32), train=train, test=test)
'''

CONFIG = """# One night of nightpress: nightpress run config.yaml --until 07:00
task: task.py:build            # relative to this file, or a built-in: mnist5k-resnet
target: onnxruntime            # or a profile file; {runtime: onnxruntime, threads: 1, batch: 1} in full
out: runs/my-model             # the run folder, relative to where you start
seed: 0
budget: 8h                     # or until: "07:00"; the command line wins
limits: {}                     # max_latency_ms: 4.0, min_accuracy: 0.90, max_size_bytes: 2000000, max_macs: 20000000
space:
  prune: {max_ratio: 0.8}
  bits: {weights: [8, 32], activations: [8, 32]}
  blocks: true
  distill: [logit]             # true: six methods, for nights long enough to compare them; false: none
search: {sampler: nightpress, runner: local, workers: 1}     # workers: auto; runner: ray, see docs/cluster.md
device: auto                   # cpu | cuda
max_disk: 20GB                 # what the run folder's checkpoints may take
notify: {}                     # webhook: https://..., command: a shell command; told at the end and of trouble
"""
