"""Who does what, where several drivers share a study: the first to claim a key has it, and everybody learns who."""

from typing import Any, Protocol

from ..spaces.errors import InputError
from ..spaces.policy import nearest

SCHEMES = ("sqlite", "postgresql", "postgresql+psycopg", "postgresql+psycopg2")
SECRETS = ("password", "sslpassword", "passfile")
CONNECT_SECONDS = 10


class Claims(Protocol):
    """Claims are for ever: a driver that is resumed still holds its own."""

    def take(self, key: str) -> str:
        """Claim a key; returns the driver that holds it, ours or another."""
        ...


class OneDriver:
    """The run folder's lock lets no second driver in: everything is ours."""

    def take(self, key: str) -> str:
        return ""


class DatabaseClaims:
    """A table beside Optuna's, whose primary key lets one driver in."""

    def __init__(self, engine: Any, study: str, driver: str) -> None:
        from sqlalchemy import Column, MetaData, String, Table
        from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

        self._engine, self._study, self._driver = engine, study, driver
        self._table = Table(
            "nightpress_claims", MetaData(), Column("study", String(512), primary_key=True),
            Column("key", String(512), primary_key=True), Column("driver", String(64), nullable=False),
        )  # fmt: skip
        try:
            self._table.metadata.create_all(engine)
        except (IntegrityError, OperationalError, ProgrammingError):  # another driver has just made it
            self._table.metadata.create_all(engine)

    def take(self, key: str) -> str:
        from sqlalchemy import select
        from sqlalchemy.exc import IntegrityError

        columns = self._table.c
        try:
            with self._engine.begin() as connection:
                row = {"study": self._study, "key": key, "driver": self._driver}
                connection.execute(self._table.insert().values(**row))
        except IntegrityError:
            with self._engine.connect() as connection:
                wanted = select(columns.driver).where(columns.study == self._study, columns.key == key)
                return str(connection.execute(wanted).scalar_one())
        return self._driver


def without_password(url: str) -> str:
    """A storage URL as it may be written down. Raises InputError when it is none that a study can live in."""
    parsed = _parsed(url)  # whose set() takes None for "as it was"
    query = {key: value for key, value in parsed.query.items() if key not in SECRETS}
    return str(parsed._replace(password=None, query=query).render_as_string(hide_password=False))


def engine_options(url: str) -> dict[str, Any]:
    """How to connect: no longer than some seconds, and anew where the server was restarted."""
    if _parsed(url).get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": 60}}  # for another driver's lock, in seconds
    return {"connect_args": {"connect_timeout": CONNECT_SECONDS}, "pool_pre_ping": True}


def sqlite_file(url: str) -> str | None:
    """The file behind an SQLite URL; None for a server."""
    parsed = _parsed(url)
    return parsed.database if parsed.get_backend_name() == "sqlite" else None


def _parsed(url: str) -> Any:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise InputError(
            "search.storage must be a URL such as postgresql://user@host/database or sqlite:////folder/study.db."
        ) from None
    if parsed.drivername not in SCHEMES:
        raise InputError(
            f"search.storage must begin with one of {', '.join(f'{s}://' for s in SCHEMES)}, but got "
            f"{parsed.drivername}://{nearest(parsed.drivername, list(SCHEMES))}."
        )
    if parsed.get_backend_name() == "sqlite" and not parsed.database:
        raise InputError("search.storage names no file: an SQLite URL is sqlite:////folder/study.db.")
    return parsed
