#!/usr/bin/env bash
# Several machines with GPUs under SLURM, one process for each GPU; set the numbers to your cluster's:
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh --config=configs/stage2.py --workdir=/shared/stage2 ...
#
# The workdir must lie on a disk that all machines see.
#SBATCH --job-name=osv
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Five minutes before the time limit, to every process: each saves the step it is in, and ends with status 143.
#SBATCH --signal=TERM@300
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" || exit 1

export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"

# The processes find each other through SLURM's own variables.
srun --kill-on-bad-exit=0 python -m osv_jax.train "$@"
status=$?
# Stopped, not finished: queue the same job again, which goes on from that step.
if [ "$status" -eq 143 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
