#!/bin/bash
# A job of several nodes whose checkpoints land on the nodes' own disks first:
#
#     sbatch examples/slurm.sh
#
# It is requeued when a node fails, or when its time is up, and goes on from the newest checkpoint that is complete: on the
# nodes, if it gets the same ones again, else at home.
#SBATCH --job-name=train-gpt
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -u

HOME_OF_CHECKPOINTS=${HOME_OF_CHECKPOINTS:-$SCRATCH/train-gpt}  # a directory that all nodes see
NODE_TIER=${NODE_TIER:-/local/ckpt}                              # a directory on a disk of each node
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$first:29500" \
    examples/train_gpt.py --device=cuda --resume --iterations=1000000 --save-every=10 \
    --directory="$HOME_OF_CHECKPOINTS" --node-tier="$NODE_TIER" &
training=$!
stopped=0
trap 'stopped=1; kill -TERM "$training"' TERM
wait "$training"
code=$?
[ "$stopped" = 1 ] && { wait "$training"; code=$?; }

# Slurm ends whatever the job has left on its nodes, the drains, too. So what they have not brought home yet is brought now.
run=$(sed -n 's/.*"run": *"\([^"]*\)".*/\1/p' "$HOME_OF_CHECKPOINTS/.run" 2>/dev/null)
[ -n "$run" ] && srun python -m ckpt drain --once "$NODE_TIER/$run"
# And from there to an object store, if there is one, by this node alone. Credentials come from the environment.
for place in "$HOME_OF_CHECKPOINTS"/.remote/*/; do
    [ -e "$place/remote.json" ] && python -m ckpt drain --once "$place"
done

[ "$stopped" = 1 ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
