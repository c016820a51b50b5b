"""tood-bench scenario, and the options that all of tood-bench shares. Parses, nothing else.

Arguments come in; a `ScenarioPlan` goes to `benchmark`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tood_deploy.cli.common import DONE, add_model_options, is_artefact, load_options
from tood_deploy.cli.detection import (
    add_device,
    add_imgsz,
    add_iou,
    add_runtime_options,
    add_threads,
    check_fast_torch,
    runtime_options,
    takes_hint,
)
from tood_deploy.errors import CheckFailed, ToodError

SCENARIOS = {
    "single": "one image after another: 90th percentile of latency",
    "multi": "8 images a query, one query after another: 99th percentile",
    "server": "images that come by chance: the highest rate with 99%% of them in time",
    "offline": "all images at once: images a second",
}
ACCURACIES = (99.0, 99.9)

SCENARIO_EPILOG = """\
Traffic, times and verdict are MLCommons' LoadGen's, by the rules of MLPerf Inference for object
detection; what departs from them, such as a shorter run, stands in the report. Exit code 1 where
LoadGen calls the run invalid, or the accuracy is less than wanted. Not verified by MLCommons.
"""


def add_scenario(parser: argparse.ArgumentParser) -> None:
    """Add the options of tood-bench scenario."""
    parser.set_defaults(run=scenario_command)
    parser.add_argument(
        "scenario",
        choices=tuple(SCENARIOS),
        metavar="{single,multi,server,offline}",
        help="; ".join(f"{name}: {text}" for name, text in SCENARIOS.items()),
    )
    parser.add_argument(
        "model", metavar="MODEL", help="an exported artefact, a checkpoint or a preset"
    )
    parser.add_argument(
        "--from",
        dest="start",
        choices=("frames", "bytes"),
        default="frames",
        help="what a query begins with: decoded frames, or encoded files (default: frames)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="folder of images (default: 8 parts of a photograph)",
    )
    _add_feeding(parser)
    _add_traffic(parser)
    _add_accuracy(parser)
    add_bench_thresholds(parser, conf=None)
    add_bench_options(parser, "scenario")


def _add_feeding(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how the model is fed")
    group.add_argument(
        "--batch",
        type=int,
        default=8,
        metavar="N",
        help="the most images of one engine call (default: 8)",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="threads that decode and scale (default: 2)",
    )
    group.add_argument(
        "--delay-ms",
        type=float,
        default=2.0,
        metavar="MS",
        help="how long an idle engine waits for a batch to fill, server and offline (default: 2)",
    )
    group.add_argument(
        "--warmup-seconds", type=float, default=5.0, metavar="S", help="of warm-up (default: 5)"
    )


def _add_traffic(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("traffic (default: as the rules have it)")
    group.add_argument(
        "--latency-ms",
        type=float,
        metavar="MS",
        help="bound of 99%% of the queries, server (the rules: 100)",
    )
    group.add_argument(
        "--rate", type=float, metavar="R", help="images a second, server (default: searched)"
    )
    group.add_argument(
        "--search-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="the shortest time to try a rate on, server (default: 10)",
    )
    group.add_argument(
        "--min-seconds", type=float, metavar="S", help="the shortest duration (the rules: 600)"
    )
    group.add_argument(
        "--min-queries",
        type=int,
        metavar="N",
        help="the fewest queries, or images of offline (the rules: 100, multi 662, offline 24576)",
    )
    group.add_argument(
        "--samples", type=int, metavar="N", help="images in memory at a time (the rules: 64)"
    )


def _add_accuracy(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("accuracy")
    group.add_argument(
        "--annotations", type=Path, metavar="FILE", help="the images' truth, COCO JSON"
    )
    group.add_argument(
        "--mapping",
        type=Path,
        metavar="FILE",
        help="JSON object: category name, or null to leave out, by class name",
    )
    group.add_argument(
        "--reference", metavar="MODEL", help="the model in fp32, run on the same images"
    )
    group.add_argument(
        "--reference-ap", type=float, metavar="P", help="its AP, where it is known, 0 to 100"
    )
    group.add_argument(
        "--accuracy",
        type=float,
        choices=ACCURACIES,
        help="percent of the reference's AP that the model must have (default: 99)",
    )


def add_bench_thresholds(parser: argparse.ArgumentParser, *, conf: float | None) -> None:
    """Add --conf and --iou.

    Args:
        parser: gets them.
        conf: the default; the model's own where None.
    """
    of_model = "the model's own, 0.05 as published"
    parser.add_argument(
        "--conf",
        type=float,
        default=conf,
        help=f"score that detections must exceed, 0 to 1 (default: {conf or of_model})",
    )
    add_iou(parser)


def add_bench_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Add what every subcommand has; `name` is that of its report."""
    add_imgsz(parser, default="the first model's")
    add_device(parser)
    add_threads(parser)
    add_runtime_options(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(f"{name}-report"),
        metavar="DIR",
        help=f"folder for the report (default: {name}-report)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress, no result on stdout: the files alone"
    )
    add_model_options(parser)


