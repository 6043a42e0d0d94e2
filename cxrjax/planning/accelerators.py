"""Accelerators that a step can be compiled for without having them: what they are, from their vendors' data sheets."""

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

from jax.experimental import topologies

from cxrjax.errors import CxrError


@dataclass(frozen=True)
class Target:
    """One accelerator.

    Attributes:
      name: as `plan --device` takes it.
      kind: as the vendor calls it.
      memory: of the device, bytes.
      flops: dense bfloat16 operations a second, two per multiply-add.
      bandwidth: of its memory, bytes a second.
      link: to the other devices, bytes a second out of one device, within a host (GPU) or a slice (TPU).
      gpu: what XLA's GPU compiler must know of the chip; empty for TPUs.
      tpu: the TPU's name in topologies; empty for GPUs.
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
        """The channels of maps take memory in multiples of so many."""
        return 128 if self.tpu else 1

    def devices(self, count: int) -> list[Any]:
        """That many of them, as compile-only devices.

        Raises:
          CxrError: JAX's compiler for this accelerator is not installed, or there is no slice of that size.
        """
        return _devices(self, count)


@cache
def _devices(target: Target, count: int) -> list[Any]:
    extra = "cuda" if target.gpu else "tpu"
    try:
        if target.gpu:
            os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
            topology = topologies.get_topology_desc(
                platform="cuda", topology_name=target.name, topology=f"1x1x{count}", target_config=target.gpu
            )
        else:
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
            os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
            os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # any, or libtpu says that there is none
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")  # several plans at once: none takes a TPU
            topology = topologies.get_topology_desc(f"{target.tpu}:{_slice(target, count)}", "tpu")
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CxrError(
            f"{count} x {target.name} cannot be compiled for here ({reason}): uv sync --extra {extra} installs JAX's "
            "compiler for it, which needs no such device"
        ) from error
    return list(topology.devices)[:count]


def _slice(target: Target, count: int) -> str:
    """The smallest slice that has so many chips."""
    shapes = _SLICES_2D if target.tpu in ("v5e", "v6e") else _SLICES_3D
    fitting = [shape for chips, shape in shapes.items() if chips >= count]
    if not fitting:
        raise CxrError(f"{count} x {target.name}: the largest slice that is planned has {max(shapes)} chips")
    return fitting[0]


_SLICES_2D = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SLICES_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}


def _chip(
    name: str,
    *,
    capability: tuple[int, int],
    cores: int,
    lanes: int,
    clock: float,
    bandwidth: float,
    memory: int,
    cache: int,
    shared: int,
) -> str:
    """What XLA's GPU compiler wants to know, in its own words."""
    return f"""gpu_device_info {{
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
  l2_cache_size: {cache}
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
device_description_str: "{name}"
"""


def _gpu(name: str, kind: str, memory: int, flops: float, bandwidth: float, link: float, **chip: Any) -> Target:
    words = _chip(kind, memory=memory, bandwidth=bandwidth, **chip)
    return Target(name, kind, memory, flops, bandwidth, link, gpu=words)


_HOPPER = {"capability": (9, 0), "cores": 132, "lanes": 128, "clock": 1.98, "cache": 60 << 20, "shared": 228 << 10}
_AMPERE = {"capability": (8, 0), "cores": 108, "lanes": 64, "clock": 1.41, "cache": 40 << 20, "shared": 164 << 10}

TARGETS = {
    target.name: target
    for target in (
        _gpu("h200", "NVIDIA H200", 150_000_000_000, 989e12, 4.8e12, 450e9, **_HOPPER),
        _gpu("h100", "NVIDIA H100 80GB HBM3", 85_000_000_000, 989e12, 3.35e12, 450e9, **_HOPPER),
        _gpu("a100-80", "NVIDIA A100-SXM4-80GB", 85_000_000_000, 312e12, 2.039e12, 300e9, **_AMPERE),
        _gpu("a100-40", "NVIDIA A100-SXM4-40GB", 42_400_000_000, 312e12, 1.555e12, 300e9, **_AMPERE),
        Target("v5e", "TPU v5e", 16 << 30, 197e12, 819e9, 200e9, tpu="v5e"),
        Target("v5p", "TPU v5p", 95 << 30, 459e12, 2.765e12, 600e9, tpu="v5p"),
        Target("v6e", "TPU v6e", 32 << 30, 918e12, 1.64e12, 448e9, tpu="v6e"),
    )
}

_TPUS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}
"""How JAX calls those that it calls otherwise."""


def target_of(kind: str) -> Target | None:
    """The target that JAX calls so (`device.device_kind`), if it is one of `TARGETS`."""
    return next((each for each in TARGETS.values() if each.kind == kind or each.name == _TPUS.get(kind)), None)
