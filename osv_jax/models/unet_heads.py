"""The trainable part of SF-V's discriminator: heads over the features of a frozen UNet, conditioned by projection.

Reference: SF-V section 3.3 and Fig. 3. Figure and text name different conditions; all of them are projected here: the
image's CLIP embedding, the noise level and, for heads that see one frame at a time, the frame's index.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from osv_jax.models.heads import Head, Projection, over_frames, over_tracks, project
from osv_jax.models.layers import Dtype, timestep_embedding

KINDS = ("spatial", "temporal")
_EMBEDDING = 64

Logits = dict[str, Float[Array, "b n"]]


class UNetHeads(nn.Module):
    """A spatial and a temporal head for each block: `spatial_<level>`, `temporal_<level>`, `<kind>_condition`.

    Variables: `params`, and `spectral` (see `heads.SpectralConv`).

    Args (attributes):
        kinds: which heads there are (SF-V Table 2).
        width: of the projection (Miyato & Koyama 2018).
    """

    kinds: tuple[str, ...] = KINDS
    width: int = 64
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: tuple[Float[Array, "b f _h _w _c"], ...],
        image_embedding: Float[Array, "b k"],
        c_noise: Float[Array, " b"],
        update_stats: bool,
    ) -> Logits:
        """Logits of the two kinds, positive for real, all levels one after the other; float32.

        Args:
            features: one array a block.
            image_embedding: CLIP's.
            c_noise: ln(sigma') / 4 of the noise that the clips had.
            update_stats: improve the singular vectors by one power iteration first; `spectral` must be mutable then.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        batch, frames = features[0].shape[:2]
        noise = timestep_embedding(c_noise, _EMBEDDING)
        of_clip = jnp.concatenate([image_embedding.astype(jnp.float32), noise], axis=-1)
        index = jnp.broadcast_to(timestep_embedding(jnp.arange(frames), _EMBEDDING), (batch, frames, _EMBEDDING))
        of_frame = jnp.concatenate([jnp.repeat(of_clip[:, None], frames, axis=1), index], axis=-1)
        logits = {}
        for kind in self.kinds:
            window, run, condition = {
                "spatial": ((3, 3), over_frames, of_frame[:, :, None, None]),
                "temporal": ((3,), over_tracks, of_clip[:, None, None, None]),
            }[kind]
            projection = Projection(self.width, name=f"{kind}_condition", **dtypes)(condition)
            heads = [Head(window, self.width, name=f"{kind}_{level}", **dtypes) for level in range(len(features))]
            values = [run(head, x, update_stats) for head, x in zip(heads, features, strict=True)]
            logits[kind] = jnp.concatenate([project(x, projection) for x in values], axis=1)
        return logits
