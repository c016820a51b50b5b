"""Read a .pt2 artefact of tood-export without running anything that the file brings.

`torch.export.load` unpickles objects, evaluates expressions and looks up functions by names in the
file, each of which can run code. Here the archive is opened as what it is, a ZIP file of JSON and
raw numbers: a node of the graph becomes a call of one of the operators listed in this module, with
plain numbers and tensors for arguments, and anything else is refused. Sizes are computed by the
graph's own nodes, so that no expression is read.

Comes in: the file's path. Goes out: functions on tensors. Knows no device but the one it is given.
"""

from __future__ import annotations

import json
import math
import operator
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from tood_deploy.errors import ArtefactError
from tood_deploy.graph_io import CANDIDATES, INPUTS, OUTPUTS, program_outputs
from tood_deploy.manifest import METADATA_KEY, Manifest, manifest_path, read_manifest

SCHEMA = 8  # major version of the JSON that PyTorch 2.8 to 2.13 write
MODEL, MANIFEST = "models/model.json", f"extra/{METADATA_KEY}"
TENSORS = {"weights": "weight", "constants": "tensor"}  # folders in data/, and names in them
DETECTIONS = (*OUTPUTS, "exact", *CANDIDATES)

# Operators of aten: arithmetic on tensors; none of them opens a file or calls anything else.
OPERATORS = """
__and__.Tensor __or__.Tensor abs.default add.Scalar add.Tensor amax.default amin.default any.dim
arange.default arange.start arange.start_step argmax.default bitwise_and.Tensor
bitwise_not.default bitwise_or.Tensor bmm.default cat.default chunk.default clamp.default
clone.default contiguous.default conv2d.default cumsum.default detach.default div.Scalar
div.Tensor div.Tensor_mode eq.Scalar eq.Tensor exp.default expand.default expand_as.default
flatten.using_ints floor.default full.default full_like.default gather.default ge.Scalar ge.Tensor
group_norm.default gt.Scalar gt.Tensor index.Tensor index_select.default le.Scalar le.Tensor
lift_fresh_copy.default linear.default log.default logical_and.default logical_not.default
lt.Scalar lt.Tensor matmul.default max_pool2d.default maximum.default mean.dim minimum.default
mul.Scalar mul.Tensor ne.Scalar ne.Tensor neg.default ones.default ones_like.default pad.default
permute.default pow.Tensor_Scalar reciprocal.default relu.default repeat.default
repeat_interleave.self_int reshape.default rsub.Scalar rsqrt.default scatter.src select.int
sigmoid.default slice.Tensor softmax.int softplus.default split.Tensor split_with_sizes.default
sqrt.default square.default squeeze.dim stack.default sub.Scalar sub.Tensor sum.default
sum.dim_IntList sym_size.int to.dtype topk.default transpose.int unbind.int unflatten.int
unsqueeze.default upsample_nearest2d.vec view.default where.ScalarOther where.ScalarSelf
where.self zeros.default zeros_like.default
""".split()
SIZE_ARITHMETIC = ("add", "mul", "sub", "floordiv", "mod", "neg", "truediv")
# What PyTorch checks, or says of sizes, and computes nothing with.
CHECKS = ("_assert_tensor_metadata.default", "_assert_scalar.default")
CHECKS += ("sym_constrain_range_for_size.default", "sym_constrain_range.default")

FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name) for name in SIZE_ARITHMETIC
}
for _name in OPERATORS:
    _operator, _, _overload = _name.partition(".")
    FUNCTIONS[f"torch.ops.aten.{_name}"] = getattr(getattr(torch.ops.aten, _operator), _overload)

# Numbers of PyTorch's schema.
SCALAR_TYPES = {
    1: torch.uint8,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    12: torch.bool,
    13: torch.bfloat16,
}
STRIDED = 7
MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
WORD = re.compile(r"[a-z_]{1,20}")


Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Program:
    """The functions of a .pt2 artefact.

    Each is made of the part of the graph that it needs, when it is first asked for.

    Attributes:
        manifest: what the artefact says of itself.
        graph: all of it.
    """

    manifest: Manifest
    graph: GraphReader

    @cached_property
    def detect(self) -> Function:
        """Return a function of images, rows and columns, and both thresholds.

        It gives what `DETECTIONS` names.
        """
        return self.graph.select(INPUTS, DETECTIONS)

    @cached_property
    def find_candidates(self) -> Function:
        """Return a function of images, rows and columns, and score threshold.

        It gives what `CANDIDATES` names.
        """
        return self.graph.select(INPUTS[:3], CANDIDATES)

    @cached_property
    def run_stages(self) -> Function:
        """Return a function as `detect`, of all that `program_outputs` names."""
        return self.graph.select(INPUTS, program_outputs(self.manifest.preset))


