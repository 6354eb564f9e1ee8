"""A corpus that python -m lm.prepare made: --config=configs/corpus.py:OUT/NAME/VERSION.

    python -m lm.main --config=configs/corpus.py:corpora/mine/texts/1.0.0 --workdir=runs/mine

The tokenizer is the corpus's own, and its stored tokens are read. The model and its training are
those of configs/pydocs.py, some 4 minutes on 2 cores.
"""

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries
from lm.models import presets


def get_config(path: str = "") -> ConfigDict:
    c = config_lib.default()
    c.model.update(presets.get("mini"))
    c.model.vocab_size = 0  # the tokenizer's
    c.model.compute_dtype = "bfloat16"
    c.model.scan_unroll = c.model.num_layers

    c.data.source = "lm.data.sources.corpus"
    c.data.source_args = dict(path=path, label_key="", stored_tokens=True)
    c.data.length = 256
    c.tokenizer.path = f"{path}/tokenizer"

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 5e-3
    c.optimizer.schedule = "linear"
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.weight_decay = 0.05

    c.train.length = "500 steps"
    c.checkpoint.every = 100
    c.checkpoint.best = "eval/validation/loss"

    c.evals.validation = entries.perplexity(every=100, max_documents=500)
    c.evals.samples = entries.samples(("",), every=0)
    return c
