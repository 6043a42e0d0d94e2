"""Plan a training step: its memory and time on an accelerator, ahead of time and without that accelerator."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cxrjax.config import Config
from cxrjax.console import progress_bar
from cxrjax.data import Batch
from cxrjax.distributed.mesh import batch_shardings, check_divides, make_mesh, replicated, suggest_space
from cxrjax.errors import CxrError
from cxrjax.findings import VOCABULARIES
from cxrjax.models.network import check_size
from cxrjax.planning.accelerators import Accelerator
from cxrjax.planning.compiled_memory import Collective, compile_memory
from cxrjax.planning.memory_estimate import peak_bytes
from cxrjax.planning.model_summary import multiply_adds
from cxrjax.train.losses import make_loss
from cxrjax.train.optimizer import TrainableParams, make_optimizer, schedule
from cxrjax.train.run_directory import create_network
from cxrjax.train.state import TrainState, flatten_for_mesh
from cxrjax.train.step import make_train_step

GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_backend_optimization_level": 0}
"""Autotuning needs the device, and memory does not depend on how well kernels are optimised."""

TPU_OPTIONS = {
    "xla_tpu_buffer_assignment_enable_fast_merge_fallback": False,
    "xla_tpu_scheduler_percent_shared_memory_limit": 1,
}
"""With memory to spare, XLA for TPUs leaves gaps between buffers and keeps more of them alive to overlap communication.
These options ask for the tight layout and schedule that it uses when memory is short."""

PREFETCHED_BATCHES = 4
"""Batches on the devices besides that of the step: the next one and those of `placement.prefetch_to_device`."""

MAX_BATCH_SIZE = (1 << 31) - 1
"""JAX counts images in 32 bits."""

USABLE_FRACTION = 0.92
"""Fraction of the memory that a program can use (XLA_PYTHON_CLIENT_MEM_FRACTION on GPUs, 0.75 by default)."""


@dataclass(frozen=True)
class Plan:
    """Resources of one training step on one device; sizes in bytes, times in seconds.

    Attributes:
      accelerator: name of the device.
      network: name of the network.
      data: devices that share a batch.
      space: devices that share the rows of an image.
      size: image side in px.
      remat: what the backward pass recomputes.
      microbatch: images processed at once, over all devices.
      accumulation_steps: microbatches per step.
      parameters: parameters and batch statistics.
      optimizer: optimizer state.
      inputs: the batch of the step.
      activations: all other buffers at the peak: activations, gradients, workspace that XLA knows of.
      program: the program itself, which lies in the memory of TPUs; 0 for GPUs and in an estimate.
      memory: memory of the device.
      compiled: whether the device's compiler made the plan; else it is an estimate from the traced step.
      exceeded: the compiler stopped for lack of memory, so collectives and traffic are unknown.
      collectives: number of collectives per step, by kind.
      bytes_sent: bytes that leave the device per step.
      flops: operations per step on the device, two per multiply-add of convolutions and matrix products.
      bytes_accessed: bytes read from and written to device memory per step; 0 in an estimate.
      compute_s: lower bound of the time for arithmetic.
      memory_s: lower bound of the time for memory traffic.
      network_s: lower bound of the time for communication.
    """

    accelerator: str
    network: str
    data: int
    space: int
    size: int
    remat: str
    microbatch: int
    accumulation_steps: int
    parameters: int
    optimizer: int
    inputs: int
    activations: int
    program: int
    memory: int
    compiled: bool
    exceeded: bool
    collectives: dict[str, int]
    bytes_sent: float
    flops: float
    bytes_accessed: float
    compute_s: float
    memory_s: float
    network_s: float

    @property
    def peak(self) -> int:
        """Bytes of the step at its peak."""
        return self.parameters + self.optimizer + self.inputs + self.activations + self.program

    @property
    def prefetched(self) -> int:
        """Bytes of the batches that wait on the device for later steps."""
        return PREFETCHED_BATCHES * self.inputs

    @property
    def fits(self) -> bool:
        """Whether the peak and the prefetched batches fit in the usable memory."""
        return not self.exceeded and self.peak + self.prefetched <= USABLE_FRACTION * self.memory

    @property
    def free(self) -> int:
        """Bytes of device memory that are free at the peak."""
        return self.memory - self.peak - self.prefetched

    @property
    def traffic_known(self) -> bool:
        """Whether collectives and memory traffic are known."""
        return self.compiled and not self.exceeded

    @property
    def floor_s(self) -> float:
        """Lower bound of the step time: the largest of the three times, which overlap at best."""
        return max(self.compute_s, self.memory_s, self.network_s)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields and properties for JSON."""
        properties = ("peak", "prefetched", "free", "fits", "floor_s")
        return asdict(self) | {name: getattr(self, name) for name in properties}


