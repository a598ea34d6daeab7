"""Attention: many keys or a single one, and the implementation that suits platform and lengths."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from osv_jax.models.layers import Dense, Dtype, Unused
from osv_jax.models.products import at_least_float32, compiled_for
from osv_jax.runtime.mesh import BATCH_AXES

ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")

# Above this many queries the XLA path works through them in chunks, so that the score matrix never exists whole
# (9,216 tokens x 14 frames x 5 heads of float32 scores would be 24 GB).
_QUERY_CHUNK = 1024
# From so many tokens on, a CPU takes one head of one image after the other: the scores of one stay in its caches.
_MANY_TOKENS = 256
# Fused kernels pay from here on; scores of fewer keys than this are about as large as the activations.
_MANY_KEYS = 128


class Attention(nn.Module):
    """Multi-head attention over the second to last axis; names follow diffusers or transformers.

    Args (attributes):
        num_heads: number of heads; the head dimension is channels // num_heads.
        names: the four projections' names, query, key, value and output.
        qkv_bias: whether query, key and value have a bias (the output always has one).
        causal: whether a token sees only those up to itself.
        implementation: see `dot_product_attention`.
    """

    num_heads: int
    names: Sequence[str] = ("to_q", "to_k", "to_v", "to_out_0")
    qkv_bias: bool = False
    causal: bool = False
    implementation: str = "auto"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch t c"], context: Float[Array, "b s d"] | None = None
    ) -> Float[Array, "*batch t c"]:
        """Attends to x itself, or to a context whose batch is the first of x's: all other axes share it."""
        *batch, _, channels = x.shape
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def heads(y: Array) -> Array:
            if y.ndim != x.ndim:
                y = jnp.expand_dims(y, range(1, x.ndim - 2))
                y = jnp.broadcast_to(y, (*batch, *y.shape[-2:]))
            return y.reshape(-1, y.shape[-2], self.num_heads, channels // self.num_heads)

        sources = (x, x, x) if context is None else (x, context, context)
        q, k, v = (
            heads(Dense(channels, use_bias=self.qkv_bias, name=name, **dtypes)(source))
            for name, source in zip(self.names[:3], sources, strict=True)
        )
        y = dot_product_attention(q, k, v, self.implementation, self.causal)
        return Dense(channels, name=self.names[3], **dtypes)(y.reshape(x.shape))


class SingleKeyAttention(nn.Module):
    """Cross-attention to ONE context token: exactly `to_out(to_v(context))`, the same for every query.

    Softmax over one key is 1, so queries, keys and the per-token output projection need not be computed. `to_q` and
    `to_k` still exist as parameters, because checkpoints carry them and exports must.
    """

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, context: Float[Array, "b k"]) -> Float[Array, "b features"]:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        Unused((("kernel", (self.features, self.features)),), self.param_dtype, name="to_q")()
        Unused((("kernel", (context.shape[-1], self.features)),), self.param_dtype, name="to_k")()
        value = Dense(self.features, use_bias=False, name="to_v", **dtypes)(context)
        return Dense(self.features, name="to_out_0", **dtypes)(value)


def dot_product_attention(
    q: Float[Array, "b t n d"],
    k: Float[Array, "b s n d"],
    v: Float[Array, "b s n d"],
    implementation: str = "auto",
    causal: bool = False,
) -> Float[Array, "b t n d"]:
    """Softmax attention with float32 softmax.

    Args:
        q, k, v: queries, keys, values; `n` heads of dimension `d`.
        implementation: `xla` anywhere, `cudnn` (NVIDIA, half precision), `splash` (TPU), or `auto`, the platform's
            own. The fused kernels are used where their conditions hold (even lengths and head dimensions up to 128;
            lengths divisible by 128) and they pay (128 keys or more), and `xla` elsewhere.
        causal: whether a query sees only the keys up to its own position; by `xla`, and for as many keys as queries.

    Raises:
        ValueError: on an unknown implementation.
    """
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {ATTENTION_IMPLEMENTATIONS}, got {implementation!r}.")
    length, keys = q.shape[1], k.shape[1]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    platform = compiled_for()
    if q.dtype == jnp.float16 and platform != "gpu":
        # Of halves, CPUs and TPUs multiply only bfloat16 with sums in float32.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return dot_product_attention(q, k, v, implementation, causal).astype(jnp.float16)
    if causal:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
    wants_cudnn = implementation == "cudnn" or (implementation == "auto" and platform == "gpu" and half)
    wants_splash = implementation == "splash" or (implementation == "auto" and platform == "tpu")
    fits_cudnn = length % 2 == 0 and keys % 2 == 0 and q.shape[3] % 8 == 0 and q.shape[3] <= 128
    if wants_cudnn and keys >= _MANY_KEYS and fits_cudnn:
        return _on_each_device(_cudnn_attention, q, k, v, multiple=2)
    if wants_splash and keys >= _MANY_KEYS and length % 128 == 0 and keys % 128 == 0:
        attend = functools.partial(_splash_attention, interpret=platform == "cpu")
        return _on_each_device(attend, q, k, v, multiple=128)
    mesh = jax.sharding.get_abstract_mesh()
    if platform == "cpu" and min(length, keys) >= _MANY_TOKENS and (mesh.empty or mesh.size == 1):
        return _attention_by_head(q, k, v)
    if length <= _QUERY_CHUNK or keys < _MANY_KEYS:
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")
    return _chunked_attention(q, k, v)


