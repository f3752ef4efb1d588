#!/bin/bash

# Parameters
#SBATCH --error=FOLDER/rev2net-small-TIME/%j_0_log.err
#SBATCH --gpus-per-node=4
#SBATCH --job-name=rev2net-small
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/rev2net-small-TIME/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60
#SBATCH --wckey=submitit

# setup
export NCCL_DEBUG=WARN
module load apptainer
export PYTHONPATH=FOLDER/rev2net-small-TIME/code${PYTHONPATH:+:$PYTHONPATH}
export PYTHONSAFEPATH=1
export REV2NET_COMMIT=COMMIT

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output FOLDER/rev2net-small-TIME/%j_%t_log.out --error FOLDER/rev2net-small-TIME/%j_%t_log.err --kill-on-bad-exit=1 apptainer exec --nv --bind /data,/scratch /images/rev2net.sif python3 -u -m submitit.core._submit FOLDER/rev2net-small-TIME


# teardown
status=$?
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID}
if rm FOLDER/rev2net-small-TIME/requeue-$job 2> /dev/null; then for try in 1 2 3 4 5 6 7 8 9 10; do scontrol requeue $job && break; sleep 5; done; fi
exit $status