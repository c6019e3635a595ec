"""What weights determine once: vectors of relative positions, led through the layers that read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch_ext.encoder.huggingface.describe import Projected
from torch_ext.encoder.huggingface.safetensors import StoredTensor

__all__ = ["project_all"]

_ELEMENT_TYPES = {"F32": 0, "F16": 1, "BF16": 2}  # As torch_ext_runtime.h numbers them.


def project_all(projections: Iterable[Projected], weights: Mapping[str, StoredTensor]) -> dict[Projected, StoredTensor]:
    """The results of projections, on several threads.

    Args:
        projections: what to compute.
        weights: by name, of fp32, fp16 or bf16.

    Returns:
        fp32 ``[rows of the table, outputs]`` for each.

    Raises:
        ValueError: shapes do not fit each other.
    """
    wanted = list(projections)
    if not wanted:
        return {}
    # What most models do without.
    from concurrent.futures import ThreadPoolExecutor

    from torch_ext import _runtime

    def project(projection: Projected) -> StoredTensor:
        roles = {
            "table": projection.table,
            "norm.weight": projection.norm_weight,
            "norm.bias": projection.norm_bias,
            "weight": projection.weight,
            "bias": projection.bias,
        }
        tensors = []
        for role, name in roles.items():
            if name is not None:
                dtype, shape, data = weights[name]
                tensors.append((role, _ELEMENT_TYPES[dtype], shape, data, False))
        result = _runtime.project_rows(tensors, projection.eps)
        return StoredTensor("F32", result.shape, memoryview(result).cast("B"))

    with ThreadPoolExecutor(_runtime.default_threads()) as threads:
        return dict(zip(wanted, threads.map(project, wanted), strict=True))
