"""How much easier the search split is than the test split, and what that makes of the least accuracy that counts.

The search split is a part of the training data, which given weights have usually been trained on: ResNet-20 has 97 % on
it where it has 89 % on the test split of CIFAR-10. A fine-tune, which leaves it out, forgets a part of that. What the
user asks for is asked of the test split, and the test split is not what a search should look at; so the limit moves by
what the uncompressed network still has beyond its accuracy on the test split after its own short fine-tune. A long one
forgets more: once a baseline has had it, the limit moves by what that has on the one split beyond the other. Baselines
are verified in any case, so no candidate's test accuracy is looked at.
"""

import math

from ..evaluators.evaluate import Outcome
from .config import Limits
from .corner import limits_at
from .records import UNCOMPRESSED, Rung
from .session import Session

LONG_GAP = "long_gap"
"""Of the study, which the drivers of a shared one agree on."""
NEAR = 0.03
"""Of accuracy: long fine-tunes that end no further below ``min_accuracy`` tell what those gain that reach it."""


def note_gap(session: Session) -> None:
    """Compare the splits once, when the rules have had their short fine-tune. One standard error of the difference is
    left out: a limit that is too strict by chance costs points, one that is too lax only time."""
    least, test = session.config.limits.min_accuracy, session.state["given"]["test"]
    if "split_gap" in session.state:
        return
    tuned = [q for t in session.store.trials() if t.name == UNCOMPRESSED for q in t.qualities if q.rung == Rung.SHORT]
    if not tuned:
        return
    noise = math.hypot(tuned[0].accuracy_se or 0.0, test["accuracy_se"] or 0.0)
    gap = max(0.0, tuned[0].accuracy - test["accuracy"] - noise)
    session.update(split_gap=gap)
    if gap and least is not None:
        session.folder.decide(
            "baselines", f"min_accuracy is {least + gap:.4f} on the search split",
            f"after its short fine-tune the uncompressed network has {tuned[0].accuracy:.1%} there, and "
            f"{test['accuracy']:.1%} on the test split as it was given; less one standard error of the difference",
            given=session.state["given"]["search"]["accuracy"], min_accuracy=least,
        )  # fmt: skip


def note_long_gap(session: Session, name: str | None, found: Outcome) -> None:
    """Compare the splits again by a baseline's long fine-tune: the uncompressed network's, or, until there is that, the
    first one's. With 6.2 points by the short fine-tune and 2.2 after ten epochs, ResNet-20's own limit was out of reach
    of every network, and a night ended without a finalist."""
    least, known = session.config.limits.min_accuracy, session.state.get("long_gap")
    if found.exported is None or (known is not None and name != UNCOMPRESSED):
        return
    noise = math.hypot(found.search.accuracy_se or 0.0, found.exported.accuracy_se or 0.0)
    gap = max(0.0, found.search.accuracy - found.exported.accuracy - noise)
    session.update(long_gap=gap)
    if name == UNCOMPRESSED:
        session.store.agreed(LONG_GAP, gap)
    if least is None:
        return
    session.folder.decide(
        "search", f"min_accuracy is {least + gap:.4f} on the search split after a long fine-tune",
        f"after its own {name} has {found.search.accuracy:.1%} there, and {found.exported.accuracy:.1%} on the test "
        "split; less one standard error of the difference", min_accuracy=least,
    )  # fmt: skip


def take_long_gap(session: Session) -> bool:
    """Where the baselines of a shared study are another driver's: what that has told of the uncompressed network's long
    fine-tune. True when it is new."""
    if "long_gap" in session.state or session.store.driver is None or (told := session.store.known(LONG_GAP)) is None:
        return False
    session.update(long_gap=told)
    return True


def search_limits(session: Session, rung: str) -> Limits:
    """:func:`limits_at` of a night. What a trial must show at the short rung so that a long fine-tune may still bring
    it within them is another matter: see :func:`least_short`."""
    return limits_at(session.state, session.config.limits, rung)


def least_short(session: Session) -> float | None:
    """The accuracy after the short fine-tune below which no long one reaches ``min_accuracy``: less than that by the
    most that any gained which came near it. None without that limit, and while no long one has come so far."""
    least = search_limits(session, Rung.LONG).min_accuracy
    if least is None:
        return None
    longs = session.store.longs()
    gained = [
        longs[t.number].accuracy - t.quality.accuracy for t in session.store.trials()
        if t.quality is not None and t.number in longs and longs[t.number].accuracy >= least - NEAR
    ]  # fmt: skip
    return least - max(0.0, *gained) if gained else None
