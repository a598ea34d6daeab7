#!/usr/bin/env bash
# The same on a GKE cluster, through xpk (`pip install xpk`), which restarts a preempted job:
#
#   CLUSTER=tpus TYPE=v5litepod-16 IMAGE=region-docker.pkg.dev/project/osv/osv:1 launch/xpk.sh stage1 \
#       --config=configs/stage1.py --workdir=gs://my-bucket/stage1 ...
#
# The image holds this repository at /osv_jax, installed with .[gcs] and jax[tpu]; the workdir, the weights and the videos or
# datasets lie in a bucket, or on a volume that all of its hosts mount.
set -euo pipefail
: "${CLUSTER:?the GKE cluster}" "${TYPE:?e.g. v5litepod-16}" "${IMAGE:?the image with osv_jax in it}"
workload=${1:?a name for the job}
shift
# Any status but 0 restarts the job, 143 after a preemption among them.
xpk workload create --cluster="$CLUSTER" --workload="$workload" --tpu-type="$TYPE" --docker-image="$IMAGE" \
    --max-restarts="${RESTARTS:-100}" --command="cd /osv_jax && python -m osv_jax.train $(printf '%q ' "$@")"
