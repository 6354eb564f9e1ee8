"""Mixtures: rows in exact shares that follow the steps, at positions that restore."""

import collections
import json

import numpy as np
import pytest

from lm import build, stopping
from lm import config as config_lib
from lm.data import loader as loaders
from lm.data import mixtures, pack
from lm.data.sources import Document, Documents
from lm.data.tokenizer import ByteTokenizer
from tests.helpers import assert_same_run, run_training, terminate_at

PACKING = pack.Packing("first_fit", 32, 4)


def documents(letter, count=40, **others):
    texts = [letter * (5 + i % 20) for i in range(count)]
    return Documents([Document(text, letter, "") for text in texts], letter, **others)


def mixture(weights, sizes=None, exponent=0.0, **parts):
    parts = parts or {name: documents(name) for name in weights}
    schedules = {name: mixtures.schedule(weight, name) for name, weight in weights.items()}
    return mixtures.mix(parts, schedules, sizes or dict.fromkeys(parts, 0), exponent)


def make_stream(mixed, rows_per_step=2, number=0, num_streams=2):
    def make(part, **arguments):
        return pack.stream(part, pack.Encoder(ByteTokenizer(), ""), PACKING, **arguments)

    return mixtures.stream(
        mixed, make, rows_per_step, seed=3, number=number, num_streams=num_streams
    )


def letters(stream, count):
    """The source of each of the next rows: all of its text is one letter."""
    found = []
    for _ in range(count):
        row = next(stream)
        codes = set(row["tokens"][row["segments"] > 0].tolist()) & set(range(97, 123))
        (code,) = codes
        found.append(chr(code))
    return found


def test_rows_have_their_shares():
    mixed = mixture({"a": (3.0,), "b": (1.0,), "c": (0.0,)})
    orders = set()
    for number in range(4):
        rows = letters(make_stream(mixed, number=number, num_streams=4), 200)
        orders.add("".join(rows))
        for count in range(1, 200):
            shares = collections.Counter(rows[:count])
            assert abs(shares["a"] - 0.75 * count) <= 2
            assert shares["c"] == 0
    # Streams don't take the same parts at the same time.
    assert len(orders) > 1


def test_shares_follow_the_steps():
    mixed = mixture({"a": (1.0, 10, 0.0), "b": (0.0, 10, 1.0)})
    assert mixed.shares(0).tolist() == [1, 0]
    assert mixed.shares(5).tolist() == [0.5, 0.5]
    assert mixed.shares(99).tolist() == [0, 1]
    rows = letters(make_stream(mixed, rows_per_step=4), 80)
    assert set(rows[:4]) == {"a"} and set(rows[40:]) == {"b"}
    assert abs(rows[:40].count("a") - 22) <= 2


@pytest.mark.parametrize(
    "exponent, shares", [(0.0, [0.5, 0.5]), (1.0, [0.9, 0.1]), (0.5, [0.75, 0.25])]
)
def test_sizes_raised_to_an_exponent(exponent, shares):
    mixed = mixture({"a": (1.0,), "b": (1.0,)}, dict(a=900, b=100), exponent)
    np.testing.assert_allclose(mixed.shares(0), shares)


def test_sizes_come_from_cards():
    card = {"splits": {"train": {"tokens": 300}}}
    parts = dict(a=documents("a", cards=(card,)), b=documents("b"))
    mixed = mixture({"a": (2.0,), "b": (1.0,)}, dict(a=0, b=100), 1.0, **parts)
    np.testing.assert_allclose(mixed.shares(0), [6 / 7, 1 / 7])
    assert mixed.cards == (card,)
    with pytest.raises(ValueError, match="mixture.b.size is 0"):
        mixture({"a": (2.0,), "b": (1.0,)}, dict(a=0, b=0), 1.0, **parts)


@pytest.mark.parametrize("rows", [0, 7, 60])
def test_the_position_is_part_of_the_state(rows):
    mixed = mixture({"a": (1.0, 20, 0.2), "b": (0.5,)})
    stream = make_stream(mixed)
    for _ in range(rows):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    wanted = [next(stream)["tokens"] for _ in range(60)]

    again = make_stream(mixed)
    again.set_state(state)
    np.testing.assert_array_equal([next(again)["tokens"] for _ in range(60)], wanted)
    with pytest.raises(ValueError, match="a mixture of"):
        make_stream(mixture({"a": (1.0,), "z": (1.0,)})).set_state(state)


