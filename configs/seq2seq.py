"""An encoder-decoder, tuned on sources and targets of your own: summaries, translations, answers.

    python -m lm.main --config=configs/seq2seq.py:BASE,PATH --workdir=runs/tuned

BASE is the directory of a T5, FLAN-T5 or BART checkpoint, or a run. PATH is JSONL, an object with
"source" and "target" a line; a tenth is held out. With {split} in PATH there are files for train
and validation, and the texts of the latter are generated too, and scored by ROUGE.
"""

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries


def get_config(path: str = "") -> ConfigDict:
    base, _, path = path.partition(",")
    c = config_lib.default()
    c.model = config_lib.model(config_lib.ENCDEC, context_length=512, source_length=512)
    config_lib.start_from(c, base)

    c.data.source = "lm.data.seq2seq.jsonl"
    c.data.source_args = dict(
        path=path, held_out=0.1, held_out_by="hash", source_key="source", target_key="target"
    )
    c.data.length = 128
    c.data.batch_size = 16
    source_length = min(512, c.model.source_length)
    c.objective = ConfigDict(dict(type="lm.objectives.seq2seq", source_length=source_length))
    c.objective.update(label_smoothing=0.0, chunk=0)

    # As T5 was tuned.
    c.optimizer.name = "adafactor"
    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.optimizer.weight_decay = 0.0
    c.train.length = "3 epochs"
    c.checkpoint.every = 200
    c.checkpoint.best = "eval/held_out/loss"

    c.evals.held_out = entries.held_out("TextLoss", every=200, max_documents=500)
    if "{split}" in path:
        c.evals.texts = entries.task(
            "xsum",
            source=dict(path=path, split="validation", tfds="", citation=""),
            prompt=dict(template="{source}"),
            target="{target}",
            references="{target}",
            output=dict(max_new_tokens=c.data.length),
            scores=("rouge1", "rougeL"),
            max_documents=500,
        )
    return c
