"""Tasks of lm/evals/tasks/ on a checkpoint, or of TOML files of your own, named with commas between
them, or one of the lists below:

    python -m lm.main --config=configs/tasks.py:sst2,piqa --workdir=runs/evals --mode=eval --config.init_from=DIR
    python -m lm.main --config=configs/tasks.py:/data/mine.toml --workdir=runs/mine --mode=eval --config.init_from=DIR

DIR is a Hugging Face checkpoint's directory or a run's. Data is read from TFDS copies, or from
files: --config.evals.piqa.source.path="piqa/{split}.jsonl".
"""  # noqa: E501

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries

# list -> tasks
SIZES = {
    "zero_shot": "sst2,boolq,rte,piqa,hellaswag,lambada",
    "label_words": "sst2,ag_news,trec,imdb,cola,rte,mnli,boolq,banking77",
    "texts": "squad,xsum,wmt14_en_de,gsm8k",
}


def get_config(tasks: str = "zero_shot") -> ConfigDict:
    c = config_lib.default()

    # The longest prompt with its answer. init_from brings the model's own context.
    c.data.length = 1024
    c.model.context_length = 1024

    c.evals.update(entries.tasks(SIZES.get(tasks, tasks)))
    return c
