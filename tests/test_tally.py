"""Figures over trials that are kept up to date agree with those counted anew."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from nightpress.search.pareto import losses, non_dominated
from nightpress.search.records import Latency, Quality, TrialRecord, TrialState
from nightpress.search.tally import RECENT, Tally

STATES = (TrialState.COMPLETE, TrialState.COMPLETE, TrialState.STOPPED, TrialState.FAILED, TrialState.INFEASIBLE)


def record(number: int, state: TrialState, accuracy: float, latency_ms: float, size_bytes: int) -> TrialRecord:
    quality = Quality(rung="short", split="search", accuracy=accuracy, accuracy_se=0.01, samples=9, seconds=latency_ms)
    latency = Latency(latency_ms=latency_ms, low_ms=latency_ms, high_ms=latency_ms, measured=False)
    return TrialRecord(
        number=number, state=state, role="search", name=None, digest=f"{size_bytes:x}", policy={}, qualities=(quality,),
        predicted=latency, size_bytes=size_bytes,
    )  # fmt: skip


@st.composite
def trials(draw: st.DrawFn) -> list[TrialRecord]:
    kinds = st.tuples(st.sampled_from(STATES), st.integers(0, 5), st.integers(1, 5), st.integers(1, 5))
    drawn = draw(st.lists(kinds, max_size=40))
    return [record(i, state, a / 10, float(ms), size) for i, (state, a, ms, size) in enumerate(drawn)]


def tallied(records: Sequence[TrialRecord]) -> Tally:
    tally = Tally()
    for one in records:
        tally.add(one)
    return tally


def point(one: TrialRecord) -> tuple[float, float, float]:
    assert one.quality is not None
    assert one.latency is not None
    assert one.size_bytes is not None
    return losses(one.quality.accuracy, one.latency.latency_ms, one.size_bytes)


@given(trials())
def test_the_front_kept_up_to_date_is_the_front(records: list[TrialRecord]) -> None:
    tally = tallied(records)
    full = [one for one in records if one.state is TrialState.COMPLETE]
    front = {point(full[i]) for i in non_dominated([point(one) for one in full])}

    assert {where for where, _ in tally.front} == front
    assert len(tally.front) == len(front)
    tally.refront(records)
    assert {where for where, _ in tally.front} == front


@given(trials())
def test_spans_are_sorted_and_a_policy_is_known_by_its_first_trial(records: list[TrialRecord]) -> None:
    tally = tallied(records)

    assert tally.spans == sorted(sum(q.seconds for q in t.qualities) for t in records if t.state is TrialState.COMPLETE)
    for one in records:
        done = [t.number for t in records if t.digest == one.digest and t.state.name in {"COMPLETE", "STOPPED"}]
        assert tally.number_of(one.digest) == (done[0] if done else None)


def test_a_long_night_is_judged_by_its_front_and_its_last_trials() -> None:
    best = record(0, TrialState.COMPLETE, 0.9, 1.0, 1)
    tally = tallied([best, *(record(i, TrialState.COMPLETE, 0.1, 9.0, 9) for i in range(1, RECENT + 50))])

    judges = tally.judges()

    assert best in judges
    assert len(judges) == RECENT + 1


def test_a_latency_that_was_measured_since_is_that_of_the_judges() -> None:
    """Another trial would be stopped as dominated by what it was predicted to take."""
    seen = [record(i, TrialState.COMPLETE, 0.1 * i, 1.0 + i, 1) for i in range(4)]
    tally = tallied(seen)
    slow = [*seen[:2], record(2, TrialState.COMPLETE, 0.2, 9.0, 1), seen[3]]

    tally.refront(iter(slow))

    assert sorted(tally.judges(), key=lambda one: one.number) == slow
