"""One shape of a plan, ready to run on one set of buffers.

An execution context and, where it can be recorded, its CUDA graph.

TensorRT asks for one context per recorded graph: a graph holds the state and the addresses of the
context it was recorded from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tood_deploy.engines.tensorrt.cuda import CudaError, DeviceBuffer, Graph, Stream
from tood_deploy.engines.tensorrt.plan import AddNote, Plan, refusal
from tood_deploy.errors import DeviceError

CudaGraph = Literal["auto"] | bool
ALIGNMENT = 256  # of every address that TensorRT is given


class Execution:
    """A plan at one shape, with its addresses bound. In a block of `Gpu.current`, all of it.

    Attributes:
        replays: whether it runs, from the second time on, as a CUDA graph, whose addresses stay
            what they are.
    """

    def __init__(
        self,
        plan: Plan,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: DeviceBuffer,
        stream: Stream,
        *,
        cuda_graph: CudaGraph,
        add_note: AddNote,
    ) -> None:
        """Make the context.

        Args:
            plan: what to run.
            profile: the number of the optimisation profile.
            shapes: of the inputs that have a batch axis.
            addresses: on the GPU, of all inputs and outputs.
            scratch: memory that other executions may use at other times.
            stream: the only one it will run on.
            cuda_graph: whether to record: yes or an error; no; or "auto", where not being able to
                goes to `add_note`.
            add_note: takes a remark for the user.

        Raises:
            DeviceError: TensorRT refuses.
        """
        self._plan, self._stream, self._add_note = plan, stream, add_note
        self._must_record = cuda_graph is True
        self.replays = bool(cuda_graph)
        self._graph: Graph | None = None
        self._context: Any = plan.new_context()
        try:
            with plan.logger.collecting() as messages:
                done = self._prepare(profile, shapes, addresses, scratch)
            if not done:
                raise refusal(
                    f"{plan.path}: refuses profile {profile} with {dict(shapes)}",
                    messages,
                    "build the engine again",
                    DeviceError,
                )
        except BaseException:
            self.close()
            raise

    def _prepare(
        self,
        profile: int,
        shapes: Mapping[str, tuple[int, ...]],
        addresses: Mapping[str, int],
        scratch: DeviceBuffer,
    ) -> bool:
        # No local name for the context: the frames of an error would keep it alive beyond its
        # memory.
        self._context.set_device_memory(scratch.address, scratch.size)
        if not self._context.set_optimization_profile_async(profile, self._stream.handle):
            return False
        self._stream.synchronise()
        return (
            all(self._context.set_input_shape(name, shape) for name, shape in shapes.items())
            and all(
                self._context.set_tensor_address(name, address)
                for name, address in addresses.items()
            )
            and not self._context.infer_shapes()
        )

    def run(self, images: int | None = None) -> None:
        """Give the stream the work. The first time, run and then record.

        Args:
            images: another address to read the images from, where it does not replay.

        Raises:
            CudaError: TensorRT could not give it.
            DeviceError: a CUDA graph was asked for and cannot be recorded.
        """
        if self._graph is not None:
            self._graph.launch(self._stream)
            return
        if images is not None:
            self._context.set_tensor_address("images", images)
        self._enqueue()
        if self.replays:
            self._stream.synchronise()
            self._record()

    def _enqueue(self) -> None:
        with self._plan.logger.collecting() as messages:
            done = self._context.execute_async_v3(self._stream.handle)
        if not done:
            raise refusal(
                f"{self._plan.path}: running failed",
                messages,
                "start the program again; if it stays, build the engine again",
            )

    def _record(self) -> None:
        """Record the graph, after a run as TensorRT asks for: it settles the context."""
        try:
            # TensorRT-RTX knows beforehand.
            if hasattr(
                self._context, "is_stream_capturable"
            ) and not self._context.is_stream_capturable(self._stream.handle):
                raise CudaError("TensorRT says that this network cannot be recorded")
            self._graph = Graph(self._stream, self._enqueue)
        except DeviceError as error:
            reason = str(error).partition("; ")[0]
            if self._must_record:
                raise DeviceError(
                    f"{self._plan.path}: no CUDA graph can be recorded ({reason}); leave "
                    "cuda_graph at auto"
                ) from error
            self.replays = False
            self._add_note(
                f"{self._plan.path.name} runs without CUDA graphs: none can be recorded ({reason})"
            )

    def close(self) -> None:
        """Free context and graph. May be called again."""
        if self._graph is not None:
            self._graph.close()
            self._graph = None
        self._context = None
