"""AVDM2: text to video in four steps, from AnimateDiff (a 2-D UNet and a motion adapter).

`configs/avdm2.py` holds the paper's settings for 8 devices that share the parameters of what learns;
`configs/avdm2.py:tiny` trains tiny random networks on the clips of a Python package, all with the empty prompt;
`configs/avdm2.py:miniature` trains students of a small teacher of a world that is drawn, see docs/text_to_video.md.
"""

from ml_collections import ConfigDict

from osv_jax.training.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    # All keys: osv_jax/objectives/options.py (RunOptions) and osv_jax/objectives/avdm2_options.py (AVDM2Options).
    config = default_config("avdm2")
    set_data(config)
    config.num_steps = 10_000
    config.picture_every = config.checkpoint_every = 500

    if variant == "tiny":
        make_tiny(config)
        config.num_steps = 60
        _set_rates(config, student=2e-4, others=1e-3)
        config.optimizer.warmup_steps = 10
        config.discriminator_width = 32
    elif variant == "miniature":
        make_miniature(config)
        config.num_steps = 400
        _set_rates(config, student=1e-4, others=2e-4)
        config.optimizer.warmup_steps = 20
        config.optimizer.max_grad_norm = 1.0
        config.discriminator_width = 64
        config.sdm_guidance = 3.0
    elif variant:
        raise ValueError(f"configs/avdm2.py has the variants '', 'tiny' and 'miniature', not {variant!r}.")
    return config


def set_data(config: ConfigDict) -> None:
    """AnimateDiff's weights and clips, shared by eight devices."""
    config.weights = "weights/animatediff"
    config.data.dataset = "openvid_latents"
    # A stride of 4 frames.
    config.data.num_frames, config.data.fps = 16, 7.5
    config.data.resolutions = ((0, 512, 512),)
    config.batch_size = 16
    config.mesh.data, config.mesh.fsdp = 1, 8


def _set_rates(config: ConfigDict, student: float, others: float) -> None:
    config.optimizer.unet_learning_rate = config.optimizer.motion_learning_rate = student
    config.optimizer.disc_learning_rate = config.optimizer.fake_score_learning_rate = others


def make_miniature(config: ConfigDict) -> None:
    """Turns a configuration into that of the networks and the clips of benchmarks/text_to_video.py."""
    config.weights = "runs/text/weights"
    config.data.dataset = "runs/text/latents"
    config.data.fps = 12.0
    config.data.resolutions = ((0, 32, 48),)
    config.batch_size = 2
    config.dtype = "float32"
    config.remat = "none"
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.log_every = 20
    config.picture_every = 400
    config.checkpoint_every = 100


def make_tiny(config: ConfigDict) -> None:
    """Turns a configuration into its embedded variant."""
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
    config.dtype = "float32"
    config.remat = "none"
    config.mesh.data, config.mesh.fsdp = -1, 1
    config.picture_every = config.checkpoint_every = 30
