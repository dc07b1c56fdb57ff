#!/bin/bash
# A stream on a SLURM cluster: `sbatch jobs/launch/slurm.sh [STREAM [more arguments of continual.py]]`, from the
# checkout, which all nodes see.
#
# It differs from the run on a laptop in placement only: `srun` starts a rank for every task instead of `deepspeed`, and
# the job reads SLURM's variables (pipeline/hosts/launcher.py): rank, world size, and as rendezvous the step's first node
# with a port made of the job's number. No hostfile, no ssh.
#
#SBATCH --job-name=perennial
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8        # one task a device
#SBATCH --gpus-per-node=8          # every task sees all devices of its node and takes the one of its SLURM_LOCALID
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120          # two minutes before the time is over the ranks save and end with 75
#SBATCH --requeue
#SBATCH --open-mode=append

set -uo pipefail
STREAM=${1:-jobs/streams/quickstart.yaml}

# the environment that the nodes have in common; `make venv` made it
. .venv/bin/activate
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}   # srun does not inherit it
# Without devices: drop --gpus-per-node and uncomment the next line.
# export DS_ACCELERATOR=cpu
# Where a node has several networks, name the one that the nodes share.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# After the loss of the first node the lock of the job is still there, in another machine's name: see that it is gone,
# then submit again with --break-lock after the stream. One task that fails ends the others; the pipeline's own watchdogs do the same and say who it was.
srun --kill-on-bad-exit=1 python jobs/continual.py --stream "$STREAM" "${@:2}"
code=$?

# 75: stopped on request with the state saved. The same command goes on where it stopped.
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
