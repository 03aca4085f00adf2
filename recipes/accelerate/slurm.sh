#!/usr/bin/env bash
#SBATCH --job-name=entrecipes
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1          # one launcher a machine, which starts a process for each of its GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32           # for all processes of a machine: 4 for each GPU
#SBATCH --signal=B:USR1@120          # time runs out: the last checkpoint holds, and the requeued job goes on from it
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append           # the log of a requeued job goes on, too
#
#   sbatch recipes/accelerate/slurm.sh digits/dit training.images=20k
#   sbatch --nodes=4 --export=ALL,ACCELERATE_CONFIG=fsdp recipes/accelerate/slurm.sh digits/dit
#
# Run it from the checkout's root, in the environment that has entrecipes; the run folder must be on a disk that all machines see.
set -euo pipefail
config=recipes/accelerate/${ACCELERATE_CONFIG:-multi_node}.yaml
gpus=${SLURM_GPUS_ON_NODE:-1}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 10000))  # of its own: jobs may share a machine
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1  # not TERM, which `scancel` sends
cpus=${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}  # which srun does not take over by itself

# --kill-on-bad-exit: when a process dies, the others do not wait for it for ever
srun --kill-on-bad-exit=1 $cpus bash -c '
  exec accelerate launch --config_file "$0" --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * $1))" \
    --machine_rank "$SLURM_PROCID" --main_process_ip "$2" --main_process_port "$3" scripts/train.py "${@:4}"
' "$config" "$gpus" "$first" "$port" "$@" &
wait $!
