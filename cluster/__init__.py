"""Running the training function on a cluster: Slurm through submitit, signals, requeues, a check-up."""
