"""Stage 1 of OSV (latent GAN pretraining).

`configs/stage1.py` holds the paper's settings for 8 devices; `configs/stage1.py:miniature` made the LoRA that
comes with the small SVD, see docs/miniature.md; `configs/stage1.py:tiny` trains tiny random networks on the clips of a
Python package, in minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from osv_jax.training.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    # All keys and what they mean: osv_jax/objectives/options.py (RunOptions, StudentOptions),
    # osv_jax/objectives/distillation.py (DistillationOptions), osv_jax/objectives/adversarial.py (AdversarialOptions)
    # and osv_jax/objectives/osv.py (OSVOptions); the defaults are the paper's. Changed most often:
    config = default_config("stage1")
    config.weights = "weights/svd"
    config.data.videos = "videos"
    config.data.resolutions = ((0, 576, 1024),)
    config.batch_size = 8
    config.num_steps = 2000
    config.optimizer.learning_rate = config.optimizer.disc_learning_rate = 5e-6
    config.lora.rank = config.lora.alpha = 64

    if variant == "tiny":
        make_tiny(config)
    elif variant == "miniature":
        make_miniature(config)
    elif variant:
        raise ValueError(f"configs/stage1.py has the variants '', 'tiny' and 'miniature', not {variant!r}.")
    return config


def make_miniature(config: ConfigDict) -> None:
    """Turns a configuration into the one for the small SVD that comes with the package."""
    config.weights = "miniature"
    config.data.dataset = "runs/miniature/latents"
    config.data.fps = 12.0
    config.data.resolutions = ((0, 64, 96),)
    config.batch_size = 2
    config.num_steps = 150
    config.optimizer.learning_rate = 1e-4
    config.lora.rank = config.lora.alpha = 8
    if "num_levels" in config:
        # A grid as fine as the 25 steps that the teacher samples with.
        config.num_levels = 25
    if "discriminator_blocks" in config:
        config.optimizer.disc_learning_rate = 1e-3
        config.discriminator_blocks = (0, 1)
    config.dtype = "float32"
    config.remat = "none"
    config.log_every = 5
    config.picture_every = config.checkpoint_every = 50


def make_tiny(config: ConfigDict) -> None:
    """Turns a configuration into its embedded variant."""
    config.weights = ""
    config.random_networks = ConfigDict(
        {
            "unet": {
                "block_out_channels": (32, 64),
                "layers_per_block": 1,
                "num_attention_heads": (1, 2),
                "has_attention": (True, False),
                "cross_attention_dim": 32,
                "addition_time_embed_dim": 16,
            },
            "vae": {"block_out_channels": (32, 32, 32)},
            "image_encoder": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "projection_dim": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 56,
            },
            "dinov2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70},
        }
    )
    config.data.videos = "demo"
    config.data.resolutions = ((0, 32, 48),)
    config.batch_size = 2
    config.num_steps = 60
    # Low: this teacher is random, and what moves the student towards real latents moves it away from the teacher.
    config.optimizer.learning_rate = 2e-4
    config.lora.rank = config.lora.alpha = 8
    config.lora.targets = "attention"
    if "discriminator_blocks" in config:
        config.optimizer.disc_learning_rate = 1e-3
        config.discriminator_blocks = (0, 1)
    config.dtype = "float32"
    config.remat = "none"
    config.picture_every = config.checkpoint_every = 30
