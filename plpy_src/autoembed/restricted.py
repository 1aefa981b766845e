"""PostgreSQL's own guards around somebody else's code, reached by ctypes.

They are C functions of the server (miscadmin.h, guc.h, guc_tables.h, timeout.h, xact.h), the same in PostgreSQL 17 and
18. A security-restricted operation refuses what would outlive it: cursors WITH HOLD, PREPARE, LISTEN, DISCARD, SET
ROLE, temporary tables, events deferred to the commit. A nest level of its own puts every setting back.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

SECURITY_LOCAL_USERID_CHANGE = 1
SECURITY_RESTRICTED_OPERATION = 2
STATEMENT_TIMEOUT = 3
SUBXACT_EVENT_ABORT_SUB = 2
PGC_SUSET = 5
PGC_S_SESSION = 13
# PostgreSQL counts microseconds from 2000-01-01.
EPOCH_SECONDS = 946_684_800

SYMBOLS = (
    "GetUserIdAndSecContext",
    "SetUserIdAndSecContext",
    "NewGUCNestLevel",
    "AtEOXact_GUC",
    "SetConfigOption",
    "find_option",
    "enable_timeout_at",
    "disable_timeout",
    "get_timeout_active",
    "get_timeout_finish_time",
    "RegisterSubXactCallback",
    "UnregisterSubXactCallback",
    "InterruptPending",
    "QueryCancelPending",
)
# These settings, which any role may change, end the whole session: at once, or with the next error.
END_SESSION = (b"transaction_timeout", b"exit_on_error", b"idle_in_transaction_session_timeout")
# Triggers take a write for that of a lane by this setting, which tells the pipeline.
WRITTEN_PIPELINE = b"autoembed.written_pipeline"


class _Setting(ctypes.Structure):
    """The beginning of struct config_generic."""

    _fields_ = (("name", ctypes.c_char_p), ("context", ctypes.c_int))


# SubXactCallback: event, subtransaction, its parent, argument.
_SubtransactionCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p)


@cache
def _server() -> Any:
    """The server's symbols; None outside a server, or in one that lacks some of them."""
    # PyDLL keeps the interpreter's lock: no thread runs while the server's state is being changed.
    library = ctypes.PyDLL(None)
    if not all(hasattr(library, name) for name in SYMBOLS):
        return None
    library.find_option.restype = ctypes.POINTER(_Setting)
    library.find_option.argtypes = (ctypes.c_char_p, ctypes.c_bool, ctypes.c_bool, ctypes.c_int)
    library.get_timeout_active.restype = ctypes.c_bool
    library.get_timeout_finish_time.restype = ctypes.c_int64
    library.enable_timeout_at.argtypes = (ctypes.c_int, ctypes.c_int64)
    library.disable_timeout.argtypes = (ctypes.c_int, ctypes.c_bool)
    library.RegisterSubXactCallback.argtypes = (_SubtransactionCallback, ctypes.c_void_p)
    library.UnregisterSubXactCallback.argtypes = (_SubtransactionCallback, ctypes.c_void_p)
    library.AtEOXact_GUC.argtypes = (ctypes.c_bool, ctypes.c_int)
    library.SetConfigOption.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
    library.SetUserIdAndSecContext.argtypes = (ctypes.c_uint, ctypes.c_int)
    return library


def available() -> bool:
    """Whether this server has the guards."""
    return _server() is not None


def interrupt_is_pending() -> bool:
    """Whether a cancel, a timeout or a shutdown waits for the next statement. Outside a server none does."""
    return available() and bool(_flag("InterruptPending").value)


@dataclass
class Run:
    """A run of somebody else's code.

    timed_out: it ran too long. session_timed_out: the session's own statement_timeout has struck meanwhile.
    """

    timed_out: bool = False
    session_timed_out: bool = False


