"""SF-V: adversarial one-step training with the teacher's own encoder as discriminator, a row of OSV's Table 1.

`configs/sf_v.py` holds the paper's settings for 8 devices that share the parameters; `configs/sf_v.py:miniature`
trains the small SVD that comes with the package, on the clips that `make demo` prepares; `configs/sf_v.py:tiny` trains
tiny random networks on the clips of a Python package.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from osv_jax.training.config import default_config


def get_config(variant: str = "") -> ConfigDict:
    stage1 = runpy.run_path(str(pathlib.Path(__file__).with_name("stage1.py")))
    # All keys: osv_jax/objectives/options.py (RunOptions, StudentOptions), osv_jax/objectives/distillation.py
    # (DistillationOptions), osv_jax/objectives/adversarial.py (AdversarialOptions) and osv_jax/objectives/sf_v.py
    # (SFVOptions).
    config = default_config("sf_v")
    config.data.resolutions = ((0, 448, 768),)
    config.batch_size = 32
    config.grad_accum = 4
    config.num_steps = 50_000
    config.mesh.data, config.mesh.fsdp = 1, 8
    config.picture_every = config.checkpoint_every = 500

    if variant == "tiny":
        stage1["make_tiny"](config)
        # SM3 has no bias correction: its first steps are 16 times as large as these.
        config.optimizer.learning_rate = 1e-3
        config.optimizer.disc_learning_rate = 1e-3
    elif variant == "miniature":
        stage1["make_miniature"](config)
        config.data.dataset = "runs/demo/latents"
        config.num_levels = 4
        config.optimizer.learning_rate = 3e-5
        config.optimizer.disc_learning_rate = 3e-4
        config.num_steps = 300
    elif variant:
        raise ValueError(f"configs/sf_v.py has the variants '', 'tiny' and 'miniature', not {variant!r}.")
    if variant:
        config.grad_accum = 1
        config.mesh.data, config.mesh.fsdp = -1, 1
    return config
