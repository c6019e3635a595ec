"""What a file of torch.export may hold: tensors, and a graph of ops of torch.

`torch.export.load` unpickles what an archive says is pickled, and evaluates its expressions of sizes; so they are
looked at before.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..bundle import BundleError

__all__ = ["LAYOUT_FILE", "check_archive"]

LAYOUT_FILE = "torch_ext.json"
"""Name of the archive's extra file that says which batches the program takes."""

_ARRAYS = re.compile(r"[^/]+/data/(weights|constants)/(weight|tensor)_\d+")
_SETTINGS = re.compile(r"[^/]+/data/(weights|constants)/\w+_config\.json")
_EXAMPLE = re.compile(r"[^/]+/data/sample_inputs/\w+\.pt")
_GRAPH = re.compile(r"[^/]+/models/\w+\.json")
_OTHERS = re.compile(
    rf"[^/]+/(extra/{re.escape(LAYOUT_FILE)}|archive_format|archive_version|byteorder|version|\.data/\w+|"
    r"\.format_version|\.storage_alignment)"
)
_TARGET = re.compile(r"(torch\.ops\.aten\.\w+\.\w+|_operator\.(?!\w*(caller|getter))\w+|math\.\w+|torch\.sym_\w+)")
_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    Symbol Integer Rational Float Add Mul Pow Mod Max Min Eq Ne Lt Le Gt Ge And Or Not FloorDiv CleanDiv CeilDiv
    PythonMod ModularIndexing Where Abs CeilToInt FloorToInt IntTrueDiv FloatTrueDiv ToFloat TruncToInt RoundToInt
    PowByNatural StrictLessThan LessThan GreaterThan StrictGreaterThan Equality Unequality floor ceiling positive
    nonnegative integer real True False true false oo int_oo and or not L size input_ids attention_mask
    token_type_ids BooleanTrue BooleanFalse evaluate NegOne One Zero Half Piecewise OpaqueUnaryFn_sqrt FloatPow
    TruncToFloat RoundDecimal LShift RShift BitwiseFn_bitwise_and BitwiseFn_bitwise_or max min math torch
    nonpositive negative
    """,
    )
)
_SYMBOL = re.compile(r"[suf]\d+|_\w*\d*")
_LARGEST_JSON = 256 << 20


def check_archive(path: Path) -> str:
    """Refuses a file that could do more than hold a program of ops of torch.

    Args:
        path: The file.

    Returns:
        Its file `LAYOUT_FILE`.

    Raises:
        BundleError: It is damaged, or holds pickles, other functions than ops, or other expressions than of sizes.
    """
    layout = None
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename
                if name.endswith(f"/extra/{LAYOUT_FILE}"):
                    layout = archive.read(entry).decode()
                if _SETTINGS.fullmatch(name) or _GRAPH.fullmatch(name):
                    if entry.file_size > _LARGEST_JSON:
                        raise _refused(path, f"{name} of {entry.file_size} bytes")
                    for key, value in _values(json.loads(archive.read(entry))):
                        _check(path, key, value)
                elif _EXAMPLE.fullmatch(name) and entry.file_size:
                    raise _refused(path, f"inputs in a pickle, {name}")
                elif not (_ARRAYS.fullmatch(name) or _EXAMPLE.fullmatch(name) or _OTHERS.fullmatch(name)):
                    raise _refused(path, name)
    except (OSError, zipfile.BadZipFile, ValueError, RecursionError, RuntimeError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{path}: expected a program of torch.export: {error}; export the model again") from error
    if layout is None:
        raise BundleError(f"{path}: expected {LAYOUT_FILE} beside the program; export the model again")
    return layout


def _check(path: Path, key: str, value: Any) -> None:
    if key == "use_pickle" and value is not False:
        raise _refused(path, "a pickle")
    if key == "target" and not _TARGET.fullmatch(str(value)):
        raise _refused(path, f"a call of {str(value)[:80]!r}")
    if key in ("expr_str", "guards_code") and isinstance(value, str):
        words = re.findall(r"[^\W\d]\w*", value)
        unknown = [word for word in words if word not in _WORDS and not _symbol(word)]
        if unknown or "__" in value or re.search(r"[^\w\s'()\[\],.+\-*/%=<>!&|~]", value):
            raise _refused(path, f"the expression {value[:80]!r}")


def _symbol(word: str) -> bool:
    return "__" not in word and _SYMBOL.fullmatch(word) is not None


def _refused(path: Path, what: str) -> BundleError:
    return BundleError(f"{path}: holds {what}, which no program of an export has: refused, nothing of it was run")


def _values(item: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in JSON with the name of its field; those of an array have the array's."""
    if isinstance(item, dict):
        for name, value in item.items():
            yield from _values(value, name)
    elif isinstance(item, list):
        for value in item:
            yield from _values(value, key)
    else:
        yield key, item
