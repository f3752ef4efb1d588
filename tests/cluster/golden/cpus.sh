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

# setup
export PYTHONPATH=FOLDER/rev2net-small-TIME/code${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
export REV2NET_COMMIT=COMMIT
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}
again() { for try in 1 2 3 4 5 6 7 8 9 10; do scontrol requeue $job && break; sleep 5; done; }
rm -f FOLDER/rev2net-small-TIME/settled-$job
saved="$(cat CWD/out/checkpoints/latest 2> /dev/null)"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/rev2net-small-TIME/%j_%t_log.out --error FOLDER/rev2net-small-TIME/%j_%t_log.err --kill-on-bad-exit=1 --export=ALL PYTHON -u -m submitit.core._submit FOLDER/rev2net-small-TIME


# teardown
status=$?
if rm FOLDER/rev2net-small-TIME/requeue-$job 2> /dev/null; then again
elif [ $status -ne 0 ] && [ ! -e FOLDER/rev2net-small-TIME/settled-$job ] && [ "$(cat CWD/out/checkpoints/latest 2> /dev/null)" != "$saved" ]; then
  echo "a rank ended with status $status, the training goes on from $(cat CWD/out/checkpoints/latest 2> /dev/null)"; again
fi
exit $status