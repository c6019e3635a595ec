"""One export from end to end; `cli` gives it its options, and `staging` makes it all or nothing."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import texts as text_sources
from deploy.bundle import (
    CONFIG_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    VARIANTS,
    Accuracy,
    FileEntry,
    Manifest,
    ModelInfo,
    SpecialToken,
    Speed,
    Variant,
    VariantKind,
    file_entry,
    load_manifest,
    write_manifest,
)
from deploy.export.accuracy import Comparison, Result, default_bounds, make_comparison
from deploy.export.engines import Batch, Engine, OnnxEngine, TorchExtEngine, TransformersEngine, batches
from deploy.export.errors import ExportError, first_line, is_disk_full
from deploy.export.int8 import BoundMissed, choose_encoder
from deploy.export.progress import Progress, megabytes, quiet_libraries
from deploy.export.source import Source
from deploy.export.staging import Staging
from deploy.machine import available_memory_bytes, cpu_name, machine, usable_cpus
from deploy.onnx_session import kernels

if TYPE_CHECKING:
    from torch_ext import Encoder, Head
    from torch_ext.sensitivity import Report

__all__ = ["Options", "export", "step_count"]


DEFAULT_TEXTS = 256
MOST_TEXTS = 2000
_BATCH = 32
_LOGITS_BYTES = 256 << 20
_MASKED_SEED = 0


@dataclass(frozen=True)
class Options:
    """How to export.

    Attributes:
        variants: Names of variants to write.
        bounds: Bounds that differ from the defaults, per variant.
        texts_file: Texts to verify on; None: the built-in sample.
        max_texts: How many texts at most.
        threads: Threads to measure with; None: all that this process may use.
        speed_s: Seconds of measuring per variant; 0 measures no speed.
        force: Whether a bundle that is there is replaced.
        accuracy: Mean cosine to fp32 that torch_ext-int8 has to reach, besides its bounds.
    """

    variants: Sequence[str]
    bounds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    texts_file: Path | None = None
    max_texts: int | None = None
    threads: int | None = None
    speed_s: float = 2.0
    force: bool = False
    accuracy: float | None = None


def _read_texts(options: Options) -> tuple[list[str], str, str | None]:
    """The texts, where they are from, and what the user should know about them."""
    if options.texts_file is None:
        texts = text_sources.sample(options.max_texts or DEFAULT_TEXTS)
        return texts, "docstrings of the Python standard library", None
    texts = text_sources.load_texts(options.texts_file)
    most = options.max_texts or MOST_TEXTS
    if len(texts) <= most:
        return texts, options.texts_file.name, None
    # Evenly spread: files are often sorted.
    spread = [texts[index * len(texts) // most] for index in range(most)]
    return spread, options.texts_file.name, f"{most} of {len(texts)} texts, evenly spread (--max-texts)"


class _Tokens:
    """The tokenizer as it goes into the bundle, and the token ids of the texts."""

    def __init__(self, source: Source, target: Path) -> None:
        from tokenizers import Tokenizer, normalizers
        from transformers import AutoTokenizer

        try:
            self.reference: Any = AutoTokenizer.from_pretrained(  # type: ignore[no-untyped-call]
                source.folder, use_fast=True, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            raise ExportError(f"{source.folder}: the tokenizer cannot be loaded: {first_line(error)}") from error
        if not self.reference.is_fast:
            raise ExportError(
                f"{source.folder}: only a slow tokenizer ({type(self.reference).__name__}), no tokenizer.json; "
                "save a fast one there with AutoTokenizer.from_pretrained(...).save_pretrained"
            )
        backend = Tokenizer.from_str(self.reference.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        if source.lowercase:
            lower = normalizers.Lowercase()
            backend.normalizer = normalizers.Sequence([lower, backend.normalizer]) if backend.normalizer else lower
        backend.save(str(target), pretty=False)
        self.lowercase = source.lowercase
        self.backend = backend

        size = source.config.get("vocab_size")
        highest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if isinstance(size, int) and highest >= size:
            raise ExportError(
                f"{source.folder}: the tokenizer has ids up to {highest}, the model a vocabulary of {size}; "
                "they do not belong together"
            )
        # Without a limit of its own a tokenizer says 1e30.
        told = self.reference.model_max_length
        limit = source.max_positions if told is None or told < 3 else min(int(told), source.max_positions)
        self.max_tokens = source.max_tokens or limit
        self.special = {name: self._special(name) for name in ("pad", "mask", "cls", "sep")}
        pad = self.special["pad"]
        if pad is None:
            told = source.config.get("pad_token_id")
            token = backend.id_to_token(told) if isinstance(told, int) else None
            if token is None:
                raise ExportError(
                    f"{source.folder}: the tokenizer has no padding token; set tokenizer.pad_token and save it"
                )
            self.special["pad"] = pad = SpecialToken(int(told or 0), token)
        self.pad_id = pad.id
        if source.task == "fill-mask" and self.special["mask"] is None:
            raise ExportError(f"{source.folder}: the tokenizer has no mask token, and the task is fill-mask")

    def _special(self, name: str) -> SpecialToken | None:
        token, index = getattr(self.reference, f"{name}_token"), getattr(self.reference, f"{name}_token_id")
        return None if token is None or index is None else SpecialToken(int(index), str(token))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, truncated.

        Raises:
            ExportError: The bundle's tokenizer gives other ids than transformers.
        """
        self.backend.enable_truncation(self.max_tokens)
        ids = [list(item.ids) for item in self.backend.encode_batch(list(texts))]
        self.backend.no_truncation()
        # Python lower-cases some letters by their place in the word, a tokenizer never does: such texts prove nothing.
        same = [index for index, text in enumerate(texts) if text.isascii() or not self.lowercase]
        told = [texts[index].lower() if self.lowercase else texts[index] for index in same]
        expected = self.reference(told, truncation=True, max_length=self.max_tokens)["input_ids"] if told else []
        for index, row in zip(same, expected, strict=True):
            if ids[index] != row:
                raise ExportError(
                    "the tokenizer in the bundle and the one in transformers give different ids for "
                    f"{texts[index][:60]!r}; the files of the tokenizer do not belong together"
                )
        kept = [row for row in ids if row]
        if not kept:
            raise ExportError("the tokenizer gives no token for any of the texts; pass other ones with --texts")
        return kept

    def mask(self, ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """Hides one token of every text that has no mask token yet; returns ids and the positions of the masks."""
        import random

        mask = self.special["mask"]
        assert mask is not None
        special = {token.id for token in self.special.values() if token is not None}
        chance = random.Random(_MASKED_SEED)
        rows, positions = [], []
        for row in ids:
            places = [index for index, token in enumerate(row) if token == mask.id]
            candidates = [index for index, token in enumerate(row) if token not in special]
            if not places and candidates:
                places = [chance.choice(candidates)]
                row = [mask.id if index == places[0] else token for index, token in enumerate(row)]
            if places:
                rows.append(row)
                positions.append(places)
        if not rows:
            raise ExportError("none of the texts has a token that could be masked; pass other ones with --texts")
        return rows, positions


def _load_model(source: Source) -> Any:
    """The model in fp32, with every weight that its task needs.

    Raises:
        ExportError: Files are damaged, hold code, or lack weights of the task.
    """
    import torch
    import transformers

    kinds = {
        "feature-extraction": transformers.AutoModel,
        "text-classification": transformers.AutoModelForSequenceClassification,
        "fill-mask": transformers.AutoModelForMaskedLM,
    }
    try:
        model, info = kinds[source.task].from_pretrained(
            source.folder,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            weights_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, EOFError) as error:
        if is_disk_full(error):
            raise
        raise ExportError(f"{source.folder / source.weights}: cannot be loaded: {first_line(error)}") from error
    except Exception as error:
        # Of the kinds of pickle and safetensors, which share no base class.
        reason = "refused" if not source.safe_format else "damaged"
        raise ExportError(
            f"{source.folder / source.weights}: {reason}: {first_line(error)}; save the model again in safetensors"
        ) from error
    missing = sorted(info["missing_keys"])
    if source.task == "feature-extraction":
        missing = [name for name in missing if ".pooler." not in f".{name}"]
    if missing or info["mismatched_keys"]:
        names = ", ".join([*missing, *(str(item[0]) for item in info["mismatched_keys"])][:3])
        raise ExportError(
            f"{source.folder / source.weights}: no weights for {names}..., which {source.task} needs; "
            "pass another --task, or a model that was trained for it"
        )
    model.eval()
    model.requires_grad_(False)
    return model


def _required_bytes(source: Source, parameters: int, variants: Sequence[str]) -> int:
    """What an export needs on disk at its peak, estimated."""
    # torch_ext-int8 has tables in bf16, and maybe layers.
    per_parameter = {
        "torch_ext-bf16": 2.0,
        "torch_ext-int8": 2.0,
        "torch-fp32": 4.0,
        "onnx-fp32": 4.0,
        "onnx-int8": 1.3,
    }
    names = set(variants) | ({"onnx-fp32"} if "onnx-int8" in variants else set())
    # Tokenizers and graphs take some megabytes.
    total = sum(per_parameter[name] * parameters for name in names)
    tokenizer = sum(path.stat().st_size for path in source.folder.glob("*.json") if path.is_file())
    return int(total * 1.03) + 2 * tokenizer + (4 << 20)


def _required_memory(source: Source, variants: Collection[str]) -> int:
    """What an export needs in memory at its peak, measured: ONNX Runtime's quantizer holds several copies."""
    return (8 if "onnx-int8" in variants else 4) * source.weights_bytes + (1 << 30)


def _speed(engine: Engine, work: Sequence[Batch], seconds: float, threads: int) -> Speed | None:
    """Texts per second over batches of every length, until the time is over; the engine has run before."""
    if seconds <= 0:
        return None
    # Whole rounds only, so that short and long texts count alike.
    chosen = work[:: max(1, len(work) // 4)]
    count, start = 0, time.perf_counter()
    while True:
        for batch in chosen:
            engine.run(batch)
            count += len(batch.ids)
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return Speed(round(count / elapsed, 1), threads, cpu_name(), max(len(batch.ids) for batch in chosen))


def _open_engine(name: str, folder: Path, source: Source, tokens: _Tokens, threads: int) -> Engine:
    kind = VARIANTS[name]
    path = folder / kind.file
    if kind.engine == "torch_ext":
        return TorchExtEngine.load(path, kind.dtype, source.task, source.pooling)
    return OnnxEngine(path, threads, source.task, source.pooling, tokens.pad_id)


def _versions() -> dict[str, str]:
    """Versions of what made the bundle."""
    result = {}
    names = {"torch": "torch", "transformers": "transformers", "optimum": "optimum-onnx", "onnxruntime": "onnxruntime"}
    for name, distribution in {**names, "onnx": "onnx", "tokenizers": "tokenizers"}.items():
        try:
            result[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "unknown"
    try:
        import torch_ext

        result["torch_ext"] = torch_ext.__version__
    except ImportError:
        result["torch_ext"] = "not installed"
    return result


def export(source: Source, target: Path, options: Options, progress: Progress) -> Manifest:
    """Writes a verified bundle.

    Args:
        source: What the model folder says.
        target: What `check_target` returned.
        options: How.
        progress: Where to say what happens.

    Returns:
        The manifest, its root being `target`.

    Raises:
        ExportError: See its message; nothing is left.
        OSError: The disk is full, or fails; nothing is left.
    """
    texts, text_source, note = _read_texts(options)
    required, available = _required_memory(source, options.variants), available_memory_bytes()
    if available is not None and available < required:
        hint = "; without onnx-int8 it takes half" if "onnx-int8" in options.variants else ""
        memory = f"about {megabytes(required)} of memory are needed, {megabytes(available)} are free{hint}"
        progress.say(f"note: {memory}")
    for line in (*source.notes, *([note] if note else [])):
        progress.say(f"note: {line}")
    with (
        Staging(target, options.force) as staging,
        quiet_libraries(),
        _threads(options.threads or usable_cpus()) as threads,
    ):
        manifest = _fill(source, staging, texts, text_source, options, threads, progress)
        staging.commit(last=MANIFEST_FILE)
    return replace(manifest, root=target)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[int]:
    """Lets torch use `count` threads, and afterwards as many as before."""
    try:
        import torch
    except ImportError as error:
        raise ExportError(f"export needs torch ({first_line(error)}): see the installation in the README") from error
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)


def step_count(variants: Collection[str]) -> int:
    """How many steps `export` has."""
    torch_ext = sum(VARIANTS[name].engine == "torch_ext" for name in variants)
    return 3 + torch_ext + len(variants) + (len(variants) > torch_ext)


def _fill(
    source: Source,
    staging: Staging,
    texts: Sequence[str],
    text_source: str,
    options: Options,
    threads: int,
    progress: Progress,
) -> Manifest:
    folder = staging.path
    names = [name for name in VARIANTS if name in options.variants]

    with progress.step("load the model and its tokenizer") as said:
        _import_libraries(names)
        tokens = _Tokens(source, folder / TOKENIZER_FILE)
        ids = tokens.encode(texts)
        masks: list[list[int]] = [[] for _ in ids]
        if source.task == "fill-mask":
            ids, masks = tokens.mask(ids)
        model = _load_model(source)
        # With tied ones counted twice, as every file but the model's own has them.
        parameters = sum(tensor.numel() for tensor in model.state_dict().values())
        required, free = _required_bytes(source, parameters, names), staging.free_bytes()
        if free < required:
            raise ExportError(
                f"-o {staging.target}: about {megabytes(required)} are needed there, {megabytes(free)} are free; make "
                "room, choose another disk, or write fewer --variants"
            )
        labels = source.labels() if source.task == "text-classification" else None
        if labels is not None and len(labels) != model.config.num_labels:
            raise ExportError(
                f"{source.folder / CONFIG_FILE}: {len(labels)} labels, but {model.config.num_labels} logits"
            )
        pickled = "" if source.safe_format else ", pickle read without running code"
        said.append(f"{parameters / 1e6:.1f} M parameters, {megabytes(source.weights_bytes)}{pickled}")

    hidden_size = int(model.config.hidden_size)
    problem_type = source.problem_type() if labels is not None else None
    logits = _LOGITS_BYTES // (4 * int(model.config.vocab_size)) if source.task == "fill-mask" else None
    work = batches(ids, masks, _BATCH, logits)
    comparison = make_comparison(source.task, len(ids), problem_type)
    with progress.step(f"transformers fp32 on {len(ids)} texts ({text_source})") as said:
        reference = TransformersEngine(model, source.task, source.pooling, tokens.pad_id)
        comparison.fill(reference, work)
        reference_speed = _speed(reference, work, options.speed_s, threads)
        if reference_speed is not None:
            said.append(f"{reference_speed.texts_per_s:.0f} texts/s")
        del reference

    shutil.copyfile(source.folder / CONFIG_FILE, folder / CONFIG_FILE)
    bounds = {
        name: {**default_bounds(source.task, problem_type, name), **options.bounds.get(name, {})} for name in names
    }
    report: Report | None = None
    layers = 0
    for name in names:
        kind = VARIANTS[name]
        if kind.engine != "torch_ext":
            continue
        with progress.step(f"write {name}") as said, _told_as_export_error(name):
            if kind.dtype == "int8":
                try:
                    encoder, head, report = choose_encoder(
                        model, source, work, comparison, bounds[name], options.accuracy
                    )
                except BoundMissed as missed:
                    _refuse(name, missed.result, names, " even with all layers in bf16")
                    raise AssertionError("a result that missed its bound is refused") from missed
                layers = len(encoder.linear_names)
                said.append(f"{len(report.kept)} of {layers} linear layers in bf16")
            else:
                encoder, head = _read_torch_ext(model, source, kind.dtype)
            encoder.save(str(folder / kind.file), head=head)
            del encoder, head
            said.append(megabytes((folder / kind.file).stat().st_size))
    if report is not None and (report.layers or options.accuracy is not None):
        progress.say(str(report))
    onnx_file = folder / VARIANTS["onnx-fp32"].file
    config = model.config
    if {"onnx-fp32", "onnx-int8"} & set(names):
        with progress.step("write onnx-fp32 (optimum)") as said:
            from deploy.export.onnx_files import export_fp32

            export_fp32(model, source.task, folder / "onnx.tmp", onnx_file)
            said.append(megabytes(_variant_bytes(folder, "onnx-fp32")))
    del model
    gc.collect()

    results: dict[str, tuple[Result, Speed | None]] = {}
    for name in names:
        if name == "onnx-int8":
            results[name] = _make_int8(
                folder, source, tokens, comparison, work, bounds[name], options, threads, config, progress
            )
            continue
        with progress.step(f"verify {name}") as said:
            engine = _open_engine(name, folder, source, tokens, threads)
            result = comparison.check(engine, work, bounds[name])
            speed = _speed(engine, work, options.speed_s, threads)
            del engine
            said.append(_describe(result.accuracy, speed))
            _refuse(name, result, names)
            if name == "torch_ext-int8" and report is not None:
                result = result.with_details(layers=layers, layers_in_bf16=len(report.kept))
            results[name] = result, speed
    if "onnx-fp32" not in names:
        for path in _files_of(folder, "onnx-fp32"):
            path.unlink(missing_ok=True)

    with progress.step("write the manifest") as said:
        manifest = _manifest(source, folder, tokens, results, labels, problem_type, hidden_size, report)
        lengths = [len(row) for row in ids]
        manifest = replace(
            manifest,
            verification={
                "texts": len(ids),
                "source": text_source,
                "mean_tokens": round(sum(lengths) / len(lengths), 1),
                "reference": "transformers fp32",
                "reference_texts_per_s": None if reference_speed is None else reference_speed.texts_per_s,
            },
        )
        write_manifest(manifest)
        load_manifest(folder, verify=True)
        said.append(megabytes(sum(entry.bytes for entry in manifest.files.values())) + " in all")
    return manifest


def _import_libraries(names: Sequence[str]) -> None:
    """Imports what is needed, so that something that is missing is told before any work."""
    try:
        import tokenizers
        import torch
        import transformers

        if any(VARIANTS[name].engine == "onnxruntime" for name in names):
            import onnx
            import onnxruntime
            import optimum.exporters.onnx
            import optimum.onnxruntime

            del onnx, onnxruntime, optimum
        del tokenizers, torch, transformers
    except ImportError as error:
        raise ExportError(
            f"export needs more packages ({first_line(error)}): pip install 'torch-ext[export]'"
        ) from error
    if any(VARIANTS[name].engine == "torch_ext" for name in names):
        try:
            import torch_ext

            del torch_ext
        except ImportError as error:
            left = ",".join(name for name in VARIANTS if VARIANTS[name].engine != "torch_ext")
            raise ExportError(f"{first_line(error, 600)}; or leave it out with --variants {left}") from error


@contextlib.contextmanager
def _told_as_export_error(name: str) -> Iterator[None]:
    """Turns what torch_ext says of a model that it does not run into an `ExportError`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        left = ",".join(other for other in VARIANTS if VARIANTS[other].engine != "torch_ext")
        raise ExportError(f"{name}: {first_line(error)}; leave it out with --variants {left}") from error


def _read_torch_ext(model: Any, source: Source, dtype: Any) -> tuple[Encoder, Head | None]:
    """The encoder of a model, and its head if the task has one."""
    from torch_ext import Encoder, Head

    head = None if source.task == "feature-extraction" else Head.from_transformers(model, dtype=dtype)
    return Encoder.from_transformers(model, dtype=dtype), head


def _files_of(folder: Path, name: str) -> list[Path]:
    """Files of a variant, its weights file first."""
    file = VARIANTS[name].file
    extra = [folder / f"{file}_data", folder / f"{file}.data"]
    return [folder / file, *(path for path in extra if path.exists())]


def _variant_bytes(folder: Path, name: str) -> int:
    return sum(path.stat().st_size for path in _files_of(folder, name))


def _describe(accuracy: Accuracy, speed: Speed | None) -> str:
    text = f"{accuracy.metric} mean {accuracy.mean:.6f} min {accuracy.min:.6f}"
    if "max_prob_diff" in accuracy.details:
        text += f" max probability difference {accuracy.details['max_prob_diff']:.4f}"
    return text if speed is None else f"{text}, {speed.texts_per_s:.0f} texts/s"


def _refuse(name: str, result: Result, names: Sequence[str], how: str = "") -> None:
    if not result.missed:
        return
    others = ",".join(other for other in names if other != name)
    drop = f"leave it out with --variants {others}, or " if others else ""
    bound, measured, _ = result.missed[0]
    raise ExportError(
        f"{name} misses its accuracy bound on {result.accuracy.texts} texts{how}: {result}; {drop}change the bound "
        f"with --bound {name}.{bound}=VALUE (measured {measured:.6g})"
    )


def _make_int8(
    folder: Path,
    source: Source,
    tokens: _Tokens,
    comparison: Comparison,
    work: Sequence[Batch],
    bounds: Mapping[str, float],
    options: Options,
    threads: int,
    config: Any,
    progress: Progress,
) -> tuple[Result, Speed | None]:
    """Quantizes and verifies; where the bound is missed, again with the most sensitive layers in fp32."""
    from deploy.export.onnx_files import quantize_int8, sensitive_nodes

    fp32, int8 = (folder / VARIANTS[name].file for name in ("onnx-fp32", "onnx-int8"))
    kept: list[str] = []
    ranked: list[str] | None = None
    first: Result | None = None
    for share in (0.0, 0.1, 0.25, 0.5):
        title = f" with {share:.0%} of the layers in fp32, the most sensitive ones" if share else ""
        with progress.step(f"write and verify onnx-int8{title}", again=share > 0) as said:
            if share:
                if ranked is None:
                    ranked = sensitive_nodes(fp32, work[len(work) // 2], tokens.pad_id, threads)
                kept = ranked[: max(1, round(share * len(ranked)))]
            for path in _files_of(folder, "onnx-int8"):
                path.unlink(missing_ok=True)
            layers = quantize_int8(fp32, int8, folder / "int8.tmp", config, kept)
            engine = _open_engine("onnx-int8", folder, source, tokens, threads)
            result = comparison.check(engine, work, bounds)
            said.append(megabytes(_variant_bytes(folder, "onnx-int8")))
            if result.missed:
                del engine
                said.append(f"{result}: missed")
                first = first or result
                continue
            speed = _speed(engine, work, options.speed_s, threads)
            said.append(_describe(result.accuracy, speed))
            return result.with_details(layers=layers, layers_in_fp32=len(kept)), speed
    assert first is not None
    _refuse("onnx-int8", first, options.variants)
    raise AssertionError("a result that missed its bound is refused")


def _kernels(kind: VariantKind) -> str:
    """What computed the figures of a variant on this machine."""
    if kind.engine == "onnxruntime":
        return kernels(kind.dtype)
    from torch_ext import isa_report

    return str(isa_report()["isa"])


def _manifest(
    source: Source,
    folder: Path,
    tokens: _Tokens,
    results: Mapping[str, tuple[Result, Speed | None]],
    labels: tuple[str, ...] | None,
    problem_type: str | None,
    hidden_size: int,
    report: Report | None,
) -> Manifest:
    files: dict[str, FileEntry] = {
        path.name: file_entry(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST_FILE
    }
    variants = {}
    for name, (result, speed) in results.items():
        kind = VARIANTS[name]
        paths = _files_of(folder, name)
        variants[name] = Variant(
            name=name,
            file=kind.file,
            engine=kind.engine,
            dtype=kind.dtype,
            bytes=sum(path.stat().st_size for path in paths),
            accuracy=result.accuracy,
            speed=speed,
            extra_files=tuple(path.name for path in paths[1:]),
            quantization=report.to_json()
            if report is not None and kind.file == VARIANTS["torch_ext-int8"].file
            else {},
            kernels=_kernels(kind),
        )
    return Manifest(
        root=folder,
        model=ModelInfo(source.name, source.revision, source.architecture),
        created_with=_versions(),
        task=source.task,
        hidden_size=hidden_size,
        max_tokens=tokens.max_tokens,
        pooling=source.pooling,
        labels=labels,
        problem_type=problem_type,
        special_tokens=tokens.special,
        files=files,
        variants=variants,
        machine=machine(),
    )
