"""tood-infer: runs a detector on images, videos, cameras and streams."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tood_deploy.cli.common import (
    DONE,
    FAILED_CHECK,
    CommandParser,
    add_model_options,
    is_artefact,
    load_options,
    model_files,
    run_command,
)
from tood_deploy.cli.detection import (
    add_device,
    add_fast_decode,
    add_hint,
    add_imgsz,
    add_iou,
    add_max_det,
    add_runtime_options,
    add_slicing,
    add_threads,
    add_thresholds,
    check_fast_torch,
    class_options,
    hint_options,
    runtime_options,
    slicing_options,
)
from tood_deploy.errors import ArtefactError, ToodError
from tood_deploy.reporter import Reporter

EPILOG = """\
A single image or video that cannot be read ends the run with exit code 2. Among several, one that
cannot be read is named and the rest goes on; the exit code is then 1, as it is for a video that is
cut or has lost frames. Ctrl-C completes the outputs so far (exit code 130). A camera or stream
gives the latest frame whenever the model is free, counts those it drops, and is connected to again
where it is lost (see --reconnect).
"""
if TYPE_CHECKING:
    from tood_deploy.inference.frame import Source
    from tood_deploy.inference.run import Outputs
    from tood_deploy.inference.video_writer import VideoEncoding

OPENCV_PIXEL_LIMIT = 2**30


def build_parser() -> argparse.ArgumentParser:
    """Return the options of tood-infer."""
    parser = CommandParser(prog="tood-infer", epilog=EPILOG)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="an artefact of tood-export (.onnx, .xml, .engine, .pt2), a checkpoint, or a preset's "
        "name",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        nargs="+",
        help="an image, folder, glob, text file with one path a line, video, - for a video from "
        "stdin, camera (0 or /dev/video0), rtsp://, http(s)://, rtmp://, udp:// or file:// address",
    )
    add_inference_options(parser)
    add_video_options(parser)
    add_output_options(parser)
    add_model_options(parser)
    return parser


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """Add how images are read and the model is run."""
    add_device(parser)
    add_imgsz(parser)
    add_thresholds(parser, default=0.3)
    add_iou(parser)
    add_max_det(parser, of="an image, or in each slice of it")
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="frames, or slices of them, of one engine call (default: 1)",
    )
    add_threads(parser)
    add_runtime_options(parser)
    add_hint(parser, default="throughput for more than one image")
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="run an artefact that is not the file its manifest describes, with a warning",
    )
    _add_reading_options(parser)
    add_slicing(parser)


def _add_reading_options(parser: argparse.ArgumentParser) -> None:
    add_fast_decode(parser)
    parser.add_argument(
        "--device-resize",
        action="store_true",
        help="resize and pad images where the model runs, in PyTorch's fast form; pixels differ by "
        "one grey level at most",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=200_000_000,
        metavar="N",
        help="refuse larger images, or read them by window with --slice (default: 200000000)",
    )
    parser.add_argument(
        "--first-page",
        action="store_true",
        help="of image files with several pages or frames (TIFF, GIF, WebP, PNG), the first alone",
    )
    parser.add_argument(
        "--bit-depth",
        type=int,
        metavar="N",
        help="bits that hold data in images of 16 bits, 9 to 16 (default: what their files say)",
    )


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Add which frames of videos and streams are run."""
    group = parser.add_argument_group("videos and streams")
    group.add_argument(
        "--stride", type=int, default=1, metavar="N", help="every N-th frame (default: 1)"
    )
    group.add_argument(
        "--start", metavar="TIME", help="from here on: seconds (12.5), or a frame (300f)"
    )
    group.add_argument("--end", metavar="TIME", help="up to before this time or frame")
    group.add_argument(
        "--max-frames", type=int, metavar="N", help="at most N frames of each video or stream"
    )
    group.add_argument(
        "--reconnect",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="connect again when the connection to a stream is lost (default: for rtsp and http)",
    )
    group.add_argument(
        "--reconnect-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="give up after so many seconds without a frame (default: 30)",
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add what to write and where."""
    group = parser.add_argument_group("output")
    _add_annotated_output(group)
    _add_records_output(group)
    group.add_argument("--show", action="store_true", help="show the frames in a window; q ends")
    group.add_argument(
        "--quiet", action="store_true", help="no line a frame, no progress, no closing line"
    )


def _add_annotated_output(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--output",
        type=Path,
        metavar="PLACE",
        help="annotated images and videos: a folder, or a file for a single source",
    )
    group.add_argument(
        "--codec", metavar="NAME", help="of annotated videos: h264 (default), hevc, vp9 or av1"
    )
    group.add_argument(
        "--crf",
        type=int,
        metavar="N",
        help="quality of annotated videos, 0 the best (default: 20 for h264, 24 for hevc, 30 for "
        "vp9, 35 for av1)",
    )
    group.add_argument(
        "--crops", type=Path, metavar="DIR", help="every object as an image of its own"
    )


def _add_records_output(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="COCO results; image ids count from 1, category ids are class numbers plus 1",
    )
    group.add_argument(
        "--coco-annotations",
        type=Path,
        metavar="FILE",
        help="take the image and category ids of --json from these annotations",
    )
    group.add_argument(
        "--jsonl", metavar="FILE", help="one JSON object a frame, as they come; - for stdout"
    )
    group.add_argument(
        "--geojson",
        type=Path,
        metavar="FILE",
        help="objects of georeferenced images (GeoTIFF, or with a world file) as polygons, in "
        "degrees of WGS 84",
    )
    group.add_argument(
        "--crs",
        metavar="CODE",
        help="coordinate system of images with a world file alone, such as EPSG:32632",
    )


def infer_command(argv: Sequence[str] | None = None) -> int:
    """Run tood-infer; errors pass through."""
    args = build_parser().parse_args(argv)
    if (
        args.max_pixels > OPENCV_PIXEL_LIMIT
    ):  # OpenCV has a limit of its own and reads this when it is loaded
        os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(args.max_pixels))

    import cv2

    from tood_deploy.inference.detector import Detector
    from tood_deploy.inference.run import run_inference
    from tood_deploy.inference.source import open_source
    from tood_deploy.manifest import doubts

    cv2.utils.logging.setLogLevel(
        cv2.utils.logging.LOG_LEVEL_SILENT
    )  # what fails is said once, by us
    reporter = Reporter(args.quiet)
    outputs = outputs_from(args)
    source = open_source(
        args.source,
        args.max_pixels,
        first_page=args.first_page,
        bit_depth=args.bit_depth,
        **video_options(args),
    )
    outputs.check_files(source, model_files(args.model, args.classes))
    options = detector_options(args)
    check_bytes(args)
    options |= source_hint(args, source, sliced=options["slicing"] is not None)
    with Detector(args.model, **options, **engine_options(args)) as detector:
        if is_artefact(args.model) and (
            doubt := doubts(Path(args.model), detector.engine.manifest)
        ):
            reporter.warn(doubt)
        run_inference(detector, source, outputs, reporter, args.batch)
    if source.skipped and source.kind != "live":  # a lost connection has been told
        reporter.problem(f"failed: {source.skipped} images or frames could not be read")
    return FAILED_CHECK if source.skipped else DONE


def outputs_from(args: argparse.Namespace) -> "Outputs":
    """Return what to write and where.

    Raises:
        ToodError: options of annotated videos out of range, or without any.
    """
    from tood_deploy.inference.run import Outputs

    return Outputs(
        args.output,
        args.json,
        args.coco_annotations,
        args.jsonl,
        args.crops,
        args.show,
        args.geojson,
        args.crs,
        encoding=video_encoding(args),
    )


def source_hint(args: argparse.Namespace, source: "Source", *, sliced: bool) -> dict[str, Any]:
    """Return how the engine shares its cores, for what is read.

    Args:
        args: the command's arguments.
        source: what is read.
        sliced: whether an image is several inputs of the network.

    Raises:
        ToodError: throughput is asked for where frames are run one at a time; a checkpoint.
    """
    if source.kind == "live" and args.hint == "throughput":
        raise ToodError(
            f"{source.names[0]}: of a camera or stream the latest frame is run, one at a time; "
            "leave --hint throughput out"
        )
    many = source.kind == "video" or len(source.names) > 1 or sliced
    return hint_options(args.model, args, several=many and source.kind != "live")


def video_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `open_source` takes for videos and streams.

    Raises:
        ToodError: a value out of range.
    """
    from tood_deploy.inference.frame import Moment, Selection
    from tood_deploy.inference.live import Reconnection

    start = None if args.start is None else Moment.parse(args.start, "--start")
    end = None if args.end is None else Moment.parse(args.end, "--end")
    return {
        "selection": Selection(args.stride, start, end, args.max_frames),
        "reconnection": Reconnection(args.reconnect, args.reconnect_timeout),
    }


def video_encoding(args: argparse.Namespace) -> "VideoEncoding":
    """Return how annotated videos are encoded.

    Raises:
        ToodError: a value out of range, or no annotated video is asked for.
    """
    from tood_deploy.inference.video_writer import VideoEncoding

    if args.output is None and (args.codec is not None or args.crf is not None):
        raise ToodError(
            "--codec and --crf are of annotated videos, and none are asked for; add --output"
        )
    return VideoEncoding(args.codec or "h264", args.crf)


def detector_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `Detector` takes of `add_inference_options`, runtimes and threads left out.

    Raises:
        ToodError: options of slices without --slice.
    """
    from tood_deploy.inference.slicing import Slicing

    slicing = slicing_options(args)
    options = {name: getattr(args, name) for name in ("conf", "iou", "max_det", "imgsz", "device")}
    options |= class_options(args) | {"slicing": None if slicing is None else Slicing(**slicing)}
    options["fast_decode"] = bool(args.fast_decode)
    options["device_resize"] = args.device_resize
    if is_artefact(args.model):
        options["verify"] = "off"  # `check_bytes` does
    return options


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what `open_engine` takes beyond the device, as far as given.

    Raises:
        ToodError: options of checkpoints beside an artefact, which has all of that inside; or the
            other way round.
    """
    options = load_options(args)
    if options and is_artefact(args.model):
        raise ToodError(
            f"{args.model}: an exported artefact knows its preset, classes and convention; "
            "leave --preset, --classes, --convention, --weights-key out"
        )
    chosen = runtime_options(args)
    if not is_artefact(args.model):
        check_fast_torch(args.model, chosen)
    return options | chosen | ({"threads": args.threads} if args.threads is not None else {})


def check_bytes(args: argparse.Namespace) -> None:
    """Refuse, before a runtime reads it, an artefact whose manifest describes another file.

    Raises:
        ToodError: it is one, and --allow-mismatch is not given; or that is given, and the model is
            a checkpoint.
    """
    from tood_deploy.manifest import mismatch, read_manifest

    if not is_artefact(args.model):
        if args.allow_mismatch:
            raise ToodError(
                f"{args.model}: a checkpoint has no manifest that it could mismatch; leave "
                "--allow-mismatch out"
            )
        return
    path = Path(args.model)
    compared = path.is_file() and not args.allow_mismatch
    if compared and (differs := mismatch(path, read_manifest(path))):
        raise ArtefactError(f"{differs}; --allow-mismatch runs it all the same")


def main(argv: Sequence[str] | None = None) -> int:
    """Run tood-infer as a command; see `run_command` for the exit codes."""
    return run_command(infer_command, argv)


if __name__ == "__main__":
    sys.exit(main())
