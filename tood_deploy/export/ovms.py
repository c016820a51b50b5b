"""Lay out OpenVINO Model Server's folder: a model's next version, and the configuration beside it.

Comes in: the repository and a model's name. Goes out: where the .xml of an export belongs, and,
when it is there, `config.json` with every model of the folder. Knows nothing of the export itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tood_deploy.errors import OutputError, ToodError
from tood_deploy.files import write_text
from tood_deploy.graph_io import OPENVINO_SUFFIX

CONFIG_FILE = "config.json"
FILE = f"model{OPENVINO_SUFFIX}"


@dataclass(frozen=True)
class OvmsModel:
    """A model's next version in a repository.

    Attributes:
        repository: that OpenVINO Model Server reads.
        name: of the model.
        version: that the export adds.
    """

    repository: Path
    name: str
    version: int

    @property
    def path(self) -> Path:
        """Where the .xml belongs, its .bin and manifest beside it."""
        return self.repository / self.name / str(self.version) / FILE

    def write_config(self) -> Path:
        """Write the configuration of all models in the repository, and return its file.

        Raises:
            OutputError: it cannot be written.
        """
        names = sorted({path.parents[1].name for path in self.repository.glob(f"*/*/{FILE}")})
        models = [{"config": {"name": name, "base_path": name}} for name in names]
        place = self.repository / CONFIG_FILE
        write_text(place, json.dumps({"model_config_list": models}, indent=2) + "\n")
        return place


def plan_ovms(source: str, output: Path | None, name: str | None) -> OvmsModel:
    """Return the next version of a model in a repository.

    Args:
        source: of the export.
        output: the repository; a folder of the source's name where not given.
        name: of the model; that of the source where not given.

    Raises:
        ToodError: a name that cannot be a folder's.
        OutputError: the place holds something else than such a repository.
    """
    repository = output or Path(Path(source).stem)
    name = name or Path(source).stem
    if not name or name.startswith(".") or Path(name).name != name:
        raise ToodError(f"--name {name}: cannot be a folder's name; expected one such as tood")
    if repository.exists() and not repository.is_dir():
        raise OutputError(f"{repository}: is a file; expected a folder for the models of a server")
    present = repository.is_dir() and any(repository.iterdir())
    if present and not (repository / CONFIG_FILE).is_file():
        raise OutputError(
            f"{repository}: holds files and no {CONFIG_FILE}, so it is no folder of OpenVINO Model "
            "Server; give a new one"
        )
    folder = repository / name
    versions = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    return OvmsModel(repository, name, 1 + max(versions, default=0))
