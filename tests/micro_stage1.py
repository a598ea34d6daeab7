"""A configuration for tests of the training program: `configs/stage1.py:tiny` with still smaller networks."""

import dataclasses
import pathlib
import runpy

import tiny
from ml_collections import ConfigDict
from small_videos import small_videos


def get_config() -> ConfigDict:
    file = pathlib.Path(__file__).parents[1] / "configs" / "stage1.py"
    config = runpy.run_path(str(file))["get_config"]("tiny")
    configs = tiny.CONFIGS | {"unet": tiny.ONE_LEVEL_UNET}
    config.random_networks = ConfigDict({name: dataclasses.asdict(made) for name, made in configs.items()})
    config.random_networks.dinov2.num_hidden_layers = 1
    config.discriminator_blocks = (0,)
    config.data.resolutions, config.data.num_frames = ((0, 16, 24),), 3
    config.data.videos = str(small_videos())
    config.lora.rank = config.lora.alpha = 4
    config.checkpoint_every, config.picture_every, config.log_every = 3, 1000, 1
    config.keep_checkpoints = 3
    return config
