"""A configuration for tests of the training program: `configs/finetune.py:tiny`, shrunk as in `micro_stage1`."""

import pathlib
import runpy

import micro_stage1
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    file = pathlib.Path(__file__).parents[1] / "configs" / "finetune.py"
    config = runpy.run_path(str(file))["get_config"]("tiny")
    micro = micro_stage1.get_config()
    for key in ("random_networks", "lora", "picture_every", "log_every"):
        config[key] = micro[key]
    for key in ("videos", "resolutions", "num_frames"):
        config.data[key] = micro.data[key]
    config.trainable = ("lora", "temporal_transformer")
    config.num_steps, config.checkpoint_every, config.keep_checkpoints = 4, 2, 10
    return config
