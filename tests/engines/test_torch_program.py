"""Reading .pt2 files: what they compute, and that nothing they bring is run."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tood_deploy.engines import torch_program
from tood_deploy.engines.torch_program import Archive, GraphReader, read_program
from tood_deploy.errors import ArtefactError
from tood_deploy.manifest import Manifest
from tood_deploy.presets import PRESETS

CPU = torch.device("cpu")
NAMES = ("sums", "places", "kept")
MANIFEST = "extra/tood_deploy"


class Network(nn.Module):
    """Takes what a detector takes; has a kernel, a constant, sizes, and a call of two results."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("mean", torch.tensor([1.0, 2.0, 3.0]), persistent=False)

    def forward(
        self, images: Tensor, valid_hw: Tensor, score_threshold: Tensor, iou_threshold: Tensor
    ) -> tuple[Tensor, ...]:
        x = (images.float() - self.mean).permute(0, 3, 1, 2)
        y = self.conv(x).relu().flatten(2)
        values, places = y.topk(2, dim=2)
        rows = torch.arange(x.shape[2], device=x.device) < valid_hw[:, :1]
        return values.sum(1) * score_threshold * (x.shape[2] * 2), places, rows & (rows.sum() > 0)


Edit = Callable[[dict[str, bytes]], None]


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def saved(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a program as PyTorch saves it."""
    path = tmp_path_factory.mktemp("program") / "program.pt2"
    example = inputs_of(2, 64, 64)  # neither batch nor rows are one
    rows = torch.export.Dim("rows", min=1)
    dynamic = ({0: torch.export.Dim("batch", min=1), 1: 32 * rows}, {0: torch.export.Dim.AUTO})
    program = torch.export.export(
        network, example, dynamic_shapes=(*dynamic, None, None), strict=False
    )
    manifest = Manifest(PRESETS["tiny"]).to_json()
    torch.export.save(program, path, extra_files={"tood_deploy": manifest})
    return path


@pytest.fixture
def edited(saved: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that saves the program with other parts, and gives its path."""

    def save(edit: Edit, compression: int = zipfile.ZIP_STORED) -> Path:
        with zipfile.ZipFile(saved) as archive:
            parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        edit(parts)
        path = tmp_path / "edited.pt2"
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in parts.items():
                archive.writestr(f"model/{name}", content)
        return path

    return save


def inputs_of(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    images = torch.arange(batch * height * width * 3).reshape(batch, height, width, 3) % 251
    valid_hw = torch.tensor([[height - 3, width]] * batch, dtype=torch.int32)
    return images.to(torch.uint8), valid_hw, torch.tensor(0.5), torch.tensor(0.6)


def reader_of(path: Path) -> GraphReader:
    with zipfile.ZipFile(path) as archive:
        contents = Archive(archive)
        tensors = torch_program._read_tensors(contents, CPU)
        return GraphReader(contents.json(torch_program.MODEL), tensors, CPU, NAMES)


@pytest.mark.parametrize(("batch", "height"), [(2, 32), (1, 64), (3, 96)])
def test_computes_what_was_saved(saved: Path, network: Network, batch: int, height: int) -> None:
    inputs = inputs_of(batch, height, 64)
    function = reader_of(saved).select(torch_program.INPUTS, NAMES)
    for part, expected in zip(function(*inputs), network(*inputs), strict=True):
        torch.testing.assert_close(part, expected)


def test_a_part_of_it(saved: Path, network: Network) -> None:
    images, valid_hw, score, _ = inputs_of(2, 32, 64)
    function = reader_of(saved).select(torch_program.INPUTS[:3], NAMES[:1])
    (sums,) = function(images, valid_hw, score)
    torch.testing.assert_close(sums, network(images, valid_hw, score, score)[0])


def change_model(change: Callable[[Any], None]) -> Edit:
    def edit(parts: dict[str, bytes]) -> None:
        model = json.loads(parts[torch_program.MODEL])
        change(model)
        parts[torch_program.MODEL] = json.dumps(model).encode()

    return edit


def call(target: str) -> Edit:
    def change(model: Any) -> None:
        nodes = model["graph_module"]["graph"]["nodes"]
        next(node for node in nodes if "relu" in node["target"])["target"] = target

    return change_model(change)


def set_weights(**values: Any) -> Edit:
    def edit(parts: dict[str, bytes]) -> None:
        name = "data/weights/model_weights_config.json"
        stated = json.loads(parts[name])
        next(iter(stated["config"].values())).update(values)
        parts[name] = json.dumps(stated).encode()

    return edit


def give_string(text: str) -> Edit:
    def change(model: Any) -> None:
        nodes = model["graph_module"]["graph"]["nodes"]
        node = next(node for node in nodes if "relu" in node["target"])
        node["inputs"].append({"name": "x", "arg": {"as_string": text}, "kind": 1})

    return change_model(change)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class TestRefusals:
    @pytest.mark.parametrize(
        ("edit", "reason"),
        [
            (call("torch.ops.aten.from_file.default"), "from_file"),
            (call("torch.load"), "torch.load"),
            (call("builtins.eval"), "eval"),
            (call("torch.ops.higher_order.cond"), "cond"),
            (give_string("__import__('os')"), "no word"),
            (set_weights(use_pickle=True), "pickled"),
            (set_weights(path_name="../../weight_0"), "not in a tensor's place"),
            (lambda parts: parts.update({"data/aotinductor/model/x.so": b""}), "machine code"),
            (lambda parts: parts.update({"data/weights/weight_0": b"1234"}), "has 4 bytes"),
            (lambda parts: parts.pop("models/model.json"), "no models/model.json"),
            (lambda parts: parts.update({"models/model.json": b"{"}), "safely"),
            (change_model(lambda model: model["schema_version"].update(major=9)), "schema"),
            (change_model(lambda model: model["graph_module"]["graph"].update(nodes=[])), "safely"),
        ],
    )
    def test_in_one_line(self, edited: Callable[..., Path], edit: Edit, reason: str) -> None:
        path = edited(edit)
        with pytest.raises(ArtefactError, match=reason) as caught:
            read_program(path, CPU)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_compressed_parts(self, edited: Callable[..., Path]) -> None:
        """A few bytes could stand for gigabytes."""
        path = edited(lambda _: None, zipfile.ZIP_DEFLATED)
        with pytest.raises(ArtefactError, match="compressed"):
            read_program(path, CPU)

    @pytest.mark.parametrize("content", [b"", b"PK", b"no archive at all"])
    def test_no_archive(self, content: bytes, tmp_path: Path) -> None:
        path = tmp_path / "m.pt2"
        path.write_bytes(content)
        with pytest.raises(ArtefactError):
            read_program(path, CPU)

    def test_a_program_that_is_not_of_this_package(self, saved: Path) -> None:
        """It has a manifest here, but gives three results."""
        with pytest.raises(ArtefactError, match="export the checkpoint again"):
            read_program(saved, CPU)


def test_pickles_and_expressions_are_never_looked_at(
    edited: Callable[..., Path], network: Network, tmp_path: Path
) -> None:
    """PyTorch's own reader unpickles the one, and evaluates the other."""
    mark = tmp_path / "mark"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"

    def edit(parts: dict[str, bytes]) -> None:
        parts["data/sample_inputs/model.pt"] = pickle.dumps(Bomb(mark))
        model = json.loads(parts[torch_program.MODEL])
        model["guards_code"] = [code]
        model["range_constraints"] = {code: {"min_val": 1, "max_val": None}}
        for value in model["graph_module"]["graph"]["sym_int_values"].values():
            value["as_expr"] = {"expr_str": code, "hint": None}
        parts[torch_program.MODEL] = json.dumps(model).encode()

    inputs = inputs_of(2, 32, 64)
    function = reader_of(edited(edit)).select(torch_program.INPUTS, NAMES)
    torch.testing.assert_close(function(*inputs)[0], network(*inputs)[0])
    assert not mark.exists()