def read_program(path: Path, place: torch.device) -> Program:
    """Read a .pt2 file and put its weights on a device.

    Args:
        path: of the file.
        place: the device.

    Raises:
        ArtefactError: not a .pt2 file of tood-export, a damaged one, or one with parts that could
            run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            contents = Archive(archive)
            manifest = _read_manifest(contents, path)
            graph, tensors = contents.json(MODEL), _read_tensors(contents, place)
        names = program_outputs(manifest.preset)
        return Program(manifest, GraphReader(graph, tensors, place, names))
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise _refusal(path, str(error)) from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise _refusal(path, reason) from error


def _refusal(path: Path, reason: str) -> ArtefactError:
    return ArtefactError(
        f"{path}: is no .pt2 file of tood-export that can be opened safely ({reason}); export the "
        "checkpoint again with --to torch"
    )


class Archive:
    """The parts of the file by their names behind the folder that all are in."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._parts = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        for name, info in self._parts.items():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name[:60]} is compressed")
            if name.startswith("data/aotinductor/"):
                raise ValueError("it holds compiled machine code")

    def read(self, name: str) -> bytes:
        """Return the bytes of a part; ValueError where it lacks."""
        if name not in self._parts:
            raise ValueError(f"it has no {name}")
        return self._archive.read(self._parts[name])

    def json(self, name: str) -> Any:
        """Return the values of a part that is JSON."""
        return json.loads(self.read(name))


def _read_manifest(contents: Archive, path: Path) -> Manifest:
    """Return the manifest beside the file, or the one in it; both must agree on the outputs."""
    inside = Manifest.from_json(contents.read(MANIFEST).decode("utf-8"), str(path))
    beside = read_manifest(path)
    if beside is not None:
        beside.check_outputs(inside, str(manifest_path(path)))
    return beside or inside


def _read_tensors(contents: Archive, place: torch.device) -> dict[str, Tensor]:
    """Return weights and constants by name, from their raw bytes."""
    tensors: dict[str, Tensor] = {}
    for folder, prefix in TENSORS.items():
        stated = contents.json(f"data/{folder}/model_{folder}_config.json")["config"]
        for name, entry in stated.items():
            if entry["use_pickle"] is not False:
                raise ValueError(f"{name[:60]} is pickled")
            place_in_file = entry["path_name"]
            if not re.fullmatch(rf"{prefix}_\d{{1,6}}", place_in_file):
                raise ValueError(f"{name[:60]} is not in a tensor's place")
            blob = contents.read(f"data/{folder}/{place_in_file}")
            tensors[name] = _tensor(blob, entry["tensor_meta"]).to(place)
    return tensors


def _tensor(blob: bytes, meta: Mapping[str, Any]) -> Tensor:
    """Return a tensor of its bytes; kernels are channels last.

    Args:
        blob: the numbers, little-endian.
        meta: type, sizes and strides, as PyTorch's schema has them.
    """
    dtype = SCALAR_TYPES[meta["dtype"]]
    sizes, strides = ([_int(one["as_int"]) for one in meta[key]] for key in ("sizes", "strides"))
    count = math.prod(sizes)
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if min(sizes + strides, default=1) < 0 or count * dtype.itemsize != len(blob) or last >= count:
        raise ValueError(f"a tensor of sizes {sizes} has {len(blob)} bytes")
    flat = torch.frombuffer(bytearray(blob), dtype=dtype)
    values = flat.as_strided(sizes, strides)
    return values.contiguous(memory_format=torch.channels_last) if len(sizes) == 4 else values


