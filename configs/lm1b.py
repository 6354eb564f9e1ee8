"""The One Billion Word benchmark, for any preset: --config=configs/lm1b.py:gpt2. Sentences, packed
into rows of 256 tokens.

    python -m lm.main --config=configs/lm1b.py --workdir=runs/lm1b --config.data.source_args.data_dir=DIR

Reads a copy of TFDS's lm1b that was prepared as ArrayRecord; the error that comes without one gives
the command.
"""  # noqa: E501

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries
from lm.models import presets


def get_config(size: str = "gpt2") -> ConfigDict:
    c = config_lib.default()
    c.model = config_lib.model(**presets.get(size))
    c.model.vocab_size = 0  # the tokenizer's

    c.data.source = "lm.data.sources.tfds"
    c.data.source_args = dict(name="lm1b", data_dir="", text_key="text", label_key="")
    c.data.length = min(256, c.model.context_length)
    c.data.batch_size = 512
    c.data.streams = 64
    c.tokenizer.vocab_size = 32000
    c.tokenizer.max_documents = 1_000_000

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 6e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 1000
    c.optimizer.weight_decay = 0.1

    c.train.length = "100000 steps"
    c.train.log_every = 20
    c.checkpoint.every = 1000
    c.checkpoint.best = "eval/validation/loss"

    # The benchmark has no validation split of its own.
    c.evals.validation = entries.perplexity(
        every=1000, split="test", batch_size=512, max_documents=20_000
    )
    c.evals.samples = entries.samples(("The ", "On Monday , "), every=5000)
    return c
