"""The errors: who is to blame, and whether they pass. Decided here, acted on in worker and rows."""

from __future__ import annotations

from types import MappingProxyType

# The import of typing takes as long as all of these.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class Fault(Exception):
    """A mistake of the user. It is returned to SQL, which raises it with message, hint and SQLSTATE."""

    def __init__(self, problem: str, *, hint: str, errcode: str = "22023") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint
        self.errcode = errcode

    def fields(self) -> dict[str, str | None]:
        """What SQL raises: the columns of the functions that may return a fault."""
        return {"problem": self.problem, "hint": self.hint, "errcode": self.errcode}


# The same columns without one.
NO_FAULT: dict[str, str | None] = {"problem": None, "hint": None, "errcode": None}


class Trouble(Exception):
    """An embedding that could not be had; str() is one sentence for the operator, without secrets.

    headers: those of the HTTP answer that says so, in lower case; empty without an answer.
    summary: the same without words of the provider, which may quote texts: for every tenant.
    may_be_a_texts: the texts were sent, and one of them may be the reason.
    status: that of the HTTP answer; None: there was none, or it was 200.
    """

    headers: Mapping[str, str] = MappingProxyType({})
    summary: str = "its provider is in trouble"
    may_be_a_texts: bool = False
    status: int | None = None


class Refused(Trouble):
    """The provider refused this request but not the next: one of its texts is to blame."""


