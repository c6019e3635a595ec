"""What bf16 and int8 cost in accuracy: embeddings of real text, and finding documents with them.

    python benchmarks/accuracy.py MODEL

Two measurements against transformers in fp32, on docstrings of the Python standard library:

* the cosine of each text's embedding to that of fp32;
* retrieval: a docstring's first paragraph is the query, the rest of it the document that should be found among those
  of all others. recall@k is the share of queries whose document is among the k nearest by cosine; queries and
  documents are embedded by the same engine.

The bars are those of the project: int8 has a cosine of at least 0.996 on average and 0.99 in each text, and a recall@10
within one point of fp32. Exit code 1 if one is missed. Accuracy does not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import command_line, commit  # noqa: E402
from deploy.bundle import Manifest, ModelInfo, SpecialToken  # noqa: E402
from deploy.ending import end  # noqa: E402
from deploy.engines.batch import batches  # noqa: E402
from deploy.engines.engine import Engine  # noqa: E402
from deploy.folder.source import read_source  # noqa: E402
from deploy.machine import cpu_name  # noqa: E402
from deploy.options import model_folder  # noqa: E402
from deploy.tasks import open_task  # noqa: E402
from deploy.texts import docstrings, sample  # noqa: E402

ENGINES = ("fp32", "bf16", "int8")
BARS = {"bf16": {"mean": 0.9999, "min": 0.9995}, "int8": {"mean": 0.996, "min": 0.99}}
RECALL_POINTS = 1.0
"""Most percentage points of recall@10 that may be lost."""

MIN_QUERY_WORDS = 4
MIN_DOCUMENT_CHARS = 80


def pairs(count: int) -> tuple[list[str], list[str]]:
    """Queries and the document that belongs to each: no document twice, none in its query."""
    queries: dict[str, str] = {}
    documents: set[str] = set()
    for text in sample(len(docstrings())):
        query, _, document = text.partition("\n\n")
        query, document = " ".join(query.split()), document.strip()
        usable = len(query.split()) >= MIN_QUERY_WORDS and len(document) >= MIN_DOCUMENT_CHARS
        if usable and query not in queries and document not in documents:
            queries[query] = document
            documents.add(document)
        if len(queries) == count:
            break
    return list(queries), list(queries.values())


def recall(queries: np.ndarray, documents: np.ndarray, k: int) -> float:
    """Share of queries whose own document is among the k nearest; f32 [n, width] each, rows of length 1."""
    scores = queries @ documents.T
    better = (scores > np.diag(scores)[:, None]).sum(axis=1)
    return float((better < k).mean())


class Embedder:
    """Texts to rows of length 1, with the model's own tokenizer and pooling."""

    def __init__(self, folder: Path, keep_bf16: Sequence[str]) -> None:
        import transformers

        from deploy.engines.torch_ext import TorchExtEngine
        from deploy.engines.transformers import TransformersEngine
        from deploy.machine import usable_cpus
        from torch_ext import Encoder

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
        self.source = read_source(folder, folder.name, None, "feature-extraction")
        limits = (self._tokenizer.model_max_length, self.source.max_positions, self.source.max_tokens)
        self._longest = min(int(limit) for limit in limits if limit)
        described = Manifest(
            root=folder,
            model=ModelInfo(folder.name, None, self.source.architecture),
            created_with={},
            task=self.source.task,
            hidden_size=int(model.config.hidden_size),
            max_tokens=self._longest,
            pooling=self.source.pooling,
            labels=None,
            problem_type=None,
            special_tokens={"pad": SpecialToken(int(self._tokenizer.pad_token_id), str(self._tokenizer.pad_token))},
            files={},
            variants={},
        )
        task = open_task(described)
        self.engines: dict[str, Engine] = {
            "fp32": TransformersEngine(model, task),
        }
        encoders = {
            "bf16": Encoder.from_transformers(model, "bf16"),
            "int8": Encoder.from_transformers(model, "int8", keep_bf16),
        }
        with tempfile.TemporaryDirectory() as scratch:
            for name, encoder in encoders.items():
                path = Path(scratch) / name
                encoder.save(path)
                self.engines[name] = TorchExtEngine.load(path, name, usable_cpus(), task)

    def __call__(self, engine: str, texts: Sequence[str]) -> np.ndarray:
        """Embeddings f32 [texts, width]."""
        tokens = self._tokenizer(list(texts), truncation=True, max_length=self._longest)["input_ids"]
        ids = [np.array(text, np.int64) for text in tokens]
        work = batches(ids, 32)
        rows: np.ndarray | None = None
        for number, batch in enumerate(work, 1):
            runner = self.engines[engine]
            output = np.stack(runner.run(batch.items, [runner.task.exact] * len(batch)))
            if rows is None:
                rows = np.empty((len(ids), output.shape[1]), np.float32)
            rows[list(batch.texts)] = output / np.linalg.norm(output, axis=1, keepdims=True)
            if sys.stderr.isatty():
                print(f"\r{engine}: {number} of {len(work)} batches ", end="", file=sys.stderr, flush=True)
        assert rows is not None
        return rows


