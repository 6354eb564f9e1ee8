"""Supervised tuning of a base model, a run's directory or a Hugging Face checkpoint's:

    python -m lm.main --config=configs/sft.py:flan,BASE --workdir=runs/flan
    python -m lm.main --config=configs/sft.py:opt_iml,BASE --workdir=runs/opt_iml

flan and opt_iml are mixtures of instructions (lm/instructions.py) about the docstrings of this
machine; config.data.source_args.held_out_clusters names what isn't tuned on. More tasks follow with
their files, for training and evals both:

    --config=configs/sft.py:flan,BASE,sst2=data/sst2/{split}.tsv,gsm8k=data/gsm8k/{split}.jsonl,multi30k_en_de=data/multi30k/{split}.{column}

All tasks are evaluated at the end, those that are held out too. --mode=eval in another --workdir,
with the same --config, evaluates the base model.
"""  # noqa: E501

import json

from etils import epath
from ml_collections import ConfigDict

from lm import config as config_lib
from lm import files
from lm.evals import entries

PYDOCS = tuple(name for name in entries.shipped_tasks() if name.startswith("pydocs_"))
EVALUATED = 200  # records of each task


def get_config(argument: str = "flan") -> ConfigDict:
    size, *given = argument.split(",")
    change = config_lib.sized(SIZES, size)
    base, *data = given or [""]

    c = config_lib.default()
    c.init_from = base
    _take_model(c, base)
    c.data.length = min(512, c.model.context_length)
    c.data.batch_size = 16

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-4
    c.optimizer.schedule = "linear"
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.weight_decay = 0.0
    c.train.length = "1 epochs"

    change(c, data)
    return c


def _take_model(c: ConfigDict, base: str) -> None:
    """Takes model and tokenizer of a run. A Hugging Face checkpoint brings its own."""
    file = epath.Path(files.expand(base)) / "config.json"
    saved = json.loads(files.read_text(str(file))) if base and file.exists() else {}
    if isinstance(saved.get("model"), dict):
        c.model.update(config_lib.stored_model(dict(config=saved), str(file)))
        c.tokenizer.path = str(file.parent / "tokenizer")


def _mixture(c: ConfigDict, data: list[str]) -> None:
    """Tunes on instructions, and evaluates every task."""
    sources = {name: {} for name in PYDOCS}
    for item in data:
        name, _, path = item.partition("=")
        sources[name] = _source(name, path) if path else {}

    c.data.source = "lm.instructions.mixture"
    tasks = ConfigDict()
    for name, source in sources.items():
        key = epath.Path(name).stem.replace(".", "_")
        tasks[key] = entries.instructed(name, source=source)
        c.evals[key] = entries.task(name, source=source, max_documents=EVALUATED)
    c.data.source_args = ConfigDict(
        dict(
            tasks=tasks,
            held_out_clusters="choice",
            held_out_tasks="",
            rate_cap=3000,
            rounds=1,
            wording=dict(options=0.5, shots=0, shots_as="turns", most_chars=0, space=True),
            seed=0,
        )
    )
    # "plain" writes nothing between question and answer: evals of the format "text" ask the same.
    c.chat.template = "plain"
    c.evals.validation = entries.held_out("AnswerLoss", every=0, max_documents=500)


def _source(name: str, path: str) -> dict:
    """The files of a task: one, or one for each column of parallel texts."""
    columns = entries.task(name).source.lines
    if not columns:
        return dict(path=path)
    return dict(lines={column: path.replace("{column}", column) for column in columns})


def _flan(c: ConfigDict, data: list[str]) -> None:
    _mixture(c, data)


def _opt_iml(c: ConfigDict, data: list[str]) -> None:
    """FLAN's with examples before the question, and a task of a seen cluster held out."""
    _mixture(c, data)
    c.data.source_args.held_out_tasks = "pydocs_raises"
    # The examples are there to be read.
    c.chat.learnt = "last_answer"
    # Tokens have some three characters.
    most_chars = 2 * c.data.length
    c.data.source_args.wording.update(dict(shots=4, shots_as="turns", most_chars=most_chars))


# What follows the colon -> the function that changes the configuration, by what follows BASE.
SIZES = {"flan": _flan, "opt_iml": _opt_iml}
