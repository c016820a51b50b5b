"""`tood-export`: parses arguments, nothing else."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tood_deploy.cli.run import DONE, add_model_options, class_names_from, run_command
from tood_deploy.manifest import Manifest, manifest_path
from tood_deploy.presets import Preset

MOST_VERIFY_PICTURES = 16

EPILOG = """\
checkpoints:
  Files of MMDetection 2.x and 3.x, of the TOOD authors, and our own (.pth, .pt, .safetensors) load as they are. A preset's name in
  place of a file downloads its published weights once.

class counts:
  Any number of classes works: the count is read from the weights, the names from the file's metadata. Where the metadata has no
  names, classes are numbered; name them with --classes person,car,dog or --classes names.txt (one a line).

anchor-free or anchor-based:
  Both kinds have the same weights. Where a file's metadata does not tell them apart (a bare state_dict), say it with
  --preset r50-1x or --preset r50-anchor-1x.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    result = argparse.ArgumentParser(
        "tood-export",
        description="Turns a TOOD checkpoint into one ONNX file with pre- and post-processing inside, and proves it equal to PyTorch.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("checkpoint", help="a checkpoint file, or the name of a preset")
    result.add_argument("--output", type=Path, metavar="FILE", help="where to (default: the checkpoint's name, ending in .onnx, here)")
    result.add_argument("--imgsz", type=int, nargs=2, metavar=("H", "W"), help="the artefact's default picture size: short and long side")
    result.add_argument("--max-det", type=int, default=100, metavar="N", help="the most detections a picture (default: 100)")
    result.add_argument(
        "--deform",
        choices=("op", "gather"),
        default="op",
        help="deformable convolutions as ONNX's operator (ONNX Runtime, TensorRT) or as gathers (OpenVINO, TensorRT-RTX)",
    )
    result.add_argument(
        "--verify-images", type=Path, metavar="DIR", help="pictures to verify on, in addition to the built-in ones (the first 16)"
    )
    result.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_model_options(result)
    return result


def export_command(argv: Sequence[str] | None) -> int:
    """Loads, exports, verifies, and says what was made."""
    arguments = parser().parse_args(argv)
    class_names = class_names_from(arguments.classes)
    output = arguments.output or Path(f"{Path(arguments.checkpoint).stem}.onnx")
    from dataclasses import replace

    from tood_deploy.export.artefact import export_onnx
    from tood_deploy.export.pictures import read_pictures
    from tood_deploy.model.checkpoint import load_checkpoint
    from tood_deploy.preprocess import check_imgsz

    def say(text: str) -> None:
        if not arguments.quiet:
            print(text, file=sys.stderr)

    pictures = read_pictures(arguments.verify_images, MOST_VERIFY_PICTURES) if arguments.verify_images else []
    imgsz = check_imgsz(arguments.imgsz) if arguments.imgsz else None
    model = load_checkpoint(arguments.checkpoint, preset=arguments.preset, class_names=class_names, convention=arguments.convention)
    model.preset = replace(model.preset, imgsz=imgsz or model.preset.imgsz)
    say(f"{arguments.checkpoint}: {describe(model.preset)}; exporting and verifying, which takes a minute or so")
    manifest = export_onnx(model, output, deform=arguments.deform, max_det=arguments.max_det, verify_pictures=pictures)
    if not arguments.quiet:
        print(summary(output, manifest))
    return DONE


def describe(preset: Preset) -> str:
    """One line on a detector."""
    names = ", ".join(preset.class_names[:3]) + (", ..." if preset.num_classes > 3 else "")
    return (
        f"{preset.name}, anchor-{preset.anchor}, {preset.num_classes} classes ({names}), {preset.convention} convention, "
        f"pictures fit {preset.imgsz[0]} x {preset.imgsz[1]}"
    )


def summary(output: Path, manifest: Manifest) -> str:
    """What was made, and how equal to PyTorch it is."""
    parity, found = manifest.parity, manifest.parity["detections"]
    lines = [
        f"{output}  {output.stat().st_size / 2**20:.1f} MiB, {manifest.precision}, dynamic batch and size",
        f"{manifest_path(output)}  manifest",
        f"parity with {parity['reference']} on {parity['pictures']} pictures: "
        f"{found['matched']} of {found['reference']} detections matched, "
        f"scores within {found['score_deviation']:.1e}, boxes within {found['box_deviation_px']:.1e} px; "
        f"head maps within {parity['head_scores']:.1e} (scores) and {parity['head_boxes']:.1e} strides (boxes)",
    ]
    if not found["reference"]:
        lines.append("no detection on these pictures: only the head's maps were compared; give --verify-images a folder of real pictures")
    return "\n".join([*lines, f"next: tood-infer {output} PICTURES --output DIR"])


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run_command(export_command, argv)
