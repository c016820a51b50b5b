"""tood-serve: serves artefacts over HTTP."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tood_deploy.cli.common import DONE, CommandParser, add_model_options, is_artefact, run_command
from tood_deploy.cli.detection import (
    add_device,
    add_imgsz,
    add_iou,
    add_max_det,
    add_runtime_options,
    add_threads,
    add_thresholds,
    class_options,
    takes_hint,
)
from tood_deploy.cli.infer import engine_options
from tood_deploy.errors import ToodError
from tood_deploy.reporter import Reporter

EPILOG = """\
GET / is a page to try images on, /docs describes the API, /metrics is for Prometheus. A full queue
answers 503 with Retry-After. SIGTERM stops: what was accepted is answered, and the exit code is 0.
One line of JSON a request goes to stdout, everything else to stderr.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the options of tood-serve."""
    parser = CommandParser(prog="tood-serve", epilog=EPILOG)
    parser.add_argument(
        "models",
        metavar="[NAME=]MODEL",
        nargs="+",
        help="artefacts of tood-export, and names to serve them under (default: the file's)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine alone)",
    )
    parser.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0: any that is free (default: 8000)"
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="holds the token that requests must bear (default: none is asked for)",
    )
    _add_model_options(parser)
    _add_limit_options(parser)
    parser.add_argument(
        "--quiet", action="store_true", help="no line a request, nothing but problems"
    )
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    add_imgsz(parser)
    add_thresholds(parser, default=0.3, shown="0.3; a request may say others")
    add_iou(parser, default="the model's; a request may say another")
    add_max_det(parser)
    add_threads(parser, of="a model")
    add_runtime_options(parser)
    add_model_options(parser)


def _add_limit_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="images of a batch (default: 8)"
    )
    group.add_argument(
        "--batch-delay",
        type=float,
        default=2.0,
        metavar="MS",
        help="how long the first image of a batch waits for others (default: 2)",
    )
    group.add_argument(
        "--queue",
        type=int,
        default=64,
        metavar="N",
        help="images of a model that may wait; more are answered 503 (default: 64)",
    )
    group.add_argument(
        "--max-body",
        type=int,
        default=64,
        metavar="MB",
        help="refuse larger request bodies (default: 64)",
    )
    group.add_argument(
        "--max-pixels",
        type=int,
        default=50_000_000,
        metavar="N",
        help="refuse larger images (default: 50000000)",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="of a request, from its first byte to its answer (default: 30)",
    )


def serve_command(argv: Sequence[str] | None = None) -> int:
    """Run tood-serve; errors pass through."""
    args = build_parser().parse_args(argv)
    models = named_models(args.models)
    token = None if args.token_file is None else read_token(args.token_file)

    from tood_deploy.manifest import doubts, read_manifest
    from tood_deploy.serve.models import ServeLimits
    from tood_deploy.serve.server import ServeConfig, run_server

    limits = ServeLimits(
        max_batch=args.max_batch,
        batch_delay_s=args.batch_delay / 1000,
        queue=args.queue,
        max_body=args.max_body * 2**20,
        max_pixels=args.max_pixels,
        timeout_s=args.timeout,
    )
    reporter = Reporter(args.quiet)

    def check(name: str, model: str) -> None:
        manifest = read_manifest(Path(model)) if is_artefact(model) else None
        if manifest is not None and (doubt := doubts(Path(model), manifest)):
            reporter.warn(doubt)

    options = {name: getattr(args, name) for name in ("conf", "iou", "max_det", "imgsz", "device")}
    options |= class_options(args)
    for model in models.values():
        options |= engine_options(argparse.Namespace(**vars(args) | {"model": model}))
    if all(takes_hint(model, args) for model in models.values()):
        options["hint"] = "throughput"
    config = ServeConfig(models, args.host, args.port, token, limits, not args.quiet)
    run_server(config, reporter, check=check, **options)
    return DONE


def named_models(texts: Sequence[str]) -> dict[str, str]:
    """Return the models by the names to serve them under.

    Raises:
        ToodError: a name stands twice, or cannot be part of an address.
    """
    models: dict[str, str] = {}
    for text in texts:
        name, equals, model = text.partition("=")
        if not equals or Path(text).exists():
            name, model = Path(text).stem, text
        if not name or not all(letter.isalnum() or letter in "-_." for letter in name):
            raise ToodError(
                f"{text}: {name!r} cannot be part of an address; give it a name of letters, digits "
                "and - _ . as NAME=MODEL"
            )
        if name in models:
            raise ToodError(
                f"{text}: the name {name} stands twice; give one of them another as NAME=MODEL"
            )
        models[name] = model
    return models


def read_token(path: Path) -> str:
    """Return the token in a file, white space around it left out.

    Raises:
        ToodError: the file cannot be read, or holds no token.
    """
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError) as error:
        raise ToodError(f"--token-file {path}: cannot be read ({error})") from error
    if not token or not token.isascii() or len(token.split()) != 1:
        raise ToodError(
            f"--token-file {path}: holds no token; expected one word of ASCII, such as openssl "
            "rand -hex 32 gives"
        )
    return token


def main(argv: Sequence[str] | None = None) -> int:
    """Run tood-serve as a command; see `run_command` for the exit codes."""
    return run_command(serve_command, argv, extras=("serve",))


if __name__ == "__main__":
    sys.exit(main())
