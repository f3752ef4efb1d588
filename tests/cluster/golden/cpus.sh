#!/bin/bash

# Parameters
#SBATCH --error=FOLDER/%j_0_log.err
#SBATCH --job-name=rev2net-small
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440
#SBATCH --wckey=submitit

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/%j_%t_log.out --error FOLDER/%j_%t_log.err --kill-on-bad-exit=1 PYTHON -u -m submitit.core._submit FOLDER
