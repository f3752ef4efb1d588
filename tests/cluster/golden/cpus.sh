#!/bin/bash

# Parameters
#SBATCH --error=FOLDER/rev2net-small-TIME/%j_0_log.err
#SBATCH --job-name=rev2net-small
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/rev2net-small-TIME/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440
#SBATCH --wckey=submitit

# setup
export PYTHONPATH=FOLDER/rev2net-small-TIME/code${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
export REV2NET_COMMIT=COMMIT

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/rev2net-small-TIME/%j_%t_log.out --error FOLDER/rev2net-small-TIME/%j_%t_log.err --kill-on-bad-exit=1 PYTHON -u -m submitit.core._submit FOLDER/rev2net-small-TIME
