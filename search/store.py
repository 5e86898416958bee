"""The study as the record of a night: every trial is durable here before the sampler learns of it.

Our own values live in trial attributes (one JSON value each); Optuna's parameters and objective values stand
beside them for samplers and dashboards. What is learned of a trial after it has ended (verification) is an
attribute of the study, because Optuna closes finished trials.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, Trial

from ..spaces.errors import InputError
from ..spaces.policy import Policy, digest, policy_from_dict, policy_to_dict
from .attributes import WORD, approvals_in, quality_from, record_of
from .claims import Claims, DatabaseClaims, OneDriver
from .journal import ReadJournal
from .policy_sampler import PolicySampler
from .records import Latency, Quality, TrialRecord, TrialState, Verified
from .salvage import read_journal, unreadable
from .storages import JOURNAL, close, open_storage
from .tally import Tally

STUDY = "nightpress"
SCHEMA = 2
"""Of our attributes. 1: as released first. 2: a trial of a shared study names its driver, and a study its model."""
DIRECTIONS = ("maximize", "minimize", "minimize")  # accuracy, latency_ms, size_bytes
LONG = "long:"
"""Study attribute with the accuracy of a trial's long fine-tune, by its number."""
MEASURED = "measured:"
"""Study attribute with a trial's latency as it was measured after the trial had ended."""
AGREED, PROPOSED = "agreed:", "proposed:"
"""Study attributes: a value that all drivers go by, and what each of them would have taken."""
_LATER = (LONG, MEASURED, "verified:", "hopeless:")
TAKEN_SECONDS = 60.0
"""A driver that took a policy from the queue says so at once; after so long it must have died before it could."""

optuna.logging.set_verbosity(optuna.logging.WARNING)
logging.getLogger("optuna").propagate = False


def open_reading(run: Path, url: str | None, study: str = STUDY) -> optuna.storages.BaseStorage:
    """The run's storage for those who only look. Raises InputError where there is no study yet."""
    if url is None and not (run / JOURNAL).is_file():
        raise InputError(f"{run}: its study has not begun yet.")
    storage = open_storage(run, url, new=False) if url else optuna.storages.JournalStorage(ReadJournal(run / JOURNAL))
    if not has_study(storage, study):
        raise InputError(f"{run}: its study has not begun yet.")
    return storage


