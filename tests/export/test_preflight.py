"""`tood-export` refuses, before PyTorch is imported, what would make the end of an export fail;
nothing is written, nothing begun."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data.small_coco import annotation, coco, write_json
from export.small_graph import save_small
from inference.fakes import CLASSES, red_image, write_image
from manifest_values import changed

from tood_deploy.cli import export as export_cli
from tood_deploy.cli.export import main
from tood_deploy.engines import openvino_runtime as openvino_model
from tood_deploy.errors import OutputError, ToodError
from tood_deploy.export import preflight
from tood_deploy.export.preflight import check_artefact, check_space
from tood_deploy.export.tensorrt.options import Profiles
from tood_deploy.export.triton.config import config_text, triton_config
from tood_deploy.export.triton.options import TritonOptions
from tood_deploy.files import write_text
from tood_deploy.manifest import Manifest, manifest_path, read_manifest

INT8 = ("--precision", "int8", "--calib-data", "images")


@pytest.fixture(autouse=True)
def workplace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder with `small.onnx`, `tood.pth` and images/ to work in, where nothing long may
    begin."""
    monkeypatch.chdir(tmp_path)
    save_small(Path("small.onnx"))
    Path("tood.pth").write_bytes(b"weights")
    for number in range(3):
        write_image(Path("images") / f"{number}.png", red_image(left=4 * number))
    monkeypatch.setitem(sys.modules, "tood_deploy.export.export", None)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function of arguments: the one line with which they are refused; the folder stays as it
    is."""

    def refuse(*arguments: str) -> str:
        before = tree()
        assert main(list(arguments)) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), err
        assert tree() == before
        return err

    return refuse


def tree() -> set[tuple[str, bytes]]:
    return {(str(path), path.read_bytes() if path.is_file() else b"") for path in Path().rglob("*")}


def stated(name: str, **fields: Any) -> str:
    """A copy of `small.onnx` whose manifest says something else."""
    shutil.copy("small.onnx", name)
    manifest = read_manifest(Path("small.onnx")) or Manifest.from_json(metadata(), name)
    write_text(
        manifest_path(Path(name)), changed(manifest, **fields).with_artefact(Path(name)).to_json()
    )
    return name


def metadata() -> str:
    import onnx

    return {prop.key: prop.value for prop in onnx.load("small.onnx").metadata_props}["tood_deploy"]


def half(precision: str, alone: bool = True) -> dict[str, Any]:
    return {
        "precision": precision if alone else "int8",
        "options": {"half_precision": {"precision": precision}},
    }


class TestInstructions:
    @pytest.fixture(autouse=True)
    def old_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stand-in for OpenVINO on a CPU without bf16."""
        core = SimpleNamespace(
            get_property=lambda _, name: (
                ["FP32", "INT8"] if name == "OPTIMIZATION_CAPABILITIES" else "an old CPU"
            )
        )
        monkeypatch.setattr(openvino_model, "shared_core", lambda: core)
        monkeypatch.setattr(openvino_model, "load_openvino", lambda: None)
        monkeypatch.setattr(export_cli, "is_installed", lambda name: True)

    @pytest.mark.parametrize(
        "precision", [("--precision", "bf16"), (*INT8, "--fallback-precision", "bf16")]
    )
    @pytest.mark.parametrize("source", ["small.onnx", "tood.pth"])
    def test_bf16(
        self, source: str, precision: tuple[str, ...], refused: Callable[..., str]
    ) -> None:
        assert "this CPU (an old CPU) has no bf16 instructions" in refused(
            source, "--to", "openvino", *precision, "--output", "a.xml"
        )

    def test_an_onnx_in_bf16(self, refused: Callable[..., str]) -> None:
        assert "has no bf16 instructions" in refused(
            stated("half.onnx", **half("bf16")), "--to", "openvino"
        )

    def test_the_graph_alone_needs_none(self) -> None:
        with pytest.raises(ModuleNotFoundError, match=r"export\.export"):
            main(["small.onnx", "--precision", "bf16"])