def test_a_mixture_has_the_documents_of_all_parts():
    mixed = mixture({"a": (1.0,), "b": (1.0,)})
    assert len(mixed) == 80
    assert [mixed[i].text[0] for i in (0, 39, 40, 79)] == ["a", "a", "b", "b"]
    with pytest.raises(IndexError):
        mixed[80]


@pytest.mark.parametrize("weight", [(), (1.0, 5), (1.0, 5, 1.0, 5, 1.0), (-1.0,)])
def test_weights_that_are_none(weight):
    with pytest.raises(ValueError, match="wanted \\(weight,\\)"):
        mixtures.schedule(weight, "config.data.mixture.a.weight")


def test_what_can_not_be_mixed():
    with pytest.raises(ValueError, match="all weights are 0 at step 10"):
        mixture({"a": (1.0, 10, 0.0), "b": (0.0,)})
    with pytest.raises(ValueError, match="kind 'pair'"):
        mixture({"a": (1.0,)}, a=documents("a", kind="pair"))


def corpus(folder, letter, weight):
    path = folder / f"{letter}.jsonl"
    lines = [json.dumps({"text": letter * (5 + i % 30)}) for i in range(60)]
    path.write_text("\n".join(lines))
    return config_lib.part("lm.data.sources.jsonl", weight, path=str(path), held_out=0.1)


def mixed_config(small, folder):
    small.data.update(dict(source="", source_args={}))
    with small.unlocked():
        small.data.mixture.a = corpus(folder, "a", (1.0, 3, 0.0))
        small.data.mixture.b = corpus(folder, "b", (0.0, 3, 1.0))
    small.tokenizer.kind = "bytes"
    return small


def test_a_configuration_with_a_mixture(small, tmp_path):
    import jax

    config = mixed_config(small, tmp_path)
    experiment = build.build(config, jax.devices()[:1])
    batch, _ = experiment.make_loader().next(None)
    assert set(np.unique(batch["tokens"])) - {0, 256, 257} == {97}  # a alone

    config.data.source = "lm.data.pydocs.pydocs"
    with pytest.raises(ValueError, match="wanted a source or a mixture"):
        build.build(config, jax.devices()[:1])
    config.data.source = ""
    config.train.length = "1 epochs"
    with pytest.raises(ValueError, match="epochs of their own"):
        build.build(config, jax.devices()[:1])
    config.train.length = "6 steps"
    config.data.mixture.a.weight = (1.0, 2)
    with pytest.raises(ValueError, match="config.data.mixture.a.weight"):
        build.build(config, jax.devices()[:1])


def test_parts_may_lie_elsewhere_when_a_run_goes_on():
    assert config_lib.is_resumable("data.mixture.web.source_args.path")
    assert not config_lib.is_resumable("data.mixture.web.weight")


@pytest.mark.usefixtures("fast_runs")
def test_a_run_that_was_stopped_goes_on_through_a_mixture(small, tmp_path, monkeypatch):
    """While weights change, and in the middle of both parts."""
    config = mixed_config(small, tmp_path)
    config.train.length = "6 steps"
    config.checkpoint.every = 2
    run_training(config, tmp_path / "reference")

    with monkeypatch.context() as patch:
        terminate_at(patch, loaders.Loader, "next", 4)
        with pytest.raises(stopping.Stopped):
            run_training(config, tmp_path / "run")
    run_training(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "reference", 6)


def test_streams_do_not_depend_on_each_other():
    """So a process that has some of them has the rows that one process has of all."""
    mixed = mixture({"a": (1.0, 9, 0.5), "b": (1.0,)})
    together = [make_stream(mixed, number=n, num_streams=4) for n in range(4)]
    rows = [[next(stream)["tokens"] for stream in together] for _ in range(30)]
    for number in range(4):
        alone = make_stream(mixed, number=number, num_streams=4)
        for row in rows:
            np.testing.assert_array_equal(next(alone)["tokens"], row[number])
