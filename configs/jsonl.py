"""Your own JSONL, an object with a text a line: a file, a folder (all .jsonl files in it) or a glob
pattern.

    python -m lm.main --config=configs/jsonl.py:PATH --workdir=runs/jsonl --config.data.source_args.text_key=body

With --config.data.source_args.label_key=KEY the model learns labels too, after
config.data.label_prompt. A tenth of the objects is held out. PATH may be gs://, files may be packed
(.jsonl.gz, .jsonl.zst), and "data/{split}.jsonl" stands for train.jsonl and validation.jsonl. The
model and its training are those of configs/pydocs.py, some 4 minutes on 2 cores.
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

    c.data.source = "lm.data.sources.jsonl"
    c.data.source_args = dict(
        path=path, held_out=0.1, held_out_by="hash", text_key="text", label_key=""
    )
    c.data.label_prompt = "\n\nLabel:"
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
