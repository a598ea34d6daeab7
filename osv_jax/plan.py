"""Says whether a run fits: `python -m osv_jax.plan --config=configs/stage2.py --topology=v5e:4x4`.

Compiles the real step of every resolution of a configuration for devices that need not be there, and prints for one
device: its memory, operations, what it sends to others, the traffic with its memory and what causes it, and bounds on
the time of a step. Compilation is stopped when all memory has been assigned; the code that would follow takes most of
its time. Topologies: a TPU slice by its chips (v5e:4x4, v5p:2x2x2, v6e:2x2; needs the package libtpu), GPUs of one
machine or of several (h100:8, h100:2x8; needs the extra plan-gpu), the GPU that is nearest to a size (gpu:8x80GB), or
this machine (cpu, cpu:8: an upper bound, as it computes bfloat16 in float32). Keys of the configuration are changed as
in training.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from osv_jax.errors import UserError
from osv_jax.planning.report import make_plan
from osv_jax.runtime import command_line


def run() -> None:
    """The program: exit status 1 if something does not fit; what the user can fix is one sentence and status 2."""
    config = config_flags.DEFINE_config_file("config", help_string="A file of configs/, e.g. configs/stage2.py.")
    topology = flags.DEFINE_string(
        "topology", "cpu", "v5e:4x4, v5p:2x2x2, v6e:2x2, h100:8, h100:2x8, gpu:8x80GB, or cpu."
    )

    def main(argv: list[str]) -> int:
        if config.value is None:
            raise UserError("--config is needed, e.g. --config=configs/stage2.py.")
        return 0 if make_plan(config.value, topology.value) else 1

    command_line.run(main)


if __name__ == "__main__":
    run()