def measure(embed: Embedder, texts: Sequence[str], queries: Sequence[str], documents: Sequence[str]) -> dict[str, Any]:
    """Accuracy and recall by engine."""
    result: dict[str, Any] = {}
    exact: np.ndarray | None = None
    for engine in ENGINES:
        rows = embed(engine, texts).astype(np.float64)
        exact = rows if exact is None else exact
        cosines = (rows * exact).sum(axis=1)
        asked, found = embed(engine, queries), embed(engine, documents)
        result[engine] = {
            "cosine mean": float(cosines.mean()),
            "cosine min": float(cosines.min()),
            **{f"recall@{k}": recall(asked, found, k) for k in (1, 10)},
        }
    return result


def missed(measured: dict[str, Any]) -> list[str]:
    """The bars that are missed, in words."""
    lines = []
    for engine, bars in BARS.items():
        found = measured[engine]
        lines += [
            f"{engine}: {name} cosine {found[f'cosine {name}']:.6f} < {bar}"
            for name, bar in bars.items()
            if not found[f"cosine {name}"] >= bar
        ]
        lost = 100 * (measured["fp32"]["recall@10"] - found["recall@10"])
        if not lost <= RECALL_POINTS:
            lines.append(f"{engine}: recall@10 is {lost:.2f} points below fp32, at most {RECALL_POINTS:g} are allowed")
    return lines


def table(measured: dict[str, Any]) -> str:
    """A table in Markdown."""
    lines = ["| engine | cosine, mean | cosine, worst | recall@1 | recall@10 |", "|---|---|---|---|---|"]
    names = {"fp32": "transformers fp32", "bf16": "torch_ext bf16", "int8": "torch_ext int8"}
    lines += [
        f"| {names[engine]} | {found['cosine mean']:.6f} | {found['cosine min']:.6f} | "
        f"{100 * found['recall@1']:.2f} % | {100 * found['recall@10']:.2f} % |"
        for engine, found in measured.items()
    ]
    return "\n".join(lines)


def main() -> int:
    """Measures; the exit code is 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=model_folder, metavar="MODEL", help="folder of an embedding model")
    parser.add_argument("--name", help="of the model, for the report; default: the folder's")
    parser.add_argument("--texts", type=int, default=2000, help="texts to compare (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=2000, help="queries and documents (default: %(default)s)")
    parser.add_argument("--keep-bf16", action="append", default=[], metavar="LAYER", help="leave it out of int8")
    parser.add_argument("--threads", type=int, help="default: what torch takes")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy.json")
    arguments = parser.parse_args()

    import torch

    import torch_ext

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    embed = Embedder(arguments.model, arguments.keep_bf16)
    queries, documents = pairs(arguments.pairs)
    measured = measure(embed, sample(arguments.texts), queries, documents)
    isa = torch_ext.isa_report()
    report: dict[str, Any] = {
        "model": arguments.name or arguments.model.name,
        "texts": arguments.texts,
        "pairs": len(queries),
        "engines": measured,
        "missed": missed(measured),
        "cpu": cpu_name(),
        "kernels": {"bf16": isa["isa"], "int8": isa["int8_kernels"][-1]},
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        },
        "commit": commit(),
        "command": command_line(["python", "benchmarks/accuracy.py", *sys.argv[1:]]),
    }
    versions = report["versions"]
    text = (
        f"{table(measured)}\n\n{report['model']}: {arguments.texts} docstrings of Python {versions['python']}; recall "
        f"with {len(queries)} queries and documents. {report['cpu']}, kernels {isa['isa']} and "
        f"{isa['int8_kernels'][-1]}, torch {versions['torch']}, transformers {versions['transformers']}, commit "
        f"{report['commit']}: `{report['command']}`\n"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {arguments.output} and .md")
    for line in report["missed"]:
        print(f"missed: {line}")
    return int(bool(report["missed"]))


if __name__ == "__main__":
    sys.exit(end(main))