class ProviderTrouble(Trouble):
    """The provider is to blame, not the texts.

    permanent: somebody must act (a wrong key, an unknown model); otherwise it passes by itself.
    retry_after_seconds: the wait that the provider asked for, if it did.
    """

    def __init__(self, message: str, *, permanent: bool = False, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.retry_after_seconds = retry_after_seconds


class OverBudget(ProviderTrouble):
    """The model has used up its budget of the day. retry_after_seconds: the time until the next day."""

    summary = "its daily budget is used up"


class CameLate(ProviderTrouble):
    """No whole answer came in time."""


class FellOver(ProviderTrouble):
    """The connection ended without an answer, or there was none."""


class RanTooLong(ProviderTrouble):
    """A model's SQL function was cancelled when its time was up."""


class PassEnded(Exception):
    """A cancel came while an owner's code ran: the pass ends in good order. str() is the error."""


class RowError(Exception):
    """A statement failed because of a row: its data, or its owner's functions, triggers and constraints.

    sqlstate: that of the error. locked: another session has a lock, perhaps on the whole table; the same statement may
    work in a moment. slow: it ran too long. cancels: a cancel came while an owner's code ran, or that code raised one.
    """

    def __init__(
        self,
        message: str,
        *,
        sqlstate: str = "XX000",
        locked: bool = False,
        slow: bool = False,
        cancels: bool = False,
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.locked = locked
        self.slow = slow
        self.cancels = cancels

    @property
    def may_pass(self) -> bool:
        """Whether another try of a write may do."""
        return self.slow or self.sqlstate.startswith(CONFLICT)

    @property
    def is_of_code(self) -> bool:
        """Whether it may be the code that is at fault, and not the row."""
        return self.sqlstate.startswith(CODE)


# SQLSTATEs (PostgreSQL manual, appendix A).
LOCK_NOT_AVAILABLE = "55P03"
OBJECT_IN_USE = "55006"
QUERY_CANCELED = "57014"
INSUFFICIENT_PRIVILEGE = "42501"
DATATYPE_MISMATCH = "42804"
SERIALIZATION_FAILURE = "40001"
DISK_FULL = "53100"
# A deadlock or a serialization failure, by its beginning: another try may do.
CONFLICT = "40"
# By their beginnings: the code names something that is gone, or that it may not use.
CODE = ("42", "3F")
# By their beginnings: the statement may work at another time.
PASSING = ("08", "40", "53", "55", "57P03", "58000", "58030")
# Raised by a statement without an owner's code, by nobody's fault: no memory or disk, a cancel, a shutdown.
NOBODYS = ("53", "57", "58030")


# More of an error's words is not kept: an owner's code can raise any number of megabytes.
MAX_REASON_CHARACTERS = 10_000


def row_error(sqlstate: str, message: str, *, timed_out: bool = False) -> RowError:
    """The error of a row that a statement with an owner's code has raised. timed_out: it ran too long."""
    message = message[:MAX_REASON_CHARACTERS]
    if timed_out and sqlstate == QUERY_CANCELED:
        message = "the code of the table's owner ran too long, and was cancelled"
        return RowError(message, sqlstate=sqlstate, slow=True)
    return RowError(
        message,
        sqlstate=sqlstate,
        locked=sqlstate in (LOCK_NOT_AVAILABLE, OBJECT_IN_USE),
        cancels=sqlstate == QUERY_CANCELED,
    )


def is_nobodys(sqlstate: str) -> bool:
    """Whether a statement without an owner's code has failed by no row's fault."""
    return sqlstate.startswith(NOBODYS)


def trouble_of_function(error: RowError, timeout_seconds: float) -> Trouble:
    """The trouble that an error of a user's SQL function means for the texts it was given."""
    if error.slow:
        return RanTooLong(
            f"the function was cancelled after {timeout_seconds:g} s; timeout_seconds of its model allows more"
        )
    if error.sqlstate.startswith(PASSING):
        return ProviderTrouble(str(error))
    return Refused(str(error))


# The longest rest after trouble that passes by itself, in seconds.
MAX_REST_SECONDS = 15.0
# The longest rest after trouble that somebody must mend, in seconds.
MAX_PERMANENT_REST_SECONDS = 60.0
# A longer wait, in seconds, is not granted to a provider.
MAX_RETRY_AFTER_SECONDS = 3600.0


def rest_seconds(trouble: ProviderTrouble, failures: int, fraction: float) -> float:
    """The rest of a model whose provider has failed that many times before. fraction: random, from 0 to 1.

    The rest is the time that the provider asks for, plus up to a second so that lanes do not all come back at once.
    Without such a time it grows exponentially, with full jitter. It is never long: a small request now and then shows
    whether the provider is back.
    """
    if isinstance(trouble, OverBudget) and trouble.retry_after_seconds is not None:
        return trouble.retry_after_seconds
    if trouble.retry_after_seconds is not None:
        return min(trouble.retry_after_seconds, MAX_RETRY_AFTER_SECONDS) + fraction
    if trouble.permanent:
        return float(min(10.0 * 2 ** min(failures, 10), MAX_PERMANENT_REST_SECONDS))
    return 0.2 + fraction * min(2.0 ** min(failures, 10), MAX_REST_SECONDS)


# Advice for an answer with this status.
ADVICE = {
    401: "Give the key that its provider takes: autoembed.alter_model(…, api_key => …). A new value of an env: "
    "reference is there after a restart of the server, one of file: or vault: at once.",
    403: "Its key may not use this model: give it the right at the provider, or another one by "
    "autoembed.alter_model(…, api_key => …).",
    404: "Compare the address with the provider's reference, and correct base_url, or model_id, with "
    "autoembed.alter_model().",
    429: "Nothing: lanes wait and go on by themselves. If it stays so, check the quota at the provider, or lower "
    "requests_per_minute with autoembed.alter_model().",
}


def advice_for(trouble: Trouble) -> str:
    """Advice for trouble with a provider."""
    if isinstance(trouble, OverBudget):
        return "Nothing: lanes go on when the day is over. Or raise the budget with autoembed.alter_model()."
    if trouble.status in ADVICE:
        return ADVICE[trouble.status]
    if trouble.status is not None and trouble.status >= 500:
        return "Look at its server, or at the provider's page of outages. Lanes try it again by themselves."
    if isinstance(trouble, ProviderTrouble) and trouble.status is None and not trouble.permanent:
        return (
            "Check that the database's server reaches its base_url: the name, the port, the firewall. Lanes try it "
            "again by themselves; timeout_seconds in autoembed.alter_model() gives a slow server more time."
        )
    return "Correct its definition with autoembed.alter_model(), its key, or the network. Lanes then try it again."
