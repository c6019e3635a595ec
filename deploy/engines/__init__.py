"""The one way to run a batch, for verifying and for serving.

`open` makes an engine of a variant's file; an engine turns token ids into states, and hands them to its task, which
makes answers of them. torch, onnxruntime and transformers are imported by the engine that needs them, and not before.
"""
