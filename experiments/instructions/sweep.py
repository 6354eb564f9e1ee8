"""What does a mixture of instructions teach beyond its own tasks? README.md beside this file has
the answer.

    python -m lm.sweep --sweep=experiments/instructions/sweep.py --workdir=runs/instructions

The base is that of the README, in runs/pydocs.
"""

from configs import sft
from lm.sweep.axes import seeds


def get_config():
    """FLAN's mixture of the tasks about pydocs, two clusters of them held out."""
    c = sft.get_config("flan,runs/pydocs")
    c.data.source_args.held_out_clusters = "choice,yes_no"
    c.data.source_args.rate_cap = 1500
    c.model.compute_dtype = "float32"
    c.optimizer.learning_rate = 1e-3
    c.train.length = "300 steps"
    return c


def get_sweep():
    return seeds(3)
