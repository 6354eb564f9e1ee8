"""nanoGPT's CPU recipe for tiny Shakespeare, on bytes: 4 layers, 4 heads, width 128, context 64,
batch 12, 2,000 steps.

    python -m lm.main --config=configs/shakespeare_char.py --workdir=runs/shakespeare --config.data.source_args.path=input.txt

The text is input.txt of github.com/karpathy/char-rnn, data/tinyshakespeare. nanoGPT's README
reports a validation loss of 1.88 for this recipe (in nats a character; a byte here: the text is
ASCII). Here: 1.879, in a few minutes on 2 cores, with bf16 parameters and stochastic rounding.
"""  # noqa: E501

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries
from lm.models import presets


def get_config() -> ConfigDict:
    c = config_lib.default()
    c.model.update(presets.get("nanogpt_cpu"))
    c.model.vocab_size = 0  # the tokenizer's
    c.model.param_dtype = "bfloat16"
    c.model.scan_unroll = c.model.num_layers

    c.tokenizer.kind = "bytes"
    c.data.source = "lm.data.sources.text"
    c.data.source_args = dict(
        path="", held_out=0.1, held_out_by="tail", separator="", document_chars=4096
    )
    c.data.length = 64
    c.data.batch_size = 12
    # Rows of several documents in mixed order.
    c.data.streams = 12
    c.data.packing_bins = 256

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.final_learning_rate = 0.1
    c.optimizer.warmup_steps = 100
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.99
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip_norm = 1.0

    c.train.length = "2000 steps"
    c.train.log_every = 50
    c.checkpoint.every = 500
    c.checkpoint.best = "eval/validation/loss"

    c.evals.validation = entries.perplexity(every=500, batch_size=64)
    c.evals.samples = entries.samples(("ROMEO:",), every=1000, max_new_tokens=50)
    return c
