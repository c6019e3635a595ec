"""What can go wrong in an export, said in one line."""

from __future__ import annotations

from deploy.folder.errors import FolderError, first_line, is_disk_full

__all__ = ["ExportError", "Interrupted", "first_line", "is_disk_full"]


class ExportError(FolderError):
    """The export cannot go on; the message says what was expected, what was found, and what to do."""


class Interrupted(BaseException):
    """A signal asked the export to stop.

    Attributes:
        signal: Its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
