"""`python -m deploy serve`: a bundle over HTTP, with batches by token budget.

One process, and kinds of work that are each in modules of their own:

| module | work | thread |
|---|---|---|
| `app`, `protocol`, `lifecycle` | HTTP: routes, limits, answers, drain | event loop |
| `tokens` | texts to token ids | event loop when short, one helper thread when long |
| `selection`, `choice`, `speed_cache` | which variant is served, and why | main thread, then engine thread |
| `measure` | variants against each other, once | a process of its own, watched by the engine thread |
| `batching`, `engines` | batches, the encoder, pooling or a task head | engine thread |

`schemas` and `openapi` describe the API, `errors` is the one table of what can go wrong, `limits` of what is too much.
Neither transformers nor optimum is imported, at start or later.
"""
