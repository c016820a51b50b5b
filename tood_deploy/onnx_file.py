"""Read, write and run the .onnx artefacts of this package.

Comes in: a file, or a graph and its manifest. Goes out: an `OnnxArtefact` (anything else is
refused), its file, graphs with further outputs, and sessions of ONNX Runtime. Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime as ort
from numpy.typing import NDArray

from tood_deploy.errors import ArtefactError, DeviceError, ToodError, not_installed
from tood_deploy.files import atomic_paths, file_sha256
from tood_deploy.graph_io import INPUTS, OUTPUTS
from tood_deploy.manifest import METADATA_KEY, Manifest, manifest_path, read_manifest

if TYPE_CHECKING:  # the runtime opens sessions without the package onnx
    import onnx


@dataclass(frozen=True, eq=False)
class OnnxArtefact:
    """An .onnx artefact of tood-export, read from its file or still in memory.

    Attributes:
        path: of the file, or what names the artefact in messages.
        sha256: of its bytes.
        model: the graph, with the manifest in its metadata.
        manifest: beside the file, else the one inside.
    """

    path: Path
    sha256: str
    model: onnx.ModelProto
    manifest: Manifest


def read_onnx(path: Path) -> OnnxArtefact:
    """Return the artefact at `path`.

    Raises:
        ToodError: there is no such file.
        ArtefactError: not an ONNX file, not one of ours, or changed since its
            manifest was written, or with weights in other files.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ToodError(f"{path}: no such file; expected an .onnx file of tood-export")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise ArtefactError(
            f"{path}: cannot be read as ONNX, cut or another kind of file "
            f"({first_line(error)}); export it again with tood-export"
        ) from error
    if outside := [
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]:
        raise ArtefactError(
            f"{path}: keeps {len(outside)} of its tensors in other files (the first is "
            f"{outside[0]}), which no artefact of tood-export does; export it again with "
            "tood-export"
        )
    try:
        onnx.checker.check_model(model)
    except (ValueError, onnx.checker.ValidationError) as error:
        raise ArtefactError(
            f"{path}: is damaged, or no ONNX graph ({first_line(error)}); export it again with "
            "tood-export"
        ) from error
    inside = {prop.key: prop.value for prop in model.metadata_props}.get(METADATA_KEY)
    names = (
        [value.name for value in model.graph.input],
        [value.name for value in model.graph.output],
    )
    if inside is None or names != ([*INPUTS], [*OUTPUTS]):
        raise ArtefactError(
            f"{path}: an ONNX file, but not one of tood_deploy (inputs {names[0]}, outputs "
            f"{names[1]}, expected {INPUTS} and {OUTPUTS}); "
            "make it from the checkpoint with tood-export"
        )
    beside, sha256 = read_manifest(path), file_sha256(path)
    if beside and beside.artefact_sha256 not in ("", sha256):
        raise ArtefactError(
            f"{path}: is not the file its manifest describes (another SHA-256); export it again "
            "with tood-export"
        )
    return OnnxArtefact(path, sha256, model, beside or Manifest.from_json(inside, str(path)))


def cut_graph(
    model: onnx.ModelProto, given: Sequence[str], wanted: Sequence[str]
) -> onnx.ModelProto:
    """Return the part of a graph that computes `wanted`, with `given` as its inputs.

    What the part needs beyond these stays an input where it is one of the whole graph (sizes are
    taken from `images`).

    Args:
        model: a model whose inner values have types that shape inference can tell.
        given: inner values that become inputs, as far as they are needed.
        wanted: values that become the outputs.
    """
    import onnx

    graph = model.graph
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    reached, needed, pending = set[str](), set[int](), list(wanted)
    while pending:
        name = pending.pop()
        if name in reached:
            continue
        reached.add(name)
        if name in makers and name not in given and makers[name] not in needed:
            needed.add(makers[name])
            pending += _reads(graph.node[makers[name]])
    inputs = [_typed(model, name) for name in given if name in reached] + [
        value for value in graph.input if value.name in reached
    ]
    part = onnx.helper.make_graph(
        [node for i, node in enumerate(graph.node) if i in needed],
        graph.name,
        inputs,
        [onnx.ValueInfoProto(name=name) for name in wanted],
        [tensor for tensor in graph.initializer if tensor.name in reached],
    )
    return onnx.helper.make_model(
        part,
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        functions=model.functions,
    )


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield all values that a node reads, also those that its inner graphs read from outside."""
    import onnx

    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                yield from _reads(inner)
            yield from (value.name for value in attribute.g.output)


def _typed(model: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    """Return a value's type, without its shape, which is dynamic."""
    import onnx

    value = next(value for value in model.graph.value_info if value.name == name)
    return onnx.helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, None)


# Of onnxruntime and onnxruntime-gpu, which write one folder, one was removed: what is left is a
# folder without the module.
if not hasattr(ort, "InferenceSession"):
    raise DeviceError(not_installed("onnxruntime"))

