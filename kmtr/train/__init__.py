"""The training path: DeepSpeed engine, checkpoints, the loop of one worker, and the driver on Ray Train."""
