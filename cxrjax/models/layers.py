"""The parts every family is made of: convolution, batch norm, and recomputation by layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from cxrjax.errors import CxrError
from cxrjax.models.convolution import depthwise, folds, halving
from cxrjax.models.spatial import constrain_rows

Maps = Float[Array, "B H W C"]


def param_dtype(dtype) -> np.dtype:
    """The type of parameters and batch statistics, and of norm arithmetic, for a compute type: float32 at least."""
    return np.promote_types(dtype, np.float32)


_drawing = ContextVar("drawing", default=True)


@contextmanager
def skip_init() -> Iterator[None]:
    """Initial values are 0 inside: drawing hundreds of millions takes seconds, and sometimes only shapes matter."""
    token = _drawing.set(False)
    try:
        yield
    finally:
        _drawing.reset(token)


class _NoKeys:
    """What nnx layers get for the random keys that they ask for; our initialisers do without."""

    def params(self) -> None:
        """No key."""


@constrain_rows
def _convolution(maps: Maps, kernel: Array, strides: Sequence[int], padding: Any, **options: Any) -> Maps:
    convolve: Callable = halving if folds(maps, strides) else jax.lax.conv_general_dilated
    return convolve(*_kernel_first(maps, kernel), strides, padding, **options)


@constrain_rows
def _depthwise(maps: Maps, kernel: Array, *args: Any, **options: Any) -> Maps:
    return depthwise(*_kernel_first(maps, kernel), *args, **options)


def _product(maps: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    return jax.lax.dot_general(*_kernel_first(maps, kernel), *args, **options)


@jax.custom_vjp
def _kernel_first(maps: Maps, kernel: Array) -> tuple[Maps, Array]:
    """The same; the backward pass computes the kernel's gradient before it goes on with that of the maps.

    XLA would rather leave kernels' gradients, and all maps that they are made of, for the end, where several devices
    add them up: twice the memory. Where only one of the two is wanted it is not held up.
    """
    return maps, kernel


def _whether_both(maps: Any, kernel: Any) -> tuple[tuple[Maps, Array], tuple[()] | None]:
    return (maps.value, kernel.value), () if maps.perturbed and kernel.perturbed else None


def _both_or_one(both: tuple[()] | None, gradients: tuple[Any, Any]) -> tuple[Any, Any]:
    if any(isinstance(each, SymbolicZero) for each in gradients):
        maps, kernel = (None if isinstance(each, SymbolicZero) else each for each in gradients)
        return maps, kernel
    return gradients if both is None else jax.lax.optimization_barrier(gradients)


_kernel_first.defvjp(_whether_both, _both_or_one, symbolic_zeros=True)


class LayerFactory:
    """Makes the layers of one network: it holds what they have in common.

    Initial values are drawn with NumPy, so that they depend on the seed alone (not on devices), and that
    building a network compiles nothing.

    Args:
      dtype: compute type.
      seed: of the initial values.
      fan: what the deviation of a convolution's initial values goes by: its connections "in" or "out".
    """

    def __init__(self, dtype, seed: int, *, fan: Literal["in", "out"] = "in"):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise CxrError(f"seed must be a whole number, 0 or above, not {seed!r}")
        self.dtype = np.dtype(dtype)
        self.param_dtype = param_dtype(dtype)
        self._fan = fan
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._unused: Any = _NoKeys()

    def _zeros(self, _key, shape, dtype) -> jax.Array:
        return jax.device_put(np.broadcast_to(np.zeros((), dtype), shape))  # shapes alone need no memory

    def _kaiming_normal(self, _key, shape, dtype) -> jax.Array:
        if not _drawing.get():
            return self._zeros(_key, shape, dtype)
        height, width, inputs, outputs = shape
        deviation = np.sqrt(2 / (height * width * (inputs if self._fan == "in" else outputs)))  # arXiv:1502.01852
        return jax.device_put((self._generator.standard_normal(shape) * deviation).astype(dtype))

    def _torch_uniform(self, _key, shape, dtype) -> jax.Array:
        if not _drawing.get():
            return self._zeros(_key, shape, dtype)
        bound = 1 / np.sqrt(shape[0])  # what torch.nn.Linear does
        return jax.device_put(self._generator.uniform(-bound, bound, shape).astype(dtype))

    def conv(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
    ) -> nnx.Conv:
        """A square convolution with PyTorch's padding: `padding` zeros on each side."""
        return nnx.Conv(
            inputs,
            outputs,
            (kernel, kernel),
            strides=(stride, stride),
            padding=((padding, padding), (padding, padding)),
            feature_group_count=groups,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self._kaiming_normal,
            bias_init=self._zeros,
            conv_general_dilated=_depthwise if groups == inputs == outputs > 1 else _convolution,
            rngs=self._unused,
        )

    def linear(self, inputs: int, outputs: int) -> nnx.Linear:
        """A fully connected layer, its bias zero at first; it computes in the type of its parameters."""
        return nnx.Linear(
            inputs,
            outputs,
            dtype=self.param_dtype,
            param_dtype=self.param_dtype,
            kernel_init=self._torch_uniform,
            bias_init=self._zeros,
            dot_general=_product,
            rngs=self._unused,
        )

    def norm(self, channels: int) -> "BatchNorm":
        """Batch norm as PyTorch has it by default."""
        return BatchNorm(channels, dtype=self.dtype)


