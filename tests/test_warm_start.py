"""A night that begins with what earlier ones found: a few policies of their fronts, which it can train."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nightpress.search.config import Limits
from nightpress.search.folder import read_run
from nightpress.search.night import MOST_EARLIER, earlier_fronts
from nightpress.search.records import TrialState
from nightpress.search.session import Prepared, Session
from nightpress.search.storages import open_storage
from nightpress.search.trials import enqueue
from nightpress.spaces.errors import InputError
from nightpress.spaces.plan import plan
from nightpress.spaces.plans import Choices, policy_at
from nightpress.spaces.policy import FP32, INT8, LayerBits, Policy, digest
from nightpress.spaces.space import Space, canonical, uniform
from test_planning import TASK
from test_search import quality
from test_trials import PLANNED, SPACE, UNCOMPRESSED, Priced, begun


class Costly(Priced):
    """Prices many at once, as one after the other."""

    def costs_of(self, choices: Choices) -> NDArray[np.float64]:
        prices = [self.predict(policy_at(self.prepared.anatomy, choices, i)) for i in range(len(choices))]
        return np.array([(price[0], price[3]) for price in prices])


class Blind(Costly):
    """On a device where nothing is known of integers."""

    def costs_of(self, choices: Choices) -> NDArray[np.float64]:
        found = super().costs_of(choices)
        found[(choices.bits > 0).any(axis=1)] = np.nan
        return found


def earlier(folder: Path, policies: Sequence[Policy], rules: Sequence[Policy] = ()) -> Path:
    """A night on disk whose accuracies follow the work that is left: all of its policies are on its front."""
    folder.mkdir()
    session = begun(folder, PLANNED, record=open_storage(folder, None)).session
    for i, policy in enumerate([*rules, *policies]):
        enqueue(session, policy, "baseline" if i < len(rules) else "search", f"policy {i}")
        trial = session.store.ask()
        session.store.begin(trial, policy, 0.0)
        latency_ms, low_ms, high_ms, size_bytes = session.predict(policy)
        session.store.note(
            trial.number, size_bytes=size_bytes, macs=1, params=1,
            predicted={"latency_ms": latency_ms, "low_ms": low_ms, "high_ms": high_ms, "measured": False},
        )  # fmt: skip
        accuracy = 0.6 + 0.3 * size_bytes / (1000 + UNCOMPRESSED.params)
        session.store.note_quality(trial.number, quality(accuracy))
        session.store.finish(trial.number, TrialState.COMPLETE, finished=1.0)
    session.update(model=SPACE.anatomy.digest)
    return folder


def narrowed(widths: Sequence[float], bits: LayerBits = INT8, removed: tuple[str, ...] = ()) -> list[Policy]:
    """Policies that keep so much of every group."""
    found = (replace(uniform(SPACE.anatomy, width=w, bits=bits), removed_blocks=removed) for w in widths)
    return [canonical(policy, SPACE.anatomy) for policy in found]


def digests(policies: Sequence[Policy]) -> set[str]:
    return {digest(policy) for policy in policies}


def next_night(folder: Path, *runs: Path, kind: type[Priced] = Costly, **space: Any) -> Session:
    folder.mkdir()
    session = begun(folder, PLANNED, kind=kind, warm_start=tuple(map(str, runs))).session
    if space:
        offered: Space = replace(SPACE, **space)
        session.provide(
            prepared=Prepared(task=TASK, anatomy=SPACE.anatomy, space=offered, train_items=160, step_ms=9.0)
        )
    return session


def decisions(session: Session) -> list[str]:
    session.update()
    return [f"{d['decision']}: {d['reason']}" for d in read_run(session.folder.path).decisions]


def test_a_night_begins_with_the_front_of_an_earlier_one(tmp_path: Path) -> None:
    best = narrowed([0.25, 0.5, 0.75])
    slower = narrowed([0.25, 0.5], FP32)  # as accurate, and take four times as long
    before = earlier(tmp_path / "before", [*best, *slower])

    found = earlier_fronts(next_night(tmp_path / "next", before))

    assert digests(found) == digests(best)


def test_of_the_fronts_of_earlier_nights_a_few_policies_are_taken_however_many_nights_there_are(tmp_path: Path) -> None:
    widths = [step / 8 for step in range(2, 8)]
    tried, removing = narrowed(widths), narrowed(widths, removed=("one",))
    one, two = earlier(tmp_path / "one", tried), earlier(tmp_path / "two", removing)
    session = next_night(tmp_path / "next", one, two)

    found = earlier_fronts(session)

    assert len(digests(found)) == len(found) == MOST_EARLIER
    [said] = decisions(session)
    there = len(digests([*tried, *removing]))
    assert said.startswith(f"enqueued {MOST_EARLIER} of {there} policies of {one}, {two}: warm_start: ")


def test_rules_of_an_earlier_night_are_left_to_the_rules_of_this_one(tmp_path: Path) -> None:
    rules, tried = narrowed([0.5]), narrowed([0.25, 0.75])
    before = earlier(tmp_path / "before", tried, rules)

    assert digests(earlier_fronts(next_night(tmp_path / "next", before))) == digests(tried)


def test_policies_that_this_night_does_not_offer_are_left_out_and_counted(tmp_path: Path) -> None:
    tried, removing = narrowed([0.25, 0.75]), narrowed([0.5], removed=("one",))
    session = next_night(tmp_path / "next", earlier(tmp_path / "before", [*tried, *removing]), blocks=False)

    assert digests(earlier_fronts(session)) == digests(tried)
    assert decisions(session)[0] == (
        "left out 1 of 3 policies of earlier fronts: warm_start: 1 make choices that this run's space or max_macs does "
        "not allow, 0 cannot be priced on its target"
    )


def test_policies_that_cannot_be_priced_on_this_target_are_left_out(tmp_path: Path) -> None:
    integers, floats = narrowed([0.25]), narrowed([0.75], FP32)
    session = next_night(tmp_path / "next", earlier(tmp_path / "before", [*integers, *floats]), kind=Blind)

    assert digests(earlier_fronts(session)) == digests(floats)
    assert "1 cannot be priced on its target" in decisions(session)[0]


def test_policies_beyond_a_limit_of_this_night_are_not_among_its_first_trials(tmp_path: Path) -> None:
    tried = narrowed([0.25, 0.75])
    before = earlier(tmp_path / "before", tried)
    session = next_night(tmp_path / "next", before)
    between_ms = sum(session.predict(policy)[0] for policy in tried) / 2
    session.config = replace(session.config, limits=Limits(max_latency_ms=between_ms))

    assert digests(earlier_fronts(session)) == digests(tried[:1])


def test_a_run_of_another_task_is_refused_though_its_model_has_the_same_shape(tmp_path: Path) -> None:
    before = earlier(tmp_path / "before", narrowed([0.5]))
    state = json.loads((before / "state.json").read_text())
    (before / "state.json").write_text(json.dumps({**state, "task": "signs"}))

    message = rf"^warm_start: {before} is a run of task 'signs', this one's is '{TASK.name}'\.$"
    with pytest.raises(InputError, match=message):
        earlier_fronts(next_night(tmp_path / "next", before))


def test_a_run_of_the_same_task_with_other_data_or_of_an_older_version_is_taken(tmp_path: Path) -> None:
    before = earlier(tmp_path / "before", narrowed([0.5]))
    state = json.loads((before / "state.json").read_text())
    assert "task" not in state
    for name, known in {"older": {}, "more data": {"task": TASK.name, "data": "another digest"}}.items():
        (before / "state.json").write_text(json.dumps({**state, **known}))
        assert len(earlier_fronts(next_night(tmp_path / name, before))) == 1


def test_policies_with_more_work_than_this_night_allows_do_not_crowd_out_those_with_less(tmp_path: Path) -> None:
    tried = narrowed([step / 8 for step in range(2, 8)])
    session = next_night(tmp_path / "next", earlier(tmp_path / "before", tried))
    macs = [plan(session.prepared.anatomy, policy).macs for policy in tried]
    session.config = replace(session.config, limits=Limits(max_macs=sorted(macs)[1]))

    found = [plan(session.prepared.anatomy, policy).macs for policy in earlier_fronts(session)]

    assert sorted(found) == sorted(macs)[:2]