class Store:
    """Writes and reads the trials of one study. ``driver`` names the run that writes, where several may share the
    study; ``sampler_at`` makes the sampler anew for each proposal, from the number of trials before it, so that a run
    that was killed goes on as it would have."""

    def __init__(
        self, storage: optuna.storages.BaseStorage, sampler: optuna.samplers.BaseSampler | None = None, *,
        study: str = STUDY, driver: str | None = None,
        sampler_at: Callable[[int], optuna.samplers.BaseSampler] | None = None,
    ) -> None:  # fmt: skip
        self._storage, self.driver, self._sampler_at = storage, driver, sampler_at
        self.study = _study_of(storage, study, sampler)
        self._study_id = storage.get_study_id_from_name(study)
        self._asked: list[Trial] = []
        self._seen: list[TrialRecord | None] = []  # by number, None where a trial has not begun
        self._open: set[int] = set()  # that have not ended
        self._changed: set[int] = set()  # since they were last read
        self._tally = Tally()
        self._look(*range(len(self.study.get_trials(deepcopy=False))))
        self.claims: Claims = OneDriver()
        if driver is not None and isinstance(storage, optuna.storages.RDBStorage):
            self.claims = DatabaseClaims(storage.engine, study, driver)
        schema = self.study.user_attrs.get("schema")
        if schema is None:
            self.study.set_user_attr("schema", SCHEMA)
        check_schema(schema)

    def join(self, model: str) -> int:
        """Tie the study to a model; returns how many trials it holds already. Raises InputError when it is another's.

        Two runs of the same name in one storage would otherwise mix two searches.
        """
        known = self.study.user_attrs.get("model")
        if known is not None and known != model:
            raise InputError(
                f"search.study: {self.study.study_name!r} in this storage is a search of model {known}, this run's is "
                f"{model}; choose another name."
            )
        if known is None:
            self.study.set_user_attr("model", model)
        return len(self.trials())

    def agreed(self, key: str, value: Any) -> Any:
        """What all drivers of the study go by: the value that was the first to be asked with, whoever asked, as JSON
        gives it back. A driver that is alone goes by its own."""
        if self.driver is None:
            return value
        if (known := self.known(key)) is None:
            own = f"{PROPOSED}{key}:{self.driver}"
            if own not in self.study.user_attrs:
                self.study.set_user_attr(own, value)  # before it claims the key, so that who holds it has a value
            holder = self.claims.take(f"{AGREED}{key}") or self.driver
            known = self.study.user_attrs[f"{PROPOSED}{key}:{holder}"]
            self.study.set_user_attr(f"{AGREED}{key}", known)
        return known

    def known(self, key: str) -> Any:
        """What the study's drivers agreed on, None while none has asked."""
        return self.study.user_attrs.get(f"{AGREED}{key}")

    def ask(self, wanted: int = 1) -> Trial:
        """The next proposal, one of so many that are wanted at once; first those that a killed driver had asked for and
        not begun."""
        if self._asked:
            return self._asked.pop(0)
        number = self._storage.get_n_trials(self._study_id)
        if self._sampler_at is not None:
            self.study.sampler = self._sampler_at(number)
        mine = {} if self.driver is None else {"driver": self.driver}
        sampler = self.study.sampler
        if isinstance(sampler, PolicySampler) and not self._waiting():
            whole = sampler.proposed(self.study, number, mine, wanted)
            return Trial(self.study, self._storage.create_new_trial(self._study_id, whole))
        trial = self.study.ask()
        for key, value in mine.items():
            trial.set_user_attr(key, value)
        return trial

    def close(self) -> None:
        """End the connections to a database; nothing can be written any more."""
        close(self._storage)

    def ours(self, trial: TrialRecord) -> bool:
        """Whether this driver evaluates the trial: its checkpoints lie in this run's folder."""
        return self.driver is None or trial.driver == self.driver

    def drop(self, trial: Trial) -> None:
        """Close a proposal that was not begun; it leaves no record."""
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)

    def enqueued(self, role: str) -> set[str]:
        """Digests of the policies of a role that were enqueued so far."""
        trials = self.study.get_trials(deepcopy=False)
        return {digest(policy_from_dict(t.user_attrs["given"], "enqueued policy")) for t in trials
                if t.user_attrs.get("role") == role and "given" in t.user_attrs}  # fmt: skip

    def enqueue(self, params: Mapping[str, Any], role: str, name: str | None, given: Mapping[str, Any]) -> None:
        """Put a policy in front of the sampler's own proposals; ``params`` are its answers, or the nearest on offer;
        what is trained is ``given``."""
        self.study.enqueue_trial(dict(params), user_attrs={"role": role, "name": name, "given": dict(given)})

    def begin(self, trial: Trial, policy: Policy, started: float) -> None:
        trial.set_user_attr("digest", digest(policy))
        trial.set_user_attr("started", started)
        if "role" not in trial.user_attrs:
            trial.set_user_attr("role", "search")
        trial.set_user_attr("policy", policy_to_dict(policy))  # last: who has a policy has the rest
        self._look(trial.number)

    def note(self, number: int, **values: Any) -> None:
        """Attributes of a running trial."""
        storage, trial_id = self._storage, self._id(number)
        for key, value in values.items():
            storage.set_trial_user_attr(trial_id, key, value)
        self._changed.add(number)

    def noted(self, key: str) -> dict[int, Any]:
        """One attribute of all trials that have it, by number."""
        return {t.number: t.user_attrs[key] for t in self.study.get_trials(deepcopy=False) if key in t.user_attrs}

    def note_long(self, number: int, quality: Quality) -> None:
        """What the long fine-tune of a finished trial gave on the search split, so that the sampler learns of it."""
        self.study.set_user_attr(f"{LONG}{number}", asdict(quality))

    def longs(self) -> dict[int, Quality]:
        """Of the trials that had the long fine-tune, by number: the search split, and the seconds of all of it."""
        found = self.study.user_attrs.items()
        return {int(k.removeprefix(LONG)): quality_from(v) for k, v in found if k.startswith(LONG)}

    def constrain(self, number: int, excess: Mapping[str, float]) -> None:
        """How far a trial lies beyond each limit, as a share of it; at most 0 is within."""
        trial = Trial(self.study, self._id(number))
        for name, value in excess.items():
            trial.set_constraint(name, value)

    def note_quality(self, number: int, quality: Quality) -> None:
        known = [q for q in self._attrs(number).get("qualities", []) if q["rung"] != quality.rung]
        self.note(number, qualities=[*known, asdict(quality)])

    def finish(self, number: int, state: TrialState, *, finished: float, reason: str | None = None) -> None:
        """Close a trial: the state last, so that the record is whole, and before the sampler is told."""
        self.note(number, reason=reason, finished=finished, state=str(state))
        self.tell(number)

    def tell(self, number: int) -> None:
        """Tell the sampler of a trial whose state is on record. Objectives are those of the short fine-tune alone: a
        lower rung's accuracy beside them would be taken for a worse policy's."""
        record = self.trial(number)
        self._changed.add(number)
        quality, latency = record.quality, record.latency
        if record.state is TrialState.COMPLETE and quality and latency and record.size_bytes:
            self.study.tell(number, [quality.accuracy, latency.latency_ms, float(record.size_bytes)])
        elif record.state in {TrialState.STOPPED, TrialState.INFEASIBLE}:
            self.study.tell(number, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(number, state=optuna.trial.TrialState.FAIL)

    def verify(self, number: int, verified: Verified) -> None:
        self._attach(number, "verified", asdict(verified))

    def note_hopeless(self, number: int, reason: str) -> None:
        """Keep why a trial is not worth a long fine-tune, and so takes no part in the comparison."""
        self._attach(number, "hopeless", {"reason": reason})

    def remeasure(self, number: int, latency: Latency) -> None:
        self._attach(number, "measured", asdict(latency))

    def approve(self, entry: Mapping[str, Any]) -> None:
        """Keep a person's word. An attribute an entry: two people at work at once would overwrite a list."""
        self.study.set_user_attr(f"{WORD}{time.time_ns()}", dict(entry))

    def approvals(self) -> tuple[Mapping[str, Any], ...]:
        """All words that people have given, in order."""
        return approvals_in(self.study.user_attrs)

    def trial(self, number: int) -> TrialRecord:
        return self._record(self._storage.get_trial(self._id(number)), self._attached())

    def trials(self) -> tuple[TrialRecord, ...]:
        """All trials that have begun, in order. Reads only what may have changed since the last call."""
        self._refresh()
        return tuple(record for record in self._seen if record is not None)

    def tally(self) -> Tally:
        """Figures over the trials, in a time that does not grow with their number unless the study is shared."""
        self._refresh()
        return self._tally

    def _look(self, *numbers: int) -> None:
        """Trials that there are now."""
        self._seen += [None] * (max(numbers, default=-1) + 1 - len(self._seen))
        self._open.update(numbers)
        self._changed.update(numbers)

    def _refresh(self) -> None:
        """Read what was written since; of a shared study all that has not ended, because others write there, too."""
        extra = self._attached()
        if self.driver is not None:
            self._look(*range(len(self._seen), len(self.study.get_trials(deepcopy=False))))
            self._changed |= self._open
        changed, self._changed = sorted(self._changed & self._open), set()
        for number in changed:
            frozen = self._storage.get_trial(self._id(number))
            if "policy" in frozen.user_attrs:
                record = self._record(frozen, extra)
                self._tally.begun += self._seen[number] is None and record.role != "baseline"
                self._seen[number] = record
                if frozen.state.is_finished():
                    self._tally.add(record)
            if frozen.state.is_finished():
                self._open.discard(number)
        if self.driver is not None:
            for number in {int(key.partition(":")[2]) for key in extra if key.startswith(_LATER)}:
                self._seen[number] = self.trial(number)

    def _attached(self) -> Mapping[str, Any]:
        """The study's attributes, not copied."""
        return self._storage.get_study_user_attrs(self._study_id)

    def _attach(self, number: int, kind: str, data: Mapping[str, Any]) -> None:
        """Keep what was learned of a trial after it had ended."""
        self.study.set_user_attr(f"{kind}:{number}", dict(data))
        if number < len(self._seen) and self._seen[number] is not None:
            self._seen[number] = self.trial(number)
            self._tally.refront(record for record in self._seen if record is not None)

    def waiting(self, role: str) -> int:
        """How many enqueued policies of a role have not begun."""
        return sum(t.user_attrs.get("role") == role for t in self._waiting())

    def _waiting(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))

    def repair(self) -> list[TrialRecord]:
        """After a kill: tell what was on record, keep what was only asked for, return what was being evaluated."""
        unfinished: list[TrialRecord] = []
        running = (optuna.trial.TrialState.RUNNING,)
        for frozen in self.study.get_trials(deepcopy=False, states=running):
            if not self._left_behind(frozen):
                continue
            if "policy" not in frozen.user_attrs:
                self._asked.append(Trial(self.study, self._id(frozen.number)))
            elif "state" in frozen.user_attrs:
                self.tell(frozen.number)
            else:
                unfinished.append(self._record(frozen, self.study.user_attrs))
        return unfinished

    def _left_behind(self, frozen: FrozenTrial) -> bool:
        """Whether a running trial is ours to go on with: nobody else's, or taken from the queue by a driver that died
        before it could say so."""
        if self.driver is None or frozen.user_attrs.get("driver") == self.driver:
            return True
        if "driver" in frozen.user_attrs or "given" not in frozen.user_attrs or frozen.datetime_start is None:
            return False
        if (datetime.now() - frozen.datetime_start).total_seconds() < TAKEN_SECONDS:
            return False
        if self.claims.take(f"taken:{frozen.number}") != self.driver:
            return False
        self._storage.set_trial_user_attr(self._id(frozen.number), "driver", self.driver)
        return True

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _attrs(self, number: int) -> Mapping[str, Any]:
        return self._storage.get_trial(self._id(number)).user_attrs

    def _record(self, frozen: FrozenTrial, extra: Mapping[str, Any]) -> TrialRecord:
        return record_of(frozen.number, frozen.user_attrs, extra)


