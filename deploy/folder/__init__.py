"""A model's folder as Hugging Face and sentence-transformers have it: what its files say, without their libraries.

| module | part |
|---|---|
| `hub` | finds the model: a folder, or a download |
| `source`, `sentence` | task, pooling, prompts, limits; takes milliseconds and no library |
| `tokenizer` | the tokenizer as transformers would load it |
| `describe` | all of it as the manifest of a bundle, so that the folder can be served as it is |
| `errors` | one line for what is wrong |

`python -m deploy export` reads the same files before it loads transformers.
"""

from __future__ import annotations

from deploy.folder.errors import FolderError

__all__ = ["FolderError"]
