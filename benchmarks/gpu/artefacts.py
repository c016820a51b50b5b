"""The files that other runtimes run, each made once, on the spot, when it is first asked for; also a failure is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.settings import Precision, Settings
from tood_deploy.model.tood import Tood


class Artefacts:
    """Exports and engines of one network."""

    def __init__(self, model: Tood, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self._made: dict[str, Path | Exception] = {}

    def onnx(self, precision: Precision) -> Path:
        """The .onnx file in a precision; whatever its making raised is raised again."""
        if precision == "fp32" and self.settings.onnx:
            return self.settings.onnx
        return self._once(
            f"{self.settings.preset}-{precision}.onnx",
            lambda path: self._make_onnx(path, precision),
        )

    def engine(self, precision: Precision) -> Path:
        """The TensorRT engine in a precision, for all sizes and batches of the run."""
        return self._once(
            f"{self.settings.preset}-{precision}-trt.engine",
            lambda path: self._make_engine(path, precision),
        )

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        if name not in self._made:
            path = self.settings.folder / name
            try:
                make(path)
                self._made[name] = path
            except Exception as error:
                self._made[name] = error
        made = self._made[name]
        if isinstance(made, Exception):
            raise made
        return made

    def _make_onnx(self, path: Path, precision: Precision) -> None:
        if precision == "fp32":
            from tood_deploy.export.export import export_onnx

            export_onnx(self.model, path)
            return
        from tood_deploy.export.precision.convert import lower_artefact
        from tood_deploy.onnx_file import read_onnx, write_onnx

        write_onnx(lower_artefact(read_onnx(self.onnx("fp32")), precision), path)

    def _make_engine(self, path: Path, precision: Precision) -> None:
        from tood_deploy.export.tensorrt.options import Profiles
        from tood_deploy.export.tensorrt.to_tensorrt import engine_from_onnx

        batches = sorted(self.settings.batches)
        profiles = Profiles(
            self.settings.sizes_hw, (batches[0], batches[len(batches) // 2], batches[-1])
        )
        engine_from_onnx(self.onnx(precision), path, profiles=profiles)
