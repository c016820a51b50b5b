"""Make the files that other runtimes run, each once, when it is first asked for.

A network in, paths of .onnx files and engines out; a failure is kept, too, and raised again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.settings import Precision, Settings
from tood_deploy.model.detector import DenseDetector


class Artefacts:
    """Exports and engines of one network."""

    def __init__(self, model: DenseDetector, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self._results: dict[str, Path | Exception] = {}

    def onnx(self, precision: Precision) -> Path:
        """Return the .onnx file in a precision, or raise what its export raised."""
        if precision == "fp32" and self.settings.onnx:
            return self.settings.onnx
        return self._once(
            f"{self.settings.preset}-{precision}.onnx",
            lambda path: self._make_onnx(path, precision),
        )

    def engine(self, precision: Precision) -> Path:
        """Return the TensorRT engine in a precision, for all sizes and batches of the run."""
        return self._once(
            f"{self.settings.preset}-{precision}-trt.engine",
            lambda path: self._make_engine(path, precision),
        )

    def _once(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the file of a name, and write it with `make` the first time."""
        if name not in self._results:
            path = self.settings.folder / name
            try:
                make(path)
                self._results[name] = path
            except Exception as error:
                self._results[name] = error
        result = self._results[name]
        if isinstance(result, Exception):
            raise result
        return result

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
