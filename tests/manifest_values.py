"""Manifests as the plain values of their JSON, for tests that look at it or change it."""

import json
from pathlib import Path
from typing import Any

from tood_deploy.manifest import Manifest
from tood_deploy.presets import PRESETS, Preset


def plain(manifest: Manifest | None) -> dict[str, Any]:
    """Return the JSON object."""
    assert manifest is not None
    return json.loads(manifest.to_json())


def changed(manifest: Manifest, **fields: Any) -> Manifest:
    """Return the manifest with other values of its JSON, such as "options"."""
    plain_fields = {
        name: value.to_dict() if isinstance(value, Preset) else value
        for name, value in fields.items()
    }
    return Manifest.from_json(json.dumps(plain(manifest) | plain_fields), "changed")


def stated(precision: str = "fp32", **fields: Any) -> Manifest:
    """Return a manifest of `tiny` with these values of its JSON."""
    return changed(Manifest(PRESETS["tiny"]), precision=precision, **fields)


def write_changed(path: Path, manifest: Manifest, **fields: Any) -> None:
    """Write the JSON with other values, be they right or wrong."""
    path.write_text(json.dumps(plain(manifest) | fields), encoding="utf-8")
