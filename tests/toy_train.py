"""One process of a run of `osv_jax.train` with the toy: `toy_train.py WORKDIR VIDEOS STEPS DEVICES SECONDS`.

Every step takes at least so many seconds, and a line of `read_<process>.jsonl` tells which clips this process read.
"""

import json
import pathlib
import sys
import time

import jax
import micro_finetune

from osv_jax import train
from osv_jax.runtime import checkpoint, distributed, ending, mesh


def main(argv: list[str]) -> None:
    workdir, videos, steps, devices, seconds = argv
    workdir = pathlib.Path(workdir)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    distributed.join()
    from toy_unet import toy_networks

    config = micro_finetune.get_config()
    config.data.videos, config.num_steps, config.batch_size = videos, int(steps), 8
    config.mesh.data, config.mesh.fsdp = -1, 2
    config.lora.targets, config.checkpoint_every = "all", 4
    mesh._MIN_SHARDED_ELEMENTS = 16  # Or nothing of the toy would be split.
    global_batches = mesh.global_batches

    def recorded(local_batches, devices):
        def read():
            for number, local in enumerate(local_batches, (checkpoint.latest_step(workdir) or 0) + 1):
                with (workdir / f"read_{jax.process_index()}.jsonl").open("a") as file:
                    file.write(json.dumps([number, local["clip_id"].tolist()]) + "\n")
                time.sleep(float(seconds))
                yield local

        return global_batches(read(), devices)

    mesh.global_batches = recorded
    with toy_networks(), distributed.quiet_but_first():
        train.train(config, workdir)


if __name__ == "__main__":
    ending.run(lambda: main(sys.argv[1:]))
