"""A temporary folder that nothing leaves behind: neither an end of the run nor its termination."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from functools import cached_property
from pathlib import Path
from types import FrameType


class Scratch:
    """Makes a folder when it is first asked for, and removes it with ``close`` or on SIGTERM."""

    @cached_property
    def path(self) -> Path:
        """The folder.

        SIGTERM, by which CI systems cancel a run, would end Python without any clean-up. It is
        taken over only where nobody else has.
        """
        self._owner = os.getpid()
        on_main_thread = threading.current_thread() is threading.main_thread()
        if on_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminated)
        return Path(tempfile.mkdtemp(prefix="aprt-"))

    def close(self) -> None:
        """Remove the folder, if there is one."""
        if "path" not in self.__dict__ or os.getpid() != self._owner:  # a forked child's copy
            return
        shutil.rmtree(self.path, ignore_errors=True)
        del self.path
        if signal.getsignal(signal.SIGTERM) == self._terminated:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self.close()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
