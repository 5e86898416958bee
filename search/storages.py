"""Where a study lives: the journal in the run folder, or a database."""

import time
from collections.abc import Callable
from pathlib import Path

import optuna

from ..spaces.errors import InputError
from .claims import engine_options, sqlite_file, without_password
from .journal import JournalFile, OneWriterJournal

JOURNAL = "study.journal"


def open_storage(
    run: Path, url: str | None, *, new: bool = True, make_room: Callable[[], bool] = lambda: False
) -> optuna.storages.BaseStorage:
    """The run's storage: the journal in its folder, or the URL of the config; ``new`` False refuses to make a file,
    ``make_room`` is asked when the disk is full.

    Raises InputError when a URL is none or does not answer; the message names no password.
    """
    if url is None:
        return OneWriterJournal(JournalFile(run / JOURNAL, make_room))
    told, file = without_password(url), sqlite_file(url)
    if file is not None and not new and not Path(file).is_file():
        raise InputError(f"search.storage: there is no file {file}, so the run's record cannot be read.")
    try:
        return _database(url)
    except ImportError:
        raise InputError(f"search.storage: {told} needs a driver: pip install 'nightpress[postgresql]'.") from None
    except Exception as error:  # noqa: BLE001  drivers of databases share no base
        raise InputError(f"search.storage: {told} does not answer ({type(error).__name__}).") from None


def _database(url: str) -> optuna.storages.RDBStorage:
    """Optuna's storage in a database. Two drivers that find it empty both make its tables: the slower one looks
    again."""
    from sqlalchemy.exc import DBAPIError

    for patience in (0.5, 1.0):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=engine_options(url))
        except DBAPIError as error:
            if error.connection_invalidated or not _exists_already(error):
                raise
            time.sleep(patience)
    return optuna.storages.RDBStorage(url, engine_kwargs=engine_options(url))


def _exists_already(error: Exception) -> bool:
    words = str(error).lower()
    return "already exists" in words or "duplicate key" in words or "unique constraint" in words


def close(storage: optuna.storages.BaseStorage) -> None:
    """End the connections to a database."""
    if isinstance(storage, optuna.storages.RDBStorage):
        storage.remove_session()
        storage.engine.dispose()
