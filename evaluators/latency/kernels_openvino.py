"""Which kernels OpenVINO's CPU plugin makes of plans.

Read off compiled models and their profiles (OpenVINO 2026.4, AVX-512). A layer with integer weights runs on integers
also where its policy says fp32 activations, if the tensor that it reads is quantised for somebody else: its integers
are there, and the result is the same. Other integer weights are dequantised when a model is compiled. All fp32 layers
of a kind run by one implementation, whatever their channels, and so do all integer ones; a kernel computes the
activation and the sum behind it and converts its result itself.
"""

from ...spaces.anatomy import WEIGHTED
from ...spaces.plan import FUSED_ACTIVATIONS
from ...spaces.plans import Flags, Planner, Plans
from .kernels import CONVERSIONS, Kernels, integer_weights


def kernels(planner: Planner, plans: Plans) -> Kernels:
    """As :func:`nightpress.evaluators.latency.kernels.kernels` for ONNX Runtime."""
    size = len(planner.anatomy.ops)
    absorbed, sums = [0] * size, [0] * size
    nothing: list[Flags] = [0] * size
    int8 = list(plans.int8)
    for position, op in enumerate(planner.anatomy.ops):
        inputs = planner.inputs[position]
        if inputs:
            there = plans.alive[position] & plans.quantised[inputs[0]]
            int8[position] |= there & integer_weights(planner, plans, position) if op.kind in WEIGHTED else there
        if op.kind in FUSED_ACTIVATIONS and inputs:
            absorbed[position] = plans.alive[position]
        if op.kind != "add" or len(inputs) != 2:
            continue
        left = plans.alive[position]
        for read in inputs:
            if planner.anatomy.ops[read].kind in WEIGHTED:
                taken = plans.alive[read] & plans.alone[read] & left
                sums[read] |= taken
                absorbed[position] |= taken
                left &= ~taken
    return Kernels(
        int8=int8, blocked=nothing, stored=nothing, absorbed=absorbed, split=nothing, early=nothing, last=nothing,
        sums=sums, conversions={name: [] for name in CONVERSIONS},
    )  # fmt: skip