Planner = Callable[..., Plan]
"""`compile_plan` or `estimate_plan`."""


def compile_plan(
    config: Config, accelerator: Accelerator, *, data: int = 1, space: int = 1, batch_size: int = 0
) -> Plan:
    """Compile the training step of a config for `data` x `space` devices.

    Args:
      config: a recipe; its data set need not exist.
      accelerator: the device.
      data: devices that share a batch.
      space: devices that share the rows of an image.
      batch_size: images per step over all devices, all at once; 0: `train.batch_size` in microbatches of
        `train.per_device_batch_size` images per device.

    Raises:
      CxrError: the mesh does not divide the batch or the rows, or the compiler is not installed.
    """
    microbatch, accumulation_steps = split_batch(config, data, space, batch_size)
    mesh = make_mesh(data, space, accelerator.devices(data * space))
    traced, state, batch = _trace_step(config, mesh, microbatch, accumulation_steps)
    options = GPU_OPTIONS if accelerator.gpu else TPU_OPTIONS if accelerator.tpu else {}
    memory = compile_memory(traced, accelerator, options, accumulation_steps)
    fixed = _fixed_bytes(state, batch, data, space)
    activations = memory.temporary
    if not memory.exceeded:
        activations += memory.arguments - sum(fixed.values())
    return _make_plan(
        config, accelerator, traced, data=data, space=space, microbatch=microbatch,
        accumulation_steps=accumulation_steps, activations=activations, program=memory.program, compiled=True,
        exceeded=memory.exceeded, collectives=memory.collectives, bytes_accessed=memory.bytes_accessed, fixed=fixed,
    )  # fmt: skip


def estimate_plan(
    config: Config, accelerator: Accelerator, *, data: int = 1, space: int = 1, batch_size: int = 0
) -> Plan:
    """Estimate the plan from the traced step (`memory_estimate`), without a compiler for the device.

    Workspace and collectives are not included. Arguments and errors are those of `compile_plan`.
    """
    microbatch, accumulation_steps = split_batch(config, data, space, batch_size)
    traced, state, batch = _trace_step(config, make_mesh(1, 1, [_host_device()]), microbatch, accumulation_steps)

    def bytes_per_device(aval: Any) -> int:
        shape, size = aval.shape, math.prod(aval.shape) * aval.dtype.itemsize
        if accumulation_steps > 1 and shape[:2] == (accumulation_steps, microbatch):
            shape = (accumulation_steps * microbatch, *shape[2:])
        rank = len(shape)
        if rank < 2 or shape[0] not in (microbatch, accumulation_steps * microbatch):
            return size
        if rank == 4 and shape[1] == shape[2] > 1:  # a feature map; few kernels have such a shape
            channels = -(-shape[3] // accelerator.lanes) * accelerator.lanes
            return size // shape[3] * channels // (data * space)
        return size // data

    return _make_plan(
        config, accelerator, traced, data=data, space=space, microbatch=microbatch,
        accumulation_steps=accumulation_steps, activations=peak_bytes(traced.jaxpr.jaxpr, bytes_per_device),
        fixed=_fixed_bytes(state, batch, data, space),
    )  # fmt: skip


def largest_batch(
    config: Config, accelerator: Accelerator, planner: Planner = compile_plan, *, data: int = 1, space: int = 1
) -> tuple[int, list[Plan]]:
    """Find the largest batch size that fits, a multiple of `data`.

    Memory is nearly affine in the batch size, so two plans predict the third; bisection settles the rest.

    Returns:
      The batch size over all devices (0 if none fits), and all plans made to find it.
    """
    plans: dict[int, Plan] = {}  # by images per data device
    usable = USABLE_FRACTION * accelerator.memory
    low, high, guess = 0, MAX_BATCH_SIZE // data + 1, 1
    with progress_bar("planning", None, unit="plans") as advance:
        while high - low > 1:
            plans[guess] = planner(config, accelerator, data=data, space=space, batch_size=guess * data)
            low, high = (guess, high) if plans[guess].fits else (low, guess)
            bounded = high in plans
            guess = (low + high) // 2 if bounded and len(plans) % 4 == 0 else _extrapolate(plans, usable)
            guess = min(max(guess, low + 1), high - 1 if bounded else max(2, 64 * low), high - 1)
            advance()
    return low * data, [plans[images] for images in sorted(plans)]


def _extrapolate(plans: dict[int, Plan], usable: float) -> int:
    """Return the batch that would need `usable` bytes on the line through the two nearest plans."""
    if len(plans) < 2:
        return 2
    needed = {images: plan.peak + plan.prefetched for images, plan in plans.items()}
    less, more = sorted(sorted(needed, key=lambda images: abs(needed[images] - usable))[:2])
    slope = (needed[more] - needed[less]) / (more - less)
    return more + math.floor((usable - needed[more]) / slope) if slope > 0 else 2 * more


def split_batch(config: Config, data: int, space: int, batch_size: int = 0) -> tuple[int, int]:
    """Return the microbatch over all devices and the number of accumulation steps; see `compile_plan`.

    Raises:
      CxrError: the mesh does not divide the batch or the rows, or the batch is too large to count.
    """
    images = batch_size or config.train.batch_size
    if images > MAX_BATCH_SIZE:
        raise CxrError(f"cannot plan a batch of {images} images: choose at most {MAX_BATCH_SIZE}")
    check_divides(f"a batch of {images} images", images, "data", data)
    rows = config.data.image_size
    check_divides(f"{rows} rows", rows, "space", space, suggest_space(rows, space))
    per_device = 0 if batch_size else config.train.per_device_batch_size
    microbatch = per_device * data or images
    if images % microbatch:
        raise CxrError(
            f"config key train.batch_size = {images} is not a multiple of {microbatch} ({data} x {per_device} images): "
            f"set train.per_device_batch_size to a divisor of {images // data}, or plan a single one with --batch-size"
        )
    return microbatch, images // microbatch


def _trace_step(config: Config, mesh: Mesh, microbatch: int, accumulation_steps: int) -> tuple[Any, TrainState, Batch]:
    """Trace the training step as a run calls it; returns it with the shapes of the state and the batch."""
    optimizer = make_optimizer(config.optimizer)
    with jax.default_device(_host_device()):
        network = create_network(config, len(_findings(config)))
        trainable = TrainableParams.from_config(network, config)
        state = jax.eval_shape(lambda: TrainState.create(network, optimizer, 0, trainable))
    classes = network.classes
    loss = make_loss(config.loss.name, prevalence=np.full(classes, 0.1), **dict(config.loss.options.items()))
    step = make_train_step(
        network, optimizer, schedule(config.optimizer, 1000), mesh, accumulation_steps, trainable, loss,
        config.train.heads == "alternating",
    )  # fmt: skip
    side, images = config.data.image_size, microbatch * accumulation_steps
    shapes: Any = [((images, side, side, 1), np.uint8), ((images, classes), np.float32), ((images, classes), bool),
                   ((images,), bool), ((images,), np.int32)]  # fmt: skip
    shardings: Any = batch_shardings(mesh)
    fields: Any = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for (shape, dtype), sharding in zip(shapes, shardings, strict=True)
    ]
    batch = Batch(*fields)
    packed = jax.eval_shape(lambda state: flatten_for_mesh(state, mesh), state)
    packed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), packed)
    try:
        return step.trace(packed, batch), state, batch
    except CxrError:
        check_size(network, side, batch_size=microbatch)  # names the sizes that the network accepts
        raise