def _chunked_attention(q: Array, k: Array, v: Array) -> Array:
    batch, length, heads, dim = q.shape
    chunks = -(-length // _QUERY_CHUNK)
    padded = jnp.pad(q, ((0, 0), (0, chunks * _QUERY_CHUNK - length), (0, 0), (0, 0)))
    padded = padded.reshape(batch, chunks, _QUERY_CHUNK, heads, dim).swapaxes(0, 1)
    # Recomputing a chunk's scores in the backward pass is what keeps them from being stored.
    attend = jax.checkpoint(lambda chunk: jax.nn.dot_product_attention(chunk, k, v, implementation="xla"))
    y = lax.map(attend, padded)
    return y.swapaxes(0, 1).reshape(batch, -1, heads, dim)[:, :length]


@jax.custom_vjp
def _attention_by_head(q: Array, k: Array, v: Array) -> Array:
    return _by_head_forward(q, k, v)[0]


def _by_head_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    """Keeps the result and the logarithm of each query's sum, from which its weights follow again."""

    @jax.checkpoint
    def attend(head: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, k, v = head
        scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        y = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        total = weights.sum(-1, keepdims=True)
        return (y / total).astype(v.dtype), largest + jnp.log(total)

    y, log_sums = lax.map(attend, (_heads(q), _heads(k), _heads(v)))
    y = _images(y, q)
    return y, (q, k, v, y, log_sums)


def _by_head_backward(saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    q, k, v, y, log_sums = saved
    scale = q.shape[-1] ** -0.5

    # (Of a gradient of this gradient, nothing of a head's scores is kept either.)
    @jax.checkpoint
    def gradients(head: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        q, k, v, dy, qt, dyt, of_sum, log_sum = head
        weights = jnp.exp(jnp.matmul(q, k.T, preferred_element_type=jnp.float32) * scale - log_sum)
        dv = jnp.matmul(dyt, weights.astype(v.dtype))
        d_weights = jnp.matmul(dy, v.T, preferred_element_type=jnp.float32)
        d_scores = (weights * (d_weights - of_sum) * scale).astype(v.dtype)
        return jnp.matmul(d_scores, k), jnp.matmul(qt, d_scores), dv

    of_sums = (at_least_float32(dy) * at_least_float32(y)).sum(-1, keepdims=True)
    queries, dys = _heads(q), _heads(dy)
    # A product with the transposed matrix of scores takes three times as long: what would need it, the gradients of
    # keys and values, is made transposed itself.
    across = queries.swapaxes(1, 2), dys.swapaxes(1, 2)
    dq, dk, dv = lax.map(gradients, (queries, _heads(k), _heads(v), dys, *across, _heads(of_sums), log_sums))
    return _images(dq, q), _images(dk.swapaxes(1, 2), k), _images(dv.swapaxes(1, 2), v)


_attention_by_head.defvjp(_by_head_forward, _by_head_backward)


def _heads(x: Float[Array, "b t n d"]) -> Float[Array, "b*n t d"]:
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _images(heads: Float[Array, "b*n t d"], like: Float[Array, "b t n d"]) -> Float[Array, "b t n d"]:
    return heads.reshape(len(like), like.shape[2], *heads.shape[1:]).swapaxes(1, 2)


def _cudnn_attention(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _splash_attention(q: Array, k: Array, v: Array, interpret: bool) -> Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    mask = splash.MultiHeadMask([splash.FullMask((q.shape[1], k.shape[1]))] * q.shape[2])
    kernel = splash.make_splash_mha_single_device(mask, interpret=interpret)
    heads_first = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jax.vmap(kernel)(*heads_first).swapaxes(1, 2)


def _on_each_device(attend: Callable[..., Array], q: Array, k: Array, v: Array, multiple: int) -> Array:
    """`attend` on each device's own part of the batch and of the queries: GSPMD cannot see into a fused kernel.

    What does not split evenly every device has whole, as a single clip of a picture; of the queries, each device's
    part is a multiple of `multiple`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q, k, v)
    axes: list[str] = []
    for name in BATCH_AXES:
        if q.shape[0] % math.prod(mesh.shape[axis] for axis in (*axes, name)) == 0:
            axes.append(name)
    splits = q.shape[1] % (multiple * mesh.shape["context"]) == 0
    keys = PartitionSpec(tuple(axes))
    queries = PartitionSpec(tuple(axes), "context") if splits else keys
    return jax.shard_map(attend, mesh=mesh, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False)(q, k, v)
