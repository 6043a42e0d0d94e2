"""Will it fit? The training step of a config, compiled ahead of time for a machine that is not here."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cxrjax.config import Config
from cxrjax.console import progress_bar
from cxrjax.data.records import Batch
from cxrjax.distributed.mesh import batch_shardings, check_divides, instead_of_rows, make_mesh, replicated
from cxrjax.errors import CxrError
from cxrjax.findings import VOCABULARIES
from cxrjax.models.network import check_size
from cxrjax.planning.accelerators import Target
from cxrjax.planning.collectives import Collective
from cxrjax.planning.compiled_memory import needs
from cxrjax.planning.memory_estimate import peak_bytes
from cxrjax.planning.model_summary import multiply_adds
from cxrjax.train.described import network_of
from cxrjax.train.flat_params import pack_for
from cxrjax.train.losses import make_loss
from cxrjax.train.optimizer import make_optimizer, schedule
from cxrjax.train.state import TrainState
from cxrjax.train.step import make_train_step
from cxrjax.train.trainable import Learning

GPU_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_backend_optimization_level": 0}
"""Nothing can be timed on a device that is not here; and memory does not depend on how well kernels are compiled."""

TPU_OPTIONS = {
    "xla_tpu_buffer_assignment_enable_fast_merge_fallback": False,
    "xla_tpu_scheduler_percent_shared_memory_limit": 1,
}
"""Where memory abounds XLA for TPUs packs buffers with wide gaps, and keeps more alive to send while it computes. It
packs them tightly, and computes in an order that holds less, where it must: as here."""

AHEAD = 4
"""Batches that a run has on its devices beside that of the step: a next step's, and those of `distributed.placement.prefetch_to_device`."""

MOST = (1 << 31) - 1
"""Images of a batch: JAX counts them in 32 bits."""

USABLE = 0.92
"""Share of a device's memory that a program can have (XLA_PYTHON_CLIENT_MEM_FRACTION on GPUs, whose default is .75)."""


@dataclass(frozen=True)
class Plan:
    """One training step on one device of the machine; bytes unless it says otherwise.

    Attributes:
      target: the device's name.
      network: its name.
      data: devices that share a batch.
      space: devices that share the rows of an image.
      size: side of the images in px.
      remat: what the backward pass recomputes.
      batch: images of all devices at once.
      parts: that pass one after the other and make the effective batch (`train.per_device`).
      parameters: with running statistics.
      optimizer: its moments.
      inputs: the effective batch.
      activations: everything else the step holds at its peak: activations, gradients, workspace that XLA knows of.
      program: the program itself, which lies in a TPU's memory; 0 for GPUs and in an estimate.
      memory: of the device.
      compiled: whether a compiler said so; else an estimate from the traced step.
      refused: the compiler gave up, for lack of memory: what the step would send and move is not known.
      collectives: how many calls a step makes, by kind.
      sent: bytes that leave the device in a step.
      flops: of the step on this device, two per multiply-add of its convolutions and matrix products.
      moved: bytes through the device's memory; 0 in an estimate.
      compute_s: least time that the arithmetic takes, seconds.
      memory_s: least time that moving `moved` takes.
      network_s: least time that sending takes.
    """

    target: str
    network: str
    data: int
    space: int
    size: int
    remat: str
    batch: int
    parts: int
    parameters: int
    optimizer: int
    inputs: int
    activations: int
    program: int
    memory: int
    compiled: bool
    refused: bool
    collectives: dict[str, int]
    sent: float
    flops: float
    moved: float
    compute_s: float
    memory_s: float
    network_s: float

    @property
    def peak(self) -> int:
        """All that the step holds at once."""
        return self.parameters + self.optimizer + self.inputs + self.activations + self.program

    @property
    def known(self) -> bool:
        """Whether a compiler said what the step sends and moves."""
        return self.compiled and not self.refused

    @property
    def waiting(self) -> int:
        """Batches of the steps to come, which a run has there as well."""
        return AHEAD * self.inputs

    @property
    def fits(self) -> bool:
        """Whether the peak and what waits are within the usable part of the memory."""
        return not self.refused and self.peak + self.waiting <= USABLE * self.memory

    @property
    def left(self) -> int:
        """Memory of the device that is free at the peak."""
        return self.memory - self.peak - self.waiting

    @property
    def floor_s(self) -> float:
        """No step is faster: the largest of the three times, which overlap at best."""
        return max(self.compute_s, self.memory_s, self.network_s)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        more = {"peak": self.peak, "waiting": self.waiting, "left": self.left, "fits": self.fits,
                "floor_s": self.floor_s}  # fmt: skip
        return asdict(self) | more


