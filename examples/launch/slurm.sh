#!/bin/bash
# Train on the nodes of a Slurm cluster, through time limits and preemptions:
#
#     sbatch --nodes 4 slurm.sh RECIPE RUN [--set a.b=c ...]
#
# The run folder RUN and the data of RECIPE must be on a file system that all nodes see. docs/launch.md explains it.
#
#SBATCH --job-name=gemmule
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1      # torchrun, which starts one process for each GPU of its node
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue                # after preemption and failures of nodes Slurm starts the job again by itself,
#SBATCH --signal=B:USR1@300      # before the time limit this script does: it is told so many seconds earlier
#SBATCH --open-mode=append

set -u
recipe=$1 run=$2
shift 2

# For this long torchrun lets its processes finish their step and save, before it kills them.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=270
# Without it a torchrun that was restarted cannot join those that kept running (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))" --rdzv-id "$SLURM_JOB_ID" \
    -m gemmule train "$recipe" --out "$run" --resume "$@" &
step=$!

# A signal to srun itself would kill; scancel passes it to torchrun on every node.
again=
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

wait "$step"
code=$?
if [ -n "$again" ]; then # the signal ended the first wait
    wait "$step"
    code=$?
    if [ "$code" -ne 0 ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
