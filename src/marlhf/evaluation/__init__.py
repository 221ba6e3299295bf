"""Building blocks of `marlhf evaluate`; the job itself is `marlhf.evaluation.job`."""
