"""Run a command until it ends or the process that wanted it is gone; then end everything that it started.

Usage: ``python supervise.py PID FOLDER COMMAND...``, in a process group of its own. PID is the process that wants it; when that
one is gone, FOLDER is removed too. Nothing but psutil is imported: this process lives as long as the command.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil

GRACE_S = 5.0
"""A server that is told to end takes a second or two; one of whose processes was killed may wait forever."""


def others(*, but: str = "") -> list[psutil.Process]:
    """Return the other live processes of this process group, without those that have ``but`` in their command."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) != os.getpid() or process.pid == os.getpid():
                continue
            if process.status() != psutil.STATUS_ZOMBIE and not (but and but in " ".join(process.cmdline())):
                found.append(process)
        except (psutil.Error, ProcessLookupError, PermissionError):
            continue
    return found


def end_others(server: "subprocess.Popen[bytes]") -> None:
    """Ask, then kill; Python's resource tracker last, since it frees the shared memory of those that were killed."""
    os.killpg(0, signal.SIGTERM)  # this process notes it and goes on, and the tracker ignores it
    for _ in range(2):
        deadline = time.monotonic() + GRACE_S
        while others() and time.monotonic() < deadline:
            server.poll()
            time.sleep(0.05)
        for process in others(but="resource_tracker"):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def main() -> None:
    """Poll: it needs no help from the platform, and survives whatever thread or signal ends the other process."""
    wanted_by, folder, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    asked_to_end: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked_to_end.append(number))
    server = subprocess.Popen(command)
    while server.poll() is None and os.getppid() == wanted_by and not asked_to_end:
        time.sleep(0.1)
    end_others(server)
    if os.getppid() != wanted_by:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
