"""Which TensorRT is loaded, what is said where there is none, and what the library logs."""

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from tood_deploy.engines.tensorrt import library as tensorrt_flavour
from tood_deploy.engines.tensorrt.library import Flavour, Messages, load_flavour
from tood_deploy.errors import DeviceError, ToodError

Install = Callable[..., None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """A function: makes exactly these packages, name = version, look installed."""
    find_spec = importlib.util.find_spec

    def install(**versions: str) -> None:
        def pretend(name: str, package: str | None = None) -> Any:
            return (
                name in versions or None
                if name in tensorrt_flavour.NAMES
                else find_spec(name, package)
            )

        monkeypatch.setattr(importlib.util, "find_spec", pretend)
        for name, version in versions.items():
            module: Any = ModuleType(name)
            module.__version__ = version
            module.ILogger = type("ILogger", (), {"WARNING": 2})
            module.init_libnvinfer_plugins = lambda logger, namespace: True
            monkeypatch.setitem(sys.modules, name, module)

    tensorrt_flavour._load.cache_clear()
    yield install
    tensorrt_flavour._load.cache_clear()


class TestChoice:
    @pytest.mark.parametrize(
        ("name", "title"),
        [("tensorrt", "TensorRT 10.13.3.9"), ("tensorrt_rtx", "TensorRT-RTX 10.13.3.9")],
    )
    def test_the_one_that_is_installed(self, name: str, title: str, installed: Install) -> None:
        installed(**{name: "10.13.3.9"})
        assert (load_flavour().name, load_flavour().title) == (name, title)

    def test_of_both_the_one_that_is_named(self, installed: Install) -> None:
        installed(tensorrt="11.4.0.1", tensorrt_rtx="1.7.1.116")
        assert load_flavour("tensorrt_rtx").title == "TensorRT-RTX 1.7.1.116"

    @pytest.mark.parametrize(
        ("versions", "name", "error", "message"),
        [
            (
                {},
                None,
                DeviceError,
                "neither TensorRT nor TensorRT-RTX is installed; install the Python package "
                "tensorrt-rtx",
            ),
            (
                {},
                "tensorrt",
                DeviceError,
                "neither .* is installed; install the Python package tensorrt$",
            ),
            (
                {"tensorrt_rtx": "1.7"},
                "tensorrt",
                DeviceError,
                "TensorRT is not installed, TensorRT-RTX is; install .* package tensorrt$",
            ),
            (
                {"tensorrt": "11.4", "tensorrt_rtx": "1.7"},
                None,
                ToodError,
                "both tensorrt and tensorrt_rtx are installed; say which",
            ),
            (
                {"tensorrt": "11.4"},
                "trt",
                ToodError,
                "TensorRT flavour is 'trt'; expected one of tensorrt, tensorrt_rtx",
            ),
            (
                {"tensorrt": "8.6.1"},
                None,
                DeviceError,
                r"TensorRT 8.6.1 is installed; expected 10.13 or newer",
            ),
        ],
    )
    def test_what_cannot_be_used_is_said(
        self,
        versions: dict[str, str],
        name: str | None,
        error: type[ToodError],
        message: str,
        installed: Install,
    ) -> None:
        installed(**versions)
        with pytest.raises(error, match=message):
            load_flavour(name)

    def test_a_package_without_its_libraries(
        self, installed: Install, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def lack(name: str) -> ModuleType:
            raise ImportError("libnvinfer.so.11: cannot open shared object file")

        installed(tensorrt="11.4")
        monkeypatch.setattr(importlib, "import_module", lack)
        with pytest.raises(
            DeviceError,
            match=r"does not load \(libnvinfer.so.11: cannot open .*\); reinstall tensorrt",
        ):
            load_flavour()


class TestLogger:
    def test_errors_and_warnings_are_collected_while_a_block_runs(self) -> None:
        pytest.importorskip("tensorrt_rtx")
        flavour = load_flavour("tensorrt_rtx")
        logger: Any = flavour.logger
        levels = flavour.module.ILogger
        logger.log(levels.ERROR, "before")
        with flavour.logger.collecting() as outer, flavour.logger.collecting() as inner:
            logger.log(levels.INFO, "idle talk")
            logger.log(levels.WARNING, "careful")
            other = threading.Thread(
                target=logger.log, args=(levels.INTERNAL_ERROR, "from\n another thread")
            )
            other.start()
            other.join()
        logger.log(levels.ERROR, "after")
        assert outer == inner == Messages(["from another thread"], ["careful"])

    def test_the_library_is_heard_and_silent(self, capfd: pytest.CaptureFixture[str]) -> None:
        trt = pytest.importorskip("tensorrt_rtx")
        flavour = load_flavour("tensorrt_rtx")
        with flavour.logger.collecting() as messages:
            builder = trt.Builder(flavour.logger)
            assert (
                builder.build_serialized_network(
                    builder.create_network(0), builder.create_builder_config()
                )
                is None
            )
        assert (
            messages.reason()
            == "Error Code 4: API Usage Error (Network must have at least one output.)"
        )
        assert capfd.readouterr() == ("", "")

    def test_one_logger_for_the_process(self) -> None:
        pytest.importorskip("tensorrt_rtx")
        assert load_flavour("tensorrt_rtx").logger is load_flavour("tensorrt_rtx").logger

    def test_no_reason_is_said_too(self) -> None:
        assert Messages().reason() == "the library gave no reason"
        assert Messages(["a", "b", "a"], ["c"]).reason() == "a; b"
        assert Messages([], ["c"]).reason() == "c"


class TestGpus:
    """Which GPUs a library runs on at all, whatever an engine was built for."""

    @pytest.mark.parametrize(
        ("capability", "runs"),
        [("7.5", True), ("8.9", True), ("12.1", True), ("9.0", False), ("10.0", False)],
    )
    def test_rtx_runs_on_those_it_lists_alone(self, capability: str, runs: bool) -> None:
        pytest.importorskip("tensorrt_rtx")
        flavour = load_flavour("tensorrt_rtx")
        if runs:
            flavour.check_gpu(capability, "a GPU")
            return
        with pytest.raises(DeviceError) as refusal:
            flavour.check_gpu(capability, "NVIDIA H200", "do this; ")
        for words in ("NVIDIA H200", capability, "8.9, 12.0", "do this; ", "PyTorch", "--flavour"):
            assert words in str(refusal.value)

    def test_tensorrt_runs_on_turing_and_later(self) -> None:
        flavour = Flavour("tensorrt", None, "10.13", None)  # pyright: ignore[reportArgumentType]
        flavour.check_gpu("7.5", "a T4")
        flavour.check_gpu("10.0", "a B200")
        with pytest.raises(
            DeviceError, match=r"a V100 has compute capability 7\.0.*7\.5 and later"
        ):
            flavour.check_gpu("7.0", "a V100")
