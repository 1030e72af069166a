#!/bin/bash
# parallel.train on several machines of a SLURM cluster: one torchrun a machine, which meet at the first one.
#
#     sbatch --nodes 2 --gpus-per-node 8 parallel/slurm.sh --preset laptop --fsdp 8 --dp 2 --folder runs/two-machines
#
# The folder has to be on a disk that all machines see. Neighbouring ranks are on one machine: give tp and fsdp at most
# as many ranks as a machine has GPUs, and let dp and pp cross between machines.
#SBATCH --job-name groundup
#SBATCH --ntasks-per-node 1
#SBATCH --output %x-%j.log
set -euo pipefail

gpus="${SLURM_GPUS_ON_NODE:-1}"
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
srun --kill-on-bad-exit=1 python -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$gpus" \
  --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
  -m parallel.train "$@"