@contextmanager
def restricted(seconds: float, user: int | None = None, written_pipeline: int | None = None) -> Iterator[Run]:
    """Runs the block's statements under the guards, for so many seconds at most.

    user: as this role. written_pipeline: the pipeline whose vectors they write.

    To be used inside a subtransaction: after an error, its rollback puts user, security context and settings back.
    """
    server = _server()
    run = Run()
    before = _Context.now()
    level = server.NewGUCNestLevel()
    written = b"" if written_pipeline is None else b"%d" % written_pipeline
    server.SetConfigOption(WRITTEN_PIPELINE, written, PGC_SUSET, PGC_S_SESSION)
    contexts = [(setting, setting.context) for setting in _settings((*END_SESSION, WRITTEN_PIPELINE))]
    timer = _Timer(seconds)
    try:
        for setting, _ in contexts:
            # Only a superuser changes them meanwhile.
            setting.context = PGC_SUSET
        flags = before.flags | SECURITY_LOCAL_USERID_CHANGE | SECURITY_RESTRICTED_OPERATION
        server.SetUserIdAndSecContext(before.user if user is None else user, flags)
        yield run
    finally:
        run.timed_out, run.session_timed_out = timer.stop()
        for setting, context in contexts:
            setting.context = context
    server.AtEOXact_GUC(False, level)
    server.SetUserIdAndSecContext(before.user, before.flags)


@contextmanager
def as_role(user: int) -> Iterator[None]:
    """Runs the block's statements as this role. They must be autoembed's own."""
    server = _server()
    before = _Context.now()
    server.SetUserIdAndSecContext(user, before.flags | SECURITY_LOCAL_USERID_CHANGE)
    try:
        yield
    finally:
        server.SetUserIdAndSecContext(before.user, before.flags)


@dataclass(frozen=True)
class _Context:
    user: int
    flags: int

    @classmethod
    def now(cls) -> _Context:
        user, flags = ctypes.c_uint(), ctypes.c_int()
        _server().GetUserIdAndSecContext(ctypes.byref(user), ctypes.byref(flags))
        return cls(user.value, flags.value)


def _settings(names: Sequence[bytes]) -> list[_Setting]:
    """The settings of these names that this server has."""
    found = [(name, _server().find_option(name, False, True, 0)) for name in names]
    return [setting.contents for name, setting in found if setting and setting.contents.name == name]


class _Timer:
    """Cancels the statement after so many seconds, unless the session's statement_timeout does so before.

    Code that catches a cancel rolls back a subtransaction. From then on each such rollback cancels again, so the
    cancel meets the code outside of the block that has caught it.
    """

    def __init__(self, seconds: float) -> None:
        server = _server()
        ends = int((time.time() + seconds - EPOCH_SECONDS) * 1e6)
        self._session_ends = server.get_timeout_finish_time(STATEMENT_TIMEOUT)
        self._session_is_timed = server.get_timeout_active(STATEMENT_TIMEOUT)
        self._is_set = not (self._session_is_timed and self._session_ends <= ends)
        self._ends = ends if self._is_set else self._session_ends
        self._has_repeated = False
        if self._is_set:
            server.enable_timeout_at(STATEMENT_TIMEOUT, ends)
        self._callback = _SubtransactionCallback(self._after_subtransaction)
        server.RegisterSubXactCallback(self._callback, None)

    def _after_subtransaction(self, event: int, *_: Any) -> None:
        if event == SUBXACT_EVENT_ABORT_SUB and (time.time() - EPOCH_SECONDS) * 1e6 >= self._ends:
            self._has_repeated = True
            _flag("QueryCancelPending").value = 1
            _flag("InterruptPending").value = 1

    def stop(self) -> tuple[bool, bool]:
        """Puts the session's own timeout back. Returns whether this one has struck, and whether that one has."""
        server = _server()
        server.UnregisterSubXactCallback(self._callback, None)
        has_struck = not server.get_timeout_active(STATEMENT_TIMEOUT)
        if self._is_set:
            server.disable_timeout(STATEMENT_TIMEOUT, False)
            if self._session_is_timed:
                server.enable_timeout_at(STATEMENT_TIMEOUT, self._session_ends)
        if self._has_repeated or (self._is_set and has_struck):
            # It may have struck just after the code ended, and would cancel what comes next.
            _flag("QueryCancelPending").value = 0
        return self._is_set and has_struck, not self._is_set and has_struck


def _flag(name: str) -> ctypes.c_int:
    """A variable of the server that its signal handlers set (sig_atomic_t)."""
    return ctypes.c_int.in_dll(_server(), name)
