"""From a dataset to batches: the order of subjects, shapes, collating on the host, drawing on the device."""
