"""`python -m deploy serve`: a bundle over HTTP, with batches by token budget.

One process, three kinds of work, each in its own module:

| module | work | thread |
|---|---|---|
| `app`, `protocol`, `lifecycle` | HTTP: routes, limits, answers, drain | event loop |
| `tokens` | texts to token ids | event loop when short, one helper thread when long |
| `batching`, `engines` | batches, the encoder, pooling or a task head | engine thread |

`schemas` and `openapi` describe the API, `errors` is the one table of what can go wrong, `limits` of what is too much.
Neither transformers nor optimum is imported, at start or later.
"""
