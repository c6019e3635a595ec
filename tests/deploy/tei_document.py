"""Validates answers of text-embeddings-inference's routes, errors included, against its own OpenAPI document.

    python tests/deploy/tei_document.py openapi.json

where openapi.json is `docs/openapi.json` of that project, which is not part of this one. Needs the package jsonschema,
which is not among those of `make test`; `test_tei.py` has what the document says in a form of its own. Exit code 1: an
answer does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deploy.engines.open import load_engine  # noqa: E402
from deploy.folder.describe import describe_folder  # noqa: E402
from deploy.server.limits.bounds import Settings  # noqa: E402
from deploy.server.variants import Choice  # noqa: E402
from tests.deploy.conftest import make_tiny_model  # noqa: E402
from tests.deploy.server_harness import LiveServer  # noqa: E402

SIMILAR = {"inputs": {"source_sentence": "a", "sentences": ["a list", "of values"]}}
EVERYWHERE: list[tuple[str, Any]] = [
    ("/info", None),
    ("/health", None),
    ("/tokenize", {"inputs": ["a list", ""]}),
    ("/tokenize", {"inputs": "a list", "add_special_tokens": False}),
    ("/decode", {"ids": [5, 6, 7]}),
    ("/decode", {"ids": [[5, 6], [7]], "skip_special_tokens": False}),
    # Errors: of the body, of the task, of limits.
    *((path, body) for path in ("/embed", "/embed_all", "/embed_sparse", "/predict", "/tokenize")
      for body in ({}, {"inputs": []}, {"inputs": 5}, b"nonsense", {"inputs": "x " * 99, "truncate": False})),
    ("/rerank", {"query": "a", "texts": []}),
    ("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}}),
    ("/decode", {"ids": [1 << 40]}),
    ("/embed", {"inputs": "x" * 70_000}),
]  # fmt: skip
CASES: dict[tuple[str, int], list[tuple[str, Any]]] = {
    ("feature-extraction", 0): [
        ("/embed", {"inputs": "a list"}),
        ("/embed", {"inputs": ["a list", ""], "normalize": False}),
        ("/embed_all", {"inputs": ["a list", "of values"]}),
        ("/similarity", SIMILAR),
        ("/v1/embeddings", {"input": ["a list", "b"], "model": "m"}),
        ("/v1/embeddings", {"input": "a list", "model": "m", "encoding_format": "base64"}),
    ],
    ("sparse-embedding", 0): [("/embed_sparse", {"inputs": ["a list", "of values"]})],
    ("text-classification", 3): [
        ("/predict", {"inputs": "a list"}),
        ("/predict", {"inputs": ["a", "list"]}),
        ("/predict", {"inputs": [["a", "list"], ["of"]], "raw_scores": True}),
    ],
    ("text-classification", 1): [
        ("/rerank", {"query": "a", "texts": ["a list", "of values"]}),
        ("/rerank", {"query": "a", "texts": ["a list"], "return_text": True, "raw_scores": True}),
    ],
}


def of_draft(schema: Any) -> Any:
    """A schema of OpenAPI 3.0 as one of JSON Schema: `nullable` is a type there."""
    if isinstance(schema, list):
        return [of_draft(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: of_draft(item) for name, item in schema.items() if name not in ("nullable", "example")}
    return {"anyOf": [found, {"type": "null"}]} if schema.get("nullable") is True else found


def main(path: str) -> int:
    """Asks servers of all tasks, and returns the exit code."""
    import jsonschema

    document = of_draft(json.loads(Path(path).read_text(encoding="utf-8")))
    checked = set()
    faults = 0
    for (task, labels), cases in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = make_tiny_model(Path(folder) / "m", "bert", task, **({"num_labels": labels} if labels else {}))
            manifest = describe_folder(str(model), task)
            variant = manifest.variant("torch_ext-fp32")
            settings = Settings(port=0, max_body_bytes=60_000)
            loaded: Any = lambda manifest=manifest, variant=variant: load_engine(manifest, variant, 1)[0]  # noqa: E731
            engine: Any = None
            server = LiveServer(manifest, settings, engine, loaded)
            assert server.ready.wait(60)
            server.app.serves(Choice(variant.name, "only", {}, {}), "an isa")
            for route, body in [*cases, *EVERYWHERE]:
                method = "GET" if body is None else "POST"
                reply = server(method, route, body)
                responses = document["paths"][route][method.lower()]["responses"]
                # Errors have one form, whether or not the document lists their status at a path.
                error = {"$ref": "#/components/schemas/ErrorResponse"}
                content = responses.get(str(reply.status), {}).get("content", {})
                schema = content.get("application/json", {}).get("schema", {} if reply.status == 200 else error)
                checked.add((route, reply.status))
                if (route, body) in cases and reply.status != 200:
                    faults += 1
                    print(f"{route} {body}: expected 200, got {reply.status} {reply.body[:200]!r}")
                try:
                    jsonschema.validate(reply.json, {**schema, "components": document["components"]})
                except (jsonschema.ValidationError, ValueError) as fault:
                    faults += 1
                    print(f"{route} {str(body)[:80]}: {reply.status} {reply.body[:200]!r}: {str(fault)[:400]}")
            server.terminate()
            server.thread.join(20)
    routes = sorted({route for route, status in checked if status == 200})
    print(f"{len(checked)} kinds of answers, 200 from {', '.join(routes)}; {faults} do not fit")
    return int(faults > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", metavar="openapi.json", help="of text-embeddings-inference")
    sys.exit(main(parser.parse_args().document))