def _findings(config: Config) -> Sequence[str]:
    findings = tuple(config.data.findings) or VOCABULARIES.get(config.data.dataset)
    if not findings:
        raise CxrError(f"data set {config.data.dataset} has no fixed findings: name them with --config.data.findings")
    return findings


def _host_device() -> Any:
    """Return the device to trace on: the CPU, unless JAX_PLATFORMS excludes it."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _fixed_bytes(state: TrainState, batch: Batch, data: int, space: int) -> dict[str, int]:
    """Return the bytes per device of state and batch."""
    image, *rest = (_tree_bytes(field) for field in batch)
    return {
        "parameters": _tree_bytes((state.params, state.stats)),
        "optimizer": _tree_bytes(state.optimizer),
        "inputs": image // (data * space) + sum(rest) // data,
    }


def _tree_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _make_plan(
    config: Config, accelerator: Accelerator, traced: Any, *, data: int, space: int, microbatch: int,
    accumulation_steps: int, fixed: dict[str, int], activations: int, program: int = 0, compiled: bool = False,
    exceeded: bool = False, collectives: Sequence[Collective] = (), bytes_accessed: float = 0.0,
) -> Plan:  # fmt: skip
    """Return a plan with the lower bounds of its times."""
    flops = 2 * multiply_adds(traced.jaxpr.jaxpr) / (data * space)
    bytes_sent = sum(collective.bytes_sent for collective in collectives)
    kinds = [collective.kind for collective in collectives]
    return Plan(
        accelerator=accelerator.name, network=config.model.name, data=data, space=space, size=config.data.image_size,
        remat=config.model.remat, microbatch=microbatch, accumulation_steps=accumulation_steps, **fixed,
        activations=int(activations), program=program, memory=accelerator.memory, compiled=compiled,
        exceeded=exceeded, collectives={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        bytes_sent=bytes_sent, flops=flops, bytes_accessed=float(bytes_accessed), compute_s=flops / accelerator.flops,
        memory_s=bytes_accessed / accelerator.bandwidth, network_s=bytes_sent / accelerator.link,
    )  # fmt: skip
