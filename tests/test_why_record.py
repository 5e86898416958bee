"""When ``why.json`` is written, and by which timer."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nightpress.search.cluster import Needs
from nightpress.search.folder import LAYERS, WHY, read_run
from nightpress.search.night import explain
from nightpress.search.places import Places
from nightpress.search.records import Latency, Quality, Verified
from nightpress.spaces.plans import Choices
from nightpress.spaces.policy import INT8
from nightpress.spaces.space import uniform
from test_long_tuning import SPACE, finish, judged


def test_a_finalist_of_a_night_whose_target_is_another_node_is_explained_without_its_layers(tmp_path: Path) -> None:
    session = judged(tmp_path)

    def costs(choices: Choices) -> NDArray[np.float64]:
        kept: Any = choices.kept
        return np.column_stack([kept.sum(axis=1), kept.sum(axis=1)]).astype(np.float64)

    session.provide(
        places=Places(workers=1, most=1, needs=Needs(cpu=1), target_node=True),
        profile=SimpleNamespace(remote=False, forced=None, seconds_each=1e6, costs=costs),  # no time to measure
    )
    finish(session, uniform(SPACE.anatomy, width=0.5, bits=INT8), "search", None, latency_ms=0.2)
    [finalist] = [t for t in session.store.trials() if t.role == "search"]
    score = Quality(rung="long", split="test", accuracy=0.9, accuracy_se=0.01, samples=100, seconds=1.0)
    latency = Latency(latency_ms=0.2, low_ms=0.19, high_ms=0.21, measured=True)
    verified = Verified(
        quality=score, simulated=score, search_quality=replace(score, split="search"), latency=latency,
        size_bytes=80_000, top1_agreement=1.0, max_abs_diff=0.0, bits_used={}, model_file="model.onnx",
    )  # fmt: skip
    session.store.verify(finalist.number, verified)

    explain(session)

    found = session.folder.read_json(WHY) or {}
    assert list(found) == [str(finalist.number)]
    saved = {e["name"]: e["saved_ms"] for e in found[str(finalist.number)] if e["kind"] == "group"}
    assert saved.keys() == {group.name for group in SPACE.anatomy.groups}
    assert min(saved.values()) > 0
    assert not (tmp_path / LAYERS).exists()
    session.update()
    [said] = [d for d in read_run(tmp_path).decisions if d["decision"] == "layers are not profiled"]
    assert said["reason"] == "the target is another node of the cluster"
