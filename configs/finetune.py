"""A head on top of a base model, trained on a classification task beside the way by label words:

    python -m lm.main --config=configs/finetune.py:sst2,BASE,data/sst2/{split}.tsv --workdir=runs/sst2
    python -m lm.main --config=configs/finetune.py:pydocs_section,runs/encoder --workdir=runs/kind

The first name is a task with a table [instructions] (lm/evals/tasks/) or the path of a .toml file,
BASE a run's directory or that of a Hugging Face checkpoint, the third the task's files where it has
any. The head reads the same prompts that label words are asked after: at [CLS] of an encoder, at the
last token of another model. All weights are trained; --config.model.lora_rank=8 with
--config.train.trained='*_lora_?,heads/*' trains adapters and the head.

`eval/head` is what the head says, `eval/words` what the label words say, of the same records; with
--mode=eval in another --workdir, what the words of the base say.
"""  # noqa: E501

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries

LENGTH = 512
EVALUATED = 1000  # records
SIZES = {"pydocs_library": "", "pydocs_section": ""}


def get_config(argument: str = "pydocs_library") -> ConfigDict:
    name, *given = argument.split(",")
    base, *paths = given or [""]

    c = config_lib.default()
    # Most checkpoints have longer contexts.
    c.model.context_length = LENGTH
    config_lib.start_from(c, base)
    c.data.length = min(LENGTH, c.model.context_length)
    c.data.batch_size = 16

    source = dict(path=",".join(paths)) if paths else {}
    task = entries.instructed(name, source=source)
    num_labels = len(task.verbalizer.words[0])
    c.data.source = "lm.instructions.labelled_texts"
    c.data.source_args = ConfigDict(dict(task=task, template=0, rate_cap=0, seed=0))
    c.objective = ConfigDict(dict(type="lm.objectives.labels"))
    c.model.heads = f"classes:{num_labels}"
    c.init_new = "heads/*" if base else ""

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-4
    c.optimizer.schedule = "linear"
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.weight_decay = 0.01
    c.train.length = "3 epochs"

    c.evals.head = entries.head_outputs(every=200, max_documents=EVALUATED)
    c.evals.words = entries.task(name, source=source, max_documents=EVALUATED)
    return c
