"""Stage 2 of OSV (adversarial consistency distillation), started from a workdir of stage 1 (`--config.init_from=...`).

`configs/stage2.py` holds the paper's settings for 2 devices; `configs/stage2.py:tiny` continues the embedded stage 1;
`configs/stage2.py:miniature` distils the small SVD that comes with the package, see docs/miniature.md.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from osv_jax.training.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    stage1 = runpy.run_path(str(pathlib.Path(__file__).with_name("stage1.py")))
    # All keys: those of configs/stage1.py, and osv_jax/objectives/consistency.py (ConsistencyOptions).
    config = default_config("stage2")
    config.batch_size = 2
    config.num_steps = 20_000
    config.data.resolutions = ((0, 320, 576), (10_000, 576, 1024))
    config.trainable = ("lora", "temporal_transformer")  # ("lora",) alone takes the least memory
    config.solver_steps = 5

    if variant == "tiny":
        stage1["make_tiny"](config)
        config.num_steps = 60
        config.picture_every = config.checkpoint_every = 30
        config.optimizer.learning_rate = 1e-2
        config.data.resolutions = ((0, 32, 48),)
        config.init_from = "runs/demo/stage1"
    elif variant == "miniature":
        stage1["make_miniature"](config)
        # The LoRA of stage 1 is stored in the package; the demo makes the dataset from a few other clips.
        config.init_from = "miniature/stage1"
        config.data.dataset = "runs/demo/latents"
        config.trainable = ("lora",)
        config.lora.rank = config.lora.alpha = 4
        # The teacher's whole trajectory in two parts of eight steps. Samplers of one and two steps visit these two
        # levels alone; what the upper one is to predict is what the lower one does.
        config.num_levels = 17
        config.solver_steps = 8
        config.level_weights = ((9, 0.5), (17, 0.5))
        config.batch_size = 1
        config.num_steps = 20
        config.optimizer.learning_rate = 4e-3
        config.picture_every = config.checkpoint_every = 20
    elif variant:
        raise ValueError(f"configs/stage2.py has the variants '', 'tiny' and 'miniature', not {variant!r}.")
    return config
