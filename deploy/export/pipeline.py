"""One export from end to end: a list of stages over one state.

`cli` gives it its options, and `staging` makes it all or nothing. It has more than 400 lines since the stages are read
one after the other.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from deploy.bundle import (
    CONFIG_FILE,
    DEFAULT_VARIANTS,
    DENSE_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    VARIANTS,
    Manifest,
    Speed,
)
from deploy.engines.batch import Ids, Item, batches
from deploy.engines.open import open_engine
from deploy.export.accuracy import Result, Verification
from deploy.export.calibration import CALIBRATION_TOKENS, calibration_texts
from deploy.export.dense import DenseStage, read_stages, write_stages
from deploy.export.errors import ExportError, NotSupportedError
from deploy.export.evaluation import Evaluation, read_evaluation
from deploy.export.mapped import Mapped, keep_little, map_weights
from deploy.export.needs import check_disk, import_libraries, memory_note, threads
from deploy.export.options import Options, Texts, read_texts
from deploy.export.progress import Progress, megabytes, quiet_libraries
from deploy.export.reference import load_model, readable_folder
from deploy.export.report import Findings, describe_model, make_manifest
from deploy.export.staging import Staging
from deploy.export.tokenizer import Tokens
from deploy.export.verify import VariantRefusedError, describe, measure, refuse, verify
from deploy.export.write_onnx import (
    SHARES_IN_FP32,
    export_fp32,
    files_of,
    quantize_int8,
    sensitive_nodes,
    variant_bytes,
)
from deploy.export.write_torch_ext import Quantized, write_encoder, write_int8_encoder
from deploy.folder.source import Source
from deploy.machine import usable_cpus
from deploy.tasks import TaskError, open_task

__all__ = ["STAGES", "export", "step_count"]

_BATCH = 32


@dataclass
class Export:
    """What an export knows; each stage adds to it.

    Attributes:
        source, options, texts, staging, threads, progress: What it starts with.
        names: Variants to write, in the order of `VARIANTS`.
        ids, model, mapped, parameters, verification: After `load`; the model goes once everything is written.
        draft: The manifest without files and variants; after `load`.
        config: The model's configuration in transformers; after `load`.
        bounds: By variant; after `load`.
        reference_speed: After `reference`.
        stages: Linear stages behind the pooling; after `load`.
        calibration: Texts that torch_ext-int8 is made for, if it is written; after `load`.
        quantized: What was measured for torch_ext-int8, if it is written; after `write_torch_ext`.
        findings: By variant; after `verify`.
        left_out: Why a variant is not in the bundle, by its name.
        evaluation: The user's own examples, if there are some; after `load`.
        evaluated: What transformers reaches on them; after `reference`.
        tries: What onnx-int8 measured with more and more layers in fp32.
        manifest: After `describe`.
    """

    source: Source
    options: Options
    texts: Texts
    staging: Staging
    threads: int
    progress: Progress
    names: list[str] = field(default_factory=list)
    draft: Manifest = field(init=False)
    ids: list[Item] = field(init=False)
    model: Any = None
    config: Any = None
    mapped: Mapped = field(default_factory=Mapped)
    parameters: int = 0
    verification: Verification = field(init=False)
    bounds: dict[str, dict[str, float]] = field(default_factory=dict)
    reference_speed: Speed | None = None
    stages: Sequence[DenseStage] = ()
    calibration: Sequence[Ids] = ()
    quantized: Quantized | None = None
    findings: dict[str, Findings] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    evaluated: float | None = None
    tries: list[dict[str, Any]] = field(default_factory=list)
    manifest: Manifest = field(init=False)

    @property
    def folder(self) -> Path:
        """Where the bundle is written."""
        return self.staging.path

    def runs_on(self, engine: str) -> list[str]:
        """The variants that an engine runs."""
        return [name for name in self.names if VARIANTS[name].engine == engine]


def load(state: Export) -> None:
    """Loads the model and its tokenizer, and makes token ids of the texts."""
    source = state.source
    with state.progress.step("load the model and its tokenizer") as said:
        import_libraries(state.names)
        with readable_folder(source, state.folder / "readable.tmp") as folder:
            tokens = Tokens(source, folder, state.folder / TOKENIZER_FILE)
            ids = tokens.encode(state.texts.texts)
            state.model = load_model(source, folder, state.progress.warn)
        state.config = state.model.config
        # With tied ones counted twice, as every file but the model's own has them.
        state.parameters = sum(tensor.numel() for tensor in state.model.state_dict().values())
        check_disk(source, state.parameters, state.names, state.staging.target, state.staging.free_bytes())
        parts = 1 if source.pooling is None else len(source.pooling.modes)
        state.stages = read_stages(source.dense, parts * int(state.config.hidden_size))
        write_stages(state.folder, state.stages)
        dense = tuple(stage.described() for stage in state.stages)
        state.draft = replace(describe_model(state.folder, source, tokens, state.config), dense=dense)
        task = open_task(state.draft)
        if state.options.eval_file is not None:
            state.evaluation = read_evaluation(state.options.eval_file, state.draft, task, tokens.encode_inputs)
        if "torch_ext-int8" in state.names:
            texts = [source.prompt + text for text in calibration_texts(state.texts.texts)]
            state.calibration = tokens.encode_alone(texts, CALIBRATION_TOKENS)
        try:
            state.ids = task.trials(ids)
        except TaskError as error:
            raise ExportError(str(error)) from error
        shutil.copyfile(source.folder / CONFIG_FILE, state.folder / CONFIG_FILE)
        pickled = "" if source.safe_format else ", pickle read without running code"
        said.append(f"{state.parameters / 1e6:.1f} M parameters, {megabytes(source.weights_bytes)}{pickled}")
        state.mapped = map_weights(state.model, state.folder / "weights.tmp")
    state.verification = Verification(batches(state.ids, _BATCH), task)
    state.bounds = {name: _bounds_of(state, name) for name in state.names}


def _bounds_of(state: Export, name: str) -> dict[str, float]:
    default = state.verification.task.default_bounds(name, VARIANTS[name].dtype)
    return {**default, **state.options.bounds.get(name, {})}


def reference(state: Export) -> None:
    """Runs transformers in fp32, which all variants are compared with."""
    title = f"transformers fp32 on {len(state.ids)} texts ({state.texts.source})"
    with state.progress.step(title) as said:
        from deploy.engines.transformers import TransformersEngine

        engine = TransformersEngine(state.model, state.verification.task)
        state.verification.remember(engine)
        if state.evaluation is not None:
            state.evaluated = state.evaluation.score(engine)
            said.append(f"{state.evaluation.metric} {state.evaluated:.4f} on {state.evaluation.count} examples")
        state.reference_speed = measure(engine, state.verification.work, state.options.speed_s, state.threads)
        if state.reference_speed is not None:
            said.append(f"{state.reference_speed.texts_per_s:.0f} texts/s")


def write_torch_ext(state: Export) -> None:
    """Writes the encoders of torch_ext; for int8, which layers stay in bf16 is measured on the texts.

    A model that torch_ext does not run has a program of torch.export in their place, unless variants were chosen.
    """
    for name in state.runs_on("torch_ext"):
        path = state.folder / VARIANTS[name].file
        with state.progress.step(f"write {name}") as said:
            try:
                _write_torch_ext(state, name, path)
            except NotSupportedError as error:
                if not {other for other in DEFAULT_VARIANTS if VARIANTS[other].engine == "torch_ext"} <= set(
                    state.names
                ):
                    raise
                said.append("failed")
                state.left_out.update(dict.fromkeys(state.runs_on("torch_ext"), str(error)))
                _stand_in(state)
                break
            if state.quantized is not None and VARIANTS[name].dtype == "int8":
                said.append(str(state.quantized))
            said.append(megabytes(path.stat().st_size))
        state.mapped.forget()
    report = None if state.quantized is None else state.quantized.report
    if report is not None and (report.layers or state.options.accuracy is not None):
        state.progress.say(str(report))


def _write_torch_ext(state: Export, name: str, path: Path) -> None:
    if VARIANTS[name].dtype != "int8":
        write_encoder(name, path, state.model, state.verification.task, state.stages)
        return
    state.quantized = write_int8_encoder(
        name,
        path,
        state.model,
        state.verification,
        state.bounds[name],
        state.options.accuracy,
        state.names,
        state.stages,
        state.calibration,
    )


def _stand_in(state: Export) -> None:
    """Adds the programs of torch.export to what is written."""
    added = [name for name, kind in VARIANTS.items() if kind.engine == "torch" and name not in state.names]
    state.names = [name for name in VARIANTS if name in {*state.names, *added}]
    for name in added:
        state.bounds[name] = _bounds_of(state, name)


def write_program(state: Export) -> None:
    """Writes the program of torch.export; where that fails, ONNX variants are left."""
    for name in state.runs_on("torch"):
        path = state.folder / VARIANTS[name].file
        with state.progress.step(f"write {name} (torch.export)") as said:
            from deploy.export import write_program as writer

            try:
                layout = writer.write_program(name, path, state.model, state.verification.task, state.ids)
                said.extend(filter(None, (str(layout), megabytes(path.stat().st_size))))
            except NotSupportedError as error:
                said.append("failed")
                path.unlink(missing_ok=True)
                _leave_out(state, name, error)
        state.mapped.forget()


def write_onnx(state: Export) -> None:
    """Writes the graph in fp32, which the one in int8 is made of, and lets go of the model."""
    if state.runs_on("onnxruntime"):
        with state.progress.step("write onnx-fp32 (optimum)") as said:
            target = state.folder / VARIANTS["onnx-fp32"].file
            try:
                work, types = state.folder / "onnx.tmp", state.draft.token_types
                export_fp32(state.model, state.source.task, work, target, state.mapped.forget, token_types=types)
                said.append(megabytes(variant_bytes(state.folder, "onnx-fp32")))
            except ExportError as error:
                said.append("failed")
                for name in state.runs_on("onnxruntime"):
                    _leave_out(state, name, error)
    state.model = None
    state.mapped.drop()


def verify_all(state: Export) -> None:
    """Compares every variant with the reference; onnx-int8 is written here.

    A variant that misses its bounds is left out, if another one remains; one of torch_ext is refused.
    """
    for name in [name for name in state.names if name not in state.left_out]:
        try:
            if name == "onnx-int8":
                result, speed = _write_and_verify_int8(state)
            else:
                with state.progress.step(f"verify {name}") as said:
                    result, speed = _verify(state, name)
                    said.append(describe(result.accuracy, speed))
                    refuse(name, result, state.names)
        except VariantRefusedError as error:
            _leave_out(state, name, error)
            continue
        quantization: Mapping[str, Any] = {}
        if name == "torch_ext-int8" and state.quantized is not None:
            report = state.quantized.report
            result = result.with_details(layers=state.quantized.layers, layers_in_bf16=len(report.kept))
            quantization = report.to_json()
        if name == "onnx-int8" and len(state.tries) > 1:
            quantization = {"tries": state.tries}
        state.findings[name] = Findings(result, speed, quantization)
        state.mapped.forget()
    for name, reason in state.left_out.items():
        state.progress.warn(f"{name} is left out of the bundle: {reason}")
    if "onnx-fp32" not in state.findings:
        for path in files_of(state.folder, "onnx-fp32"):
            path.unlink(missing_ok=True)
    if all(VARIANTS[name].engine == "torch_ext" for name in state.findings):
        (state.folder / DENSE_FILE).unlink(missing_ok=True)


def describe_all(state: Export) -> None:
    """Writes the manifest."""
    with state.progress.step("write the manifest") as said:
        verification = {
            "texts": len(state.ids),
            "source": state.texts.source,
            "pairs": state.verification.task.takes_pairs(state.source),
            "mean_tokens": round(sum(map(len, state.ids)) / len(state.ids), 1),
            "reference": "transformers fp32",
            "reference_texts_per_s": None if state.reference_speed is None else state.reference_speed.texts_per_s,
        }
        if state.evaluation is not None and state.options.eval_file is not None:
            verification["eval"] = {
                "file": state.options.eval_file.name,
                "metric": state.evaluation.metric,
                "examples": state.evaluation.count,
                "reference": state.evaluated,
            }
        if state.left_out:
            verification["left_out"] = state.left_out
        state.manifest = make_manifest(state.draft, state.findings, verification)
        said.append(megabytes(sum(entry.bytes for entry in state.manifest.files.values())) + " in all")


class Stage(NamedTuple):
    """A part of an export.

    Attributes:
        name: What it is called.
        run: What it does with the state.
        steps: How many steps the user sees of it, by the variants.
    """

    name: str
    run: Callable[[Export], None]
    steps: Callable[[Collection[str]], int]


def _count(names: Collection[str], engine: str) -> int:
    return sum(VARIANTS[name].engine == engine for name in names)


STAGES = (
    Stage("load", load, lambda names: 1),
    Stage("reference", reference, lambda names: 1),
    Stage("write_torch_ext", write_torch_ext, lambda names: _count(names, "torch_ext")),
    Stage("write_program", write_program, lambda names: _count(names, "torch")),
    Stage("write_onnx", write_onnx, lambda names: min(1, _count(names, "onnxruntime"))),
    Stage("verify", verify_all, len),
    Stage("describe", describe_all, lambda names: 1),
)
"""An export, from its first stage to its last."""


def step_count(variants: Collection[str]) -> int:
    """How many steps `export` has."""
    return sum(stage.steps(variants) for stage in STAGES)


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
        FolderError: See its message; nothing is left.
        OSError: The disk is full, or fails; nothing is left.
    """
    texts = read_texts(options)
    for note in filter(None, (memory_note(source), *source.notes, texts.note)):
        progress.say(f"note: {note}")
    names = [name for name in VARIANTS if name in options.variants]
    keep_little()
    count = options.threads or usable_cpus()
    with Staging(target, options.force) as staging, quiet_libraries(), threads(count):
        state = Export(source, options, texts, staging, count, progress, names)
        try:
            for stage in STAGES:
                stage.run(state)
                state.mapped.forget()
        finally:
            state.mapped.drop()
        staging.commit(last=MANIFEST_FILE)
    return replace(state.manifest, root=target)


