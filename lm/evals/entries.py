"""Entries of config.evals: what each kind of eval may say, and the functions that make one."""

import pathlib
import tomllib

from ml_collections import ConfigDict


def perplexity(
    *,
    every: int,
    split: str = "validation",
    batch_size: int = 16,
    max_documents: int = 0,
    stride: int = 0,
) -> ConfigDict:
    """config.evals entry: loss, perplexity and bits per byte of a split; `stride`: see
    lm/evals/perplexity.py.
    """
    return ConfigDict(
        dict(
            type="lm.evals.perplexity.Perplexity",
            every=every,
            batch_size=batch_size,
            split=split,
            max_documents=max_documents,
            stride=stride,
        )
    )


# What an eval of a TOML file may say, by its type. Files are read when a configuration is made: all
# of it stands in config.json, each key can be overridden.
_SOURCE = dict(
    path="",  # a .jsonl, .json, .csv or .tsv file; "{split}" in it is replaced
    lines={},  # column -> text file, line by line (parallel texts)
    tfds="",  # TFDS's name, where there are neither; prepared in data_dir ("": TFDS's default)
    data_dir="",
    split="test",  # what is evaluated
    shots_split="",  # where examples before the question come from: never what is evaluated
    citation="",
)


_PROMPT = dict(
    shots=0,  # examples before the question
    sampler="balanced",  # balanced (over the labels) | first_n | random
    separator="\n\n",
)  # after each example


TASKS = {
    "lm.evals.classification.PromptClassification": dict(
        source=_SOURCE,
        prompt=_PROMPT | dict(templates=(), seeds=(0,)),
        label="label",
        # words: one or more tables label -> words, as ((label, (word, ...)), ...); weights: one for
        # each word of aggregate="sum".
        verbalizer=dict(
            words=(),
            terminator="",
            boundary="strict",
            aggregate="sum",
            length_norm="none",
            weights=(),
        ),
        priors=("content_free", "domain", "pmi_dc", "batch"),
        ensemble="mean_prob",
        temperature_examples=0,
        max_documents=0,
    ),
    "lm.evals.choice.MultipleChoice": dict(
        source=_SOURCE,
        prompt=_PROMPT | dict(template="", seed=0),
        choices=(),
        answer="label",
        answers="",
        premise="",
        boundary="strict",
        max_documents=0,
    ),
    "lm.evals.generation.TextGeneration": dict(
        source=_SOURCE,
        prompt=_PROMPT | dict(template="", seed=0, sampler="random"),
        target="",
        references="",
        scores=(),
        max_documents=0,
        output=dict(max_new_tokens=64, stop=("\n",), extract="", normalize="none"),
    ),
}


TASKS["lm.evals.linear.LinearVerbalizer"] = TASKS[
    "lm.evals.classification.PromptClassification"
] | dict(
    # label_words | prototype; 0: chosen by cross-validation
    train_examples=256,
    init="label_words",
    l2=0.0,
    verbalizer=dict(words=(), boundary="strict"),
)
for _key in ("priors", "temperature_examples", "ensemble"):
    del TASKS["lm.evals.linear.LinearVerbalizer"][_key]


def task(
    name: str, *, every: int = 0, batch_size: int = 16, type: str = "", **changes
) -> ConfigDict:
    """config.evals entry: an eval of lm/evals/tasks/ by its name, or of a TOML file of your own by
    its path.

    Args:
      type: of the eval, where it isn't the file's: task("sst2", type="lm.evals.linear.LinearVerbalizer").
      changes: other values for its keys; dicts change what they name: task("sst2",
        prompt=dict(shots=4)).

    Raises:
      ValueError: no such task, no TOML, or a key that its type doesn't have.
    """
    folder = pathlib.Path(__file__).parent / "tasks"
    path = pathlib.Path(name) if name.endswith(".toml") else folder / f"{name}.toml"
    if not path.exists():
        raise ValueError(
            f"no task {name!r}; valid: {sorted(p.stem for p in folder.glob('*.toml'))}, and paths "
            "of .toml files"
        )
    try:
        read = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    kind = read.pop("type", "")
    kind = type or kind
    if kind not in TASKS:
        raise ValueError(f"{path}: type = {kind!r}; valid: {list(TASKS)}")
    made = dict(type=kind, every=every, batch_size=batch_size) | _merged(
        _merged(TASKS[kind], read, str(path)), changes, f"task({name!r})"
    )
    return ConfigDict(made)


def _merged(old: dict, new: dict, where: str) -> dict:
    """`old` with the values of `new`, whose keys it has to have."""
    if unknown := [key for key in new if key not in old]:
        raise ValueError(f"{where} has no key {unknown[0]!r}; valid: {list(old)}")

    def merge(key: str, a, b):
        if key == "words" and isinstance(b, dict):
            b = [b]  # a single verbalizer
        kinds = {tuple: (list, tuple), int: int, float: (int, float)}.get(type(a), type(a))
        if not isinstance(b, kinds) or isinstance(b, bool):
            raise ValueError(
                f"{where}: {key} = {b!r}; wanted "
                f"{'an array' if isinstance(a, tuple) else type(a).__name__}, such as {a!r}"
            )
        if key == "lines":
            return dict(b)
        return (
            _merged(a, b, f"{where}: {key}")
            if isinstance(a, dict)
            else float(b)
            if isinstance(a, float)
            else _tuples(b)
        )

    return old | {key: merge(key, old[key], value) for key, value in new.items()}


def _tuples(value):
    """TOML's arrays as tuples, its tables as pairs: names of labels may have dots in them, keys of
    a configuration may not.
    """
    if isinstance(value, dict):
        return tuple((key, _tuples(v)) for key, v in value.items())
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def classification(
    verbalizer: dict[str, tuple[str, ...]],
    *,
    every: int,
    split: str = "validation",
    batch_size: int = 16,
    max_documents: int = 0,
    aggregate: str = "sum",
    length_norm: str = "none",
) -> ConfigDict:
    """config.evals entry: verbalizer classification of a labelled split. `verbalizer`: label -> its
    words; how they become scores (aggregate, length_norm): lm/evals/verbalizer.py.
    """
    return ConfigDict(
        dict(
            type="lm.evals.classification.DocumentClassification",
            every=every,
            batch_size=batch_size,
            split=split,
            max_documents=max_documents,
            verbalizer=tuple((k, tuple(v)) for k, v in verbalizer.items()),
            aggregate=aggregate,
            length_norm=length_norm,
        )
    )


def samples(
    prompts: tuple[str, ...],
    *,
    every: int,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 50,
) -> ConfigDict:
    """config.evals entry: continuations of fixed prompts, in samples.md."""
    return ConfigDict(
        dict(
            type="lm.evals.generation.Samples",
            every=every,
            batch_size=len(prompts),
            prompts=tuple(prompts),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
        )
    )
