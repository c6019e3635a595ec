"""What happens at an import, and what waits until it is needed: actions after imports, and lazy names of packages."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["lazy_names", "when_imported"]

Action = Callable[[ModuleType], None]


class _Finder:
    """Finds modules as the other finders do, and has an action follow the import of those that have one.

    It stays in ``sys.meta_path``: if it were removed there, an import in another thread could skip a finder.

    Attributes:
        actions: by name of the module.
    """

    def __init__(self) -> None:
        self.actions: dict[str, Action] = {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The specification of a module that has an action; None for any other module."""
        action = self.actions.get(name)
        if action is None:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is None:
                continue
            if spec.loader is not None:
                # A loader that takes no attributes: the module is imported all the same.
                with contextlib.suppress(AttributeError, TypeError):
                    spec.loader.exec_module = _then(name, spec.loader.exec_module, action)  # type: ignore[assignment, method-assign]
            return spec
        return None


def _then(name: str, execute: Action, action: Action) -> Action:
    """Executes a module, then does the action."""

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ == name:  # A loader may have several modules.
            action(module)

    return exec_module


_finder = _Finder()


def when_imported(name: str, action: Action) -> None:
    """Does something with a module: at once if it has been imported, else at the end of its import.

    Args:
        name: the module's.
        action: what is done. An error in it is an error of the import.
    """
    _finder.actions[name] = action
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)  # Not of importlib.abc, which takes 3 ms to import.
    if sys.modules.get(name) is not None:
        action(importlib.import_module(name))  # Waits where another thread is still importing it.


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]], submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names are imported at their first use.

    Args:
        package: its name.
        homes: names by the module that they are imported from.
        submodules: modules of the package that are imported when they are looked up as its attributes.

    Returns:
        Both functions. ``__getattr__`` raises AttributeError for a name that is not listed, and ImportError for one
        that needs torch where there is none.
    """
    home_of = {name: home for home, names in homes.items() for name in names}
    namespace = vars(sys.modules[package])

    def __getattr__(name: str) -> Any:  # noqa: N807
        home = home_of.get(name)
        if home is None and name not in submodules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(home or f"{package}.{name}")
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            from torch_ext._library import needs_torch

            raise needs_torch(f"{package}.{name}") from error
        namespace[name] = module if home is None else getattr(module, name)
        return namespace[name]

    def __dir__() -> list[str]:  # noqa: N807
        return sorted({*namespace, *home_of, *submodules})

    return __getattr__, __dir__
