"""A configuration for tests of the training program: `configs/stage2.py:tiny`, shrunk as in `micro_stage1`."""

import pathlib
import runpy

import micro_stage1
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    file = pathlib.Path(__file__).parents[1] / "configs" / "stage2.py"
    config = runpy.run_path(str(file))["get_config"]("tiny")
    micro = micro_stage1.get_config()
    for key in ("random_networks", "discriminator_blocks", "lora", "picture_every", "log_every"):
        config[key] = micro[key]
    config.data.videos, config.data.num_frames = micro.data.videos, micro.data.num_frames
    config.data.resolutions = ((0, 16, 24), (2, 24, 16))
    config.num_steps, config.checkpoint_every, config.keep_checkpoints = 4, 1, 10
    return config
