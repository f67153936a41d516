"""The simulated cohort: from a subject's number over anatomy, labels and images to the k-space of a Study."""