def check_schema(schema: object) -> None:
    """Raises InputError when a newer version wrote the study; what an older one wrote is read as it is."""
    if schema is not None and (not isinstance(schema, int) or schema > SCHEMA):
        raise InputError(
            f"the study's attributes are of schema {schema!r}, but this nightpress reads up to {SCHEMA}: a newer "
            "version wrote them."
        )


def _study_of(
    storage: optuna.storages.BaseStorage, name: str, sampler: optuna.samplers.BaseSampler | None
) -> optuna.Study:
    if has_study(storage, name):  # a reader leaves no mark in the record
        return optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    return optuna.create_study(
        storage=storage, study_name=name, directions=DIRECTIONS, sampler=sampler, load_if_exists=True
    )


def has_study(storage: optuna.storages.BaseStorage, name: str) -> bool:
    return name in [study.study_name for study in storage.get_all_studies()]


class StudyRecord(NamedTuple):
    """What readers learn of a study; ``unreadable`` names the trials that are damaged."""

    trials: tuple[TrialRecord, ...] = ()
    approvals: tuple[Mapping[str, Any], ...] = ()
    unreadable: tuple[str, ...] = ()


def read_study(run: Path, url: str | None, study: str = STUDY) -> StudyRecord:
    """A run's study, for readers that do not search; empty where there is none yet.

    The journal in a run's folder is read as far as it is whole; a trial that is damaged is named and left out.
    """
    if url is not None:
        storage = open_storage(run, url, new=False)
        try:
            if not has_study(storage, study):
                return StudyRecord()
            store = Store(storage, study=study)
            return StudyRecord(store.trials(), store.approvals())
        finally:
            close(storage)
    if not (run / JOURNAL).is_file():
        return StudyRecord()
    journal = read_journal(run / JOURNAL)
    check_schema(journal.study.get("schema"))
    trials: list[TrialRecord] = []
    complaints = list(journal.complaints)
    for number, attrs in journal.trials.items():
        if "policy" not in attrs:
            continue
        try:
            trials.append(record_of(number, attrs, journal.study))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            complaints.append(f"trial {number} (its record is damaged: {type(error).__name__}: {error})")
    return StudyRecord(tuple(trials), approvals_in(journal.study), unreadable(complaints))


def approve_trial(run: Path, entry: Mapping[str, Any], url: str | None = None, study: str = STUDY) -> None:
    """Add a person's word on a trial to the run's record."""
    storage = open_storage(run, url, new=False)
    try:
        Store(storage, study=study).approve(entry)
    finally:
        close(storage)


def policy_of(record: TrialRecord) -> Policy:
    """The trial's policy as a value."""
    return policy_from_dict(dict(record.policy), f"trial {record.number}")
