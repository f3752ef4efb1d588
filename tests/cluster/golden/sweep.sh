#!/bin/bash

# Parameters
#SBATCH --array=0-5%6
#SBATCH --error=FOLDER/rev2net-sweep-demo-TIME/%A_%a_0_log.err
#SBATCH --gpus-per-node=2
#SBATCH --job-name=rev2net-sweep-demo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/rev2net-sweep-demo-TIME/%A_%a_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
export PYTHONPATH=FOLDER/rev2net-sweep-demo-TIME/code${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
export REV2NET_COMMIT=COMMIT
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}
again() { for try in 1 2 3 4 5 6 7 8 9 10; do scontrol requeue $job && break; sleep 5; done; }

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/rev2net-sweep-demo-TIME/%A_%a_%t_log.out --error FOLDER/rev2net-sweep-demo-TIME/%A_%a_%t_log.err --kill-on-bad-exit=1 --export=ALL PYTHON -u -m submitit.core._submit FOLDER/rev2net-sweep-demo-TIME


# teardown
status=$?
if rm FOLDER/rev2net-sweep-demo-TIME/requeue-$job 2> /dev/null; then again
fi
exit $status