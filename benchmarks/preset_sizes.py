"""Print the parameters and multiply-adds of every preset, as docs/presets.md has them.

Needs torch, and neither weights nor memory.
"""

import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from tood_deploy.model import build_model
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
        parameters, gmacs = preset_cost(name, size_hw)
        print(
            f"{name:<14} {size_hw[0]}x{size_hw[1]} {parameters / 1e6:7.1f} M {gmacs:7.1f} GMAC",
            flush=True,
        )


def preset_cost(name: str, size_hw: tuple[int, int]) -> tuple[int, float]:
    """Return the number of parameters of a preset's network and its multiply-adds in billions.

    Counted are convolutions and matrix products, on the meta device: nothing is computed.

    Args:
        name: of the preset.
        size_hw: rows and columns of the network's input, multiples of 32.
    """
    with torch.device("meta"):
        model = build_model(name)
        images = torch.zeros(1, 3, *size_hw)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return sum(
        parameter.numel() for parameter in model.parameters()
    ), counter.get_total_flops() / 2e9


if __name__ == "__main__":
    main()