def _int(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError(f"{str(value)[:60]} is no whole number")
    return value


class GraphReader:
    """The graph, node by node, as calls of listed operators."""

    def __init__(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        place: torch.device,
        names: Sequence[str],
    ) -> None:
        """Look at every node, and refuse what is not listed.

        Args:
            values: of the JSON.
            tensors: weights and constants by name.
            place: the device that everything runs on.
            names: of the outputs, in order.
        """
        if values["schema_version"]["major"] != SCHEMA:
            raise ValueError(f"its schema is {values['schema_version']}, expected {SCHEMA}")
        self._place, self._root, self._graph = place, nn.Module(), fx.Graph()
        self._nodes: dict[str, Any] = {}
        module = values["graph_module"]
        self._add_inputs(module["signature"]["input_specs"], tensors)
        for node in module["graph"]["nodes"]:
            self._add_node(node)
        outputs = module["graph"]["outputs"]
        stated = [self._nodes[_only(one, "as_tensor")["name"]] for one in outputs]
        self._outputs = dict(zip(names, stated, strict=True))

    def select(self, inputs: Sequence[str], outputs: Sequence[str]) -> Function:
        """Return the part of the graph that gives some outputs, as a function of some inputs."""
        graph, copies = fx.Graph(), {}
        result = graph.graph_copy(self._graph, copies)
        assert result is None
        graph.output(tuple(copies[self._outputs[name]] for name in outputs))
        graph.eliminate_dead_code()
        for node in graph.find_nodes(op="placeholder"):
            if node.target not in inputs:
                graph.erase_node(node)
        return fx.GraphModule(self._root, graph).eval()

    def _add_inputs(
        self, specs: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]
    ) -> None:
        """Add the graph's inputs, which are weights, constants, and `INPUTS`."""
        users: list[str] = []
        for number, spec in enumerate(specs):
            ((kind, entry),) = spec.items()
            if kind == "user_input":
                users.append(_only(entry["arg"], "as_tensor")["name"])
                continue
            key = {"parameter": "parameter_name", "buffer": "buffer_name"}.get(
                kind, "tensor_constant_name"
            )
            attribute = f"tensor_{number}"
            self._root.register_buffer(attribute, tensors[entry[key]])
            self._nodes[entry["arg"]["name"]] = self._graph.get_attr(attribute)
        for given, name in zip(users, INPUTS, strict=True):
            self._nodes[given] = self._graph.placeholder(name)

    def _add_node(self, node: Mapping[str, Any]) -> None:
        target = node["target"]
        if target.removeprefix("torch.ops.aten.") in CHECKS:
            return
        if target not in FUNCTIONS:
            # Outcomes of checks on sizes are arithmetic that nothing else reads.
            raise ValueError(f"it calls {str(target)[:60]}, which no graph of tood-export does")
        function = FUNCTIONS[target]
        known = _argument_names(function)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for given in node["inputs"]:
            value = self._argument(given["arg"])
            if given["kind"] == 1:
                args.append(value)
            elif given["name"] in known:
                kwargs[given["name"]] = value
            else:
                raise ValueError(f"{target} takes no {str(given['name'])[:60]}")
        self._add_results(self._graph.call_function(function, tuple(args), kwargs), node["outputs"])

    def _add_results(self, call: fx.Node, outputs: Sequence[Mapping[str, Any]]) -> None:
        """Name what a call gives: one value, several, or a list of tensors."""
        ((kind, first), *others) = (next(iter(one.items())) for one in outputs)
        names = [one["name"] for one in first] if kind == "as_tensors" else []
        if others:
            names = [_only(one, "as_tensor")["name"] for one in outputs]
        if not names:
            self._nodes[first["as_name" if kind == "as_sym_int" else "name"]] = call
        for number, name in enumerate(names):
            self._nodes[name] = self._graph.call_function(operator.getitem, (call, number))

    def _argument(self, argument: Mapping[str, Any]) -> Any:
        """Return an argument: a node, a plain value, or a list of them."""
        ((kind, value),) = argument.items()
        if kind in SINGLE:
            return SINGLE[kind](value)
        if kind == "as_tensor":
            return self._nodes[value["name"]]
        if kind == "as_tensors":
            return [self._nodes[one["name"]] for one in value]
        if kind == "as_optional_tensors":
            return [
                None if "as_none" in one else self._nodes[one["as_tensor"]["name"]] for one in value
            ]
        if kind == "as_sym_int":
            return self._size(value)
        if kind == "as_sym_ints":
            return [self._size(one) for one in value]
        if kind == "as_device":
            return self._place
        raise ValueError(f"an argument of the kind {kind[:60]} is in no graph of tood-export")

    def _size(self, value: Mapping[str, Any]) -> Any:
        ((kind, size),) = value.items()
        return self._nodes[size] if kind == "as_name" else _int(size)


def _argument_names(function: Callable[..., Any]) -> set[str]:
    """Return the names that an operator's arguments may be given by."""
    if not isinstance(function, torch._ops.OpOverload):
        return set()
    return {argument.name for argument in function._schema.arguments}


def _only(values: Mapping[str, Any], kind: str) -> Any:
    ((found, value),) = values.items()
    if found != kind:
        raise ValueError(f"a value of the kind {found[:60]} is where {kind} is expected")
    return value


def _word(value: Any) -> str:
    if not isinstance(value, str) or not WORD.fullmatch(value):
        raise ValueError(f"{str(value)[:60]!r} is no word that an operator takes")
    return value


def _layout(value: Any) -> torch.layout:
    if value != STRIDED:
        raise ValueError(f"layout is {str(value)[:60]}; expected {STRIDED}")
    return torch.strided


SINGLE: dict[str, Callable[[Any], Any]] = {
    "as_none": lambda _: None,
    "as_bool": bool,
    "as_int": _int,
    "as_float": float,
    "as_ints": lambda values: [_int(one) for one in values],
    "as_floats": lambda values: [float(one) for one in values],
    "as_bools": lambda values: [bool(one) for one in values],
    "as_string": _word,
    "as_scalar_type": lambda value: SCALAR_TYPES[value],
    "as_layout": _layout,
    "as_memory_format": lambda value: MEMORY_FORMATS[value],
}
