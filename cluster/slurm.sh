#!/usr/bin/env bash
# Meta-training on the nodes of a Slurm job. From a directory that they share, in an environment with metadist:
#   sbatch --nodes=4 cluster/slurm.sh configs/sinusoid_maml.yaml --workers 1:32
#   sbatch --nodes=2 --gpus-per-node=4 cluster/slurm.sh CONFIG --set scaling.use_gpu=true --workers 8
# The arguments are those of `metadist train`. Before the time is up the run writes a checkpoint, and the job goes back
# into the queue, from where it goes on.
#SBATCH --job-name=metadist
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=metadist-%j.log
set -euo pipefail

# A token for this job alone, readable by its owner alone, where every node finds it.
umask 077
private=$(mktemp -d "$HOME/.metadist-job-$SLURM_JOB_ID-XXXXXX")
trap 'kill $(jobs -p) 2> /dev/null || true; rm -rf "$private"' EXIT
python -c 'import secrets; print(secrets.token_hex(32))' > "$private/token"
unset RAY_AUTH_TOKEN
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$private/token"

# This script runs on the first node, which becomes the head.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=${METADIST_RAY_PORT:-6379}
address="$(python -c 'import ray; print(ray.util.get_node_ip_address())'):$port"
ray start --head --block --port="$port" --num-cpus="$SLURM_CPUS_PER_TASK" --include-dashboard=false \
    --temp-dir="/tmp/ray-$SLURM_JOB_ID" --disable-usage-stats &
others=$((${#nodes[@]} - 1))
if [ "$others" -gt 0 ]; then
    # `ray start` itself waits for the head.
    srun --nodes="$others" --ntasks="$others" --exclude="${nodes[0]}" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        ray start --address="$address" --block --num-cpus="$SLURM_CPUS_PER_TASK" &
fi
timeout 300 python - "$address" "${#nodes[@]}" << 'END'
import sys, time
import ray

ray.init(address=sys.argv[1], log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < int(sys.argv[2]):
    time.sleep(1)
END

python -m metadist train "$@" --address "$address" &
run=$!
out_of_time=false
trap 'out_of_time=true; kill -TERM "$run" 2> /dev/null || true' USR1 TERM
status=0
wait "$run" || status=$?
if "$out_of_time"; then
    # The signal ended the first `wait`, not the run, which now writes its checkpoint.
    status=0
    wait "$run" || status=$?
    [ "$status" -ne 130 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
