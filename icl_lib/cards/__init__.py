"""Cards: what one file says about an experiment or a suite of SAEs, and what its model and tasks can serve."""