class BatchNorm(nnx.Module):
    """Batch norm over B, H and W that keeps PyTorch's running statistics.

    Two things differ from `nnx.BatchNorm`: the running variance is the unbiased one, and the result has the
    compute type. Statistics and arithmetic are float32 (float64 for float64). Under a sharded `jax.jit` the means
    are those of the global batch, whatever the mesh: batch norm is synchronised.

    Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    def __init__(self, channels: int, *, dtype, momentum: float = 0.1, epsilon: float = 1e-5):
        wide = param_dtype(dtype)
        zeros, ones = np.zeros(channels, wide), np.ones(channels, wide)  # NumPy's: those of JAX are compiled
        self.scale, self.bias = nnx.Param(jax.device_put(ones)), nnx.Param(jax.device_put(zeros))
        self.mean, self.var = nnx.BatchStat(jax.device_put(zeros)), nnx.BatchStat(jax.device_put(ones))
        self.dtype = np.dtype(dtype)
        self.momentum = momentum
        self.epsilon = epsilon

    def __call__(self, maps: Maps, *, train: bool, moments: "Moments | None" = None) -> Maps:
        """Normalise; in training by the batch's statistics, which also enter the running ones.

        `moments` are those statistics where they are known: `self.moments(maps)` is what they would be.
        """
        wide = maps.astype(param_dtype(self.dtype))
        if train:
            mean, var = moments or self.moments(wide)
            self._enter(mean, var, maps.size // maps.shape[-1])
        else:
            mean, var = self.mean[...], self.var[...]
        scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        offset = self.bias[...] - mean * scale  # one multiplication and addition per value, as PyTorch does
        return (wide * _spread(scale) + _spread(offset)).astype(self.dtype)

    def moments(self, maps: Maps, first: int = 0) -> "Moments":
        """Mean and biased variance of the batch, for the channels of this norm from `first` on that `maps` has."""
        if maps.size // maps.shape[-1] < 2:
            raise CxrError("batch norm cannot train on one value per channel: use a larger batch or larger images")
        return _moments(maps, jax.lax.stop_gradient(self.mean[...][first : first + maps.shape[-1]]))

    def _enter(self, mean: Float[Array, " C"], var: Float[Array, " C"], values: int) -> None:
        """Move the running statistics towards those of a batch of so many values per channel."""
        for running, batch in ((self.mean, mean), (self.var, var * (values / (values - 1)))):
            moved = (1 - self.momentum) * running[...] + self.momentum * jax.lax.stop_gradient(batch)
            running.set_value(moved)  # `running[...] = moved` walks all that is traced so far: quadratic in depth


Moments = tuple[Float[Array, " C"], Float[Array, " C"]]
"""Mean and biased variance over a batch, per channel."""


@jax.custom_vjp
def _moments(maps: Maps, about: Float[Array, " C"]) -> Moments:
    """In the type of `about`, the running mean: in one pass, E[x^2] - E[x]^2 does not cancel about it.

    The backward pass needs the maps alone, as they are, and no shifted ones of a wider type.
    """
    shifted = maps.astype(about.dtype) - _spread(about)
    offset = shifted.mean((0, 1, 2))
    return about + offset, jnp.maximum(jnp.square(shifted).mean((0, 1, 2)) - jnp.square(offset), 0)


def _moments_and_maps(maps: Maps, about: Float[Array, " C"]) -> tuple[Moments, tuple[Maps, Float[Array, " C"]]]:
    mean, var = _moments(maps, about)
    return (mean, var), (maps, mean)


def _gradient_of_moments(kept: tuple[Maps, Float[Array, " C"]], gradients: Moments) -> tuple[Maps, Any]:
    maps, mean = kept
    of_mean, of_var = (_spread(each) * (maps.shape[-1] / maps.size) for each in gradients)
    return (of_mean + 2 * of_var * (maps.astype(mean.dtype) - _spread(mean))).astype(maps.dtype), jnp.zeros_like(mean)


_moments.defvjp(_moments_and_maps, _gradient_of_moments)


def _spread(per_channel: Float[Array, " C"]) -> Float[Array, "1 1 1 C"]:
    return per_channel.reshape(1, 1, 1, -1)


class ConvNorm(nnx.List):
    """A convolution, padded by half its kernel, and its norm: "0" and "1" in published names."""

    def __init__(
        self,
        make: LayerFactory,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ):
        conv = make.conv(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias)
        super().__init__([conv, make.norm(outputs)])

    def __call__(self, maps: Maps, train: bool) -> Maps:
        """Both, without an activation."""
        conv, norm = self
        return norm(conv(maps), train=train)

    def active(self, maps: Maps, train: bool) -> Maps:
        """Both, and the activation."""
        return self.activation(self(maps, train))

    @staticmethod
    def activation(maps: Maps) -> Maps:
        """ReLU."""
        return nnx.relu(maps)


REMATS = ("none", "layer", "block", "full")
"""What the backward pass recomputes instead of keeping it: each names all that those before it do, and more."""


@cache
def maybe_remat(method: Callable, remat: str, level: str = "layer", static: tuple[int, ...] = (2,)) -> Callable:
    """An unbound method of a layer, a block or a network as a function of (module, inputs, train, ...).

    Where `remat` covers the method's level, the backward pass recomputes what the method computes instead of keeping
    it, so only its inputs stay in memory; results and running statistics are the same, and statistics move once.
    (`jax.checkpoint` on a method would lose them.) Levels nest: what a block recomputes its layers recompute again.

    Args:
      method: the function.
      remat: one of `REMATS`.
      level: what the method is: "layer", "block" or "full" (a whole network).
      static: positions of arguments that are no arrays.
    """
    covered = REMATS.index(remat) >= REMATS.index(level)
    return nnx.remat(method, static_argnums=static, graph=False) if covered else method


@jax.custom_vjp
def sum_gradients_early(maps: Any) -> Any:
    """The same maps; in the backward pass what has come together of their gradients is summed before anything else.

    XLA would rather keep the gradients of all readers and sum them when the sum is needed: in a dense block that is
    one gradient of all maps for each layer, all alive at once.
    """
    return maps


sum_gradients_early.defvjp(lambda maps: (maps, None), lambda _, gradients: (jax.lax.optimization_barrier(gradients),))
