"""How statements run, and whose fault their errors are."""

from __future__ import annotations

import json
from contextlib import contextmanager

import plpy  # type: ignore[import-not-found]

from autoembed.errors import NOBODYS, PASSING, Fault, is_nobodys, row_error

# The import of typing takes as long as all of these.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

# A failed statement raises this.
Error = plpy.SPIError

# Fractions stay text: a numeric key must come back with the same digits. json.loads() would make a decoder for each.
_decoded = json.JSONDecoder(parse_float=str).decode

# Plans of autoembed's own statements, which are so many and no more.
_plans: dict[str, Any] = {}
# Plans of statements that a table, its pipeline or a caller has a part in, by text and types. The last one was used
# last.
_kept_plans: dict[tuple[str, ...], Any] = {}
# A plan takes up to 200 kB. A hybrid search has five, and a lane four for each of the 30 tables of a claim.
MAX_KEPT_PLANS = 150


class Statements:
    """The statements of one subject, each a method."""

    Error = Error

    def own_id(self) -> int:
        """The OID of the database."""
        [row] = self._run(
            "SELECT d.oid::pg_catalog.int8 AS id FROM pg_catalog.pg_database AS d"
            " WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()"
        )
        return int(row["id"])

    @staticmethod
    def fault_of(error: Exception) -> Fault:
        """An error of a statement, Error, for SQL to raise."""
        # (number, detail, hint, …), if PostgreSQL told more than a message.
        told = getattr(error, "spidata", None) or (None, None, None)
        return Fault(str(error), hint=told[2] or "", errcode=sqlstate_of(error))

    @staticmethod
    def is_nobodys(error: Exception) -> bool:
        """Whether an error of a statement, Error, is a cancel, a shutdown or a shortage of the server."""
        return is_nobodys(sqlstate_of(error))

    @staticmethod
    def may_pass(error: Exception) -> bool:
        """Whether an error may be due to the server, to a cancel or to another session, and not to the data."""
        return sqlstate_of(error).startswith((*NOBODYS, *PASSING))

    def _run(self, sql: str, types: Sequence[str] = (), arguments: Sequence[Any] = ()) -> Any:
        """Runs a statement whose text is a constant."""
        plan = _plans.get(sql)
        if plan is None:
            plan = _plans[sql] = plpy.prepare(sql, list(types))
        return plpy.execute(plan, list(arguments))

    def _run_made(self, sql: str, types: Sequence[str] = (), arguments: Sequence[Any] = ()) -> Any:
        """Runs a statement that is made for a table, a pipeline or a caller. Its plan is kept if it is used often."""
        key = (sql, *types)
        plan = _kept_plans.pop(key, None) or plpy.prepare(sql, list(types))
        _kept_plans[key] = plan
        if len(_kept_plans) > MAX_KEPT_PLANS:
            del _kept_plans[next(iter(_kept_plans))]
        return plpy.execute(plan, list(arguments))

    @staticmethod
    def _forget_plan(sql: str, types: Sequence[str] = ()) -> None:
        _kept_plans.pop((sql, *types), None)


@contextmanager
def row_errors() -> Iterator[None]:
    """Makes a RowError of the error of one statement, unless it is nobody's fault. That statement is rolled back."""
    try:
        yield
    except Error as error:
        if is_nobodys(sqlstate_of(error)):
            raise
        raise row_error(sqlstate_of(error), str(error)) from error


def sqlstate_of(error: Exception) -> str:
    # An SQLSTATE that PostgreSQL does not know leaves the attribute out.
    return getattr(error, "sqlstate", None) or "XX000"


def message_body(message: str | None) -> Any:
    """The body of a message of the queue; its text, if it has a number or a depth that Python does not read."""
    try:
        return None if message is None else _decoded(message)
    except (ValueError, RecursionError):
        return message