def _leave_out(state: Export, name: str, error: ExportError) -> None:
    """Goes on without a variant; raises `error` for one of torch_ext, or if no variant would remain."""
    state.left_out[name] = str(error)
    if VARIANTS[name].engine == "torch_ext":
        raise error
    if state.left_out.keys() >= set(state.names):
        others = [other for other in state.names if VARIANTS[other].engine != VARIANTS[name].engine]
        reasons = dict.fromkeys(state.left_out[other] for other in others)
        if reasons:
            raise ExportError("; ".join([*reasons, str(error)])) from error
        raise error
    for path in files_of(state.folder, name) if name != "onnx-fp32" else ():
        path.unlink(missing_ok=True)


def _verify(state: Export, name: str) -> tuple[Result, Speed | None]:
    engine = open_engine(state.draft, VARIANTS[name], state.threads)
    result, speed = verify(engine, state.verification, state.bounds[name], state.options.speed_s, state.threads)
    if state.evaluation is not None:
        result = result.with_details(eval=state.evaluation.score(engine))
    return result, speed


def _write_and_verify_int8(state: Export) -> tuple[Result, Speed | None]:
    """Quantizes and verifies; where the bound is missed, again with the most sensitive layers in fp32."""
    fp32, int8 = (state.folder / VARIANTS[name].file for name in ("onnx-fp32", "onnx-int8"))
    kept: list[str] = []
    ranked: list[str] | None = None
    first: Result | None = None
    for share in SHARES_IN_FP32:
        title = f" with {share:.0%} of the layers in fp32, the most sensitive ones" if share else ""
        with state.progress.step(f"write and verify onnx-int8{title}", again=share > 0) as said:
            if share:
                if ranked is None:
                    work, pad_id = state.verification.work, state.verification.task.pad_id
                    ranked = sensitive_nodes(fp32, work[len(work) // 2], pad_id, state.threads)
                kept = ranked[: max(1, round(share * len(ranked)))]
            for path in files_of(state.folder, "onnx-int8"):
                path.unlink(missing_ok=True)
            layers = quantize_int8(fp32, int8, state.folder / "int8.tmp", state.config, kept)
            result, speed = _verify(state, "onnx-int8")
            said.append(megabytes(variant_bytes(state.folder, "onnx-int8")))
            figures = {"mean": result.accuracy.mean, "min": result.accuracy.min, "missed": str(result)}
            state.tries.append({"layers_in_fp32": len(kept), **figures})
            if result.missed:
                said.append(f"{result}: missed")
                first = first or result
                continue
            said.append(describe(result.accuracy, speed))
            return result.with_details(layers=layers, layers_in_fp32=len(kept)), speed
    assert first is not None
    refuse("onnx-int8", first, state.options.variants)
    raise AssertionError("a result that missed its bound is refused")
