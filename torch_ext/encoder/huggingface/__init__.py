"""Encoders and heads of Hugging Face: what their configurations mean, and where their weights are.

| module | part |
|---|---|
| ``architecture`` | the fields of a row, and how values of a configuration are read |
| ``albert``, ``bert``, ``distilbert`` ... | the rows, related architectures in one file |
| ``table`` | all rows, by ``model_type`` |
| ``describe`` | from a configuration and the shapes of weights to a specification, and which weights become which |
| ``safetensors`` | files of weights, mapped |
| ``stages`` | linear stages behind the pooling, from the folders of sentence-transformers' Dense modules |
| ``folder`` | all of it from a folder, without torch |
| ``models`` | all of it from models of the transformers package, and folders as tensors; needs torch |
"""

from __future__ import annotations

from torch_ext.encoder.huggingface.table import ARCHITECTURES

__all__ = ["ARCHITECTURES"]