def options_by_model(args: argparse.Namespace, models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what each model is opened with, by model.

    Options of runtimes go to artefacts where there are any, else to checkpoints, which PyTorch's
    fast form runs.

    Raises:
        ToodError: options of runtimes that a checkpoint does not have.
    """
    of_artefacts, of_checkpoints = runtime_options(args), load_options(args)
    if not any(map(is_artefact, models)):
        check_fast_torch(models[0], of_artefacts)
        of_checkpoints |= of_artefacts
    return {model: of_artefacts if is_artefact(model) else of_checkpoints for model in models}


def scenario_command(args: argparse.Namespace, command: str) -> int:
    """Run tood-bench scenario; errors pass through."""
    for name in ("batch", "workers"):
        if getattr(args, name) < 1:
            raise ToodError(f"--{name} is {getattr(args, name)}; expected a positive number")
    if not args.delay_ms >= 0:
        raise ToodError(f"--delay-ms is {args.delay_ms:g}; expected 0 or more")
    for name in ("accuracy", "mapping"):
        if getattr(args, name) is not None and args.annotations is None:
            raise ToodError(
                f"--{name} has no effect without annotations; add --annotations FILE --images DIR, "
                "and --reference MODEL or --reference-ap P"
            )
    from tood_deploy.benchmark.scenario.process import ScenarioCase
    from tood_deploy.benchmark.scenario.run import ScenarioPlan, run_scenario
    from tood_deploy.benchmark.scenario.system import SystemSettings
    from tood_deploy.benchmark.scenario.traffic import Traffic
    from tood_deploy.reporter import Reporter

    case = ScenarioCase(
        args.model,
        args.scenario,
        args.start,
        settings=SystemSettings(args.batch, args.workers, args.delay_ms / 1000),
        warm_up_s=args.warmup_seconds,
        samples=args.samples,
        conf=args.conf,
        options=_detector_options(args),
    )
    plan = ScenarioPlan(
        case,
        args.images,
        args.annotations,
        args.mapping,
        reference=None if args.reference is None else _reference_case(args),
        reference_ap=args.reference_ap,
        accuracy=args.accuracy or ACCURACIES[0],
        traffic=Traffic(
            1.0, args.min_seconds, args.min_queries, args.latency_ms, samples=args.samples
        ),
        rate=args.rate,
        search_seconds=args.search_seconds,
    )
    reporter = Reporter(args.quiet)
    result = run_scenario(plan, args.output, command=command, reporter=reporter)
    reporter.result(f"{args.output / 'scenario.html'}")
    if not result.passed:
        raise CheckFailed(result.failure_line)
    return DONE


def _reference_case(args: argparse.Namespace) -> Any:
    """Return the case of --reference: all images as fast as it can, of the same thresholds."""
    from tood_deploy.benchmark.scenario.process import ScenarioCase

    options = {} if is_artefact(args.reference) else load_options(args)
    return ScenarioCase(
        args.reference, "offline", conf=args.conf, warm_up_s=0.0, options=_shared(args) | options
    )


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    """Return what model and reference are both made with."""
    threads = {} if args.threads is None else {"threads": args.threads}
    return {name: getattr(args, name) for name in ("iou", "imgsz", "device")} | threads


def _detector_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a detector is made with, but its score threshold."""
    options = _shared(args) | options_by_model(args, [args.model])[args.model]
    queued = args.scenario in ("server", "offline")
    return options | ({"hint": "throughput"} if queued and takes_hint(args.model, args) else {})
