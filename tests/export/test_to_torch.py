"""tood-export --to torch: a verified .pt2 of the network, and what is refused before it begins."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tood_deploy.cli.export import main
from tood_deploy.data.image_set import synthetic_image
from tood_deploy.engines import open_engine
from tood_deploy.engines.torch_engine import TorchEngine
from tood_deploy.engines.torch_program import read_program
from tood_deploy.errors import ArtefactError
from tood_deploy.export.to_torch import (
    ProgramModule,
    _filled,
    _stored_bytes,
    export_torch,
    trace,
    write_parts,
)
from tood_deploy.manifest import Manifest, manifest_path, read_manifest
from tood_deploy.manifest_sections import Build
from tood_deploy.model import load_checkpoint


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--precision", "int8"], "int8"),
        (["--deform", "gather"], "--deform"),
        (["--keep-fp32", "a*"], "--keep-fp32"),
        (["--batch", "1"], "--batch"),
        (["--output", "m.onnx"], ".pt2"),
    ],
)
def test_refused_at_once(
    tiny_checkpoint: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_checkpoint), "--to", "torch", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error:")
    assert reason in message
    assert message.count("\n") == 1


def test_an_onnx_is_no_network(tiny_artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_artefact), "--to", "torch"]) == 2
    assert "give the checkpoint" in capsys.readouterr().err


@pytest.fixture(scope="module")
def artefact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torch") / "tiny.pt2"
    assert main([str(tiny_checkpoint), "--to", "torch", "--output", str(path), "--quiet"]) == 0
    return path


@pytest.mark.slow
class TestArtefact:
    def test_says_what_it_is(self, artefact: Path, tiny_checkpoint: Path) -> None:
        manifest = read_manifest(artefact)
        assert manifest is not None
        assert manifest.parity is not None
        assert manifest.parity.judged_by == "float32 noise"
        assert manifest.self_test is not None
        assert manifest.checkpoint_sha256 == load_checkpoint(tiny_checkpoint).checkpoint_sha256
        assert str(Path(__file__).parent).encode() not in artefact.read_bytes()

    @pytest.mark.parametrize(("batch", "size_hw"), [(1, (64, 64)), (3, (96, 160))])
    def test_equals_the_network(
        self, artefact: Path, tiny_checkpoint: Path, batch: int, size_hw: tuple[int, int]
    ) -> None:
        images = np.stack([synthetic_image(*size_hw, seed) for seed in range(batch)])
        valid_hw = np.array([[size_hw[0] - 5, size_hw[1]]] * batch, np.int32)
        with open_engine(artefact) as engine, TorchEngine(tiny_checkpoint) as eager:
            result = engine.infer(images, valid_hw, 0.05, 0.6)
            expected = eager.infer(images, valid_hw, 0.05, 0.6)
        np.testing.assert_array_equal(result.labels, expected.labels)
        np.testing.assert_allclose(result.scores, expected.scores, atol=1e-5)
        np.testing.assert_allclose(result.boxes_net, expected.boxes_net, atol=0.05)

    def test_weights_of_another_checkpoint_fill_the_same_program(
        self, artefact: Path, seeded_model: Callable, tmp_path: Path
    ) -> None:
        """The traced program is kept; what is verified is what was written."""
        model = seeded_model("tiny").eval().requires_grad_(False)
        model.bbox_head.tood_cls.bias.data += 0.1
        lines: list[str] = []

        class Listener:
            def info(self, line: str) -> None:
                lines.append(line)

        export_torch(model, tmp_path / "other.pt2", reporter=Listener())  # pyright: ignore[reportArgumentType]
        assert any("earlier export" in line for line in lines)

    def test_a_sabotaged_program_fails_its_self_test(
        self, artefact: Path, seeded_model: Callable, tmp_path: Path
    ) -> None:
        import zipfile

        with zipfile.ZipFile(artefact) as archive:
            parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        largest = max(
            (name for name in parts if name.startswith("data/weights/weight_")),
            key=lambda name: len(parts[name]),
        )
        weights = np.frombuffer(parts[largest], np.float32) * -1
        write_parts(parts | {largest: weights.tobytes()}, tmp_path / "bad.pt2")
        manifest_path(tmp_path / "bad.pt2").write_bytes(manifest_path(artefact).read_bytes())
        with pytest.raises(ArtefactError, match="self-test"):
            open_engine(tmp_path / "bad.pt2", verify="off")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paa-r50-1x", "fcos-r50-1x", "vfnet-r50-1x"])
def test_programs_of_the_relatives_can_be_read(
    name: str, seeded_model: Callable, tmp_path: Path
) -> None:
    """PAA votes, FCOS takes BGR, VFNet has deformable convolutions."""
    model = seeded_model(name, depth=18, base_channels=32, channels=64).eval()
    module = ProgramModule(model.requires_grad_(False), "fp32", 100).eval()
    manifest = Manifest(model.preset, checkpoint_sha256="0" * 64, build=Build(format="torch"))
    write_parts(_filled(trace(module), module, manifest), tmp_path / "a.pt2")
    program = read_program(tmp_path / "a.pt2", torch.device("cpu"))
    images = torch.from_numpy(synthetic_image(96, 128, 3)[None])
    inputs = (images, torch.tensor([[90, 128]]), torch.tensor(0.05), torch.tensor(0.6))
    with torch.no_grad():
        outputs, expected = program.run_stages(*inputs), module(*inputs)
    assert expected[0] > 0
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_are_stored_as_they_lie_in_memory() -> None:
    kernel = torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)
    expected = kernel.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    assert _stored_bytes(kernel) == expected
    assert len(_stored_bytes(kernel.bfloat16())) == 48
    assert _stored_bytes(torch.tensor(5)) == (5).to_bytes(8, "little")
