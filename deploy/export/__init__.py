"""`python -m deploy export`: from a model of transformers to a verified bundle.

| module | part |
|---|---|
| `cli`, `options` | options, exit codes, one line per error |
| `deploy.folder` | finds the model and reads what its folder says; the server does so, too |
| `staging`, `signals` | the folder appears complete or not at all |
| `pipeline` | the stages, from loading to the manifest |
| `needs` | libraries, memory, room on the disk |
| `tokenizer`, `reference` | the tokenizer as it goes into the bundle; the model in transformers, fp32 |
| `write_torch_ext`, `int8` | encoders of torch_ext; which layers int8 spares |
| `write_program` | a program of torch.export, for models that the encoder does not run |
| `write_onnx` | fp32 and int8 ONNX through optimum |
| `verify`, `accuracy` | by `deploy/engines`: the comparison with transformers in fp32, its bounds, and the speed |
| `report`, `progress`, `errors` | the manifest and what the user sees |

Decisions about int8 (ONNX, arm64 settings: u8 activations per tensor, s8 weights per output channel, dynamic):

* Attention scores and context stay in fp32 (all-MiniLM-L6-v2, 2,000 docstrings: mean cosine 0.9931 instead of 0.9925).
* Embedding tables are quantized: a quarter of the size for 0.0003 of cosine.
* Where a model misses its bound, the layers whose inputs lose most by 8 bits stay in fp32, up to half of them, until
  it keeps it. A single outlier channel in a layer's input is enough to need that.
* On x86-64 without VNNI, u8 x s8 saturates. `deploy.onnx_session` makes ONNX Runtime exact there: under an
  emulated AVX2 CPU the outputs are then those of VNNI. On aarch64 (emulated Neoverse N1 and N2) the mean cosine to fp32
  of 16 texts is 0.9926, on x86-64 0.9925; the outputs differ from each other as much, since roundings go other ways.
"""
