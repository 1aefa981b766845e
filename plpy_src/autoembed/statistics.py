"""The server's statistics of what a lane has written, reached by ctypes.

A session reports what it has written when its command has ended. The command of a lane lasts for minutes, and without a
report autovacuum does not see the dead rows of a table, the application's included.
"""

from __future__ import annotations

import ctypes
import time

# The server lets a session report once a second, too.
REPORT_SECONDS = 1.0


class Reporter:
    """Reports now and then. To be called right after a commit, when no statement of the new transaction has run.

    track_functions, debug_assertions: the server's settings. Where calls are counted, the count of the lane's own call
    is still open, and a report would free it. A server built with assertions allows no report within a command. The
    report waits for the end of the lane then.
    """

    def __init__(self, track_functions: str, debug_assertions: str) -> None:
        # PyDLL keeps the interpreter's lock: no thread runs meanwhile.
        report = getattr(ctypes.PyDLL(None), "pgstat_report_stat", None)
        self._report = report if (track_functions, debug_assertions) == ("none", "off") else None
        if self._report is not None:
            self._report.argtypes, self._report.restype = (ctypes.c_bool,), ctypes.c_long
        self._report_at = 0.0

    def report(self) -> None:
        now = time.monotonic()
        if self._report is not None and now >= self._report_at:
            self._report(True)
            self._report_at = now + REPORT_SECONDS
