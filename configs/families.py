"""Models of other families on the main job's texts, the docstrings of this machine's packages:

    python -m lm.main --config=configs/families.py:encoder --workdir=runs/encoder

encoder is configs/pydocs.py's model that sees all of a text. It finds masked tokens again, and is
asked for the library of a document by the same label words: a mask stands behind the question. bert
is BERT's architecture in that size. In its first hundreds of steps it learns little more than how
frequent tokens are, and it has ten times as many. lstm is a recurrent net, which predicts the next
token. t5 is an encoder-decoder, which finds spans again, and is asked for a label word as for a
span. prefix is the decoder of configs/pydocs.py, which sees the beginning of each text whole.
"""

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries
from lm.models import presets

VERBALIZER = {"python": (" python",), "numpy": (" numpy",), "scipy": (" scipy",), "jax": (" jax",)}


def get_config(size: str = "encoder") -> ConfigDict:
    change = config_lib.sized(SIZES, size)

    c = config_lib.default()
    c.data.label_prompt = "\n\nLibrary:"
    c.data.length = 256
    c.data.batch_size = 16
    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 5e-3
    c.optimizer.schedule = "linear"
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.weight_decay = 0.05
    c.train.length = "500 steps"
    c.checkpoint.every = 100

    c.evals.library = entries.classification(VERBALIZER, every=0)

    change(c)
    c.model.vocab_size = 0  # the tokenizer's
    return c


def _bert(c: ConfigDict) -> None:
    _encoder(c)
    c.model.update(presets.get("bert_mini"))
    c.objective.rate = 0.15
    c.train.length = "5000 steps"
    c.checkpoint.every = 500
    c.evals.masked.every = 500


def _encoder(c: ConfigDict) -> None:
    c.model.update(presets.get("mini"))
    c.model.visible = "full"
    c.model.scan_unroll = c.model.num_layers
    c.tokenizer.reserve = "mask"
    # Twice BERT's: a step has twice the targets.
    c.objective = ConfigDict(dict(type="lm.objectives.masked", rate=0.3, whole_words=False))
    c.objective.update(random_share=0.1, kept_share=0.1, chunk=64, z_loss=0.0)
    c.evals.masked = entries.held_out("TextLoss", every=100, max_documents=120)
    c.evals.pseudo = entries.pseudo_perplexity(every=0, max_documents=20)


def _t5(c: ConfigDict) -> None:
    c.model = config_lib.model(**presets.get("t5_mini"))
    c.model.scan_unroll = c.model.num_layers
    c.tokenizer.reserve = "sentinels:100"
    # Shorter spans than T5's, and more of them: a label is one word.
    c.objective = ConfigDict(dict(type="lm.objectives.span_corruption", source_length=256))
    c.objective.update(rate=0.3, mean_span=2.0, z_loss=0.0, chunk=0)
    # As many tokens a row as of a source.
    c.data.length = 128
    c.evals.spans = entries.held_out("TextLoss", every=100, max_documents=120)
    c.evals.library.fill = "infill"


def _prefix(c: ConfigDict) -> None:
    c.model.update(presets.get("mini"))
    c.model.scan_unroll = c.model.num_layers
    c.objective = ConfigDict(dict(type="lm.objectives.prefix", z_loss=0.0, chunk=0))
    c.evals.behind_prefix = entries.held_out("TextLoss", every=100, max_documents=120)


def _lstm(c: ConfigDict) -> None:
    c.model = config_lib.model(**presets.get("lstm_mini"))
    # Of 1e-2, 2e-2 and 4e-2 the best after 100 steps, and far better than AdamW's best of them.
    c.optimizer.learning_rate = 2e-2
    c.evals.part = entries.perplexity(every=100, max_documents=120)
    c.evals.validation = entries.perplexity(every=0)


# What follows the colon -> the function that changes the configuration.
SIZES = {"encoder": _encoder, "bert": _bert, "lstm": _lstm, "t5": _t5, "prefix": _prefix}
