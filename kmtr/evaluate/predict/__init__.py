"""Prediction of a whole dataset with an exported model.

command   what jobs/predict.py does: the model, the dataset, what is refused, what is said
parts     a part of the dataset to its files, by one process; knows no Ray
dense     masks and images: tables, and NIfTI files
ray       parts over the cluster, with Ray Data
"""

from kmtr.evaluate.predict.command import run

__all__ = ["run"]