class TestPackages:
    @pytest.mark.parametrize(
        ("package", "arguments"),
        [
            ("torch", ()),
            ("onnxscript", ("--to", "engine")),
            ("safetensors", ("--quiet",)),
            ("openvino", ("--to", "openvino")),
            (
                "pycocotools",
                (*INT8, "--max-ap-drop", "1", "--annotations", "truth.json", "--images", "images"),
            ),
        ],
    )
    def test_missing(
        self,
        package: str,
        arguments: tuple[str, ...],
        monkeypatch: pytest.MonkeyPatch,
        refused: Callable[..., str],
    ) -> None:
        monkeypatch.setattr(export_cli, "is_installed", lambda name: name != package)
        line = refused("tood.pth", *arguments)
        assert "pip install" in line
        assert package.lower() in line.lower()

    def test_openvino_is_not_asked_for_where_it_is_not_used(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            export_cli, "is_installed", lambda name: name not in ("openvino", "pycocotools")
        )
        with pytest.raises(ModuleNotFoundError, match=r"export\.export"):
            main(["tood.pth"])

    def test_a_module_that_is_blocked_is_not_installed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert export_cli.is_installed("json")
        monkeypatch.setitem(sys.modules, "json", None)
        assert not export_cli.is_installed("json")
        assert not export_cli.is_installed("no_such_package_at_all")


class TestSource:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("absent.pth",), "absent.pth: no such file"),
            (("absent.onnx", "--to", "openvino"), "absent.onnx: no such file"),
            (("empty.pth",), "empty.pth: is an empty file"),
            (("images",), "images: no such file"),
            (("model.xml",), "an artefact for OpenVINO cannot be exported further"),
            (("tood.pth", "--preset", "r51"), "no preset is called 'r51'"),
            (("tood.pth", "--imgsz", "0", "64"), "imgsz is 0 64"),
            (("tood.pth", "--max-det", "4000"), "max_det is 4000; expected 1 to 3840"),
            (
                ("tood.pth", "--to", "openvino", "--precision", "fp16"),
                "OpenVINO on CPUs computes in fp32, bf16 and int8",
            ),
            (
                ("tood.pth", "--to", "engine", "--shapes", "64x63"),
                "expected height and width as multiples of 32",
            ),
            (("tood.pth", "--to", "engine", "--batch", "4,2,1"), "expected MIN,OPT,MAX"),
            ((*("tood.pth", *INT8), "--max-drop", "-1"), "the largest drop is -1.0"),
            (("small.onnx",), "small.onnx is an .onnx already"),
            (("tiny",), "no weights are published"),
            (("x101-dcn-2x",), "published by the authors alone"),
            (
                ("small.onnx", "--precision", "fp16", "--keep-fp32", "nothing"),
                "nothing in the graph is called nothing",
            ),
            (("small.onnx", *INT8, "--keep-fp32", "nothing"), "no 8-bit layer is called nothing"),
        ],
    )
    def test_refused(
        self, arguments: tuple[str, ...], message: str, refused: Callable[..., str]
    ) -> None:
        Path("empty.pth").touch()
        Path("model.xml").touch()
        assert message in refused(*arguments)

    def test_a_cut_onnx(self, refused: Callable[..., str]) -> None:
        Path("cut.onnx").write_bytes(Path("small.onnx").read_bytes()[:-100])
        assert "cut.onnx" in refused("cut.onnx", "--to", "openvino")

    def test_lowered_already(self, refused: Callable[..., str]) -> None:
        assert "half.onnx is in fp16 already" in refused(stated("half.onnx", **half("fp16")), *INT8)
        assert "OpenVINO on CPUs computes in" in refused("half.onnx", "--to", "openvino")

    def test_deformable_convolutions_as_an_operator(self, refused: Callable[..., str]) -> None:
        line = refused(
            stated("deformable.onnx", options={"deform": "op"}), "--to", "openvino", *INT8
        )
        assert "which OpenVINO lacks; export the checkpoint again with --deform gather" in line

    def test_the_form_of_servers(self, refused: Callable[..., str]) -> None:
        assert "has the form that Triton serves" in refused(
            stated("served.onnx", options={"serving": {}}), "--precision", "fp16"
        )

    def test_8_bits_with_zero_points_for_an_engine(self, refused: Callable[..., str]) -> None:
        name = stated("eight.onnx", precision="int8", options={"int8": {"scheme": "u8s8"}})
        assert "zero points, as CPUs want them and TensorRT does not" in refused(
            name, "--to", "engine"
        )


