"""What drivers that share a study must have in common, since all their trials stand on one front.

Who comes first says what a short fine-tune is, from its own budget; the others take it over. What is the user's word
(task, seed, target, limits, space) must be the same in all of them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..spaces.errors import InputError
from .session import Session
from .storages import close, open_storage
from .store import Store, has_study

TERMS, RUNGS = "terms", "rungs"
LENGTHS = ("short_steps", "looks", "study", "part_steps", "bn")
"""Of the state's ``rungs``: what makes an accuracy comparable with another one of the same rung."""


def terms_of(session: Session) -> dict[str, Any]:
    """What must be the same in all drivers, by the names that its user knows it by. The seed comes before the data: it
    says what is split off for the search."""
    config, prepared = session.config, session.prepared
    return {
        "model": prepared.anatomy.digest, "task": prepared.task.name, "seed": config.seed,
        "training data": session.state["data"],
        **{f"target.{key}": getattr(config.target, key) for key in ("runtime", "threads", "batch")},
        # A policy is evaluated once: one driver's refusal would be everybody's.
        **{f"limits.{key}": value for key, value in asdict(config.limits).items()},
        # What is on offer is one for a parameter of a study; as it comes back from the storage, where tuples are lists.
        **{f"space.{key}": value for key, value in json.loads(json.dumps(asdict(config.space))).items()},
        **{f"finetune.{key}": value for key, value in asdict(config.finetune).items() if key != "finalists"},
    }  # fmt: skip


def look(session: Session) -> int:
    """Before anything is measured: refuse to join a search that is another one. Returns how many of its baselines
    other drivers have begun. Raises InputError."""
    search = session.config.search
    if search.storage is None:
        return 0
    storage = open_storage(session.folder.path, search.storage)
    try:
        if not has_study(storage, search.study):
            return 0
        store = Store(storage, study=search.study)
        if not session.state.get("agreed"):
            _check(session, store.known(TERMS) or {}, terms_of(session))
        return sum(t.role == "baseline" and t.driver != session.state.get("driver") for t in store.trials())
    finally:
        close(storage)


def agree(session: Session) -> None:
    """Join the other drivers of a shared study, once a night: by what was agreed on where one was there before, else by
    what this one has planned. Raises InputError where it would be another search."""
    store, rungs = session.store, session.state["rungs"]
    if store.driver is None or session.state.get("agreed"):
        return
    target = session.config.target  # as it was measured
    terms = {**terms_of(session), "device": session.profile.device.cpu, "target.integer_bits": target.integer_bits}
    _check(session, store.agreed(TERMS, terms), terms)
    own = {key: rungs[key] for key in LENGTHS if key in rungs}
    taken: dict[str, Any] = store.agreed(RUNGS, own)
    if taken != own:
        session.folder.decide(
            "baselines", f"short fine-tune of {taken['short_steps']} steps, as the study has it",
            "drivers that share a study compare their accuracies, and its first one chose that", before=own, **taken,
        )  # fmt: skip
    session.update(rungs={**{k: v for k, v in rungs.items() if k not in LENGTHS}, **taken}, agreed=True)


def _check(session: Session, known: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name, value in own.items():
        if known.get(name, value) != value:
            raise InputError(
                f"search.study: {session.config.search.study!r} in this storage is a search with {name} "
                f"{known[name]!r}, this run's is {value!r}; choose another name."
            )
