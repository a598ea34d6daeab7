"""The methods beside OSV on the clips and networks of `micro_stage1`; as a program, a run that kills itself.

`micro_peers.py NAME WORKDIR` trains with the toy, and sends itself SIGKILL two steps after the first checkpoint.
"""

import os
import pathlib
import signal
import sys
import time

import jax
import micro_stage1

from osv_jax.runtime.command_line import read_config

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
STEPS = 24


def get_config(name, *overrides):
    """`configs/NAME.py:tiny` with the clips and networks of `micro_stage1`, its rates being its own.

    Args:
        overrides: as on the command line.
    """
    config = read_config([f"--config={CONFIGS / name}.py:tiny", *overrides])
    micro = micro_stage1.get_config()
    for key in ("random_networks", "data", "log_every", "lora"):
        config[key] = micro[key]
    config.lora.targets = "all"
    if "discriminator_blocks" in config:
        config.discriminator_blocks = micro.discriminator_blocks
    if "phases" in config:
        # The toy has no spatial transformer.
        config.trainable = ("temporal_transformer",)
        config.phases = ((0, "temporal_transformer", 1e-2),)
    config.num_steps, config.checkpoint_every, config.picture_every = STEPS, STEPS // 2, STEPS
    return config


def main(name: str, workdir: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    from toy_unet import toy_training

    from osv_jax import train
    from osv_jax.runtime import checkpoint, metrics

    write = metrics.MetricsWriter.write

    def write_and_die(self, step, row):
        write(self, step, row)
        if step == STEPS // 2 + 2:
            # A checkpoint is written beside training.
            while not checkpoint.latest_step(pathlib.Path(workdir)):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    metrics.MetricsWriter.write = write_and_die
    with toy_training():
        train.train(get_config(name), pathlib.Path(workdir))


if __name__ == "__main__":
    main(*sys.argv[1:])
