"""What the builder can be told, and that an option which one flavour lacks is refused, not left out."""

from pathlib import Path
from typing import Any, cast

import pytest

from tood_deploy.engines.tensorrt.library import Flavour, Name
from tood_deploy.errors import ToodError
from tood_deploy.export.config import FLAGS
from tood_deploy.export.tensorrt.options import EngineOptions


def flavour(name: str) -> Flavour:
    return Flavour(cast(Name, name), None, "1.0", cast(Any, None))


SET = {
    "optimisation_level": 0,
    "timing_cache": Path("cache"),
    "version_compatible": True,
    "hardware_compatible": True,
    "compute_capabilities": ("8.9",),
}
LACKED_BY = {name: "tensorrt" if name == "compute_capabilities" else "tensorrt_rtx" for name in SET}


@pytest.mark.parametrize("name", SET)
def test_an_option_of_the_other_flavour_is_refused(name: str) -> None:
    options = EngineOptions(**{name: SET[name]})
    with pytest.raises(
        ToodError, match=f"^{FLAGS[name]} means nothing to .*; leave {FLAGS[name]} out$"
    ):
        options.check(flavour(LACKED_BY[name]))
    (other,) = {"tensorrt", "tensorrt_rtx"} - {LACKED_BY[name]}
    options.check(flavour(other))


def test_what_both_have_passes() -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        EngineOptions().check(flavour(name))
        EngineOptions(workspace_mib=64).check(flavour(name))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workspace_mib": 0}, "workspace is 0 MiB; expected a positive number"),
        ({"optimisation_level": 6}, "optimisation level is 6; expected 0 to 5"),
        ({"optimisation_level": -1}, "expected 0 to 5"),
        ({"compute_capabilities": ("8.9", "8.9")}, "one stands there twice"),
        ({"nms": "plugin"}, "nms is 'plugin'; expected unrolled or loop"),
        (
            {"nms": "loop", "nms_rounds": 16},
            "nms is loop, which ends by itself, and 16 rounds are given; leave --nms-rounds out",
        ),
        ({"nms_rounds": 0}, "nms rounds are 0; expected 1 to 256"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ToodError, match=message):
        EngineOptions(**values)


def test_manifest_holds_what_was_set() -> None:
    assert EngineOptions().to_dict() == {"nms": "unrolled"}
    options = EngineOptions(workspace_mib=64, optimisation_level=0, nms="loop")
    assert options.to_dict() == {"workspace_mib": 64, "optimisation_level": 0, "nms": "loop"}
