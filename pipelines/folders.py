"""Folders that are whole or not there."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that takes its name at the end, or leaves nothing behind on any error."""
    made = [parent for parent in output.parents if not parent.exists()]
    token = uuid.uuid4().hex[:8]
    partial = output.with_name(f".{output.name}.{token}.partial")
    retired = output.with_name(f".{output.name}.{token}.old")
    try:
        partial.mkdir(parents=True)
        yield partial
        # safetensors writes files that only their owner can read; here others may as the umask has it.
        readable = partial.stat().st_mode & 0o666
        for path in partial.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(path.stat().st_mode | readable)
        if output.exists():
            os.replace(output, retired)
        os.replace(partial, output)
    except BaseException:  # Ctrl-C as well
        if retired.exists() and not output.exists():
            os.replace(retired, output)
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()
        raise
    shutil.rmtree(retired, ignore_errors=True)
