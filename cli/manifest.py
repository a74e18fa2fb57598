"""What became of each picture, as JSON lines; several processes may write one file."""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock


class Manifest:
    """Appends whole lines to a file, and knows what it said before.

    A last line without its end, which a power cut or a full disk leaves, is removed when the next one is written.

    Args:
        path: the file; it and its folder are made where there is none.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        self._append(b"")

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def done(self) -> dict[str, dict[str, Any]]:
        """The last record of every result that was made, or found whole, by the result's absolute path."""
        records = {}
        with open(self.path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                    if record["status"] in ("done", "kept"):
                        records[record["output"]] = record
                except (ValueError, KeyError, TypeError):
                    continue  # not one of ours
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            OSError: it cannot be written.
        """
        line = json.dumps(record, ensure_ascii=False)
        # Names that are no Unicode become JSON's own escapes.
        self._append(line.encode("utf-8", "backslashreplace") + b"\n")

    def _append(self, line: bytes) -> None:
        with self._lock.acquire(poll_interval=0.01):
            # One write in append mode, so that even without the lock (a network disk) lines would not mix.
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                end = os.fstat(descriptor).st_size
                if stat.S_ISREG(os.fstat(descriptor).st_mode) and end:
                    with open(self.path, "rb") as whole:
                        whole.seek(-1, os.SEEK_END)
                        if whole.read(1) != b"\n":
                            whole.seek(0)
                            end = whole.read().rfind(b"\n") + 1
                            os.ftruncate(descriptor, end)
                try:
                    while line:
                        line = line[os.write(descriptor, line) :]
                except OSError as error:
                    with suppress(OSError):
                        os.ftruncate(descriptor, end)
                    raise OSError(error.errno, error.strerror, os.fspath(self.path)) from error
            finally:
                os.close(descriptor)
