#!/usr/bin/env bash
# The same run on every host of a TPU pod slice, one process a host.
#
#   ZONE=us-east5-a scripts/tpu_pod.sh my-v5e-256 resolution:2048 gs-mount/runs/2048 \
#       --config.train.batch=64 --config.mesh.space=4
#
# The chips over mesh.space must divide the batch: here one image on each four of 256.
# Each host needs this clone in ~/cxrjax with `uv sync --extra tpu`, and the data and the run's directory at the same
# path of a shared file system. VERB="study resolution" makes it a study; DRY_RUN=1 prints the command instead of running
# it.
set -euo pipefail

usage="usage: [ZONE=Z] [PROJECT=P] [VERB=V] [DRY_RUN=1] $0 TPU CONFIG RUN [--config.key=value ...]"
tpu=${1:?"$usage"}
config=${2:?"$usage"}
run=${3:?"$usage"}

read -ra verb <<<"${VERB:-train}"

printf -v words '%q ' uv run --no-sync cxrjax "${verb[@]}" --config "$config" --workdir "$run" --coordinator auto "${@:4}"
command=(gcloud compute tpus tpu-vm ssh "$tpu" --worker=all --command "cd ~/cxrjax && $words")
[ -z "${ZONE:-}" ] || command+=(--zone "$ZONE")
[ -z "${PROJECT:-}" ] || command+=(--project "$PROJECT")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
