"""Kept for importers of old; see `deploy.export.write_onnx`."""

from deploy.export.write_onnx import export_fp32, quantize_int8, sensitive_nodes

__all__ = ["export_fp32", "quantize_int8", "sensitive_nodes"]
