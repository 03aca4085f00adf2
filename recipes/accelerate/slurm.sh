#!/usr/bin/env bash
#SBATCH --job-name=entrecipes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # one launcher a machine, which starts a process for each of its GPUs
#SBATCH --gpus-per-node=8
#SBATCH --signal=B:TERM@120          # time runs out: the last checkpoint holds, and the requeued job goes on from it
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#
#   sbatch recipes/accelerate/slurm.sh digits/dit training.images=20k
#   sbatch --nodes=4 --export=ALL,ACCELERATE_CONFIG=fsdp recipes/accelerate/slurm.sh digits/dit
#
# Run it from the checkout's root, in the environment that has entrecipes; the run folder must be on a disk that all machines see.
set -euo pipefail
config=recipes/accelerate/${ACCELERATE_CONFIG:-multi_node}.yaml
gpus=${SLURM_GPUS_ON_NODE:-1}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
trap 'scontrol requeue "$SLURM_JOB_ID"' TERM

# --kill-on-bad-exit: when a process dies, the others do not wait for it for ever
srun --kill-on-bad-exit=1 bash -c '
  exec accelerate launch --config_file "$0" --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * $1))" \
    --machine_rank "$SLURM_PROCID" --main_process_ip "$2" --main_process_port 29500 scripts/train.py "${@:3}"
' "$config" "$gpus" "$first" "$@" &
wait $!