CPU = "CPUExecutionProvider"


def open_session(
    model: Path | bytes,
    *,
    provider: str = CPU,
    threads: int | None = None,
    keeps_memory: bool = True,
    float_arithmetic: bool = False,
    provider_options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Open a session that prints nothing on the terminal: what fails is raised.

    Args:
        model: an .onnx file, or its bytes.
        provider: ONNX Runtime's name of what computes.
        threads: on the CPU; the number of cores where not given.
        keeps_memory: whether what a call has used is kept for the next one; many sessions at a
            time would keep too much.
        float_arithmetic: compute quantised layers as their Q/DQ nodes define them, in float32, and
            not by integer kernels; see `needs_float_arithmetic`.
        provider_options: of the provider, by ONNX Runtime's names.

    Raises:
        Exception: of ONNX Runtime's own types, which share no public base, where it cannot open the
            model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = keeps_memory
    # To plan which values share memory takes half a second, seven tenths of the time to open a
    # ResNet-50. On the CPU that gains little:
    # calls are as fast without, and the peak is 2% higher (docs/performance.md).
    options.enable_mem_reuse = provider != CPU
    if float_arithmetic:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    return ort.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        providers=[(provider, dict(provider_options))] if provider_options else [provider],
    )


def run_session(
    session: ort.InferenceSession, outputs: Sequence[str], feeds: dict[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Return the values of outputs.

    Args:
        session: of ONNX Runtime.
        outputs: their names.
        feeds: the inputs by name.

    Raises:
        ArtefactError: the graph fails while it runs, or there is not enough memory for it.
    """
    with naming_failures():
        values: Any = session.run(list(outputs), feeds)
    return values


@contextmanager
def naming_failures() -> Iterator[None]:
    """Raise as an ArtefactError what an inference of ONNX Runtime raises inside the block."""
    try:
        yield
    except Exception as error:  # onnxruntime raises types of its own that share no public base
        raise ArtefactError(
            f"ONNX Runtime {ort.__version__}: an inference failed ({first_line(error)}); give "
            "smaller images or a smaller --batch, or export the model again"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, the name of its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def needs_float_arithmetic(model: onnx.ModelProto) -> bool:
    """Return whether a graph quantises activations to signed int8, as TensorRT alone runs it.

    ONNX Runtime's integer kernels on a CPU are no stand-in for TensorRT: without VNNI instructions
    their sums of products saturate, and where they fuse layers they round at other places.
    """
    import onnx

    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return any(
        types.get(node.input[2]) == onnx.TensorProto.INT8
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and len(node.input) > 2
    )


def with_outputs(shipped: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """Return a copy of a shipped graph that also gives these inner values.

    Their types are the runtime's to tell.

    Raises:
        ArtefactError: the graph does not hold them.
    """
    import onnx

    made = {name for node in shipped.graph.node for name in node.output}
    if missing := [name for name in names if name not in made]:
        raise ArtefactError(
            f"the graph has no values {', '.join(missing[:3])}: it is of an older tood_deploy, or "
            "was rewritten; export it again"
        )
    extended = onnx.ModelProto()
    extended.CopyFrom(shipped)
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return extended


def artefact_in_memory(path: Path, exported: onnx.ModelProto, manifest: Manifest) -> OnnxArtefact:
    """Return the artefact that a graph will be, checked by ONNX's checker.

    It has no outputs but `OUTPUTS`, and the manifest in its metadata, without verdict and
    self-test.

    Args:
        path: names it in messages; nothing is written.
        exported: the graph, with or without further outputs. Stays as it is.
        manifest: of the artefact.
    """
    import onnx

    shipped = onnx.ModelProto()
    shipped.CopyFrom(exported)
    outputs = [value for value in shipped.graph.output if value.name in OUTPUTS]
    del shipped.graph.output[:]
    shipped.graph.output.extend(outputs)
    inside = replace(manifest, artefact_sha256="", parity=None, self_test=None)
    onnx.helper.set_model_props(shipped, {METADATA_KEY: inside.to_json()})
    onnx.checker.check_model(shipped, full_check=True)
    sha256 = hashlib.sha256(shipped.SerializeToString()).hexdigest()
    return OnnxArtefact(path, sha256, shipped, manifest)


def write_onnx(artefact: OnnxArtefact, output: Path) -> Manifest:
    """Write an artefact and the manifest beside it, both or none.

    Args:
        artefact: in memory.
        output: an .onnx file; what is there already is replaced.

    Returns:
        The manifest as it is written, with the SHA-256 of the file.

    Raises:
        OutputError: the place cannot be written.
    """
    with atomic_paths(output, manifest_path(output)) as (file, described):
        file.write_bytes(artefact.model.SerializeToString())
        manifest = artefact.manifest.with_artefact(file)
        described.write_text(manifest.to_json(), encoding="utf-8")
    return manifest
