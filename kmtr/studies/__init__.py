"""The studies: what pretraining is worth for few labels, and which of its choices matter."""
