"""Translation from German into English, of Multi30k's captions of pictures:

    python -m lm.main --config=configs/multi30k.py:PATH --workdir=runs/multi30k

PATH has train.de, train.en, val.de, val.en, test_2016_flickr.de and test_2016_flickr.en (29,000,
1,014 and 1,000 lines; Elliott et al. 2016). The model is the Transformer of 2017 in a small size,
or with PATH,lstm an LSTM with attention. Texts are lower case, and BLEU is of lower case too.

On 2 cores the Transformer takes an hour and reaches 41.6 BLEU on the test set; the LSTM, a third of
that, reaches 32.0.
"""

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries
from lm.models import presets


def _transformer(c: ConfigDict) -> None:
    c.model = config_lib.model(**presets.get("transformer_base"))
    c.model.update(num_layers=3, encoder_layers=3, embed_dim=256, num_heads=4, mlp_dim=512)
    c.model.scan_unroll = c.model.num_layers
    c.optimizer.name = "muon"


def _lstm(c: ConfigDict) -> None:
    c.model = config_lib.model("lm.models.recurrent", cell="lstm", num_layers=2, encoder_layers=1)
    c.model.update(embed_dim=256, hidden_dim=384, embed_scale=True)
    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 4e-3  # 1e-2 is too much where it lasts for long
    c.train.length = "2 epochs"


# What follows the path -> the function that chooses the model.
MODELS = {"": _transformer, "lstm": _lstm}


def get_config(path: str = "") -> ConfigDict:
    path, _, kind = path.partition(",")
    c = config_lib.default()
    c.data.source = "lm.data.seq2seq.lines"
    c.data.source_args = dict(
        source=f"{path}/{{split}}.de", target=f"{path}/{{split}}.en", lowercase=True
    )
    c.data.length = 128
    c.data.batch_size = 16
    c.tokenizer.vocab_size = 6000
    c.objective = ConfigDict(
        dict(type="lm.objectives.seq2seq", source_length=128, label_smoothing=0.1)
    )

    c.optimizer.learning_rate = 3e-3
    c.optimizer.schedule = "linear"
    c.optimizer.warmup_steps = 200
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.weight_decay = 0.05
    c.optimizer.ema_decay = 0.995
    c.train.length = "12 epochs"
    c.checkpoint.every = 500

    config_lib.sized(MODELS, kind)(c)
    c.model.update(context_length=128, source_length=128, dropout=0.3)
    c.model.vocab_size = 0  # the tokenizer's
    c.model.compute_dtype = "bfloat16"

    c.evals.held_out = entries.held_out("TextLoss", every=250, split="val")
    c.evals.test = entries.task(
        "multi30k_de_en",
        batch_size=64,
        source=dict(lines=dict(de=f"{path}/{{split}}.de", en=f"{path}/{{split}}.en")),
        prompt=dict(template="{de:lower}"),
        target="{en:lower}",
        references="{en:lower}",
        scores=("bleu_lc", "chrf"),
    )
    return c
