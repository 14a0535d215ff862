#!/bin/bash
# One run on the machines of a Slurm allocation: Ray is started on all of them for this job alone.
#   sbatch cluster/slurm.sh configs/sft_lora_ray_gpu.yaml ray_num_workers=8
# Submit from a folder that all machines see, with the environment that has llmray on the PATH.
# A run that was cut short goes on from its newest checkpoint when the same line is given again.

#SBATCH --job-name=llmray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=4
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=llmray-%j.log
# ten minutes before the end of the time: SIGTERM to this script, which saves
#SBATCH --signal=B:TERM@600

set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch $0 RUN.yaml [key=value ...]" >&2
    exit 2
fi

# A token of this job alone: others on these machines cannot use its cluster.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token

# This script runs on the first machine of the allocation: the head.
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(head -n 1 <<< "$nodes")
others=$(tail -n +2 <<< "$nodes" | paste -sd, -)
port=$((20000 + SLURM_JOB_ID % 20000))  # several jobs may share a machine
address=$(hostname --ip-address | tr ' ' '\n' | grep -v '^127\.' | head -n 1)
export RAY_ADDRESS="$address:$port"
cpus=${SLURM_CPUS_PER_TASK:-$(nproc)}
# short: sockets of Ray lie in it, and their paths are limited to 107 characters
temporary=/tmp/ray-$SLURM_JOB_ID

pids=()
# shellcheck disable=SC2329  # by the trap below
end() {  # end what this script started, on all machines
    trap - EXIT
    for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done
    wait || true
    rm -rf "$temporary"
}
trap end EXIT

echo "head $head at $RAY_ADDRESS, others: ${others:-none}"
ray start --head --block --node-ip-address "$address" --port "$port" --num-cpus "$cpus" \
    --include-dashboard false --temp-dir "$temporary" &
pids+=($!)
if [ -n "$others" ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --nodelist="$others" --overlap \
        ray start --block --address "$RAY_ADDRESS" --num-cpus "$cpus" &
    pids+=($!)
fi

# All machines must be there before the run counts them.
waited=0
until ray status --address "$RAY_ADDRESS" 2> /dev/null |
    awk -v want="$SLURM_JOB_NUM_NODES" '/^Active:/ {on = 1; next} /^Pending:/ {on = 0}
        on && /node_/ {found++} END {exit !(found >= want)}'; do
    if [ "$waited" -ge 300 ]; then
        echo "the $SLURM_JOB_NUM_NODES machines did not form a cluster in $waited s" >&2
        exit 1
    fi
    sleep 2
    waited=$((waited + 2))
done

llmray train "$@" &
run=$!
# the first signal asks the run to save and end; `wait` returns early then, so it is asked again
trap 'kill -TERM "$run" 2> /dev/null || true' TERM INT
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do
    code=0
    wait "$run" || code=$?
done
echo "llmray ended with exit code $code"
exit "$code"
