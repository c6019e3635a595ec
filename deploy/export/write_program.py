"""The variant for models that torch_ext's encoder does not run: a program of torch.export.

The model is traced with batches of any size and length. What a tracer cannot leave open is tried in smaller
steps: lengths padded to 8 or 16 tokens, texts of one length together, texts one by one. Whether a program answers what
the model does is found out by running both.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy.engines.batch import Batch, PairIds, plain_ids
from deploy.engines.padded import padded
from deploy.engines.program import Layout, shaped
from deploy.engines.program_file import LAYOUT_FILE, check_archive
from deploy.export.errors import NotSupportedError, first_line, is_disk_full
from deploy.folder.errors import chain
from deploy.tasks import Task

__all__ = ["write_program"]

_aten = torch.ops.aten

_TOLERANCE = 1e-3
"""Largest difference between program and model, in parts of the largest output; rounding of fp32 has some 1e-6."""

_TRIES = (
    (False, 1, (1, 8, 16)),
    (False, 16, (16, 32, 64)),
    (True, 1, (1, 8, 16)),
    (True, 16, (16, 32, 64)),
)
"""Whether texts run one by one, of what lengths are multiples, and what the shortest may be."""


class _Outputs(torch.nn.Module):
    """A model of transformers with tensors in and one tensor out, whose classes the program need not know."""

    def __init__(self, model: torch.nn.Module, count: int) -> None:
        super().__init__()
        self.model = model
        self._count = count
        self._taken = frozenset(inspect.signature(model.forward).parameters)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        outputs = self.model(**{name: value for name, value in inputs.items() if name in self._taken})
        first = [outputs[place] for place in range(self._count)]
        result: torch.Tensor = first[0] if len(first) == 1 else torch.stack(first, dim=-1)
        return result


def write_program(name: str, path: Path, model: Any, task: Task, texts: Sequence[Any]) -> Layout:
    """Writes the variant.

    Args:
        name: Name of the variant.
        path: File to write.
        model: The model in transformers, fp32, in evaluation mode; it is left as it is.
        task: What it is for.
        texts: Token ids of some texts, as engines take them.

    Returns:
        Which batches the program takes.

    Raises:
        NotSupportedError: torch.export does not write it; the message names the layer and the reason.
        OSError: The file cannot be written.
    """
    whole = _Outputs(model, len(task.onnx_outputs))
    try:
        probes = _Probes(whole, task, texts)
    except (RuntimeError, ValueError, IndexError) as error:
        raise NotSupportedError(f"{name}: {_layer(whole, error)}{type(error).__name__}: {first_line(error)}") from error
    reasons: list[str] = []
    for single, multiple, leasts in _TRIES:
        try:
            program = _trace(whole, probes.example(single, multiple), single)
        except Exception as error:  # Whatever tracing a model raises.
            if is_disk_full(error) or isinstance(error, (OSError, MemoryError)):
                raise
            reasons.append(f"{_layer(whole, error)}{type(error).__name__}: {first_line(error)}")
            continue
        for layout in [Layout(single, multiple, least, ragged) for ragged in (True, False) for least in leasts]:
            reason = probes.difference(program.module(), layout)
            if reason is None:
                _round(program)
                try:
                    _save(program, path, layout)
                except Exception as error:  # Programs may hold what torch runs, and cannot write.
                    if is_disk_full(error) or isinstance(error, (OSError, MemoryError)):
                        raise
                    raise NotSupportedError(f"{name}: torch.export does not save it: {first_line(error)}") from error
                return layout
            reasons.append(reason)
    raise NotSupportedError(f"{name}: torch.export does not write this model: {reasons[0]}")


class _Probes:
    """Batches that program and model must answer alike: texts of several lengths, alone and together."""

    def __init__(self, model: torch.nn.Module, task: Task, texts: Sequence[Any]) -> None:
        self._pad_id = task.pad_id
        by_length = sorted(texts, key=len)
        chosen = [by_length[place * (len(by_length) - 1) // 4] for place in range(5)] if by_length else []
        # Sizes that no text had: odd ones, and the shortest that are usual.
        longest = by_length[-1]
        chosen += [_cut(longest, size) for size in (2, 3, 5, 8, 17, 33) if size < len(longest)]
        self._texts: list[Any] = []
        self._expected: list[Any] = []
        for text in chosen:
            arrays = padded(Batch([text]), self._pad_id)
            try:
                with torch.inference_mode():
                    expected = model(*map(torch.from_numpy, arrays)).float().numpy()[0]
            except (RuntimeError, ValueError, IndexError):
                if len(text) > 3:  # Some models do not take the shortest.
                    raise
                continue
            self._texts.append(text)
            self._expected.append(expected)

    def example(self, single: bool, multiple: int) -> tuple[torch.Tensor, ...]:
        """What to trace with: sizes that are no others', so that none is taken for another."""
        text = max(self._texts, key=len)
        tokens = max(multiple * 3, min(len(text), 40) // multiple * multiple, 12)
        ids = np.resize(np.asarray(plain_ids(text), np.int64), tokens)
        rows = 1 if single else 3
        mask = np.ones((rows, tokens), np.int64)
        if not single:
            mask[1:, tokens * 2 // 3 :] = 0
        arrays = (np.where(mask == 1, ids, self._pad_id), mask, np.zeros_like(mask))
        return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)

    def difference(self, run: Any, layout: Layout) -> str | None:
        """Why a program is not the model; None if it is."""
        count = len(self._texts)
        alone = [[row] for row in range(count)]
        # One text twice, too: a batch without padding.
        together = [[row, row] for row in range(0, count, 2)]
        if layout.ragged:
            together += [list(range(count)), list(range(0, count, 3))]
        for rows in alone + ([] if layout.single else together):
            batch = Batch([self._texts[row] for row in rows])
            try:
                found = shaped(run, layout, padded(batch, self._pad_id), self._pad_id)
            except Exception as error:  # A guard, or an op.
                return f"with {len(rows)} texts of up to {max(batch.lengths)} tokens: {first_line(error)}"
            for place, row in enumerate(rows):
                expected = self._expected[row]
                own = found[place]
                if own.shape != expected.shape and own.ndim == 2 and own.shape[1:] == expected.shape[1:]:
                    own = own[: len(expected)]
                if own.shape != expected.shape:
                    return f"its output is {list(own.shape)}, expected {list(expected.shape)}"
                size = max(1e-6, float(np.abs(expected).max()))
                worst = float(np.abs(own - expected).max()) / size
                if not worst <= _TOLERANCE:
                    return (
                        f"with {len(rows)} texts of up to {max(batch.lengths)} tokens its outputs differ by "
                        f"{worst:.1e} of the largest from those of the model"
                    )
        return None


def _cut(text: Any, size: int) -> Any:
    return PairIds(text.ids[:size], text.types[:size]) if isinstance(text, PairIds) else plain_ids(text)[:size]


def _trace(model: torch.nn.Module, example: tuple[torch.Tensor, ...], single: bool) -> Any:
    auto: Any = torch.export.Dim.AUTO
    sizes = {1: auto} if single else {0: auto, 1: auto}
    with _quiet(), _masks_by_broadcasting(), _no_autocast(), torch.no_grad():
        return torch.export.export(model, example, dynamic_shapes=(sizes,) * len(example), strict=False)


_VMAP_OF_MASKS = "_vmap_for_bhqkv"
_MODE_OF_MASKS = "TransformGetItemToIndex"
"""Private names of `transformers.masking_utils` in transformers 4.

Masks of decoders are functions of places, which it maps over all of them by vmap; torch.export traces that, and cannot
save it. The functions take tensors as well, as transformers 5 calls them.
"""


@contextlib.contextmanager
def _masks_by_broadcasting() -> Iterator[None]:
    """Has transformers 4 make the masks of decoders without vmap; changes nothing in versions without these names."""
    import transformers.masking_utils as masks

    def over_places(function: Callable[..., torch.Tensor], bh_indices: bool = True) -> Callable[..., torch.Tensor]:
        def mask(*places: torch.Tensor) -> torch.Tensor:
            count = len(places)
            spread = [
                index.view([-1 if own == place else 1 for own in range(count)]) for place, index in enumerate(places)
            ]
            return function(*spread).expand([index.shape[0] for index in places])

        return mask

    before = {name: getattr(masks, name, None) for name in (_VMAP_OF_MASKS, _MODE_OF_MASKS)}
    if None in before.values():
        yield
        return
    try:
        setattr(masks, _VMAP_OF_MASKS, over_places)
        setattr(masks, _MODE_OF_MASKS, contextlib.nullcontext)
        yield
    finally:
        for name, value in before.items():
            setattr(masks, name, value)


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Has models not switch autocast off around rotary positions: it is off, and a program would hold that."""
    before = torch.autocast
    try:
        torch.autocast = lambda *arguments, **options: contextlib.nullcontext()  # type: ignore[assignment, misc]
        yield
    finally:
        torch.autocast = before  # type: ignore[misc]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _layer(model: torch.nn.Module, error: BaseException) -> str:
    """The innermost layer that was running, such as `encoder.layer.0 (LongformerLayer): `."""
    names = {id(part): name for name, part in model.named_modules()}
    found = None
    for item in chain(error):
        trace = item.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if id(owner) in names and owner is not model:
                found = owner
            trace = trace.tb_next
        if found is not None:
            return f"{names[id(found)].removeprefix('model').lstrip('.') or 'model'} ({type(found).__name__}): "
    return ""


def _round(program: Any) -> None:
    """Rounds to bf16 the weights that only linear layers and tables of embeddings read; both widen them again."""
    rounded: dict[int, torch.Tensor] = {}
    graph = program.graph
    signature = program.graph_signature
    for node in list(graph.nodes):
        node.meta.pop("stack_trace", None)  # It has the paths of this machine.
        target = signature.inputs_to_parameters.get(node.name) if node.op == "placeholder" else None
        weight = None if target is None else program.state_dict[target]
        if target is None or weight is None or weight.dtype is not torch.float32 or weight.dim() != 2 or not node.users:
            continue
        if not all(_reads_weight(user, node) for user in node.users):
            continue
        if id(weight) not in rounded:
            rounded[id(weight)] = torch.nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
        program.state_dict[target] = rounded[id(weight)]
        wide = node.meta["val"]
        narrow = wide.detach().to(torch.bfloat16)
        for user in list(node.users):
            before = user.target is _aten.linear.default
            with graph.inserting_before(user) if before else graph.inserting_after(user):
                convert = graph.call_function(_aten.to.dtype, (node if before else user, torch.float32))
            convert.meta["val"] = wide if before else user.meta["val"]
            if before:
                user.replace_input_with(node, convert)
            else:
                user.replace_all_uses_with(convert, delete_user_cb=lambda item, made=convert: item is not made)
                user.meta["val"] = user.meta["val"].to(torch.bfloat16)
        node.meta["val"] = narrow
        node.meta.pop("tensor_meta", None)
    program.graph_module.recompile()


def _reads_weight(user: Any, node: Any) -> bool:
    if user.target is _aten.linear.default:
        return user.args[1] is node and user.args[0] is not node and node not in user.args[2:]
    return user.target is _aten.embedding.default and user.args[0] is node and node not in user.args[1:]


def _save(program: Any, path: Path, layout: Layout) -> None:
    program.example_inputs = None
    with _quiet():
        torch.export.save(program, path, extra_files={LAYOUT_FILE: layout.to_json()})
    check_archive(path)
