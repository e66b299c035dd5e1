"""Kills before a chosen operation on files, within the process of the test."""
import os
import sys
from pathlib import Path


class Killed(BaseException):
    """The process is dead."""


class Killer:
    """Counts operations that change files below a folder, and raises `Killed` before number `at` and all after it."""

    EVENTS = ('open', 'os.rename', 'os.remove', 'os.link', 'os.mkdir', 'os.rmdir')
    active = None

    def __init__(self, folder: Path, at: int = 1_000_000):
        self.folder, self.at, self.done = str(folder), at, []

    def __enter__(self):
        Killer.active = self
        return self

    def __exit__(self, kind, *error):
        Killer.active = None
        return kind is Killed

    def see(self, event, args):
        paths = [os.fspath(a) for a in args if isinstance(a, (str, os.PathLike))]
        if not any(path.startswith(self.folder) for path in paths):
            return
        if event == 'open' and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if len(self.done) >= self.at:
            raise Killed
        self.done.append((event, *(path.removeprefix(self.folder) for path in paths[:2])))


def audit(event, args):
    if Killer.active and event in Killer.EVENTS:
        Killer.active.see(event, args)


sys.addaudithook(audit)  # Python has no way to take one away
