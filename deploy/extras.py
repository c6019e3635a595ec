"""What to install where a package is missing. Standard library only."""

from __future__ import annotations

__all__ = ["how_to_install", "is_ours", "missing"]

_OURS = ("deploy", "loadtest", "torch_ext")


def how_to_install(extra: str) -> str:
    """The command for an extra, or several with commas between them; run in the checkout.

    The package is on no index: without the wheel's path pip would fail, or take another package of that name.
    """
    return f'make wheel, then pip install "$(echo dist/torch_ext-*.whl)[{extra}]"'


def is_ours(error: ModuleNotFoundError) -> bool:
    """Whether a module of this project is missing, which no extra brings."""
    return error.name is None or error.name.partition(".")[0] in _OURS


def missing(error: ModuleNotFoundError, extra: str) -> str:
    """What to do about a package that is not there.

    Args:
        error: The failed import.
        extra: The extra that has the package.
    """
    return f"the package {error.name} is missing; install the extra: {how_to_install(extra)}"
