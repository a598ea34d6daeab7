#!/usr/bin/env bash
# One machine with NVIDIA GPUs, all of them in one process:
#
#   launch/gpu_host.sh --config=configs/stage1.py --workdir=runs/stage1 --config.batch_size=8 ...
#
# Started again after a crash or a SIGTERM it goes on from the last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

# JAX reserves 75% of each GPU unless told otherwise; what is left beside 92% is for cuDNN, NCCL and the driver.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
# Gathering fsdp's weights and summing gradients while other work is computed.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"

exec python -m osv_jax.train "$@"
