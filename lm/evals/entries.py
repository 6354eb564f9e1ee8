"""Entries of config.evals: functions that make them, and the keys that each type of task has.

An entry is a ConfigDict. `type` names the class of the evaluator, the other keys are its arguments.
Three keys are for the caller (lm/build.py, lm/train.py):

  every       steps between two evaluations in training; 0: only at the last step
  batch_size  rows of a batch
  split       split of the run's own documents that is evaluated, or of the entry's own `source`

All entries are evaluated at the last step of training, and by --mode=eval.
"""

import pathlib
import tomllib
import types
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lm import files

# The keys of a task by its type, with their defaults. A TOML file of lm/evals/tasks/ says what
# differs. It is read when a configuration is made, so that config.json holds all of a task, and
# each key can be overridden.

_SOURCE = dict(
    path="",  # a .jsonl, .json, .csv or .tsv file; "{split}" in it is replaced
    lines={},  # column -> text file, line by line (parallel texts)
    tfds="",  # a data set of TFDS, for where there are neither path nor lines
    pydocs="",  # or a family of lm.data.pydocs_tasks.FAMILIES
    data_dir="",  # where the TFDS data set, or pydocs, is prepared; "": the default
    split="test",  # the split that is evaluated
    shots_split="",  # the split that examples come from: never the one that is evaluated
    citation="",
)

_PROMPT = dict(
    shots=0,  # examples before the question
    sampler="balanced",  # balanced (over the labels) | first_n | random
    separator="\n\n",  # after each example
    format="text",  # text | chat, in the tokenizer's chat template
    system="",  # the chat's first message; "": none
)

TASKS = {
    "lm.evals.classification.PromptClassification": dict(
        source=_SOURCE,
        # All combinations of templates, verbalizers and seeds are asked.
        prompt=_PROMPT | dict(templates=(), seeds=(0,)),
        label="label",  # column of the right label: its name or its number
        verbalizer=dict(
            # One or more verbalizers, each ((label, (word, ...)), ...).
            words=(),
            terminator="",  # text after each word, scored with it
            boundary="strict",  # strict | common_prefix | lm_eval
            aggregate="sum",  # sum | mean | max | logmeanexp, of the words of a label
            length_norm="none",  # none | token | char | byte
            weights=(),  # one for each word, with aggregate="sum"
            # of models that fill blanks: text behind the word, given | ltr | parallel | max_first |
            # infill, how they are filled (lm.evals.predict.FILLS)
            after="",
            fill="ltr",
        ),
        priors=("content_free", "domain", "pmi_dc", "batch"),
        ensemble="mean_prob",  # mean_prob | mean_logprob
        temperature_examples=0,  # examples of shots_split that fit a temperature
        max_documents=0,  # evenly out of the split; 0: all
    ),
    "lm.evals.choice.MultipleChoice": dict(
        source=_SOURCE,
        prompt=_PROMPT | dict(template="", seed=0),
        choices=(),  # templates of the continuations
        answer="label",  # column of the right choice, or its number
        answers=(),  # templates of the choices' names, of which the column holds one
        premise="",  # text that the choices are scored after too
        boundary="strict",
        max_documents=0,
    ),
    "lm.evals.generation.TextGeneration": dict(
        source=_SOURCE,
        prompt=_PROMPT | dict(template="", seed=0, sampler="random"),
        target="",  # template of the answer in examples; "": the references'
        references="",  # template of the right answers
        scores=(),  # names of lm.evals.scores.text_metrics.SCORES
        max_documents=0,
        output=dict(
            max_new_tokens=64,
            stop=("\n",),  # texts that end an answer
            extract="",  # regular expression of the answer in the text; "": all of it
            normalize="none",  # none | squad | unicode | number
            tokenize="13a",  # of BLEU, ROUGE and f1: lm.evals.scores.text_metrics.TOKENIZERS
            num_beams=1,  # of a beam search (lm/decoding/beams.py); 1: greedy
            length_penalty=1.0,
            no_answer="",  # the right answer of records without references; "": all have some
        ),
    ),
    # The prompts of PromptClassification; the words say only where the vectors start.
    "lm.evals.linear.LinearVerbalizer": dict(
        source=_SOURCE,
        prompt=_PROMPT | dict(templates=(), seeds=(0,)),
        label="label",
        verbalizer=dict(words=(), boundary="strict", after=""),
        max_documents=0,
        train_examples=256,  # of shots_split
        init="label_words",  # label_words | prototype
        l2=0.0,  # penalty on the distance from the start; 0: chosen by cross-validation
    ),
}

