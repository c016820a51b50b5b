"""Models in a Triton repository: the form that is served, its folder, and what is refused."""

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from export.small_graph import save_small
from manifest_values import plain
from numpy.typing import NDArray

from tood_deploy.data.image_set import synthetic_image
from tood_deploy.errors import ArtefactError, CheckFailed, DeviceError, OutputError, ToodError
from tood_deploy.export.tensorrt.options import Profiles
from tood_deploy.export.triton import folder as triton_folder
from tood_deploy.export.triton import repository as to_triton
from tood_deploy.export.triton.config import read_config
from tood_deploy.export.triton.options import TritonOptions
from tood_deploy.export.triton.repository import (
    ServedModel,
    check_serving_form,
    serving_form,
    triton_repository,
)
from tood_deploy.files import file_sha256, write_text
from tood_deploy.graph_io import INPUTS, OUTPUTS
from tood_deploy.manifest import manifest_path, read_manifest
from tood_deploy.manifest_sections import Build, EngineTarget
from tood_deploy.onnx_file import read_onnx
from tood_deploy.presets import COCO_CLASSES


@pytest.fixture(scope="module")
def shipped(tiny_artefact: Path) -> onnx.ModelProto:
    return onnx.load(tiny_artefact)


@pytest.fixture(scope="module")
def sessions(shipped: onnx.ModelProto) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    shipped_session, serving_session = (
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for model in (shipped, serving_form(shipped))
    )
    return shipped_session, serving_session


def shape_of(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_every_input_and_output_has_the_batch_axis(shipped: onnx.ModelProto) -> None:
    before = shipped.SerializeToString()
    serving = serving_form(shipped)
    assert shipped.SerializeToString() == before
    onnx.checker.check_model(serving, full_check=True)
    assert [value.name for value in serving.graph.input] == list(INPUTS)
    assert [value.name for value in serving.graph.output] == list(OUTPUTS)
    batch = shape_of(serving.graph.input[0])[0]
    assert isinstance(batch, str)
    assert all(
        shape_of(value)[0] == batch for value in (*serving.graph.input, *serving.graph.output)
    )
    assert [shape_of(value)[1:] for value in serving.graph.input[2:]] == [[1], [1]]


@pytest.mark.parametrize("size_hw", [(64, 64), (96, 160), (224, 96)])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_equals_the_shipped_graph_in_batches(
    sessions: tuple[ort.InferenceSession, ort.InferenceSession],
    size_hw: tuple[int, int],
    batch: int,
) -> None:
    """Each image has thresholds of its own; the shipped graph runs the same batch once with
    each."""
    shipped, serving = sessions
    height, width = size_hw
    images = np.stack([synthetic_image(height, width, seed) for seed in range(batch)])
    feeds = {"images": images, "valid_hw": np.array([[height - 7, width - 3]] * batch, np.int32)}
    scores = np.linspace(0.0, 0.3, batch, dtype=np.float32)
    ious = np.linspace(0.8, 0.2, batch, dtype=np.float32)
    found = run(
        serving, feeds | {"score_threshold": scores[:, None], "iou_threshold": ious[:, None]}
    )
    assert found[0].shape == (batch,)
    assert found[0][0] > 0
    for i in range(batch):
        expected = run(
            shipped,
            feeds
            | {
                "score_threshold": scores[i : i + 1].reshape(()),
                "iou_threshold": ious[i : i + 1].reshape(()),
            },
        )
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one[i], other[i])


def run(session: ort.InferenceSession, feeds: dict[str, NDArray]) -> list[NDArray]:
    found: list[NDArray] = session.run(list(OUTPUTS), feeds)  # pyright: ignore[reportAssignmentType] - no sparse tensors among them
    return found


def test_check_passes_on_the_true_form(shipped: onnx.ModelProto) -> None:
    assert check_serving_form(shipped, serving_form(shipped), "fp32") > 100


