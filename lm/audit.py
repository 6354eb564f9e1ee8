"""What a run trains on, token by token: --mode=audit.

Trains nothing. Shows rows of the first batch as the loss gets them: which token the model reads at
each place, what it is to predict there, and with which weight.
"""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lm import build, escape, files, weights
from lm.data import batch as batch_contract
from lm.data.tokenizer import Tokenizer
from lm.reports import page


class Segment(NamedTuple):
    """A document's window, a conversation, or a part of a pair."""

    row: int
    number: int  # in the row, from 1
    arrays: dict[str, np.ndarray]  # of its places, in order
    source: np.ndarray  # ids of its source; none where the model reads none


def audit(config: ConfigDict, workdir: epath.Path, devices, num_rows: int) -> str:
    """Writes audit.txt and, where the packages for pages are installed, audit.html.

    Args:
      num_rows: rows that are shown whole.

    Returns:
      What is to be printed: the rows.

    Raises:
      ValueError: what a run couldn't start from; no target has weight.
    """
    config = build.apply_hf_config(config)
    experiment = build.build(config, devices)
    with jax.set_mesh(experiment.program.mesh):
        batch = _first_batch(experiment)
    if not batch["weights"].any():
        raise ValueError("no target of the first batch has weight: nothing would be learnt")

    summary = summarize(batch, experiment.tokenizer.bos_id)
    segments = list(segments_of(batch, num_rows))
    lines = [f"{name}: {value}" for name, value in summary.items()]
    for segment in segments:
        lines += ["", _title(segment), *_text_lines(segment, experiment.tokenizer)]
    text = escape.printable("\n".join(lines)) + "\n"
    files.write_whole(workdir / "audit.txt", text)

    try:
        page.check_installed()
    except ValueError as error:
        logging.info("no page is written: %s", error)
        return text
    sections = [page.Section("The first batch", [page.Table(["", ""], list(summary.items()))])]
    for segment in segments:
        sections.append(_section(segment, experiment.tokenizer))

    about = "What the model reads at each place, and what it is to predict there."
    files.write_whole(workdir / "audit.html", page.render("Audit", sections, about))
    return text


def _first_batch(experiment: build.Experiment) -> dict[str, np.ndarray]:
    program = experiment.program
    params = None
    if experiment.config.data.loader:
        # It may draw texts from the model, and ask others about them.
        experiment.others.update(weights.load_others(experiment))
        if init_from := experiment.config.init_from:
            source = build.checkpoint_directory(init_from, "config.init_from")
            params, _ = weights.load_weights(experiment, source, averaged=False)
        else:
            params = program.make_params(jax.random.key(experiment.config.seed))

    loader = experiment.make_loader()
    try:
        batch, _ = loader.next(params)
        return {name: np.asarray(array) for name, array in batch.items()}
    finally:
        loader.close()


def summarize(batch: dict[str, np.ndarray], bos_id: int) -> dict[str, str]:
    """What a batch is like, in words."""
    is_token = batch["segments"] > 0
    num_tokens = int(is_token.sum())
    learnt = batch["weights"] > 0

    sizes, without, twice = [], 0, 0
    for segment in segments_of(batch, len(is_token)):
        sizes.append(len(segment.arrays["tokens"]))
        without += not (segment.arrays["weights"] > 0).any()
        twice += (segment.arrays["tokens"][:2] == bos_id).sum() == 2

    return {
        "rows": f"{len(is_token)} of {is_token.shape[1]} places, {is_token.mean():.1%} filled",
        "segments": f"{len(sizes)}, {np.mean(sizes):.1f} tokens on average",
        "learnt": f"{learnt.sum()} of {num_tokens} targets ({learnt.sum() / num_tokens:.1%})",
        "segments without a learnt target": str(without),
        "segments that begin with BOS twice": str(twice),
    }


def segments_of(batch: dict[str, np.ndarray], num_rows: int) -> Iterator[Segment]:
    """Yields the segments of the first rows of a batch, with the arrays that have a value for each
    place.
    """
    shape = batch["tokens"].shape
    of_places = {}
    for name, array in batch.items():
        if array.shape == shape and not name.startswith("source"):
            of_places[name] = array
    for row in range(min(num_rows, shape[0])):
        numbers = batch["segments"][row]
        for number in sorted(set(numbers[numbers > 0].tolist())):
            places = numbers == number
            arrays = {name: array[row][places] for name, array in of_places.items()}
            source = np.zeros(0, np.int32)
            if "source" in batch:
                source = batch["source"][row][batch["source_segments"][row] == number]
            yield Segment(row, number, arrays, source)


def _title(segment: Segment) -> str:
    weights = segment.arrays["weights"]
    return (
        f"row {segment.row}, segment {segment.number}: {len(weights)} tokens, "
        f"{np.count_nonzero(weights)} learnt targets"
    )


def _spelt(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as Python spells it: spaces and line ends are seen."""
    return repr(tokenizer.spell([int(token_id)]))


def _text_lines(segment: Segment, tokenizer: Tokenizer) -> Iterator[str]:
    arrays = segment.arrays
    if len(segment.source):
        yield f"source: {tokenizer.spell(segment.source.tolist())!r}"
    for position, token, target, weight in zip(
        arrays["positions"], arrays["tokens"], arrays["targets"], arrays["weights"], strict=True
    ):
        mark = f"  {weight:g}" if weight else ""
        predicted = _spelt(tokenizer, target) if weight else ""
        yield f"{position:6d}  {_spelt(tokenizer, token):16s} -> {predicted:16s}{mark}".rstrip()


def _section(segment: Segment, tokenizer: Tokenizer) -> page.Section:
    """A segment as a table; what is learnt is marked."""
    arrays = segment.arrays
    others = [name for name in arrays if name not in batch_contract.ARRAYS]
    rows = []
    for i, weight in enumerate(arrays["weights"]):
        mark = "good" if weight else ""
        target = page.Cell(_spelt(tokenizer, arrays["targets"][i]), mark=mark)
        row = [
            _number(arrays["positions"][i]),
            page.Cell(_spelt(tokenizer, arrays["tokens"][i])),
            target if weight else None,
            _number(weight),
        ]
        rows.append(row + [_number(arrays[name][i]) for name in others])

    columns = ["position", "reads", "predicts", "weight", *others]
    text = tokenizer.spell(arrays["tokens"].tolist())
    parts = [page.Preformatted("As it is read", text), page.Table(columns, rows)]
    if len(segment.source):
        source = tokenizer.spell(segment.source.tolist())
        parts.insert(0, page.Preformatted("Its source", source))
    return page.Section(_title(segment), parts)


def _number(value) -> page.Cell:
    return page.Cell(f"{value:g}", float(value))
