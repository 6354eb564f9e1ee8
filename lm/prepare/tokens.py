"""Stages that train a tokenizer on a sample of the training split, or take one that is given."""

import json
from collections.abc import Iterator

from etils import epath
from ml_collections import ConfigDict

from lm import files
from lm.data import sources, tokenizer
from lm.prepare.engine import Made, Stage
from lm.prepare.shards import Document, Work, read


def split_of(document: Document, shares: dict) -> str:
    """Returns the split of a document: that of its source, or by the hash of its text. What is held
    out for validation is what `lm.data.sources.is_held_out` says for that share.
    """
    if document.split:
        return document.split
    if sources.is_held_out(document.text, shares["validation"]):
        return "validation"

    # The next hashes behind those of validation.
    if sources.is_held_out(document.text, shares["validation"] + shares["test"]):
        return "test"
    return "train"


def stages(config: ConfigDict) -> list[Stage]:
    """The stages.

    Raises:
      ValueError: there is neither a tokenizer nor a size to train one of.
    """
    c = config.tokenizer
    settings = c.to_dict() | dict(bad_input=config.bad_input, splits=config.splits.to_dict())
    if c.path:
        given = tokenizer.load(epath.Path(files.expand(c.path)))
        return [Stage("tokenizer", take, _plan_take, settings, reads=given.fingerprint)]
    if not c.vocab_size:
        raise ValueError(
            "config.tokenizer has neither a path nor a vocab_size to train one of; wanted one of "
            "them, or config.stages without 'tokenizer'"
        )

    package = "tokenizers" if c.kind == "byte_bpe" else "sentencepiece"
    return [
        Stage("tokenizer_sample", sample, _plan_sample, settings),
        Stage("tokenizer", train, _plan_train, settings, (package,)),
    ]


def _plan_take(made: Made) -> list[dict]:
    del made
    return [{}]


def _plan_sample(made: Made) -> list[dict]:
    """A task for each shard, with the bytes of all of them: what share is wanted depends on it."""
    size = 0
    for report in made.reports("collect"):
        size += sum(report["counts"].get("bytes", {}).values())
    return [{"shard": path, "bytes": size} for path in made.shards()]


def _plan_train(made: Made) -> list[dict]:
    """The task, for all samples.

    Raises:
      ValueError: there is no text in them.
    """
    if not any(report["counts"].get("sampled") for report in made.reports("tokenizer_sample")):
        raise ValueError(f"no document is left to train a tokenizer on; dropped: {made.dropped()}")
    return [{"samples": [output["path"] for output in made.outputs("tokenizer_sample", "sample")]}]


def sample(work: Work) -> None:
    """Copies some of a shard's training documents: those whose hash says so, so that it matters
    neither how many shards there are nor which come first.
    """
    share = work.settings["sample_mb"] * 1e6 / max(work.inputs["bytes"], 1)
    with work.documents("sample") as writer:
        for document in read(work.inputs["shard"]):
            if split_of(document, work.settings["splits"]) != "train":
                continue
            # Another hash than that of the splits.
            if share >= 1 or sources.is_held_out(f"sample\0{document.text}", share):
                work.count("sampled", document.source)
                writer.write(document)


def take(work: Work) -> None:
    """Keeps the tokenizer that is given."""
    given = tokenizer.load(epath.Path(files.expand(work.settings["path"])))
    _save(given, work)


def train(work: Work) -> None:
    """Trains a tokenizer.

    Raises:
      ValueError: the texts are too few for its size.
    """
    settings = work.settings
    if settings["kind"] == "byte_bpe":
        _save(_train_byte_bpe(_texts(work), settings), work)
        return

    model = tokenizer.sentencepiece_model(
        _texts(work),
        settings["vocab_size"],
        kind=settings["kind"],
        byte_fallback=settings["byte_fallback"],
        split_digits=settings["split_digits"],
        user_symbols=settings["user_symbols"],
    )
    _save(tokenizer.SentencePieceTokenizer(model, "the trained tokenizer"), work)


def _texts(work: Work) -> Iterator[str]:
    for path in work.inputs["samples"]:
        for document in read(path):
            work.count("tokenizer.documents", document.source)
            work.count("tokenizer.bytes", document.source, len(document.text.encode()))
            yield document.text


END = "<|endoftext|>"


def _train_byte_bpe(texts: Iterator[str], settings: dict) -> tokenizer.Tokenizer:
    """A byte-level BPE as GPT-2's, by Hugging Face's library."""
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError(
            "config.tokenizer.kind = 'byte_bpe' needs the package tokenizers: pip install -c "
            "constraints.txt -e '.[hf]'"
        ) from None

    trained = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if settings["split_digits"]:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    trained.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings["vocab_size"],
        special_tokens=[END, *settings["user_symbols"]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    config = {"eos_token": END, "bos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    contents = {
        "tokenizer.json": trained.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    return tokenizer.HuggingFaceTokenizer(contents, {}, "the trained tokenizer")


def _save(trained: tokenizer.Tokenizer, work: Work) -> None:
    folder = work.folder / "files"
    trained.save(folder)
    for path in sorted(folder.iterdir()):
        work.adopt("tokenizer", path, about=path.name)


def load(paths: list[str]) -> tokenizer.Tokenizer:
    """Returns the tokenizer of a stage's outputs."""
    return tokenizer.load(epath.Path(paths[0]).parent)
