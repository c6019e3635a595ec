"""Finds a model: a folder of this machine, or one of the hub, which is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from deploy.extras import how_to_install, other_python
from deploy.folder.errors import FolderError, is_disk_full

__all__ = ["find_model"]

_CACHED, _SNAPSHOTS = "models--", "snapshots"
"""How the hub's cache calls the folder of a model, and what is in it: a folder for each commit."""

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def _hub_state() -> str:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{name}={os.environ[name]} is set, so nothing is downloaded: unset it, or pass a folder"
    return "HF_HUB_OFFLINE is not set: check the network and HF_ENDPOINT, or pass a folder"


def find_model(model: str, revision: str | None = None) -> tuple[Path, str, str | None]:
    """Finds a model on this machine or on the hub.

    Args:
        model: Path of a folder, or id on the hub.
        revision: Branch, tag or commit on the hub.

    Returns:
        Folder, name, and commit (None for a folder).

    Raises:
        FolderError: There is no such folder, or the hub does not give the model.
    """
    path = Path(model).expanduser()
    if not model:
        raise FolderError("MODEL is empty: no such folder, and not an id on the hub (expected NAME or OWNER/NAME)")
    if path.is_dir():
        if revision is not None:
            raise FolderError(f"--revision {revision}: only for models on the hub, and {model} is a folder")
        resolved = _snapshot(Path(os.path.realpath(path)))
        kept = resolved.parent.parent.name
        if resolved.parent.name == _SNAPSHOTS and kept.startswith(_CACHED):
            return resolved, kept.removeprefix(_CACHED).replace("--", "/"), resolved.name
        # By the link's name, if it is one: that of its target, such as a release's, changes.
        return resolved, Path(os.path.abspath(path)).name, None
    if path.exists():
        raise FolderError(
            f"{model}: expected a model folder or an id on the hub, found a file; pass the folder it is in"
        )
    if not _REPO_ID.fullmatch(model) or ".." in model or model.startswith((".", "/", "~")):
        raise FolderError(f"{model}: no such folder, and not an id on the hub (expected NAME or OWNER/NAME)")
    return _download(model, revision)


def _snapshot(folder: Path) -> Path:
    """The snapshot of a model in the hub's cache: of its main branch, or its only one; another folder itself.

    Raises:
        FolderError: It has several snapshots, and none of the main branch.
    """
    if not folder.name.startswith(_CACHED) or not (folder / _SNAPSHOTS).is_dir():
        return folder
    found = sorted(path for path in (folder / _SNAPSHOTS).iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    named = main.read_text(encoding="utf-8", errors="replace").strip() if main.is_file() else ""
    chosen = [path for path in found if path.name == named] or found
    if len(chosen) != 1:
        raise FolderError(
            f"{folder}: the hub's cache of a model with {len(found)} snapshots; pass the folder of one, below "
            f"{folder / _SNAPSHOTS}"
        )
    return chosen[0]


def _download(model: str, revision: str | None) -> tuple[Path, str, str | None]:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise FolderError(
            f"{model}: no such folder, and huggingface_hub is not installed to download it; pass a folder, or install "
            f"the extra: {how_to_install('serve')}{other_python()}"
        ) from error

    description = ["*.json", "*.txt", "*.model", "*.jinja"]
    other_formats = ["onnx/*", "openvino/*", "coreml/*", "*.fp16.*", "*.onnx*", "tf_model*", "flax_model*"]
    try:
        for patterns in (["*.safetensors"], ["pytorch_model*.bin"]):
            folder = Path(
                huggingface_hub.snapshot_download(
                    model, revision=revision, allow_patterns=[*description, *patterns], ignore_patterns=other_formats
                )
            )
            if any(folder.rglob(patterns[0])):
                break
    except errors.GatedRepoError:
        raise FolderError(f"{model}: access is gated; accept its terms on the hub and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise FolderError(f"{model}: the hub has no revision {revision!r} of it") from None
    except errors.RepositoryNotFoundError:
        raise FolderError(
            f"{model}: no such folder, and no such model on the hub (for a private one set HF_TOKEN)"
        ) from None
    except errors.HFValidationError:
        raise FolderError(f"{model}: no such folder, and not an id on the hub (expected NAME or OWNER/NAME)") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError) as error:
        raise FolderError(
            f"{model}: no such folder, and the hub cannot be reached or does not answer for it. {_hub_state()}"
        ) from error
    except OSError as error:  # Connection errors of requests, and a full disk, are both of that kind.
        if is_disk_full(error):
            raise
        raise FolderError(f"{model}: no such folder, and the hub cannot be reached. {_hub_state()}") from error
    revision_found = folder.name if folder.parent.name == "snapshots" else None
    return folder, model, revision_found
