"""Supervised tuning of a base model, a run's directory or a Hugging Face checkpoint's:

    python -m lm.main --config=configs/sft.py:alpaca,BASE,alpaca_data.json --workdir=runs/alpaca
    python -m lm.main --config=configs/sft.py:chat,BASE,chats.jsonl --workdir=runs/chat
    python -m lm.main --config=configs/sft.py:questions,BASE --workdir=runs/questions
    python -m lm.main --config=configs/sft.py:summaries,BASE --workdir=runs/summaries
    python -m lm.main --config=configs/sft.py:flan,BASE --workdir=runs/flan
    python -m lm.main --config=configs/sft.py:opt_iml,BASE --workdir=runs/opt_iml

alpaca and chat read conversations in any of the formats of lm/data/conversations.py. A twentieth of
them is held out. alpaca writes them as Stanford Alpaca does; chat in ChatML, whose tokens are added
to a tokenizer that lacks them. --config.model.lora_rank=8 trains adapters.

questions is docs/tuning.md's example: questions about functions, with short answers out of their
docstrings. summaries is what its reinforcement learning starts from: first lines of docstrings.
flan and opt_iml are mixtures of instructions (lm/instructions.py) about the docstrings of this
machine; config.data.source_args.held_out_clusters names what isn't tuned on. More tasks follow with
their files, for training and evals both:

    --config=configs/sft.py:flan,BASE,sst2=data/sst2/{split}.tsv,gsm8k=data/gsm8k/{split}.jsonl,multi30k_en_de=data/multi30k/{split}.{column}

All tasks are evaluated at the end, those that are held out too. --mode=eval in another --workdir,
with the same --config, evaluates the base model.
"""  # noqa: E501

from etils import epath
from ml_collections import ConfigDict

from lm import config as config_lib
from lm.evals import entries

PYDOCS = tuple(name for name in entries.shipped_tasks() if name.startswith("pydocs_"))
EVALUATED = 200  # records of each task
LENGTH = 512


def get_config(argument: str = "flan") -> ConfigDict:
    size, *given = argument.split(",")
    change = config_lib.sized(SIZES, size)
    base, *data = given or [""]

    c = config_lib.default()
    # Most checkpoints have longer contexts.
    c.model.context_length = LENGTH
    config_lib.start_from(c, base)
    c.data.length = min(LENGTH, c.model.context_length)
    c.data.batch_size = 16

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-4
    c.optimizer.schedule = "linear"
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.weight_decay = 0.0
    c.train.length = "1 epochs"

    change(c, data)
    return c


def _conversations(c: ConfigDict, data: list[str]) -> None:
    """Tunes on files."""
    c.data.source = "lm.data.conversations.conversations"
    c.data.source_args = ConfigDict(dict(path=",".join(data), held_out=0.05, held_out_by="hash"))
    c.train.length = "3 epochs"
    c.evals.held_out = entries.held_out("AnswerLoss", every=200, max_documents=500)


def _alpaca(c: ConfigDict, data: list[str]) -> None:
    _conversations(c, data)
    c.chat.template = "alpaca"


def _chat(c: ConfigDict, data: list[str]) -> None:
    _conversations(c, data)
    c.chat.template = "chatml"
    c.tokenizer.reserve = "turns"
    c.init_resize = bool(c.init_from)
    c.model.vocab_size = 0  # the tokenizer's, with the new ones


def _questions(c: ConfigDict, data: list[str]) -> None:
    """Tunes on one task, which the base model is asked with four examples."""
    _one_task(c, data, "pydocs_questions")
    c.data.source_args.rate_cap = 9000
    shots = dict(shots=4, sampler="random")
    c.evals.with_examples = entries.task("pydocs_questions", max_documents=500, prompt=shots)


def _summaries(c: ConfigDict, data: list[str]) -> None:
    """Tunes on the first lines of docstrings."""
    _one_task(c, data, "pydocs_summary")


def _one_task(c: ConfigDict, data: list[str], name: str) -> None:
    _mixture(c, data)
    c.data.source_args.tasks = ConfigDict({name: entries.instructed(name)})
    c.data.source_args.update(held_out_clusters="", rate_cap=6000)
    c.data.batch_size = 8
    c.optimizer.learning_rate = 1e-3
    c.evals = ConfigDict(dict(held_out=entries.held_out("AnswerLoss", every=200)))
    c.evals.questions = entries.task(name, max_documents=500)


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
SIZES = {
    "alpaca": _alpaca,
    "chat": _chat,
    "questions": _questions,
    "summaries": _summaries,
    "flan": _flan,
    "opt_iml": _opt_iml,
}
