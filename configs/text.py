"""Your own text: a file, a folder (all files in it) or a glob pattern.

    python -m lm.main --config=configs/text.py:PATH --workdir=runs/text
    python -m lm.main --config=configs/text.py:"texts/**/*.txt" --workdir=runs/text --config.data.source_args.separator="\\n\\n"

A file is a document, and without other files its last tenth is held out. The second command makes a
document of each paragraph, and holds out a tenth of them. PATH may be gs://, and files may be
packed (.gz, .zst). The model and its training are those of configs/pydocs.py, some 4 minutes on
2 cores. Where labels are to be learnt, see configs/jsonl.py.
"""  # noqa: E501

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

    c.data.source = "lm.data.sources.text"
    c.data.source_args = dict(
        path=path, held_out=0.1, held_out_by="hash", separator="", document_chars=4096
    )
    c.data.length = 256

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 5e-3
    c.optimizer.schedule = "linear"
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.weight_decay = 0.05

    c.train.length = "500 steps"
    c.checkpoint.every = 100
    c.checkpoint.best = "eval/validation/loss"

    # The text's language isn't known: samples begin with nothing.
    c.evals.validation = entries.perplexity(every=100, max_documents=500)
    c.evals.samples = entries.samples(("",), every=0)
    return c
