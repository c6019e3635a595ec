"""Packed linear layers in the graph of an exported program, as :func:`torch_ext.optimize` puts them into a model.

`torch.export` writes a program that belongs to no CPU: its linear layers are `aten.linear` with plain weights.
:func:`pack_graph` packs them for the CPU at hand once the program is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from torch_ext.layer_weights import FLOATS, as_bias, pack_as

__all__ = ["constant_of", "pack_graph", "widened"]

_aten = torch.ops.aten
_linear = torch.ops.torch_ext.linear.default

_ACTIVATIONS: dict[Any, str] = {
    _aten.relu.default: "relu",
    _aten.relu_.default: "relu",
    _aten.tanh.default: "tanh",
    _aten.silu.default: "silu",
    _aten.silu_.default: "silu",
}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}

_SAME = (_aten.dropout.default, _aten.detach.default, _aten.detach_.default, _aten.alias.default)
"""What changes nothing in evaluation mode, all of whose first arguments are what they return."""


def widened(node: object) -> object:
    """What a conversion to fp32 is of; the node itself, if it is none."""
    if isinstance(node, fx.Node) and node.target is _aten.to.dtype and node.args[1] is torch.float32:
        return node.args[0]
    return node


def constant_of(module: fx.GraphModule, node: object) -> Tensor | None:
    """The parameter, buffer or constant that a node stands for; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value.detach() if isinstance(value, Tensor) else None


def pack_graph(module: fx.GraphModule) -> int:
    """Run the linear layers of a graph on packed weights, in place; an activation behind one becomes part of it.

    The module is for inference on this CPU afterwards: weights that nothing else uses are removed from it. Inputs of
    the layers are fp32 or bf16; products are of bf16, sums fp32.

    Args:
        module: what ``torch.export.ExportedProgram.module()`` returns. Weights are fp32, or bf16 behind a conversion to
            fp32; two-dimensional and not empty, others stay as they are.

    Returns:
        How many layers were packed.
    """
    packed: dict[tuple[int, tuple[int, ...]], str] = {}
    count = 0
    graph = module.graph
    graph.eliminate_dead_code()
    _remove_no_ops(graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not _aten.linear.default:
            continue
        x, weight_node = node.args[:2]
        bias_node = node.args[2] if len(node.args) > 2 else None
        weight = constant_of(module, widened(weight_node))
        bias = None if bias_node is None else constant_of(module, widened(bias_node))
        usable = weight is not None and weight.dim() == 2 and weight.dtype in FLOATS and weight.numel() > 0
        if not usable or weight is None or (bias_node is not None and bias is None) or not _is_float(x):
            continue
        key = weight.data_ptr(), tuple(weight.shape)
        if key not in packed:
            packed[key] = f"_packed_{len(packed)}"
            module.register_buffer(packed[key], pack_as("bf16", weight), persistent=False)
        with graph.inserting_before(node):
            packed_node = graph.get_attr(packed[key])
            wide: fx.Node | None = None
            if bias is not None:
                name = f"_bias_{count}"
                module.register_buffer(name, as_bias(bias), persistent=False)
                wide = graph.get_attr(name)
            replaced, activation = _with_activation(node)
            made = graph.call_function(_linear, (x, packed_node, wide, activation))
        made.meta.update(node.meta)
        replaced.replace_all_uses_with(made)
        graph.erase_node(replaced)
        if replaced is not node:
            graph.erase_node(node)
        count += 1
    _narrow(graph)
    graph.eliminate_dead_code()
    _drop_unused(module)
    module.recompile()
    return count


def _is_float(node: object) -> bool:
    """Whether a node is a tensor of fp32; where the graph does not say so, it is taken for one."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(node, fx.Node) and (not isinstance(value, Tensor) or value.dtype in FLOATS)


def _with_activation(node: fx.Node) -> tuple[fx.Node, str]:
    """The node that a layer and the activation behind it end in, and the activation's name."""
    if len(node.users) == 1:
        (user,) = node.users
        if user.target in (_aten.gelu.default, _aten.gelu_.default):
            how = user.kwargs.get("approximate", user.args[1] if len(user.args) > 1 else "none")
            return user, _GELUS[str(how)]
        if user.target in _ACTIVATIONS:
            return user, _ACTIVATIONS[user.target]
    return node, "none"


def _narrow(graph: fx.Graph) -> None:
    """Writes in bf16 what only linear layers read: they round it anyway, and it is half as much memory."""
    for node in graph.nodes:
        if node.target is _linear and all(
            user.target is _linear and user.args[0] is node and user.args[1:].count(node) == 0 for user in node.users
        ):
            if not node.users:
                continue
            node.args = (*node.args[:4], torch.bfloat16)
            for user in list(node.users):
                if len(user.args) < 5:
                    user.args = (*user.args[:4], torch.float32)


def _remove_no_ops(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _SAME and not (node.target is _aten.dropout.default and node.args[2]):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _drop_unused(module: fx.GraphModule) -> None:
    """Removes weights that no node reads any more."""
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for path, part in list(module.named_modules()):
        for tensors in (part._parameters, part._buffers):
            for name in list(tensors):
                if (f"{path}.{name}" if path else name) not in used:
                    del tensors[name]
