"""The trainable part of AVDM2's discriminator: one head over a frozen UNet's features at several scales.

Reference: AVDM2 section 4.1, which gives its plan and no sizes.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.models.layers import Conv, Dtype
from osv_jax.models.norms import GroupNorm
from osv_jax.models.resize import apply_per_axis, bilinear_matrix


class MultiscaleHead(nn.Module):
    """A convolution at each scale, all of them side by side at the finest, and a convolution to logits.

    Parameters: `scale_<i>_conv` and `scale_<i>_norm` for each scale, `out_conv`.

    Args (attributes):
        width: channels at each scale.
    """

    width: int = 256
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: tuple[Float[Array, "b f _h _w _c"], ...]) -> Float[Array, "b n"]:
        """A logit for each position of each frame, positive for real; float32.

        Frames are not mixed here: in the features of a video network they have been.

        Args:
            features: from the finest scale, in any resolutions.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, _, height, width, _ = features[0].shape
        scales = []
        for i, x in enumerate(features):
            frames = Conv(self.width, (3, 3), name=f"scale_{i}_conv", **dtypes)(x.reshape(-1, *x.shape[2:]))
            norm = GroupNorm(1e-5, math.gcd(32, self.width), name=f"scale_{i}_norm", **dtypes)
            y = nn.leaky_relu(norm(frames), 0.2)
            if i:
                rows, columns = bilinear_matrix(y.shape[1], height), bilinear_matrix(y.shape[2], width)
                y = apply_per_axis(rows, columns, y).astype(y.dtype)
            scales.append(y)
        logits = Conv(1, (3, 3), name="out_conv", **dtypes)(jnp.concatenate(scales, axis=-1))
        return logits.reshape(batch, -1).astype(jnp.float32)
