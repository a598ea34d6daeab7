"""Stage 1 of OSV (latent GAN pretraining).

`configs/stage1.py` holds the paper's settings for 8 devices; `configs/stage1.py:miniature` is how the LoRA was made
that comes with the small SVD, see docs/miniature.md; `configs/stage1.py:tiny` has tiny random networks and the clips of
a Python package, minutes on two CPU cores.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    config = ConfigDict()
    config.objective = "stage1"
    config.seed = 0  # 0 to 2^32 - 1

    # A workdir whose student and discriminator this run starts from, or a LoRA trained elsewhere (PEFT folder or
    # .safetensors), which replaces stage 1; empty: from the teacher.
    config.init_from = ""
    # A folder that tools/convert_weights.py wrote: unet/, vae/, image_encoder/, dinov2/.
    config.weights = "weights/svd"
    # Architectures to fill with random parameters, instead of `weights` or of some networks in that folder.
    config.random_networks = ConfigDict()

    config.data = ConfigDict()
    config.data.videos = "videos"  # a folder; `demo` names the clips that come with the extra osv_jax[demo]
    # Instead of videos: a dataset of osv_jax.prepare. {height} and {width} in it stand for the size of the clips, for
    # runs with several resolutions.
    config.data.dataset = ""
    config.data.num_workers = 0  # processes that read a dataset; 0: threads, which are fast enough
    config.data.num_frames = 14
    config.data.fps = 7.0
    # (from step, height, width), ascending: what size clips have from which step on.
    config.data.resolutions = ((0, 576, 1024),)
    config.data.motion_bucket_id = 127

    config.batch_size = 8  # over all devices
    config.grad_accum = 1
    config.num_steps = 2000

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 5e-6
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.max_grad_norm = 0.0  # 0: no clipping
    config.optimizer.disc_learning_rate = 5e-6

    config.lora = ConfigDict()
    config.lora.rank = 64
    config.lora.alpha = 64.0
    config.lora.targets = "all"  # or `attention`

    config.trainable = ("lora",)

    config.num_levels = 100
    config.adversarial_weight = 0.1
    config.huber_c = 1e-3
    config.ema_decay = 0.95
    config.boundary = "svd"
    config.discriminator_blocks = (2, 5, 8, 11)
    config.discriminator_input = "latents"  # or `decoded`: through the VAE's decoder
    config.discriminator_frames = 0  # consecutive frames of a clip that it sees, at random; 0: all

    config.dtype = "bfloat16"  # or `float32`
    config.attention = "auto"
    config.remat = "full"
    config.mesh = ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1  # devices that share the parameters
    config.mesh.context = 1  # devices that share each clip's height

    config.log_every = 10
    config.picture_every = 200
    config.checkpoint_every = 200
    config.keep_checkpoints = 2

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
    config.optimizer.disc_learning_rate = 1e-3
    config.lora.rank = config.lora.alpha = 8
    # A grid as fine as the 25 steps that the teacher samples with.
    config.num_levels = 25
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
    # Gentle: this teacher is random, and what pulls the student to real latents pulls it away from the teacher.
    config.optimizer.learning_rate = 2e-4
    config.optimizer.disc_learning_rate = 1e-3
    config.lora.rank = config.lora.alpha = 8
    config.lora.targets = "attention"
    config.discriminator_blocks = (0, 1)
    config.dtype = "float32"
    config.remat = "none"
    config.picture_every = config.checkpoint_every = 30
