"""Accelerators that a step can be compiled for ahead of time, with the numbers of their data sheets."""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

from jax.experimental import topologies

from cxrjax.errors import CxrError


@dataclass(frozen=True)
class Accelerator:
    """A GPU or TPU.

    Attributes:
      name: the value of `plan --device`.
      kind: JAX's `device.device_kind` for GPUs, the vendor's name for TPUs.
      memory: device memory in bytes.
      flops: dense bfloat16 operations per second, two per multiply-add.
      bandwidth: memory bandwidth in bytes per second.
      link: bytes per second out of one device to the others of a host (GPU) or slice (TPU).
      gpu: description of the chip for XLA's GPU compiler; empty for TPUs.
      tpu: name of the chip in TPU topologies; empty for GPUs.
    """

    name: str
    kind: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    gpu: str = ""
    tpu: str = ""

    @property
    def lanes(self) -> int:
        """Channels of a feature map are padded to a multiple of this."""
        return 128 if self.tpu else 1

    def devices(self, count: int) -> list[Any]:
        """Return `count` compile-only devices.

        Raises:
          CxrError: JAX's compiler for this accelerator is not installed, or no slice is that large.
        """
        return _compile_only_devices(self, count)


def find_accelerator(kind: str) -> Accelerator | None:
    """Return the accelerator with this `device.device_kind`, or None if it is not in `ACCELERATORS`."""
    name = _TPU_KINDS.get(kind)
    return next((known for known in ACCELERATORS.values() if known.kind == kind or known.name == name), None)


@cache
def _compile_only_devices(accelerator: Accelerator, count: int) -> list[Any]:
    extra = "cuda" if accelerator.gpu else "tpu"
    try:
        if accelerator.gpu:
            os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
            topology = topologies.get_topology_desc(
                platform="cuda", topology_name=accelerator.name, topology=f"1x1x{count}",
                target_config=accelerator.gpu,
            )  # fmt: skip
        else:
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
            os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # libtpu needs some value
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")  # plans in parallel; none uses a TPU
            topology = topologies.get_topology_desc(f"{accelerator.tpu}:{_slice_shape(accelerator, count)}", "tpu")
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CxrError(
            f"cannot compile for {count} x {accelerator.name} ({reason}): install JAX's compiler for it with "
            f"`uv sync --extra {extra}`; the device itself is not needed"
        ) from error
    return list(topology.devices)[:count]


def _slice_shape(accelerator: Accelerator, count: int) -> str:
    """Return the smallest slice with at least `count` chips."""
    shapes = _SLICES_2D if accelerator.tpu in ("v5e", "v6e") else _SLICES_3D
    fitting = [shape for chips, shape in shapes.items() if chips >= count]
    if not fitting:
        raise CxrError(f"{count} x {accelerator.name}: the largest supported slice has {max(shapes)} chips")
    return fitting[0]


_SLICES_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SLICES_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


def _gpu(
    name: str, kind: str, *, memory: int, flops: float, bandwidth: float, link: float, capability: tuple[int, int],
    cores: int, lanes: int, clock: float, l2_cache: int, shared: int,
) -> Accelerator:  # fmt: skip
    """Return a GPU with its description in the format of XLA's `GpuTargetConfigProto`."""
    chip = f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(bandwidth)}
  l2_cache_size: {l2_cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared - 1024}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""
    return Accelerator(name, kind, memory, flops, bandwidth, link, gpu=chip)


_HOPPER: dict[str, Any] = {
    "flops": 989e12, "link": 450e9, "capability": (9, 0), "cores": 132, "lanes": 128, "clock": 1.98,
    "l2_cache": 60 << 20, "shared": 228 << 10,
}  # fmt: skip
_AMPERE: dict[str, Any] = {
    "flops": 312e12, "link": 300e9, "capability": (8, 0), "cores": 108, "lanes": 64, "clock": 1.41,
    "l2_cache": 40 << 20, "shared": 164 << 10,
}  # fmt: skip

ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        _gpu("h200", "NVIDIA H200", memory=150_000_000_000, bandwidth=4.8e12, **_HOPPER),
        _gpu("h100", "NVIDIA H100 80GB HBM3", memory=85_000_000_000, bandwidth=3.35e12, **_HOPPER),
        _gpu("a100-80", "NVIDIA A100-SXM4-80GB", memory=85_000_000_000, bandwidth=2.039e12, **_AMPERE),
        _gpu("a100-40", "NVIDIA A100-SXM4-40GB", memory=42_400_000_000, bandwidth=1.555e12, **_AMPERE),
        Accelerator("v5e", "TPU v5e", 16 << 30, 197e12, 819e9, 200e9, tpu="v5e"),
        Accelerator("v5p", "TPU v5p", 95 << 30, 459e12, 2.765e12, 600e9, tpu="v5p"),
        Accelerator("v6e", "TPU v6e", 32 << 30, 918e12, 1.64e12, 448e9, tpu="v6e"),
    )
}

_TPU_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
"""JAX's `device_kind` of TPUs."""
