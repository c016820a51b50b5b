"""tood-bench: latency, video throughput, parity with PyTorch, scenarios. Parses, nothing else.

Arguments come in; `LatencyPlan`, `ParityConfig` and a `Detector` go to `benchmark`.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tood_deploy.cli.common import (
    DONE,
    CommandParser,
    check_written,
    is_artefact,
    load_options,
    model_files,
    run_command,
)
from tood_deploy.cli.detection import add_hint, add_slicing, hint_options, slicing_options
from tood_deploy.cli.scenario import (
    SCENARIO_EPILOG,
    add_bench_options,
    add_bench_thresholds,
    add_scenario,
    options_by_model,
)
from tood_deploy.errors import CheckFailed, ToodError, naming_extras

PARITY_SIZES = ("64x64", "320x320", "640x384", "384x640", "1344x1344")
BASELINE = "eager PyTorch"
# Extras that each command always needs.
EXTRAS = {
    "latency": ("eval",),
    "video": ("eval",),
    "parity": ("eval", "export"),
    "scenario": ("eval", "scenario"),
}

# Options of limits: name, metavar, help.
LIMITS = (
    ("max_pixel", "D", "of the network's input, in normalised units"),
    ("max_map", "D", "of a backbone or pyramid map, relative L2 norm"),
    ("max_score", "D", "of a score"),
    ("max_box_strides", "D", "of the head's boxes, in strides"),
    ("max_box_px", "D", "of a box, in pixels of the network's input"),
    ("min_matched", "S", "share of detections that both must have, 0 to 1"),
    ("max_ap_drop", "P", "points of AP, 0 to 100"),
)

PARITY_EPILOG = """\
An artefact passes by the comparison and the limits of tood-export: float32 by its maps and
detections, a lower precision by its detections alone; see docs/verification.md. The limits are
printed with the verdict. One that is passed makes the exit code 1. Every stage is also compared
alone, from the reference's own values: that names the guilty stage. The verdict goes into the
artefact's manifest.
"""

LATENCY_EPILOG = """\
Each model runs in a process of its own; rounds are interleaved, so that drift hits all alike.
Ratios are against the baseline, or against the first model. Images are real, also without --images.
Times of a busy machine mean little: what other processes took is measured and reported.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of tood-bench."""
    parser = CommandParser(
        prog="tood-bench", description="Latency, video throughput, parity with PyTorch, scenarios."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_latency(
        commands.add_parser("latency", help="time models on this machine", epilog=LATENCY_EPILOG)
    )
    _add_video(
        commands.add_parser(
            "video", help="time the whole pipeline on a clip, and say what limits it"
        )
    )
    _add_parity(
        commands.add_parser(
            "parity",
            help="compare artefacts with a checkpoint, stage by stage",
            epilog=PARITY_EPILOG,
        )
    )
    add_scenario(
        commands.add_parser(
            "scenario",
            help="measure a model as MLPerf Inference does: single, multi, server, offline",
            epilog=SCENARIO_EPILOG,
        )
    )
    return parser


def _add_latency(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=latency_command)
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="exported artefacts, checkpoints or presets"
    )
    parser.add_argument(
        "--baseline",
        metavar="CHECKPOINT",
        help="compare with this checkpoint in eager PyTorch, in the same run",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="images to run on, the first 8 (default: 8 crops of a photograph)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="images of one engine call; several numbers are measured in turn (default: 1)",
    )
    parser.add_argument(
        "--ap",
        action="append",
        default=[],
        metavar="MODEL=P",
        help="a model's AP, 0 to 100 (default: its manifest's)",
    )
    _add_turns(parser)
    add_bench_thresholds(parser, conf=0.3)
    add_slicing(parser)
    add_bench_options(parser, "latency")


def _add_turns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="turns of every model (default: 10)"
    )
    parser.add_argument(
        "--turn-seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="of each kind of call in a turn (default: 1)",
    )
    parser.add_argument(
        "--warmup-seconds",
        type=float,
        default=20.0,
        metavar="S",
        help="longest warm-up of each kind of call (default: 20)",
    )


def _add_video(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=video_command)
    parser.add_argument(
        "model", metavar="MODEL", help="an exported artefact, a checkpoint or a preset"
    )
    parser.add_argument("clip", metavar="CLIP", help="a video")
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="images of one engine call; the last call may have fewer (default: 1)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N frames only")
    parser.add_argument("--no-encode", action="store_true", help="neither draw nor encode")
    add_bench_thresholds(parser, conf=0.3)
    add_slicing(parser)
    add_bench_options(parser, "video")
    add_hint(parser, default="throughput")


def _add_parity(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=parity_command)
    parser.add_argument(
        "reference", metavar="REFERENCE", help="the checkpoint, run by PyTorch in float32"
    )
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="exported artefacts, or other checkpoints"
    )
    _add_images(parser)
    add_bench_thresholds(parser, conf=None)
    parser.add_argument(
        "--stages",
        action=argparse.BooleanOptionalAction,
        help="compare what lies before the detections (default: where it can be had)",
    )
    parser.add_argument(
        "--sizes",
        nargs="*",
        metavar="HxW",
        default=PARITY_SIZES,
        help=f"further input sizes to try (default: {' '.join(PARITY_SIZES)})",
    )
    parser.add_argument(
        "--net-size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="also pad every image to this canvas: what that costs",
    )
    parser.add_argument(
        "--no-verdict", action="store_true", help="leave the artefacts' manifests as they are"
    )
    _add_limits(parser)
    add_bench_options(parser, "parity")


def _add_images(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of images (default: 16 crops of a built-in photograph)",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="their truth, COCO JSON: adds AP, and what each part costs in AP",
    )
    parser.add_argument(
        "--mapping",
        type=Path,
        metavar="FILE",
        help="JSON object: category name, or null to leave out, by class name",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N images only")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits = parser.add_argument_group("limits in place of those that go with the precision")
    for name, metavar, text in LIMITS:
        option = f"--{name.replace('_', '-')}"
        limits.add_argument(option, type=float, metavar=metavar, help=text)


def latency_command(args: argparse.Namespace, command: str) -> int:
    """Run tood-bench latency; errors pass through."""
    names = short_names(args.models)
    ap = dict(ap_from(text, args.models, names) for text in args.ap)

    from tood_deploy.benchmark.latency.measure import LatencyPlan
    from tood_deploy.benchmark.latency.run import run_latency
    from tood_deploy.benchmark.latency.worker import Case
    from tood_deploy.preprocess import check_imgsz
    from tood_deploy.reporter import Reporter

    of_models = options_by_model(args, args.models)
    rows = [(name, model, of_models[model]) for name, model in zip(names, args.models, strict=True)]
    if args.baseline:  # eager, whatever is asked of the others
        rows.insert(0, (BASELINE, args.baseline, load_options(args)))
    slicing = _slicing(args)
    cases = tuple(
        Case(
            model,
            name,
            images=args.images,
            device=args.device,
            threads=args.threads,
            conf=args.conf,
            iou=args.iou,
            warmup_s=args.warmup_seconds,
            options=options | slicing,
        )
        for name, model, options in rows
    )
    sizes = (check_imgsz(args.imgsz) if args.imgsz else None,)
    plan = LatencyPlan(cases, tuple(args.batch), sizes, args.rounds, args.turn_seconds)
    reporter = Reporter(args.quiet)
    run_latency(plan, args.output, ap=ap, command=command, reporter=reporter)
    reporter.result(f"{args.output / 'latency.html'}")
    return DONE


def video_command(args: argparse.Namespace, command: str) -> int:
    """Run tood-bench video; errors pass through."""
    from tood_deploy.benchmark.latency.video import VideoPlan, bench_video
    from tood_deploy.inference.detector import Detector
    from tood_deploy.reporter import Reporter

    options = {name: getattr(args, name) for name in ("conf", "iou", "imgsz", "device")}
    options |= {} if args.threads is None else {"threads": args.threads}
    options |= options_by_model(args, [args.model])[args.model] | _slicing(args)
    options |= hint_options(args.model, args, several=True)
    plan = VideoPlan(args.clip, args.batch, args.limit, encode=not args.no_encode)
    reporter = Reporter(args.quiet)
    with Detector(args.model, **options) as detector:
        bench_video(detector, args.model, plan, args.output, command=command, reporter=reporter)
    reporter.result(f"{args.output / 'video.html'}")
    return DONE


def _slicing(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a detector is made with beside other options, where slices are asked for."""
    from tood_deploy.inference.slicing import Slicing

    options = slicing_options(args)
    return {} if options is None else {"slicing": Slicing(**options)}


