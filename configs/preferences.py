"""Preferences: a reward model, or a model that is tuned on pairs of a better and a worse answer.

    python -m lm.main --config=configs/preferences.py:reward,BASE --workdir=runs/reward
    python -m lm.main --config=configs/preferences.py:dpo,BASE --workdir=runs/dpo
    python -m lm.main --config=configs/preferences.py:kto,BASE,judged.jsonl --workdir=runs/kto

BASE is a run's directory or that of a Hugging Face checkpoint, mostly of supervised tuning. A size
is reward, or a loss of lm/objectives/preference.py: dpo, robust, hinge, ipo, orpo, simpo, kto. What
follows BASE is a file of pairs (for kto of judged answers) in a format of lm/data/conversations.py,
or a task of lm/evals/tasks/ that has wrong answers; without one the pairs are those of
docs/tuning.md, answers to questions about docstrings with wrong ones as long.

The reference is BASE itself. --config.model.lora_rank=8 --config.objective.reference=base trains
adapters, and takes the model without them; --mode=reference computes what it says beforehand.
"""

from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries
from lm.objectives.preference_losses import LOSSES, WITHOUT_REFERENCE

LENGTH = 512
SIZES = {name: name for name in ("reward", "kto", *LOSSES)}


def get_config(argument: str = "dpo") -> ConfigDict:
    size, *given = argument.split(",")
    loss = config_lib.sized(SIZES, size)
    base, *paths = given or [""]

    c = config_lib.default()
    # Most checkpoints have longer contexts.
    c.model.context_length = LENGTH
    config_lib.start_from(c, base)
    if c.model.positions == "rope":
        # A row has both answers with their prompts, and each of these begins at position 0.
        c.model.context_length = max(LENGTH, c.model.context_length)
    c.data.length = min(LENGTH, c.model.context_length)
    c.data.batch_size = 16
    task = paths[0] if paths and paths[0] in entries.shipped_tasks() else ""
    if paths and not task:
        c.data.source = "lm.data.conversations.conversations"
        path = ",".join(paths)
        c.data.source_args = ConfigDict(dict(path=path, held_out=0.05, held_out_by="hash"))
    else:
        task = task or "pydocs_questions"
        tasks = {task: entries.instructed(task)}
        c.data.batch_size = 8
        c.data.source = "lm.instructions.preferences"
        # As few as show it: the whole walk is half an hour on two cores.
        rate_cap = 5000 if loss == "reward" else 2000
        about = dict(tasks=tasks, rate_cap=rate_cap, wording=dict(space=True))
        c.data.source_args = ConfigDict(about)
    # A tuned base has its template with its tokenizer.
    c.chat.template = "" if base else "plain"

    if loss == "reward":
        c.objective = ConfigDict(dict(type="lm.objectives.reward", centring=0.01))
        c.model.heads = "scalar"
        c.init_new = "heads/*"
        c.optimizer.learning_rate = 5e-4
    else:
        reference = "none" if loss in WITHOUT_REFERENCE else "model"
        c.objective = ConfigDict(dict(type="lm.objectives.preference", loss=loss, beta=0.1))
        c.objective.reference = reference
        # The reference has the logits of a whole batch.
        c.objective.chunk = 128 if c.data.length % 128 == 0 else 0
        c.optimizer.learning_rate = 3e-5
        if base and reference == "model":
            c.models.reference = ConfigDict(dict(init_from=base, model={}))

    c.optimizer.schedule = "linear"
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.weight_decay = 0.0
    c.train.length = "1 epochs"
    c.evals.held_out = entries.held_out("Preferences", every=200, max_documents=500)
    return c
