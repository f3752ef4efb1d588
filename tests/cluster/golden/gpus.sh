#!/bin/bash

# Parameters
#SBATCH --account=my-project
#SBATCH --cpus-per-task=10
#SBATCH --error=FOLDER/rev2net-small-TIME/%j_0_log.err
#SBATCH --gpus-per-node=4
#SBATCH --job-name=rev2net-small
#SBATCH --mem=245760M
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/rev2net-small-TIME/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440
#SBATCH --wckey=submitit

# setup
export NCCL_DEBUG=WARN
ulimit -n 65536
export PYTHONPATH=FOLDER/rev2net-small-TIME/code${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
export REV2NET_COMMIT=COMMIT

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/rev2net-small-TIME/%j_%t_log.out --error FOLDER/rev2net-small-TIME/%j_%t_log.err --kill-on-bad-exit=1 --cpus-per-task=10 PYTHON -u -m submitit.core._submit FOLDER/rev2net-small-TIME