def short_names(models: Sequence[str]) -> list[str]:
    """Return the file names; whole paths where two of them are the same."""
    names = [Path(model).name for model in models]
    return names if len(set(names)) == len(names) else list(models)


def ap_from(text: str, models: Sequence[str], names: Sequence[str]) -> tuple[str, float]:
    """Return short name and value of --ap.

    Args:
        text: a model as it was given, = and its AP in points.
        models: as they were given.
        names: their short names.

    Raises:
        ToodError: not NAME=NUMBER, or not a model of this run.
    """
    name, _, value = text.rpartition("=")
    try:
        ap = float(value)
    except ValueError:
        ap = -1.0
    if name not in models or not 0 <= ap <= 100:
        raise ToodError(
            f"--ap has {text!r}; expected one of the models, = and a number from 0 to 100, "
            f"such as {models[0]}=42.4"
        )
    return names[list(models).index(name)], ap


def parity_command(args: argparse.Namespace, command: str) -> int:
    """Run tood-bench parity; errors pass through."""
    sizes_hw = tuple(size_from(text) for text in args.sizes)

    from tood_deploy.benchmark.parity.checks import OwnLimits
    from tood_deploy.benchmark.parity.run import ParityConfig, run_parity
    from tood_deploy.reporter import Reporter

    options = options_by_model(args, args.models)
    artefacts = [model for model in args.models if is_artefact(model)]
    config = ParityConfig(
        args.reference,
        args.models,
        args.output,
        images=args.images,
        annotations=args.annotations,
        mapping=args.mapping,
        limit=args.limit,
        imgsz=args.imgsz,
        conf=args.conf,
        iou=args.iou,
        sizes_hw=sizes_hw,
        net_hw=(args.net_size[0], args.net_size[1]) if args.net_size else None,
        stages=args.stages,
        own=OwnLimits(**{name: getattr(args, name) for name, _, _ in LIMITS}),
        device=args.device,
        threads=args.threads,
        load_options=load_options(args),
        artefact_options=options[artefacts[0]] if artefacts else {},
        keep_verdict=not args.no_verdict,
        command=command,
    )
    reporter = Reporter(args.quiet)
    results = run_parity(config, reporter)
    reporter.result(f"{args.output / 'parity.html'}")
    if failed := [result.failure_line for result in results if not result.passed]:
        raise CheckFailed("; ".join(failed))
    return DONE


