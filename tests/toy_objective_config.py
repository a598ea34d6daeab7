"""The configuration of `toy_objective`, on the smallest networks."""

import micro_stage1
import toy_objective  # noqa: F401  (makes its name known)
from ml_collections import ConfigDict

from osv_jax.training.config import default_config


def get_config() -> ConfigDict:
    config, micro = default_config("regression"), micro_stage1.get_config()
    for key in ("weights", "random_networks", "data", "batch_size", "dtype", "remat", "log_every"):
        config[key] = micro[key]
    config.sigma = 2.0
    config.lora.rank = config.lora.alpha = 2
    config.optimizer.learning_rate = 1e-2
    config.num_steps, config.checkpoint_every, config.picture_every = 4, 2, 4
    return config