# How a model is tuned on a task (lm/instructions.py): the table [instructions] of its TOML file,
# which entries of `instructed` have and evals don't.
INSTRUCTIONS = dict(
    cluster="",  # tasks of a cluster are held out together
    split="train",  # that is trained on
    phrasings=(),  # templates of questions, beside those of the eval
    reversed=(),  # pairs of templates, question and answer; {answer} is the task's own answer
    rejected="",  # template of a wrong answer, where there are some for pairs
)

# The other types, with values of the types that their keys have.
SCHEMAS = TASKS | {
    "lm.evals.perplexity.Perplexity": dict(
        split="", source="", source_args={}, max_documents=0, stride=0
    ),
    "lm.evals.perplexity.PseudoPerplexity": dict(split="", max_documents=0),
    "lm.evals.held_out.TextLoss": dict(split="", max_documents=0),
    "lm.evals.held_out.AnswerLoss": dict(split="", max_documents=0),
    "lm.evals.held_out.Preferences": dict(split="", max_documents=0),
    "lm.evals.heads.HeadOutputs": dict(split="", max_documents=0),
    "lm.evals.classification.DocumentClassification": dict(
        split="", max_documents=0, verbalizer=(), aggregate="", length_norm="", fill=""
    ),
    "lm.evals.generation.Samples": dict(
        prompts=(), max_new_tokens=0, temperature=0.0, top_k=0, beside=""
    ),
    "lm.evals.harness.Harness": dict(
        tasks=(),
        num_fewshot=0,
        limit=0,
        include_path="",
        apply_chat_template=False,
        system_instruction="",
        fewshot_as_multiturn=True,
    ),
}
# What the arrays among these keys hold.
_ITEMS = dict(
    templates=str,
    prompts=str,
    choices=str,
    answers=str,
    scores=str,
    priors=str,
    stop=str,
    tasks=str,
    seeds=int,
    weights=(int, float),
)
_ITEM_WORDS = dict.fromkeys(_ITEMS, "texts") | dict(seeds="integers", weights="numbers")
_COMMON_KEYS = ("type", "every", "batch_size")  # checked by `lm.config.check`
_SUGGEST_KEY = "examples_key"  # of PromptClassification, which lm.suggest alone gives


TASKS_FOLDER = pathlib.Path(__file__).parent / "tasks"


def shipped_tasks() -> list[str]:
    """The names of the tasks in lm/evals/tasks/."""
    return sorted(file.stem for file in TASKS_FOLDER.glob("*.toml"))


def check(name: str, entry: Mapping) -> None:
    """Checks the keys of config.evals.NAME, and the types of their values. The evaluator, when it
    is built, checks what the values say.

    Raises:
      ValueError: an unknown key, or a value of another type.
    """
    # One's own evaluators have keys of their own.
    schema = SCHEMAS.get(entry["type"])
    if schema:
        others = (*_COMMON_KEYS, _SUGGEST_KEY)
        values = {key: value for key, value in entry.items() if key not in others}
        _check_values(f"config.evals.{name}", schema, values)


def _check_values(where: str, schema: Mapping, values: Mapping) -> None:
    for key, value in values.items():
        path = f"{where}.{key}"
        if key not in schema:
            raise ValueError(f"{path} is no key; valid: {list(schema)}")
        _check_type(schema[key], value, path)

        if key in ("verbalizer", "words") and isinstance(schema[key], tuple):
            _check_verbalizers(path, value if key == "words" else (value,))
        elif key in _ITEMS:
            if not all(isinstance(item, _ITEMS[key]) for item in value):
                raise ValueError(f"{path} = {value!r}; wanted an array of {_ITEM_WORDS[key]}")
        elif isinstance(value, Mapping) and key not in ("lines", "source_args"):
            _check_values(path, schema[key], value)


