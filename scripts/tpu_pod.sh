#!/usr/bin/env bash
# Start the same run on every host of a TPU pod slice, one process per host.
#
#   ZONE=us-east5-a scripts/tpu_pod.sh my-v5e-256 resolution:2048 gs-mount/runs/2048 \
#       --config.train.batch_size=64 --config.mesh.space=4
#
# The number of chips divided by mesh.space must divide the batch: here each image is on 4 of 256 chips.
# Each host needs this clone in ~/cxrjax with `uv sync --extra tpu`, and the data and the run directory at the same path
# of a shared file system. COMMAND="study resolution" runs a study; DRY_RUN=1 prints the command and does not run it.
set -euo pipefail

usage="usage: [ZONE=Z] [PROJECT=P] [COMMAND=C] [DRY_RUN=1] $0 TPU CONFIG RUN [--config.key=value ...]"
tpu=${1:?"$usage"}
config=${2:?"$usage"}
run=${3:?"$usage"}

read -ra subcommand <<<"${COMMAND:-train}"

printf -v remote '%q ' uv run --no-sync cxrjax "${subcommand[@]}" --config "$config" --workdir "$run" --coordinator auto "${@:4}"
command=(gcloud compute tpus tpu-vm ssh "$tpu" --worker=all --command "cd ~/cxrjax && $remote")
[ -z "${ZONE:-}" ] || command+=(--zone "$ZONE")
[ -z "${PROJECT:-}" ] || command+=(--project "$PROJECT")
if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
else
    exec "${command[@]}"
fi
