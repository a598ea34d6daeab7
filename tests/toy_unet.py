"""A stand-in for the UNet, for tests in which only what is done with it matters."""

import flax.linen as nn
import jax.numpy as jnp

from osv_jax.models.layers import Dense, FeedForward
from osv_jax.models.svd_unet import SVDUNet


class _Block(nn.Module):
    dtype: object
    param_dtype: object

    @nn.compact
    def __call__(self, x):
        return x + FeedForward(self.dtype, self.param_dtype, name="ff")(x)


class _Attention(nn.Module):
    dtype: object
    param_dtype: object

    @nn.compact
    def __call__(self, x):
        return _Block(self.dtype, self.param_dtype, name="temporal_transformer_blocks_0")(x)


class ToyUNet(SVDUNet):
    """Depends on all its inputs, has LoRA modules and a temporal transformer's parameters, and compiles at once."""

    @nn.compact
    def __call__(self, sample, timestep, image_embedding, added_time_ids):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shift = timestep + image_embedding.mean(axis=-1) + 0.01 * added_time_ids.sum(axis=-1)
        x = Dense(16, name="proj_in", **dtypes)(sample) + shift[:, None, None, None, None].astype(self.dtype)
        x = _Attention(name="attentions_0", **dtypes)(jnp.sin(x))
        return Dense(4, name="conv_out", **dtypes)(x + x[:, ::-1]).astype(jnp.float32)