def _check_verbalizers(path: str, verbalizers: Sequence) -> None:
    """Raises ValueError unless each is ((label, (word, ...)), ...)."""
    try:
        for verbalizer in verbalizers:
            if not verbalizer:
                raise ValueError
            for label, words in verbalizer:
                texts = [label, *words]
                if isinstance(words, str) or not all(isinstance(text, str) for text in texts):
                    raise TypeError
    except (TypeError, ValueError):
        raise ValueError(
            f"{path} = {verbalizers!r}; wanted pairs of a label and its words: "
            "((label, (word, ...)), ...)"
        ) from None


def task(
    name: str, *, every: int = 0, batch_size: int = 16, type: str = "", **changes
) -> ConfigDict:
    """Makes the entry of a task: an eval of a data set, described by a TOML file. One with the key
    `base` says only what differs from that task of lm/evals/tasks/.

    Args:
      name: a file of lm/evals/tasks/ without its ending, "sst2", or the path of a .toml file.
        Relative paths in that file are relative to its folder; those in `changes`, as all others,
        to the working directory.
      every, batch_size: see the top of this file.
      type: another type than the file's, "lm.evals.linear.LinearVerbalizer".
      changes: other values for the task's keys. A dict changes only the keys that it has:
        task("sst2", prompt=dict(shots=4)).

    Raises:
      ValueError: no such task; a file that is not TOML; a key that the type doesn't have; a value
        that is of another type than the key's default.
    """
    path, values, _ = _read(name)
    base = values.pop("base", "")
    if base and base not in shipped_tasks():
        raise ValueError(f"{path}: base = {base!r}; valid: {shipped_tasks()}")
    defaults = task(base).to_dict() if base else {}
    file_type = values.pop("type", defaults.get("type", ""))
    type = type or file_type
    if type not in TASKS:
        raise ValueError(f"{path}: type = {type!r}; valid: {list(TASKS)}")

    # Defaults, what the file says, what the caller says: each overrides what is before it.
    defaults = {key: defaults.get(key, default) for key, default in TASKS[type].items()}
    values = _merge(defaults, values, str(path))
    if name.endswith(".toml"):
        values["source"] = _relative_to(values["source"], str(path.parent))
    values = _merge(values, changes, f"task({name!r})")
    return ConfigDict(dict(type=type, every=every, batch_size=batch_size) | values)


def instructed(name: str, **changes) -> ConfigDict:
    """Makes the entry of a task that a model is tuned on: `task`'s, with the key `instructions`.

    Args:
      name, changes: see `task`.

    Raises:
      ValueError: see `task`; a task without a table [instructions] that names its cluster.
    """
    entry = task(name, **changes)
    _, _, instructions = _read(name)
    if not instructions["cluster"]:
        valid = [task for task in shipped_tasks() if _read(task)[2]["cluster"]]
        raise ValueError(
            f"the task {name!r} has no instructions.cluster; wanted one of {valid}, or a .toml "
            "file with a table [instructions]"
        )
    entry.instructions = ConfigDict(instructions)
    return entry


def _read(name: str) -> tuple[epath.Path, dict, dict]:
    """(file of a task, what it says, its table [instructions] with all keys).

    Raises:
      ValueError: see `task`.
    """
    is_file = name.endswith(".toml")
    path = epath.Path(files.expand(name) if is_file else TASKS_FOLDER / f"{name}.toml")
    if not path.exists():
        raise ValueError(f"no task {name!r}; valid: {shipped_tasks()}, and paths of .toml files")
    try:
        values = tomllib.loads(files.read_text(str(path)))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    table = dict(instructions=values.pop("instructions", {}))
    instructions = _merge(dict(instructions=INSTRUCTIONS), table, str(path))["instructions"]
    return path, values, instructions


