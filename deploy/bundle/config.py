"""Whether a manifest agrees with the model's own `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deploy.bundle.fields import CONFIG_FILE, BundleError

if TYPE_CHECKING:
    from deploy.bundle.manifest import Manifest

__all__ = ["OFFSET_POSITIONS", "check_config"]

OFFSET_POSITIONS = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "roberta-prelayernorm", "data2vec-text"),
        *("esm", "longformer"),
    }
)
"""Types of models whose positions begin behind the padding index."""

_WIDTHS = ("hidden_size", "dim", "d_model")


def check_config(manifest: Manifest) -> None:
    """Compares sizes in a manifest with those of the model.

    A text that is longer than the position table, or a row of another width, fails while it is computed, and with it
    the batch that it is in. Sizes that `config.json` does not have are not compared.

    Args:
        manifest: The bundle.

    Raises:
        BundleError: `config.json` is no JSON object, or says something else than the manifest.
    """
    path = manifest.path(CONFIG_FILE)
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: expected JSON, {error}") from error
    if not isinstance(config, dict):
        raise BundleError(f"{path}: expected an object, got {type(config).__name__}")

    positions = _positions(config)
    if positions is not None and manifest.max_tokens > positions:
        raise _differs(
            manifest, "limits.max_tokens", f"at most {positions}, the model's positions", manifest.max_tokens
        )
    width = next((size for name in _WIDTHS if (size := _count(config, name)) is not None), None)
    if width is not None and manifest.hidden_size != width:
        raise _differs(manifest, "hidden_size", f"{width}, the model's", manifest.hidden_size)
    vocabulary = _count(config, "vocab_size")
    if vocabulary is not None and manifest.vocab_size not in (None, vocabulary):
        raise _differs(manifest, "vocab_size", f"{vocabulary}, the model's", manifest.vocab_size)
    names = config.get("id2label")
    if manifest.labels is not None and isinstance(names, dict) and len(names) != len(manifest.labels):
        raise _differs(manifest, "labels", f"{len(names)}, as many as the model has", len(manifest.labels))


def _count(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _positions(config: Mapping[str, Any]) -> int | None:
    positions = _count(config, "max_position_embeddings")
    if positions is not None and config.get("model_type") in OFFSET_POSITIONS:
        padding = config.get("pad_token_id")
        positions -= (padding if isinstance(padding, int) else 1) + 1
    return positions


def _differs(manifest: Manifest, field: str, expected: str, found: object) -> BundleError:
    return BundleError(
        f"{manifest.root}: manifest.json and {CONFIG_FILE} disagree on {field}: expected {expected}, got {found}; "
        "export the model again"
    )
