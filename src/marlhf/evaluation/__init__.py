"""What `marlhf evaluate` is made of; the job itself is `marlhf.evaluation.job`."""
