"""The run that is disturbed: seconds long, with a bit of everything that a run has to remember."""

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries

EVERY = 6  # steps between evaluations
VERBALIZER = {"red": (" red",), "green": (" green",), "blue": (" blue",)}


def get_config() -> ConfigDict:
    c = config_lib.default()
    sizes = dict(num_layers=2, embed_dim=64, mlp_dim=128, num_heads=2, num_kv_heads=2, head_dim=32)
    c.model.update(sizes | dict(context_length=64, param_dtype="bfloat16"))

    # The path of the corpus is given on the command line.
    c.data.source = "lm.data.sources.jsonl"
    c.data.source_args = dict(path="", held_out=0.2, label_key="label")
    c.data.label_prompt = "\n="
    c.data.update(dict(length=64, batch_size=8, streams=4, packing="first_fit"))
    c.tokenizer.vocab_size = 300

    c.optimizer.rounding = "stochastic"
    c.optimizer.ema_decay = 0.9
    c.train.update(dict(length="120 steps", accumulation=2, log_every=1))

    # Checkpoints in step with evaluations, and out of step.
    c.checkpoint.update(dict(every=4, keep=3, best="eval/text/loss"))
    c.evals.text = entries.perplexity(every=EVERY, max_documents=40, batch_size=8)
    c.evals.label = entries.classification(VERBALIZER, every=EVERY, batch_size=8)
    c.evals.samples = entries.samples(("red", "ab"), every=EVERY, max_new_tokens=8)
    return c
