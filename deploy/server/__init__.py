"""`python -m deploy serve`: a bundle over HTTP, with batches by token budget.

One process, and kinds of work that are each in modules of their own. A request goes through the first four, in this
order, and back:

| module | work | thread |
|---|---|---|
| `http/protocol`, `lifecycle` | bytes to requests, bounds on them; listen, drain | event loop |
| `app`, `endpoints`, `http` | which row of which model answers; key, body, errors | event loop; helper threads |
| `api` | a list of `Route` rows for each dialect: between its bodies and the service | event loop |
| `service` | texts to token ids, and these to results | event loop; helper threads for long texts |
| `service/batching`, `deploy/engines` | batches, the encoder, pooling or a task head | engine thread |
| `variants` | which variant is served, and why | main thread, then engine thread |
| `variants/measure` | variants against each other, once | a process of its own, watched by the engine thread |

`cli` has the options, `serving` does what they say; `loading` brings the models in (`models`). `api/route` says what a
row is, and `api/openapi` describes the rows; `api/schemas` holds the types of bodies, `errors` is the one table of
what can go wrong, `limits` of what is too much. Neither transformers nor optimum is imported, at start or later.
"""
