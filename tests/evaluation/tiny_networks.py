"""I3D and VideoMAE at their smallest, with random parameters."""

import numpy as np
from flax.traverse_util import unflatten_dict

from osv_jax.convert import weights
from osv_jax.convert.architectures import expected_params
from osv_jax.models.i3d import I3DConfig
from osv_jax.models.videomae import VideoMAEConfig

NUM_FRAMES = 10
CONFIGS = {
    "i3d": I3DConfig(num_classes=20, stem_channels=8),
    "videomae": VideoMAEConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=28,
        num_frames=NUM_FRAMES,
    ),
}


def random_weights(name, seed=0):
    """Parameters that keep signals alive; variances are positive."""
    rng = np.random.default_rng(seed)

    def draw(path, shape):
        if path[-1] == "running_var":
            return rng.uniform(0.5, 1.5, shape)
        return rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]) if len(shape) > 1 else 10)

    shapes = expected_params(name, CONFIGS[name])
    return unflatten_dict({path: draw(path, leaf.shape).astype(np.float32) for path, leaf in shapes.items()})


def save(folder, *names):
    """A weights folder."""
    for name in names:
        weights.save_packed(folder / name, name, CONFIGS[name], random_weights(name), folder)
    return folder
