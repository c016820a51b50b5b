"""Print the parameters and multiply-adds of every preset, as docs/presets.md has them.

Needs torch, and neither weights nor memory.
"""

import argparse

from tood_deploy.benchmark.latency.peak import network_cost
from tood_deploy.preprocess import padded_size
from tood_deploy.presets import PRESETS

COCO_IMAGE_HW = (480, 640)  # rows and columns of a common COCO image


def main() -> None:
    """Print one line a preset: name, padded input, parameters in millions, GMACs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "presets", nargs="*", default=list(PRESETS), metavar="PRESET", help="which (default: all)"
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="padded input (default: a 4:3 image's, by preset)",
    )
    args = parser.parse_args()
    for name in args.presets:
        size_hw = (
            tuple(args.size) if args.size else padded_size(COCO_IMAGE_HW, PRESETS[name].sizing)
        )
        parameters, gmacs = network_cost(PRESETS[name], size_hw)
        print(
            f"{name:<14} {size_hw[0]}x{size_hw[1]} {parameters / 1e6:7.1f} M {gmacs:7.1f} GMAC",
            flush=True,
        )


if __name__ == "__main__":
    main()