def tasks(names: str) -> dict[str, ConfigDict]:
    """Makes the entries of tasks, by their names.

    Args:
      names: tasks as `task` takes them, with commas between them. One of a .toml file has the name
        of the file, without dots, since it becomes part of flags.

    Raises:
      ValueError: see `task`; two of one name.
    """
    entries = {}
    for name in names.split(","):
        key = name
        if name.endswith(".toml"):
            key = pathlib.PurePath(name).stem.replace(".", "_")
        if key in entries:
            raise ValueError(f"{names!r} has two tasks of the name {key!r}; rename a file")
        entries[key] = task(name)
    return entries


def change(evals: ConfigDict, changes: str) -> None:
    """Adds tasks to config.evals and takes entries out.

    Args:
      changes: with commas between them, -NAME takes out an entry, -all all of them; +TASK adds one,
        see `tasks`.

    Raises:
      ValueError: an entry that isn't there, or is there already; a change of another form; see
        `task`.
    """
    for item in changes.split(","):
        sign, name = item[:1], item[1:]
        if sign == "-" and name == "all":
            for key in list(evals):
                del evals[key]
        elif sign == "-" and name in evals:
            del evals[name]
        elif sign == "+" and name:
            for key, entry in tasks(name).items():
                if key in evals:
                    raise ValueError(f"{item}: config.evals has {key!r} already; -{key} before it")
                evals[key] = entry
        else:
            raise ValueError(
                f"{item!r} is no change of config.evals; wanted +TASK, -all, or one of "
                f"{[f'-{key}' for key in evals]}"
            )


def _relative_to(source: dict, folder: str) -> dict:
    """The keys of a task's source with its paths as seen from the working directory."""
    lines = {column: files.expand(file, folder) for column, file in source["lines"].items()}
    path, data_dir = source["path"], source["data_dir"]
    return source | dict(
        path=files.expand(path, folder), data_dir=files.expand(data_dir, folder), lines=lines
    )


def _merge(defaults: dict, changes: dict, where: str) -> dict:
    """`defaults` with the values of `changes`.

    Args:
      where: what `changes` come from, for messages.

    Raises:
      ValueError: a key that `defaults` don't have, or a value of another type.
    """
    merged = dict(defaults)
    for key, value in changes.items():
        if key not in defaults:
            raise ValueError(f"{where} has no key {key!r}; valid: {list(defaults)}")
        default = defaults[key]

        # A single verbalizer may be written without a list around it.
        if key == "words" and isinstance(value, dict):
            value = [value]
        _check_type(default, value, f"{where}: {key}")

        # The keys of `lines` are the columns of the data: any will do.
        if key == "lines":
            for column, file in value.items():
                _check_type("", file, f"{where}: {key}.{column}")
            merged[key] = dict(value)
        elif isinstance(default, dict):
            merged[key] = _merge(default, value, f"{where}: {key}")
        elif isinstance(default, float):
            merged[key] = float(value)
        else:
            merged[key] = _as_tuples(value)
    return merged


def _check_type(default, value, key: str) -> None:
    """Raises ValueError for a value of another type than the default's."""
    valid_types: dict[type, tuple[type, ...]] = {tuple: (list, tuple), float: (int, float)}
    valid = valid_types.get(type(default), type(default))

    # A bool is an int to isinstance().
    if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, valid):
        wanted = "an array" if isinstance(default, tuple) else type(default).__name__
        raise ValueError(f"{key} = {value!r}; wanted {wanted}, such as {default!r}")


