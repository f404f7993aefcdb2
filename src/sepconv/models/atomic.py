"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replacing"]


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside `path` to write to, and renames it to `path` in the end.

    If the block fails, what it has written is removed and `path` stays as it was. The path has the
    ending of `path`, for writers that look at it.

    Args:
        path: The file to write. Its folder must exist.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> target = Path(tempfile.mkdtemp()) / "weights.bin"
        >>> with replacing(target) as beside:
        ...     _ = beside.write_bytes(b"1234")
        >>> target.read_bytes()
        b'1234'
    """
    target = Path(path)
    with tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent) as folder:
        beside = Path(folder, target.name)
        yield beside
        os.replace(beside, target)
