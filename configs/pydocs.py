"""The main job: a small Transformer on the docstrings of this machine's Python, numpy, scipy and
jax.

    python -m lm.main --config=configs/pydocs.py --workdir=runs/pydocs

On 2 cores, in some 5 minutes: 1.78 bits per byte on the validation split (`xz -9e`: 1.72), and the
right library for 86% of the documents (the most frequent one: 36%). `:small`, in 44 minutes: 1.46
and 88%.
"""

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries
from lm.models import presets

VERBALIZER = {"python": (" python",), "numpy": (" numpy",), "scipy": (" scipy",), "jax": (" jax",)}
PROMPTS = ("Return the ", "Compute the eigenvalues of ", "Raise an exception if ")

# size -> (length, steps between the evals of a part of the validation split)
SIZES = {"micro": ("200 steps", 50), "mini": ("500 steps", 100), "small": ("1300 steps", 200)}


def get_config(size: str = "mini") -> ConfigDict:
    c = config_lib.default()
    length, every = config_lib.sized(SIZES, size)

    c.model.update(presets.get(size))
    c.model.vocab_size = 0  # the tokenizer's
    # bf16 matmuls are 1.4 times as fast as f32 on a CPU that has them (AVX512-BF16), slower on
    # those before.
    c.model.compute_dtype = "bfloat16"
    c.model.scan_unroll = c.model.num_layers

    c.data.label_prompt = "\n\nLibrary:"
    c.data.length = min(256, c.model.context_length)
    c.data.batch_size = 16

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 5e-3
    c.optimizer.schedule = "linear"
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.weight_decay = 0.05

    c.train.length = length
    c.checkpoint.every = every
    c.checkpoint.best = "eval/part/loss"

    # The whole split, the library and the samples come at the end only.
    c.evals.part = entries.perplexity(every=every, max_documents=120)
    c.evals.validation = entries.perplexity(every=0)
    c.evals.library = entries.classification(VERBALIZER, every=0)
    c.evals.samples = entries.samples(PROMPTS, every=0)
    return c