def test_check_finds_another_graph(shipped: onnx.ModelProto) -> None:
    """As if every image had the thresholds of the first."""
    serving = serving_form(shipped)
    for node in serving.graph.node:
        if node.op_type == "Greater" and "score_threshold" in node.input:
            node.input[:] = [
                name if name != "score_threshold" else "first_threshold" for name in node.input
            ]
            break
    serving.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int64), "first"))
    serving.graph.node.insert(
        0, onnx.helper.make_node("Gather", ["score_threshold", "first"], ["first_threshold"])
    )
    with pytest.raises(CheckFailed, match="does not give what the graph gives with the thresholds"):
        check_serving_form(shipped, serving, "fp32")


PROFILES = Profiles(((96, 128), (128, 96)), (1, 2, 4))


@pytest.fixture(scope="module")
def served(tiny_artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    options = TritonOptions(
        name="tood", instances=2, gpus=(0, 1), warm_up_batches=(1, 4), queue_delay_us=500
    )
    return triton_repository(
        tiny_artefact, tmp_path_factory.mktemp("served") / "repo", options, profiles=PROFILES
    )


def config_of(model: ServedModel) -> Any:
    return read_config((model.folder / "config.pbtxt").read_text(encoding="utf-8"))


def files_below(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


class TestRepository:
    def test_files(self, served: ServedModel) -> None:
        warm_up = [
            f"warmup/{size}/{name}" for size in ("128x96", "96x128") for name in sorted(INPUTS)
        ]
        assert files_below(served.folder) == [
            "1/model.json",
            "1/model.onnx",
            "config.pbtxt",
            "labels.txt",
            *warm_up,
        ]
        assert [path.name for path in served.folder.parent.iterdir()] == ["tood"]
        assert (served.path, served.version) == (served.folder / "1" / "model.onnx", 1)
        assert served.folder.stat().st_mode & 0o077, "the server may be another user"

    def test_labels_in_the_order_of_the_class_numbers(self, served: ServedModel) -> None:
        assert (
            tuple((served.folder / "labels.txt").read_text(encoding="utf-8").splitlines())
            == COCO_CLASSES
        )

    def test_inputs_and_outputs(self, served: ServedModel) -> None:
        config = config_of(served)
        assert (config.name, config.platform, config.backend) == (
            "tood",
            "onnxruntime_onnx",
            "onnxruntime",
        )
        assert config.default_model_filename == served.path.name
        assert {value.name: list(value.dims) for value in config.input} == {
            "images": [-1, -1, 3], "valid_hw": [2], "score_threshold": [1], "iou_threshold": [1]
        }  # fmt: skip
        assert {value.name: list(value.dims) for value in config.output} == {
            "num_dets": [1], "boxes": [100, 4], "scores": [100], "labels": [100]
        }  # fmt: skip

    def test_configuration_describes_the_graph(self, served: ServedModel) -> None:
        """What Triton compares when it loads a model: the graph's shapes are the configuration's
        behind an open batch axis."""
        config = config_of(served)
        types = {1: "TYPE_FP32", 2: "TYPE_UINT8", 6: "TYPE_INT32"}
        graph = read_onnx(served.path).model.graph
        schema = config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name
        for values, configured in ((graph.input, config.input), (graph.output, config.output)):
            assert [value.name for value in values] == [value.name for value in configured]
            for value, stated in zip(values, configured, strict=True):
                tensor = value.type.tensor_type
                assert stated.data_type == schema[types[tensor.elem_type]].number
                shape = [dim.dim_value or -1 for dim in tensor.shape.dim]
                assert shape == [
                    -1,
                    *(stated.reshape.shape if stated.HasField("reshape") else stated.dims),
                ]

    def test_batching_instances_and_warm_up(self, served: ServedModel) -> None:
        config = config_of(served)
        assert config.max_batch_size == 4
        assert config.dynamic_batching.max_queue_delay_microseconds == 500
        (group,) = config.instance_group
        assert (
            group.count,
            group.Kind.Name(group.kind),
            list(group.gpus),
            list(group.profile),
        ) == (2, "KIND_GPU", [0, 1], [])
        assert [(each.name, each.batch_size) for each in config.model_warmup] == [
            ("96x128, batch 1", 1), ("96x128, batch 4", 4), ("128x96, batch 1", 1), ("128x96, batch 4", 4)  # noqa: E501
        ]  # fmt: skip

    def test_warm_up_files_hold_one_image_each(self, served: ServedModel) -> None:
        sizes = {"TYPE_UINT8": np.uint8, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32}
        for warm_up in config_of(served).model_warmup:
            assert set(warm_up.inputs) == set(INPUTS)
            for value in warm_up.inputs.values():
                kind = sizes[
                    value.DESCRIPTOR.fields_by_name["data_type"]
                    .enum_type.values_by_number[value.data_type]
                    .name
                ]
                array = np.fromfile(served.folder / "warmup" / value.input_data_file, kind).reshape(
                    list(value.dims)
                )
                assert array.any()

    def test_parameters_for_clients(self, served: ServedModel) -> None:
        parameters = {
            key: value.string_value for key, value in config_of(served).parameters.items()
        }
        assert tuple(json.loads(parameters["class_names"])) == COCO_CLASSES
        assert (parameters["imgsz"], parameters["preset"], parameters["precision"]) == (
            "240 320",
            "tiny",
            "fp32",
        )
        assert parameters["model_sha256"] == file_sha256(served.path)

    def test_manifest_beside_the_model(self, served: ServedModel, tiny_artefact: Path) -> None:
        manifest = served.manifest
        assert plain(manifest) == plain(read_manifest(served.path))
        assert manifest.artefact_sha256 == file_sha256(served.path)
        assert plain(manifest)["options"]["serving"]["onnx_sha256"] == file_sha256(tiny_artefact)
        assert plain(manifest)["options"]["serving"]["equal_detections"] > 100
        assert plain(manifest)["parity"]["compared"] == "the ONNX artefact that this was made from"


def skip_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_triton, "serving_form", lambda graph: graph)
    monkeypatch.setattr(to_triton, "check_serving_form", lambda *_: 0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ServedModel]:
    """A function that serves a graph of one convolution as it is: how it uses the thresholds has no
    serving form."""
    skip_form(monkeypatch)
    source = save_small(tmp_path / "small.onnx")

    def serve(
        repository: Path = tmp_path / "repo", model: Path = source, **options: Any
    ) -> ServedModel:
        return triton_repository(model, repository, TritonOptions(**options), profiles=PROFILES)

    return serve


class TestOptions:
    def test_name_of_the_file_and_cpu(self, quick: Callable[..., ServedModel]) -> None:
        config = config_of(quick(device="cpu", instances=3, warm_up_batches=()))
        (group,) = config.instance_group
        assert (config.name, group.Kind.Name(group.kind), group.count) == ("small", "KIND_CPU", 3)
        assert not config.model_warmup

    def test_no_batching(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        skip_form(monkeypatch)
        model = save_small(tmp_path / "small.onnx")
        config = config_of(
            triton_repository(model, tmp_path / "repo", profiles=Profiles(((64, 96),), (1, 1, 1)))
        )
        assert config.max_batch_size == 1
        assert not config.HasField("dynamic_batching")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"name": "a/b"}, "model name is 'a/b'"),
            ({"name": ".a"}, "model name is '.a'"),
            ({"name": "a" * 300}, "300 characters"),
            ({"backend": "openvino"}, "backend is 'openvino'"),
            ({"instances": 0}, "instances 0"),
            ({"queue_delay_us": -1}, "queue delay -1"),
            ({"device": "cpu", "gpus": (1,)}, "GPUs 1 are given"),
            ({"device": "cpu", "backend": "tensorrt"}, "TensorRT runs on GPUs"),
            ({"warm_up_batches": (1, 5)}, "warm-up batch is 5; expected at most 4"),
        ],
    )
    def test_refused(
        self, quick: Callable[..., ServedModel], options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ToodError, match=message):
            quick(**options)

    def test_single_images_must_fit(self, tmp_path: Path) -> None:
        with pytest.raises(ToodError, match="batch is at least 2"):
            triton_repository(
                save_small(tmp_path / "a.onnx"),
                tmp_path / "repo",
                profiles=Profiles(((64, 64),), (2, 2, 4)),
            )