class TestServing:
    @pytest.mark.parametrize("source", ["checkpoint", "onnx"])
    @pytest.mark.parametrize(
        ("precision", "arguments", "message"),
        [
            ("bf16", (), "in bf16: Triton's back end onnxruntime does not compute it"),
            (
                "bf16",
                ("--device", "cpu"),
                "in bf16: Triton's back end onnxruntime does not compute it",
            ),
            (
                "fp16",
                ("--device", "cpu"),
                "in fp16 and device cpu: ONNX Runtime on CPUs emulates fp16",
            ),
        ],
    )
    def test_half_precision(
        self,
        source: str,
        precision: str,
        arguments: tuple[str, ...],
        message: str,
        refused: Callable[..., str],
    ) -> None:
        model = (
            ("tood.pth", "--precision", precision)
            if source == "checkpoint"
            else (stated("half.onnx", **half(precision)),)
        )
        assert message in refused(*model, "--to", "triton", "--output", "repo", *arguments)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_int8_beside_half_precision(self, precision: str, refused: Callable[..., str]) -> None:
        name = stated("mixed.onnx", **half(precision, alone=False))
        assert f"in int8 beside {precision}: Triton's back end" in refused(
            name, "--to", "triton", "--output", "repo"
        )

    def test_fp16_on_gpus_goes_on(self) -> None:
        with pytest.raises(ModuleNotFoundError, match=r"export\.export"):
            main([stated("half.onnx", **half("fp16")), "--to", "triton", "--output", "repo"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("my tood.pth",), "model name is 'my tood'"),
            (("tood.pth", "--batch", "2,2,4"), "batch is at least 2"),
            (("tood.pth", "--warm-up", "9"), "warm-up batch is 9; expected at most 8"),
            (("tood.pth", "--output", "images"), "images: holds files, but no model"),
            (("tood.pth", "--output", "tood.pth"), "tood.pth: is a file; expected a folder"),
            (("tood.pth", "--backend", "tensorrt", "--device", "cpu"), "TensorRT runs on GPUs"),
        ],
    )
    def test_place_and_options(
        self, arguments: tuple[str, ...], message: str, refused: Callable[..., str]
    ) -> None:
        Path("my tood.pth").write_bytes(b"weights")
        assert message in refused(
            arguments[0], "--to", "triton", "--output", "repo", *arguments[1:]
        )

    @pytest.mark.parametrize("source", ["tood.pth", "small.onnx"])
    def test_a_name_that_is_taken(self, source: str, refused: Callable[..., str]) -> None:
        Path("repo/tood").mkdir(parents=True)
        Path("repo/tood/config.pbtxt").write_text('name: "tood"')
        assert "the model there was not written by tood-export" in refused(
            source, "--to", "triton", "--output", "repo", "--name", "tood"
        )

    def test_other_classes_of_an_onnx(self, refused: Callable[..., str]) -> None:
        manifest = Manifest.from_json(metadata(), "small")
        other = replace(manifest, preset=replace(manifest.preset, class_names=("okapi",)))
        Path("repo/tood").mkdir(parents=True)
        config = triton_config(
            other, "onnxruntime", TritonOptions(name="tood"), Profiles(((64, 96),))
        )
        Path("repo/tood/config.pbtxt").write_text(config_text(config))
        assert "has other classes" in refused(
            "small.onnx", "--to", "triton", "--output", "repo", "--name", "tood"
        )


