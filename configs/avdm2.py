"""AVDM2: text to video in four steps, from AnimateDiff (a 2-D UNet and a motion adapter).

`configs/avdm2.py` holds the paper's settings for 8 devices that share the parameters of what learns;
`configs/avdm2.py:tiny` trains tiny random networks on the clips of a Python package, all with the empty prompt.
"""

from ml_collections import ConfigDict

from osv_jax.training.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    # All keys: osv_jax/objectives/options.py (RunOptions) and osv_jax/objectives/avdm2_options.py (AVDM2Options).
    config = default_config("avdm2")
    config.weights = "weights/animatediff"
    config.data.dataset = "openvid_latents"
    # A stride of 4 frames.
    config.data.num_frames, config.data.fps = 16, 7.5
    config.data.resolutions = ((0, 512, 512),)
    config.batch_size = 16
    config.num_steps = 10_000
    config.mesh.data, config.mesh.fsdp = 1, 8
    config.picture_every = config.checkpoint_every = 500

    if variant == "tiny":
        _make_tiny(config)
    elif variant:
        raise ValueError(f"configs/avdm2.py has the variants '' and 'tiny', not {variant!r}.")
    return config


def _make_tiny(config: ConfigDict) -> None:
    """Turns the configuration into its embedded variant."""
    config.weights = ""
    widths = (32, 64)
    config.random_networks = ConfigDict(
        {
            "unet_2d": {
                "block_out_channels": widths,
                "layers_per_block": 1,
                "num_attention_heads": (1, 2),
                "has_attention": (True, False),
                "cross_attention_dim": 32,
            },
            "motion_adapter": {
                "block_out_channels": widths,
                "motion_layers_per_block": 1,
                "motion_num_attention_heads": 2,
            },
            "image_vae": {"block_out_channels": (32, 32, 32)},
            "text_encoder": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "vocab_size": 64,
            },
        }
    )
    config.data.dataset, config.data.videos = "", "demo"
    config.data.num_frames, config.data.resolutions = 8, ((0, 32, 48),)
    config.batch_size = 2
    config.num_steps = 60
    config.optimizer.unet_learning_rate = config.optimizer.motion_learning_rate = 2e-4
    config.optimizer.disc_learning_rate = config.optimizer.fake_score_learning_rate = 1e-3
    config.optimizer.warmup_steps = 10
    config.discriminator_width = 32
    config.dtype = "float32"
    config.remat = "none"
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.picture_every = config.checkpoint_every = 30
