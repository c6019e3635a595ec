"""A program of torch.export: padded batches, run by torch with its linear layers on the kernels of torch_ext.

It is for models whose architecture torch_ext's encoder does not know. The file belongs to no CPU: weights are packed
when it is loaded. transformers is not imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import torch_ext.ops
from torch_ext.graph import pack_graph

from ..bundle import BundleError
from ..tasks import Task
from .padded import PaddedEngine, PaddedIds
from .pooling import Floats
from .program_file import check_archive

__all__ = ["INPUTS", "Layout", "ProgramEngine", "shaped"]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Arguments of every program, each i64 [texts, longest]; what a model does not take, it leaves alone."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which batches a program takes, as its export found out.

    Attributes:
        single: Texts run one by one.
        multiple: Padded lengths are multiples of so many tokens.
        least: Shorter ones are padded to so many tokens.
        ragged: Texts of different lengths may run together; else padding changes answers.
    """

    single: bool = False
    multiple: int = 1
    least: int = 1
    ragged: bool = True

    def __str__(self) -> str:
        """What the user should know of it; nothing in the usual case."""
        said = ["texts one by one"] if self.single else [] if self.ragged else ["texts of one length together"]
        if self.multiple > 1 or self.least > 1:
            said.append(f"padded to {self.length(1)} tokens at least")
        return ", ".join(said)

    def length(self, tokens: int) -> int:
        """The padded length of a text."""
        return max(self.least, -(-tokens // self.multiple) * self.multiple)

    def to_json(self) -> str:
        """What `from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Layout:
        """Reads it.

        Raises:
            ValueError: It is damaged.
        """
        values = json.loads(text)
        fields = {field.name: type(field.default) for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != fields:
            raise ValueError(f"expected {', '.join(fields)}, got {text!r}")
        if min(values["multiple"], values["least"]) < 1:
            raise ValueError(f"expected lengths of 1 or more, got {text!r}")
        return cls(**values)


def shaped(run: Any, layout: Layout, arrays: tuple[PaddedIds, ...], pad_id: int) -> Floats:
    """What a program makes of a padded batch.

    Args:
        run: The program.
        layout: Which batches it takes.
        arrays: Those of `INPUTS`; of one text, if the layout is for single ones.
        pad_id: Token id of padding.

    Returns:
        f32 [texts, longest, n] or [texts, n].
    """
    longest = arrays[0].shape[1]
    more = layout.length(longest) - longest
    if more:
        filled = (pad_id, 0, 0)
        arrays = tuple(
            np.pad(array, ((0, 0), (0, more)), constant_values=value)
            for array, value in zip(arrays, filled, strict=True)
        )
    with torch.inference_mode():
        found = run(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
    found = found if isinstance(found, torch.Tensor) else found[0]
    output = np.asarray(found.float().numpy(), np.float32)
    return output[:, :longest] if output.ndim == 3 else output


class ProgramEngine(PaddedEngine):
    """Runs a program of torch.export."""

    padding_bound = 1.15

    def __init__(self, path: Path, threads: int, task: Task) -> None:
        """Loads a program and packs its weights.

        Args:
            path: The file.
            threads: Threads of torch, in the whole process.
            task: What the answers are.

        Raises:
            BundleError: The file is damaged, holds more than a program, or is of another version of torch.
        """
        super().__init__(task)
        layout = check_archive(path)
        torch.set_num_threads(threads)
        try:
            self._layout = Layout.from_json(layout)
            program = torch.export.load(path)
            module: Any = program.module(check_guards=False)
            del program
            # Checks of shapes, and trees of arguments, take as long as a small model.
            module._forward_pre_hooks.clear()
            module.graph.set_codegen(torch.fx.graph.CodeGen())
            pack_graph(module)
        except Exception as error:  # Those of torch have no common base class.
            raise BundleError(
                f"{path}: torch {torch.__version__} cannot load it: {str(error).splitlines()[0][:300]}; export the "
                "model again with this version"
            ) from error
        self._module = module
        if not self._layout.ragged:
            self.padding_bound = 1.0
        if self._layout.single:
            self._max_padded = 0  # No two texts run together.
        self.isa = f"torch-{torch.__version__}, {torch_ext.ops.isa_report()['isa']}"

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def _forward(self, ids: PaddedIds, mask: PaddedIds, types: PaddedIds) -> Floats:
        return shaped(self._module, self._layout, (ids, mask, types), self.task.pad_id)