class TestPlace:
    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ("tood.xml", "expected a name ending in .onnx"),
            ("folder.onnx", "folder.onnx: is a folder"),
            ("beside.onnx", "would replace that of beside.engine"),
            ("truth.onnx", "truth.json: is no manifest of tood-export"),
            ("tood.pth/a.onnx", "is a file; choose another --output"),
            ("/proc/new/a.onnx", "cannot be written"),
        ],
    )
    def test_refused(self, output: str, message: str, refused: Callable[..., str]) -> None:
        Path("folder.onnx").mkdir()
        Path("beside.engine").touch()
        Path("truth.json").write_text("{}")
        assert message in refused("tood.pth", "--output", output)

    def test_not_over_the_source(self, refused: Callable[..., str]) -> None:
        assert "small.onnx: is an input of this export" in refused(
            "small.onnx", "--precision", "fp16", "--output", "./small.onnx"
        )

    def test_a_full_disk(
        self, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
    ) -> None:
        monkeypatch.setattr(
            preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=50 * 2**20)
        )
        assert "50 MiB are free, and this export needs about 64" in refused("tood.pth")

    def test_a_cache_that_cannot_be_written(
        self, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
    ) -> None:
        monkeypatch.setenv("TOOD_HOME", "tood.pth/home")
        assert "name another folder in TOOD_HOME" in refused("tood.pth", *INT8)

    @pytest.mark.parametrize(
        ("plot", "message"),
        [
            ("plot.txt", "expected a name ending in .png"),
            ("images", "expected a name ending"),
            ("tood.pth/a.svg", "is a file"),
        ],
    )
    def test_a_plot(self, plot: str, message: str, refused: Callable[..., str]) -> None:
        pytest.importorskip("matplotlib")
        auto = ("--to", "engine", "--shapes", "auto", "--images", "images")
        assert message in refused("tood.pth", *auto, "--shapes-plot", plot)


