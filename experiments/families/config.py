"""A model of each family on pydocs' texts, at one budget of FLOPs; README.md has what came.

python -m lm.main --config=experiments/families/config.py:lstm --workdir=RUNS/lstm-0
"""

from ml_collections import ConfigDict

from configs import families, pydocs
from lm import config as config_lib
from lm.evals import entries

# Family -> steps of as many model FLOPs as 500 of the causal model, 2.295e13 (table.py has them).
STEPS = dict(causal=500, prefix=500, encoder=537, bert=554, t5=349, lstm=432)
LEFT_TO_RIGHT = ("causal", "prefix", "lstm")


def get_config(family: str = "causal") -> ConfigDict:
    steps = config_lib.sized(STEPS, family)
    c = pydocs.get_config() if family == "causal" else families.get_config(family)
    c.model.compute_dtype = "bfloat16"
    c.train.length = f"{steps} steps"
    c.checkpoint.every = steps // 4
    c.checkpoint.best = ""

    evals = dict(library=c.evals.library)
    evals["library"].every = steps // 4
    if family in LEFT_TO_RIGHT:
        evals["validation"] = entries.perplexity(every=0)
    c.evals = evals
    return c
