"""PyTorch models with packed linear layers: :func:`optimize` puts :class:`PackedLinear` into a model that exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_ext.layer_weights import PackedDtype as PackedDtype
from torch_ext.layer_weights import check_dtype, check_tensors
from torch_ext.packed_linear import PackedLinear
from torch_ext.quantize import check_inputs
from torch_ext.sensitivity import Report, Sample
from torch_ext.swap import Skip, Swap, check_packed, choose, is_plain, matcher

__all__ = ["PackedLinear", "Skip", "optimize"]


def optimize(
    model: nn.Module,
    dtype: PackedDtype = "bf16",
    skip: Skip = (),
    *,
    keep_bf16: Skip = (),
    accuracy: float | None = None,
    sample: Iterable[Sample] | None = None,
    report: Callable[[Report], object] | None = None,
) -> nn.Module:
    """Swap every ``nn.Linear`` of a model for a :class:`PackedLinear`, in place.

    The model is for inference afterwards: it is put into eval mode, ``requires_grad`` is off in all of it, and inputs
    that require grad are refused. A second call with the same dtype finds nothing to do; one that asks for another
    dtype of layers that are packed already is refused, since their original weights are gone. Only plain ``nn.Linear``
    is swapped: subclasses, such as the output projection of ``nn.MultiheadAttention``, and parametrized layers stay as
    they are. A layer that is used in several places stays one layer. A weight that is tied to an embedding is packed
    for the linear layer, while the embedding keeps its own, unrounded; what is saved is that one,
    tied as before.

    int8 is coarser here than in an :class:`torch_ext.Encoder`, which balances the channels that layers read: the norms
    of a model feed residuals, too, and stay as they are. The shortest texts show it: single words of all-MiniLM-L6-v2
    have a cosine of at least 0.979 to fp32, in an Encoder 0.992, and 0.993 if the layers that read a norm stay in bf16
    (``keep_bf16=["*.attention.self.*", "*.intermediate.dense"]``).

    Inputs and outputs may be fp32, bf16, fp16 or fp64, also after ``model.half()`` and its like and under
    ``torch.autocast``. Weights of the linear layers cannot be written to: see :class:`PackedLinear`.

    With ``accuracy``, layers that int8 would do too much damage to are found and stay in bf16: the sample is run
    through the model as it is, and then, if int8 in all layers misses the accuracy, once for each layer; see
    :func:`torch_ext.sensitivity.choose_layers`. That takes memory for a second and a third copy of the weights.

    Args:
        model: the model, its parameters fp32, bf16 or fp16 on the CPU. If it is itself an ``nn.Linear``, it cannot be
            swapped in place: use what is returned.
        dtype: what products are computed in: ``"bf16"`` or ``"int8"``.
        skip: layers to leave alone: a name or ``fnmatch`` pattern, several of them, or a function of name and layer. A
            pattern that matches a module's name leaves out all layers in that module.
        keep_bf16: with ``"int8"``, layers to pack in bf16 instead; like ``skip``.
        accuracy: with ``"int8"``, the mean cosine between outputs before and after that must be reached.
        sample: inputs to measure ``accuracy`` on, each what the model takes: a dictionary of keyword arguments, a
            tensor, a tuple of positional arguments, or a function of the model that returns what counts, such as
            pooled embeddings. Models of sentence-transformers take the dictionary of their ``tokenize`` or
            ``preprocess``, or ``lambda model: model.encode(texts)``. Where nothing else is said, rows of ``logits``,
            ``last_hidden_state``, ``scores`` or ``sentence_embedding`` are compared, without those that
            ``attention_mask`` leaves out. Rows of one number, such as scores, are compared as one row: give many.
        report: called with what was measured if ``accuracy`` is given; ``print`` shows it as a table.

    Returns:
        The model.

    Raises:
        ValueError: ``dtype`` is not known, the model has no ``nn.Linear``, a pattern in ``skip`` or ``keep_bf16``
            matches none, options do not go together, a weight is not on the CPU or is made at the first call only, a
            layer is packed in another dtype already, accelerate has put hooks on a layer (offloading), or a weight for
            int8 is not finite or has more than :data:`torch_ext.quantize.MAX_INT8_INPUTS` inputs. The model is
            unchanged then.
        TypeError: ``model`` is not a module, a weight is neither fp32 nor bf16 nor fp16, or an option is of another
            type. The model is unchanged then.
        torch_ext.sensitivity.AccuracyError: a ValueError; not even bf16 is as accurate. The model is unchanged then.

    Example:
        >>> model = torch_ext.optimize(AutoModel.from_pretrained(name), skip="pooler")
        >>> with torch.inference_mode():
        ...     model(**inputs)
        >>> torch_ext.optimize(other, "int8", accuracy=0.998, sample=[inputs], report=print)
    """
    given: Any = model
    if not isinstance(given, nn.Module):
        inside = [f".{name}" for name, value in getattr(given, "__dict__", {}).items() if isinstance(value, nn.Module)]
        advice = f": pass its {' or '.join(inside)}" if inside else ""
        raise TypeError(f"optimize: expected a torch.nn.Module, got {type(given).__name__}{advice}")
    inputs = _check_options(dtype, keep_bf16, accuracy, sample)
    targets, bf16 = _find_layers(model, dtype, skip, keep_bf16)
    swap = Swap(model, targets)
    low = {id(module) for _, module in targets} if dtype == "bf16" else bf16
    if accuracy is not None:
        result = choose(swap, low, accuracy, inputs)
        low = low | {swap.ids[name] for name in result.kept}
        if report is not None:
            report(result)
    model = swap(low)
    model.requires_grad_(False)
    return model.eval()


def _check_options(
    dtype: PackedDtype, keep_bf16: Skip, accuracy: float | None, sample: Iterable[Sample] | None
) -> list[Sample]:
    """Raise unless the options of :func:`optimize` go together. Returns the inputs of the sample."""
    check_dtype("optimize", dtype)
    if dtype != "int8" and (keep_bf16 != () or accuracy is not None):
        raise ValueError(f"optimize: keep_bf16 and accuracy mean nothing with dtype={dtype!r}, only with 'int8'")
    if isinstance(sample, (Tensor, Mapping, str)):
        raise TypeError(f"optimize: expected a list of inputs as sample, got {type(sample).__name__}: pass [sample]")
    inputs = [] if sample is None else list(sample)
    if (accuracy is None) != (not inputs):
        raise ValueError("optimize: expected accuracy and a sample of inputs together, got one without the other")
    if accuracy is not None and not isinstance(accuracy, (float, int)):
        raise TypeError(f"optimize: expected a number as accuracy, got {type(accuracy).__name__}")
    if accuracy is not None and not 0 < accuracy <= 1:
        raise ValueError(f"optimize: expected accuracy above 0 and at most 1, got {accuracy}")
    return inputs


def _find_layers(
    model: nn.Module, dtype: PackedDtype, skip: Skip, keep_bf16: Skip
) -> tuple[list[tuple[str, nn.Linear]], set[int]]:
    """Find what :func:`optimize` swaps, and raise unless all of it can be packed.

    Returns:
        The layers to swap, each under all of its names, and the ids of those that ``keep_bf16`` names.
    """
    skipped, unused = matcher(skip)
    in_bf16, unused_bf16 = matcher(keep_bf16)
    targets: list[tuple[str, nn.Linear]] = []
    packed: dict[int, tuple[str, PackedLinear]] = {}
    seen = False
    kept: set[int] = set()
    bf16: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if any(is_lazy(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(
                f"optimize: {name or 'the model'} is a {type(module).__name__} whose weights are made at the first "
                "call: call the model once before"
            )
        if isinstance(module, PackedLinear):
            seen = True
            packed.setdefault(id(module), (name, module))
            if in_bf16(name, module):
                bf16.add(id(module))
            if skipped(name, module):
                kept.add(id(module))
        elif type(module) is nn.Linear and hasattr(module, "_hf_hook"):
            seen = True
            in_bf16(name, module)
            if not skipped(name, module):
                raise ValueError(
                    f"optimize: {name or 'the model'} has a hook of accelerate, which moves or offloads its weights "
                    "for each call, while a packed layer keeps them in memory, on the CPU: load the model without "
                    "device_map and offloading, or take the hooks off before: "
                    "accelerate.hooks.remove_hook_from_submodules(model)"
                )
        elif is_plain(module):
            seen = True
            if in_bf16(name, module):
                bf16.add(id(module))
            if skipped(name, module):
                kept.add(id(module))  # Under its other names, too: a shared layer stays shared.
            else:
                targets.append((name, module))
    if not seen:
        raise ValueError(f"optimize: {type(model).__name__} has no nn.Linear that could be swapped")
    for option, left in (("skip", unused()), ("keep_bf16", unused_bf16())):
        if left:
            raise ValueError(f"optimize: {option} names no nn.Linear of the model: {', '.join(left)}")
    check_packed(dtype, [layer for key, layer in packed.items() if key not in kept], bf16)
    targets = [(name, module) for name, module in targets if id(module) not in kept]
    for name, module in targets:
        if dtype == "int8" and id(module) not in bf16:
            check_inputs(f"optimize: {name or 'the model'}", module.in_features)
        check_tensors(f"optimize: {name or 'the model'}", module.weight, module.bias)
    return targets, bf16