class TestImages:
    @pytest.mark.parametrize("option", ["--calib-data", "--verify-images"])
    @pytest.mark.parametrize("name", ["1.png", "page.jpg"])
    def test_one_that_does_not_decode_is_named(
        self, option: str, name: str, refused: Callable[..., str]
    ) -> None:
        whole = Path("images/1.png").read_bytes()
        Path("images", name).write_bytes(
            whole[: len(whole) // 2] if name == "1.png" else b"<html>not an image</html>"
        )
        more = () if option == "--verify-images" else ("--precision", "int8")
        line = refused("tood.pth", *more, option, "images")
        assert (
            f"{option}: 1 of {3 if name == '1.png' else 4} images cannot be read: images/{name};"
            in line
        )

    def test_no_folder(self, refused: Callable[..., str]) -> None:
        assert "nowhere: no such folder" in refused("tood.pth", "--verify-images", "nowhere")

    def test_sizes_for_auto(self, refused: Callable[..., str]) -> None:
        pytest.importorskip("tensorrt_rtx")
        Path("images/bad.jpg").write_bytes(b"\xff\xd8\xff")
        assert "--images: 1 of 4 images cannot be read" in refused(
            "tood.pth", "--to", "engine", "--shapes", "auto", "--images", "images"
        )


class TestAnnotations:
    WANTED = (*INT8, "--max-ap-drop", "1", "--annotations", "truth.json", "--images", "images")

    def write(self, names: tuple[str, ...] = CLASSES, images: int = 2) -> None:
        for number in range(1, images + 1):
            shutil.copy("images/0.png", f"images/{number}.png")
        write_json(
            Path("truth.json"), coco([annotation(1, 1, (4, 8, 16, 16))], names=names, images=images)
        )

    @pytest.mark.parametrize(
        ("content", "message"),
        [("{", "not JSON"), ('{"images": []}', "expected an object with the lists images")],
    )
    def test_not_annotations(self, content: str, message: str, refused: Callable[..., str]) -> None:
        Path("truth.json").write_text(content)
        assert message in refused("tood.pth", *self.WANTED)

    def test_an_image_that_does_not_decode(self, refused: Callable[..., str]) -> None:
        self.write()
        Path("calib").mkdir()
        for number in range(2):
            shutil.copy("images/0.png", f"calib/{number}.png")
        whole = Path("images/2.png").read_bytes()
        Path("images/2.png").write_bytes(whole[:-40])
        wanted = [
            part if part != "images" or place == len(self.WANTED) - 1 else "calib"
            for place, part in enumerate(self.WANTED)
        ]
        assert "--images: 1 of 2 images cannot be read" in refused("tood.pth", *wanted)

    @pytest.mark.parametrize("source", [("small.onnx",), ("tood.pth", "--classes", "okapi,gnu")])
    def test_other_classes(self, source: tuple[str, ...], refused: Callable[..., str]) -> None:
        self.write()
        assert "truth.json" in refused(*source, *self.WANTED)

    def test_they_are_not_written_over(self, refused: Callable[..., str]) -> None:
        self.write()
        Path("truth.json").write_text(
            json.dumps(json.loads(Path("truth.json").read_text()) | {"format": 1, "preset": {}})
        )
        assert "truth.json: is an input of this export" in refused(
            "tood.pth", *self.WANTED, "--output", "truth.onnx"
        )


def test_what_is_in_order_goes_on_and_leaves_nothing(tmp_path: Path) -> None:
    before = tree()
    with pytest.raises(ModuleNotFoundError, match=r"export\.export"):
        main(["tood.pth", *INT8, "--verify-images", "images", "--output", "new/folder/a.onnx"])
    assert tree() == before


def test_pytorch_is_not_imported(tmp_path: Path) -> None:
    code = "import sys; from tood_deploy.cli.export import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"  # noqa: E501
    for arguments in (
        ["small.onnx", "--precision", "fp16", "--output", "small.onnx"],
        ["tood.pth", *INT8, "--output", "tood.xml"],
    ):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 2, result.stderr
        assert result.stderr.count("\n") == 1


MIB = 2**20


class TestArtefact:
    def test_a_new_one_and_one_of_ours(self, tmp_path: Path) -> None:
        check_artefact(tmp_path / "no" / "folder" / "a.onnx", (".onnx",), "onnx")
        (tmp_path / "a.onnx").touch()
        (tmp_path / "a.json").write_text(json.dumps({"format": 0, "preset": {}}))
        check_artefact(tmp_path / "a.onnx", (".onnx",), "onnx")
        check_artefact(tmp_path / "a.ONNX", (".onnx",), "onnx")

    @pytest.mark.parametrize("content", ["", "[]", "{", '{"images": [], "format": 1}', "\udc80"])
    def test_json_of_something_else(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(OutputError, match=r"a\.json: is no manifest of tood-export"):
            check_artefact(tmp_path / "a.onnx", (".onnx",), "onnx")

    def test_weights_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "a.bin").touch()
        check_artefact(tmp_path / "a.onnx", (".onnx",), "onnx")
        with pytest.raises(OutputError, match=r"a\.bin: belongs to no \.xml"):
            check_artefact(tmp_path / "a.xml", (".xml",), "openvino")
        (tmp_path / "a.xml").touch()
        check_artefact(tmp_path / "a.xml", (".xml",), "openvino")

    def test_another_name_is_proposed(self, tmp_path: Path) -> None:
        (tmp_path / "a.onnx").touch()
        with pytest.raises(ToodError, match=r"such as \S+a-openvino\.xml"):
            check_artefact(tmp_path / "a.xml", (".xml",), "openvino")


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path, 0)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * MIB))
    check_space(tmp_path, 36 * MIB)
    with pytest.raises(OutputError, match="100 MiB are free, and this export needs about 101"):
        check_space(tmp_path, 37 * MIB)
