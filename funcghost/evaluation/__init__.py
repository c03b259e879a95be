"""The judge of attributions: retrained models, and what tables of scores foresaw of them.

Nothing here asks where a table of scores comes from. One convention: `scores[i, q]` is what training on sample i adds
to output q, up to a positive factor, so that outputs which fall (losses) go with negative scores of samples that help.
Read `datamodeling.py` first. May import everything below it: losses, transforms, training, attribution, distributed.
"""

from funcghost.evaluation.bank import Bank, retrain
from funcghost.evaluation.datamodeling import LDS, LeaveOneOut, lds, leave_one_out
from funcghost.evaluation.detection import Detection, detection
from funcghost.evaluation.removal import area_between, removal_masks, tail_patch
from funcghost.evaluation.retrieval import mean_reciprocal_rank, recall_at
from funcghost.evaluation.subsets import leave_out, random_subsets

__all__ = [
    "LDS",
    "Bank",
    "Detection",
    "LeaveOneOut",
    "area_between",
    "detection",
    "lds",
    "leave_one_out",
    "leave_out",
    "mean_reciprocal_rank",
    "random_subsets",
    "recall_at",
    "removal_masks",
    "retrain",
    "tail_patch",
]
