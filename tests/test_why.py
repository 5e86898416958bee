"""What undoing one choice of a finalist would change."""

from dataclasses import replace

import pytest

from nightpress.search.encoding import Encoder
from nightpress.search.proposals import Sensitivity
from nightpress.search.surrogate import Describer, Surrogate
from nightpress.search.why import choices
from nightpress.spaces.policy import FP32, INT8, LayerBits, Policy
from nightpress.spaces.space import Space, uniform
from strategies import toy_anatomy
from test_search import batch_costs_of, costs_of
from test_search_model import observations

INT4 = LayerBits(weights=4, activations=8)
ANATOMY = toy_anatomy()
SPACE = Space(anatomy=ANATOMY, max_ratio=0.8, bit_choices=(FP32, INT8, INT4))
WHOLE = uniform(ANATOMY, width=1, bits=INT8)
WITHOUT = replace(WHOLE, removed_blocks=("one",), bits={n: b for n, b in WHOLE.bits.items() if "one" not in n})


def saved_by_block(policy: Policy) -> float:
    """Milliseconds that the removed block saves."""
    encoder = Encoder(SPACE)
    surrogate = Surrogate(Describer(encoder, Sensitivity()), observations(encoder, 12))
    found = choices(policy, surrogate, batch_costs_of(ANATOMY), Sensitivity())
    [entry] = [entry for entry in found if entry["kind"] == "block"]
    assert (entry["name"], entry["choice"], entry["measured"]) == ("one", "removed", False)
    return entry["saved_ms"]


def latency_ms(policy: Policy, bits: LayerBits) -> float:
    """Of a policy once block ``one`` is back at these bits."""
    back = {"one.a": bits, "one.b": bits}
    return costs_of(ANATOMY)(replace(policy, removed_blocks=(), bits={**policy.bits, **back}))[0]


@pytest.mark.parametrize(
    ("others", "bits"),
    [
        ({}, INT8),
        ({"head": FP32, "stem": FP32}, INT8),
        ({"stem": FP32, "two.a": FP32}, FP32),
        ({"stem": FP32, "two.b": INT4}, INT8),  # one convolution each; of all layers most are INT8
    ],
)
def test_a_removed_block_comes_back_at_the_bits_that_prevail_among_layers_of_its_kind(
    others: dict[str, LayerBits], bits: LayerBits
) -> None:
    policy = replace(WITHOUT, bits={**WITHOUT.bits, **others})

    assert saved_by_block(policy) == pytest.approx(latency_ms(policy, bits) - costs_of(ANATOMY)(policy)[0])
