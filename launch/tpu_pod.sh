#!/usr/bin/env bash
# A TPU slice of Google Cloud, asked for as a queued resource, from your own machine:
#
#   NAME=osv ZONE=us-west4-a TYPE=v5litepod-16 launch/tpu_pod.sh create    # and wait until it is ACTIVE:
#   NAME=osv ZONE=us-west4-a launch/tpu_pod.sh status
#   NAME=osv ZONE=us-west4-a launch/tpu_pod.sh setup https://github.com/you/osv_jax
#   NAME=osv ZONE=us-west4-a launch/tpu_pod.sh train --config=configs/stage1.py --workdir=gs://my-bucket/stage1 ...
#   NAME=osv ZONE=us-west4-a launch/tpu_pod.sh delete
#
# Every host runs the same command; on a TPU they find each other by themselves. The workdir, the weights and the videos or
# datasets must lie where all of them see them: in a bucket, or on a disk that is mounted on each (Filestore).
set -euo pipefail
: "${NAME:?the name of the slice}" "${ZONE:?its zone}"
action=${1:?create, status, setup, train or delete}
shift

on_all_hosts() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

case $action in
create)
    # SPOT=1 for the cheap kind, which may be taken at any time: create and train again, and training goes on.
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
        --accelerator-type="${TYPE:?e.g. v5litepod-16}" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" ${SPOT:+--spot}
    ;;
status) gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)' ;;
setup)
    # The hosts' own Python is older than the 3.11 that is needed; uv brings one.
    on_all_hosts "git clone ${1:?the address of the repository} osv_jax && cd osv_jax && python3 -m pip install --quiet uv &&
        python3 -m uv venv --quiet --python 3.11 .venv &&
        python3 -m uv pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[gcs]' 'jax[tpu]'"
    ;;
train)
    # 143: SIGTERM came and the last step is saved. Any other failure of one host ends them all.
    on_all_hosts "cd osv_jax && until .venv/bin/python -m osv_jax.train $(printf '%q ' "$@"); do
        [ \$? -eq 143 ] || exit 1; done"
    ;;
delete) gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force ;;
*)
    echo "error: $action is none of create, status, setup, train, delete." >&2
    exit 2
    ;;
esac