class TestFolder:
    def test_next_version_beside_the_first(self, quick: Callable[..., ServedModel]) -> None:
        first = quick(instances=1)
        kept = first.path.read_bytes()
        second = quick(instances=2)
        assert (second.version, second.folder) == (2, first.folder)
        assert first.path.read_bytes() == kept
        assert config_of(second).instance_group[0].count == 2
        assert [path for path in files_below(second.folder) if "model" in path] == [
            "1/model.json", "1/model.onnx", "2/model.json", "2/model.onnx"
        ]  # fmt: skip
        assert not [path for path in second.folder.iterdir() if path.name.startswith(".")]

    def test_another_model_in_the_same_repository(self, quick: Callable[..., ServedModel]) -> None:
        quick(name="a")
        assert quick(name="b").version == 1

    def test_folder_of_something_else_is_refused(
        self, quick: Callable[..., ServedModel], tmp_path: Path
    ) -> None:
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "a.jpg").touch()
        with pytest.raises(OutputError, match="holds files, but no model"):
            quick(tmp_path / "images")
        assert files_below(tmp_path / "images") == ["a.jpg"]

    def test_file_is_refused(self, quick: Callable[..., ServedModel], tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="is a file"):
            quick(tmp_path / "file")

    @pytest.mark.parametrize("text", ['name: "small"', "not a configuration", None])
    def test_model_of_somebody_else_is_refused(
        self, quick: Callable[..., ServedModel], tmp_path: Path, text: str | None
    ) -> None:
        quick(name="other")
        (tmp_path / "repo" / "small").mkdir()
        if text is not None:
            (tmp_path / "repo" / "small" / "config.pbtxt").write_text(text)
        with pytest.raises(OutputError, match="give another --name"):
            quick()

    def test_model_with_other_classes_is_refused(
        self, quick: Callable[..., ServedModel], tmp_path: Path
    ) -> None:
        folder = quick().folder
        text = (folder / "config.pbtxt").read_text(encoding="utf-8")
        (folder / "config.pbtxt").write_text(text.replace("zebra", "okapi"), encoding="utf-8")
        with pytest.raises(OutputError, match="other classes"):
            quick()

    def test_model_with_other_outputs_is_refused(self, quick: Callable[..., ServedModel]) -> None:
        folder = quick().folder
        text = (folder / "config.pbtxt").read_text(encoding="utf-8")
        (folder / "config.pbtxt").write_text(
            text.replace("dims: 100", "dims: 300"), encoding="utf-8"
        )
        with pytest.raises(OutputError, match="another output"):
            quick()

    def test_failed_comparison_leaves_nothing(
        self, quick: Callable[..., ServedModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def fail(*_: Any) -> int:
            raise CheckFailed("not equal")

        monkeypatch.setattr(to_triton, "check_serving_form", fail)
        with pytest.raises(CheckFailed):
            quick()
        assert not (tmp_path / "repo").exists()

    def test_full_disk_leaves_the_last_version(
        self, quick: Callable[..., ServedModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        before = files_below(quick().folder.parent)

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(triton_folder, "_add_version", fail)
        with pytest.raises(OutputError, match="No space left"):
            quick()
        assert files_below(tmp_path / "repo") == before

    @pytest.mark.parametrize("size", [20, 500, 20_000])  # its labels, its model, its warm-up
    def test_a_disk_that_fills_while_a_file_is_written(
        self,
        quick: Callable[..., ServedModel],
        tmp_path: Path,
        full_disk: Callable[[int], AbstractContextManager[None]],
        size: int,
    ) -> None:
        repository = tmp_path / "repo"
        with full_disk(size), pytest.raises(OutputError, match="repo/small: cannot be written"):
            quick()
        assert not repository.exists()
        folder = quick().folder
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with full_disk(size), pytest.raises(OutputError, match="repo/small: cannot be written"):
            quick()
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert not list(repository.rglob(".*"))


class TestTensorRT:
    def test_without_tensorrt_is_said_and_leaves_nothing(
        self, quick: Callable[..., ServedModel], tmp_path: Path
    ) -> None:
        if find_spec("tensorrt"):
            pytest.skip("TensorRT is installed")
        with pytest.raises(DeviceError, match="TensorRT is not installed"):
            quick(backend="tensorrt")
        assert not (tmp_path / "repo").exists()

    def test_a_plan_of_tensorrt_rtx_is_refused(self, served: ServedModel, tmp_path: Path) -> None:
        """A stand-in for one; that the served form builds is tested in test_export.py."""
        engine = tmp_path / "tood.engine"
        engine.write_bytes(b"a plan")
        target = EngineTarget("tensorrt_rtx", "1.7", "linux", ("8.9",), PROFILES.for_manifest())
        stated = replace(served.manifest, target=target).with_artefact(engine)
        write_text(manifest_path(engine), stated.to_json())
        with pytest.raises(ArtefactError, match="is a plan of tensorrt_rtx"):
            triton_repository(engine, tmp_path / "repo")

    def test_engine_whose_manifest_pretends_another_flavour(
        self, tmp_path: Path, served: ServedModel
    ) -> None:
        """A stand-in for a plan of TensorRT, which cannot be had without a GPU: its configuration
        and its files."""
        engine = tmp_path / "tood.engine"
        engine.write_bytes(b"a plan")
        target = EngineTarget("tensorrt", "10.13", "linux", ("8.9",), PROFILES.for_manifest())
        write_text(
            manifest_path(engine),
            replace(served.manifest, target=target).with_artefact(engine).to_json(),
        )
        model = triton_repository(engine, tmp_path / "repo")
        config = config_of(model)
        assert (config.platform, config.max_batch_size, model.profiles) == (
            "tensorrt_plan",
            4,
            PROFILES,
        )
        assert list(config.instance_group[0].profile) == ["0", "1"]
        assert not config.HasField("optimization")  # a recording fits one profile alone
        assert model.path.read_bytes() == b"a plan"
        with pytest.raises(ToodError, match="has its own sizes"):
            triton_repository(engine, tmp_path / "repo", profiles=PROFILES)
        with pytest.raises(ToodError, match="onnxruntime does not run an engine"):
            triton_repository(engine, tmp_path / "repo", TritonOptions(backend="onnxruntime"))

    def test_ordinary_engine_is_refused(self, tmp_path: Path, served: ServedModel) -> None:
        engine = tmp_path / "tood.engine"
        engine.write_bytes(b"a plan")
        write_text(
            manifest_path(engine),
            replace(served.manifest, build=Build()).with_artefact(engine).to_json(),
        )
        with pytest.raises(ArtefactError, match="one threshold for all images"):
            triton_repository(engine, tmp_path / "repo")
        manifest_path(engine).unlink()
        with pytest.raises(ArtefactError, match=r"tood\.json is missing"):
            triton_repository(engine, tmp_path / "repo")


def test_model_of_a_repository_can_be_served_again(served: ServedModel, tmp_path: Path) -> None:
    """It has the serving form already, and keeps it to the byte."""
    source = shutil.copy(served.path, tmp_path / "again.onnx")
    model = triton_repository(Path(source), tmp_path / "repo", profiles=PROFILES)
    assert model.path.read_bytes() == served.path.read_bytes()
    assert set(OUTPUTS) == {value.name for value in config_of(model).output}