def _as_tuples(value):
    """TOML's arrays as tuples, its tables as tuples of pairs. Keys of a configuration may not have
    dots, names of labels may.
    """
    if isinstance(value, dict):
        return tuple((key, _as_tuples(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_as_tuples, value))
    return value


def perplexity(
    *,
    every: int,
    split: str = "validation",
    batch_size: int = 16,
    source: str = "",
    source_args: Mapping[str, Any] = types.MappingProxyType({}),
    max_documents: int = 0,
    stride: int = 0,
) -> ConfigDict:
    """Makes the entry of `lm.evals.perplexity.Perplexity`: loss, perplexity and bits per byte.

    Args:
      every, batch_size, split: see the top of this file.
      source, source_args: whose split it is, as config.data has them; "": the run's own.
      max_documents: how many documents, evenly out of the split; 0: all.
      stride: tokens by which the windows of a long document advance; 0: windows without overlap.
    """
    return ConfigDict(
        dict(
            type="lm.evals.perplexity.Perplexity",
            every=every,
            batch_size=batch_size,
            split=split,
            source=source,
            source_args=dict(source_args),
            max_documents=max_documents,
            stride=stride,
        )
    )


def pseudo_perplexity(
    *, every: int, split: str = "validation", batch_size: int = 16, max_documents: int = 0
) -> ConfigDict:
    """Makes the entry of `lm.evals.perplexity.PseudoPerplexity`, of masked models. The arguments
    are those of `perplexity`. Each token is a row: take few documents.
    """
    return ConfigDict(
        dict(
            type="lm.evals.perplexity.PseudoPerplexity",
            every=every,
            batch_size=batch_size,
            split=split,
            max_documents=max_documents,
        )
    )


def held_out(
    kind: str,
    *,
    every: int,
    split: str = "validation",
    batch_size: int = 16,
    max_documents: int = 0,
) -> ConfigDict:
    """Makes the entry of an evaluator of lm/evals/held_out.py.

    Args:
      kind: "TextLoss", of texts, and of sources with targets; "AnswerLoss", of conversations;
        "Preferences", of pairs and judged answers.
      every, batch_size, split: see the top of this file.
      max_documents: how many examples, evenly out of the split; 0: all.
    """
    return ConfigDict(
        dict(
            type=f"lm.evals.held_out.{kind}",
            every=every,
            batch_size=batch_size,
            split=split,
            max_documents=max_documents,
        )
    )


def head_outputs(
    *, every: int, split: str = "validation", batch_size: int = 16, max_documents: int = 0
) -> ConfigDict:
    """Makes the entry of `lm.evals.heads.HeadOutputs`. The arguments are those of `perplexity`."""
    return ConfigDict(
        dict(
            type="lm.evals.heads.HeadOutputs",
            every=every,
            batch_size=batch_size,
            split=split,
            max_documents=max_documents,
        )
    )


def classification(
    verbalizer: dict[str, tuple[str, ...]],
    *,
    every: int,
    split: str = "validation",
    batch_size: int = 16,
    max_documents: int = 0,
    aggregate: str = "sum",
    length_norm: str = "none",
    fill: str = "ltr",
) -> ConfigDict:
    """Makes the entry of `lm.evals.classification.DocumentClassification`: label words after the
    run's own labelled documents.

    Args:
      verbalizer: label -> its words, each with the space before it.
      every, batch_size, split: see the top of this file.
      max_documents: how many documents, evenly out of the split; 0: all.
      aggregate, length_norm: how words become scores, see lm/evals/scores/label_scores.py.
      fill: how the model fills a word in, see `lm.evals.predict.FILLS`.
    """
    return ConfigDict(
        dict(
            type="lm.evals.classification.DocumentClassification",
            every=every,
            batch_size=batch_size,
            split=split,
            max_documents=max_documents,
            verbalizer=_as_tuples(verbalizer),
            aggregate=aggregate,
            length_norm=length_norm,
            fill=fill,
        )
    )


def samples(
    prompts: tuple[str, ...],
    *,
    every: int,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 50,
    beside: str = "",
) -> ConfigDict:
    """Makes the entry of `lm.evals.generation.Samples`: continuations of fixed prompts, in
    samples.md.

    Args:
      every: see the top of this file.
      temperature: 0 takes the best token each time.
      top_k: draw from so many best tokens; 0: from all.
      beside: a name in config.models, "reference", whose texts stand beside the model's; "": none.
    """
    return ConfigDict(
        dict(
            type="lm.evals.generation.Samples",
            every=every,
            batch_size=len(prompts),
            prompts=tuple(prompts),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            beside=beside,
        )
    )