def plan(config: Config, target: Target, *, data: int = 1, space: int = 1, batch: int = 0) -> Plan:
    """Compile the config's training step for `data` x `space` devices.

    Args:
      config: a recipe; its data need not be here.
      target: the accelerator.
      data: devices that share a batch.
      space: devices that share the rows of an image.
      batch: images of a step, over all devices; 0: `train.batch`, of which `train.per_device` pass at once.

    Raises:
      CxrError: a mesh that does not divide the batch or the rows, or a compiler that is not installed.
    """
    images = batches(config, data, space, batch)
    mesh = make_mesh(data, space, target.devices(data * space))
    traced, state, inputs = _traced(config, mesh, *images)
    found = needs(traced, target, _options(target), images[1])
    fixed = _fixed(state, inputs, data, space)
    activations = found.temporary if found.refused else found.held + found.temporary - sum(fixed.values())
    return _plan(
        target, (data, space), config, images, fixed, activations, traced.jaxpr.jaxpr, found.calls, found.moved,
        compiled=True, program=found.program, refused=found.refused,
    )  # fmt: skip


def estimate(config: Config, target: Target, *, data: int = 1, space: int = 1, batch: int = 0) -> Plan:
    """The same without a compiler for the target, from the traced step (`parallel.liveness`).

    Workspace and collectives are not in it. Arguments and errors are those of `plan`.
    """
    batch, parts = batches(config, data, space, batch)
    traced, state, inputs = _traced(config, make_mesh(1, 1, [_host()]), batch, parts)
    jaxpr = traced.jaxpr.jaxpr

    def on_one_device(aval: Any) -> int:
        shape, whole = aval.shape, math.prod(aval.shape) * aval.dtype.itemsize
        if parts > 1 and shape[:2] == (parts, batch):
            shape = (parts * batch, *shape[2:])
        rank = len(shape)
        if rank < 2 or shape[0] not in (batch, parts * batch):
            return whole
        if rank == 4 and shape[1] == shape[2] > 1:  # maps: of kernels only some stems' have such a shape
            return whole // shape[3] * (-(-shape[3] // target.lanes) * target.lanes) // (data * space)
        return whole // data

    fixed, activations = _fixed(state, inputs, data, space), peak_bytes(jaxpr, on_one_device)
    return _plan(target, (data, space), config, (batch, parts), fixed, activations, jaxpr, [], 0.0, compiled=False)


def largest_batch(
    config: Config, target: Target, make: Callable[..., Plan] = plan, *, data: int = 1, space: int = 1
) -> tuple[int, list[Plan]]:
    """The largest batch of all devices that fits, a multiple of `data`, and every plan that was made to find it.

    Memory is nearly affine in the batch, so two plans point at the third; bisection settles the rest.
    """
    made: dict[int, Plan] = {}
    room = USABLE * target.memory
    low, high, guess = 0, MOST // data + 1, 1  # of the images on each data device
    with progress_bar("planning", None, unit="plans") as advance:
        while high - low > 1:
            made[guess] = make(config, target, data=data, space=space, batch=guess * data)
            low, high = (guess, high) if made[guess].fits else (low, guess)
            known = high in made
            guess = (low + high) // 2 if known and len(made) % 4 == 0 else _affine(made, room)
            guess = min(max(guess, low + 1), high - 1 if known else max(2, 64 * low), high - 1)
            advance()
    return low * data, [made[each] for each in sorted(made)]


def _affine(made: dict[int, Plan], room: float) -> int:
    """The batch whose memory would be `room`, were it a straight line through the two plans nearest to it."""
    if len(made) < 2:
        return 2
    held = {each: plan.peak + plan.waiting for each, plan in made.items()}
    less, more = sorted(sorted(held, key=lambda each: abs(held[each] - room))[:2])
    slope = (held[more] - held[less]) / (more - less)
    return more + math.floor((room - held[more]) / slope) if slope > 0 else 2 * more