def size_from(text: str) -> tuple[int, int]:
    """Return rows and columns from text such as 320x640.

    Raises:
        ToodError: not such a text.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ToodError(f"--sizes has {text!r}; expected rows and columns such as 320x640")
    return int(parts[0]), int(parts[1])


def bench_command(argv: Sequence[str] | None = None) -> int:
    """Run tood-bench; errors pass through."""
    args = build_parser().parse_args(argv)
    _check_inputs_stay(args)
    with naming_extras(*EXTRAS[args.command]):
        return args.run(args, shlex.join(["tood-bench", *(sys.argv[1:] if argv is None else argv)]))


def _check_inputs_stay(args: argparse.Namespace) -> None:
    """Refuse a report that would be written over a file that the command reads."""
    models = [getattr(args, name, None) for name in ("model", "baseline", "reference")]
    models += getattr(args, "models", [])
    files = [getattr(args, name, None) for name in ("clip", "annotations", "mapping")]
    inputs = {
        "a file of a model": [file for model in models if model for file in model_files(model)],
        "an input": files,
    }
    written = [args.output / f"{args.command}.{suffix}" for suffix in ("json", "md", "html")]
    check_written(getattr(args, "classes", None), written, inputs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run tood-bench, and return its exit code; see `run_command`."""
    return run_command(bench_command, argv)


if __name__ == "__main__":
    sys.exit(main())
