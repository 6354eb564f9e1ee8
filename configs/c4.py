"""C4 (English), for GPT-2's, GPT-3's and Llama 2's sizes: --config=configs/c4.py:llama2_7b. For
accelerators; each size has the batch size of its paper.

    python -m lm.main --config=configs/c4.py:gpt2 --workdir=gs://BUCKET/c4-gpt2 --config.data.source_args.data_dir=gs://BUCKET/tfds

Reads a copy of TFDS's c4/en that was prepared as ArrayRecord; the error that comes without one
gives the command.
"""  # noqa: E501

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries
from lm.models import presets

# preset -> (learning rate, tokens a batch, tokens in all): GPT-3's table 2.1, Llama 2's table 1.
# A GPT-2 size takes the values of the GPT-3 size nearest to it.
SIZES = {
    "gpt2": (6e-4, 0.5e6, 300e9),
    "gpt2_medium": (3e-4, 0.5e6, 300e9),
    "gpt2_large": (2.5e-4, 0.5e6, 300e9),
    "gpt2_xl": (2e-4, 1e6, 300e9),
    "gpt3_small": (6e-4, 0.5e6, 300e9),
    "gpt3_medium": (3e-4, 0.5e6, 300e9),
    "gpt3_large": (2.5e-4, 0.5e6, 300e9),
    "gpt3_xl": (2e-4, 1e6, 300e9),
    "gpt3_2.7b": (1.6e-4, 1e6, 300e9),
    "gpt3_6.7b": (1.2e-4, 2e6, 300e9),
    "gpt3_13b": (1e-4, 2e6, 300e9),
    "gpt3_175b": (0.6e-4, 3.2e6, 300e9),
    "llama2_7b": (3e-4, 4e6, 2e12),
    "llama2_13b": (3e-4, 4e6, 2e12),
    "llama2_70b": (1.5e-4, 4e6, 2e12),
}


def get_config(size: str = "gpt2") -> ConfigDict:
    c = config_lib.default()
    learning_rate, batch_tokens, total_tokens = config_lib.sized(SIZES, size)

    c.model.update(presets.get(size))
    c.model.vocab_size = -(-c.model.vocab_size // 128) * 128  # so that a mesh can divide it
    c.model.remat = "full"

    c.data.source = "lm.data.sources.tfds"
    c.data.source_args = dict(name="c4/en", data_dir="", text_key="text", label_key="")
    c.data.length = c.model.context_length
    # A multiple of the streams, which a pod's hosts divide among them.
    c.data.batch_size = max(64, round(batch_tokens / c.data.length / 64) * 64)
    c.data.streams = 64
    c.tokenizer.vocab_size = min(c.model.vocab_size, 32000)
    c.tokenizer.max_documents = 200_000

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = learning_rate
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup_steps = 2000
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.1

    c.train.length = f"{total_tokens:.0f} tokens"
    c.train.log_every = 20
    c.checkpoint.every = 1000
    c.checkpoint.best = "eval/validation/loss"

    c.evals.validation = entries.perplexity(
        every=1000, batch_size=c.data.batch_size, max_documents=5000
    )
    c.evals.samples = entries.samples(("The ", "In 1969, ", "How to "), every=5000)
    return c