def batches(config: Config, data: int, space: int, batch: int = 0) -> tuple[int, int]:
    """Images at once and how many such parts make a step, as `plan` takes them.

    Raises:
      CxrError: a mesh that does not divide them or the rows, or more images than can be counted.
    """
    given = batch or config.train.batch
    if given > MOST:
        raise CxrError(f"a batch of {given} images cannot be planned: choose at most {MOST}")
    check_divides(f"a batch of {given} images", given, "data", data)
    rows = config.data.size
    check_divides(f"{rows} rows", rows, "space", space, instead_of_rows(rows, space))
    at_once = config.train.per_device * data if config.train.per_device and not batch else given
    if given % at_once:
        raise CxrError(
            f"config key train.batch = {given} is not a multiple of {at_once} ({data} x {config.train.per_device} "
            f"images): set train.per_device to a divisor of {given // data}, or plan one part with --batch N"
        )
    return at_once, given // at_once


def _network(config: Config) -> Any:
    findings = tuple(config.data.findings) or VOCABULARIES.get(config.data.dataset)
    if not findings:
        raise CxrError(f"data set {config.data.dataset} can have any findings: name yours with --config.data.findings")
    return network_of(config, len(findings))


def _traced(config: Config, mesh: Mesh, batch: int, parts: int) -> tuple[Any, TrainState, Batch]:
    """The jitted step, traced as a run calls it, and the shapes of the state and of a batch."""
    optimizer = make_optimizer(config.optimizer)
    with jax.default_device(_host()):
        network = _network(config)
        learning = Learning.of(network, config)
        state = jax.eval_shape(lambda: TrainState.create(network, optimizer, 0, learning))
    findings = network.classes
    options = dict(config.loss.options.items())
    loss = make_loss(config.loss.name, prevalence=np.full(findings, 0.1), **options)
    step = make_train_step(
        network, optimizer, schedule(config.optimizer, 1000), mesh, parts, learning, loss,
        config.train.heads == "alternating",
    )  # fmt: skip
    side, images = config.data.size, batch * parts
    shapes: Any = [((images, side, side, 1), np.uint8), ((images, findings), np.float32), ((images, findings), bool),
                   ((images,), bool), ((images,), np.int32)]  # fmt: skip
    shardings: Any = batch_shardings(mesh)
    inputs: Any = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for (shape, dtype), sharding in zip(shapes, shardings, strict=True)
    ]
    whole, batched = replicated(mesh), Batch(*inputs)
    given = jax.eval_shape(lambda state: pack_for(state, mesh), state)
    given = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), given)
    try:
        return step.trace(given, batched), state, batched
    except CxrError:
        check_size(network, side, batch_size=batch)  # which knows the sizes that the network takes
        raise


def _host() -> Any:
    """Where a step is traced: the CPU, unless JAX was told to leave it alone (JAX_PLATFORMS=cuda)."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def _options(target: Target) -> dict[str, Any]:
    return GPU_OPTIONS if target.gpu else TPU_OPTIONS if target.tpu else {}


def _fixed(state: Any, inputs: Any, data: int, space: int) -> dict[str, int]:
    image, *rest = (_bytes(field) for field in inputs)
    return {
        "parameters": _bytes((state.params, state.stats)),
        "optimizer": _bytes(state.optimizer),
        "inputs": image // (data * space) + sum(rest) // data,
    }


def _plan(
    target: Target, mesh: tuple[int, int], config: Config, images: tuple[int, int], fixed: dict[str, int],
    activations: int, jaxpr: Any, calls: Sequence[Collective], moved: float, *, compiled: bool, program: int = 0,
    refused: bool = False,
) -> Plan:  # fmt: skip
    flops = 2 * multiply_adds(jaxpr) / math.prod(mesh)
    sent = sum(call.sent for call in calls)
    kinds = [call.kind for call in calls]
    return Plan(
        target=target.name, network=config.model.name, data=mesh[0], space=mesh[1], size=config.data.size,
        remat=config.model.remat, batch=images[0], parts=images[1], **fixed, activations=int(activations),
        program=program, memory=target.memory, compiled=compiled, refused=refused,
        collectives={kind: kinds.count(kind) for kind in sorted(set(kinds))}, sent=sent, flops=flops,
        moved=float(moved), compute_s=flops / target.flops, memory_s=moved / target.bandwidth,
        network_s=sent / target.link,
    )  # fmt: skip


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
