"""The training job: data, step, loop, checkpoints and metrics."""
