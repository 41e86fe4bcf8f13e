"""Model soups."""

from lightning_reg.averaging._ancestry import ancestry
from lightning_reg.averaging._batch_norm import reestimate_batchnorm
from lightning_reg.averaging._greedy import SoupResult, greedy_soup
from lightning_reg.averaging._learned import LearnedSoup
from lightning_reg.averaging._merging import dare_merge, slerp_merge, ties_merge, wise_ft
from lightning_reg.averaging._state_dicts import average_state_dicts

__all__ = [
    "LearnedSoup",
    "SoupResult",
    "ancestry",
    "average_state_dicts",
    "dare_merge",
    "greedy_soup",
    "reestimate_batchnorm",
    "slerp_merge",
    "ties_merge",
    "wise_ft",
]
