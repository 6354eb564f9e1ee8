"""Weights of another run, with rows for new tokens."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lm import convert, weights
from tests.helpers import read_checkpoint, run_training, slow

TABLES = ("params/embed/table", "params/head/table")
SIZE = 259  # of the bytes, BOS, EOS and a mask: no number that a mesh can divide


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_new_rows_are_the_mean_of_the_old_ones(dtype):
    """So the old ids' probabilities shrink to no less than V / (V + n), whatever the state."""
    num_kept, num_rows = 30, 40
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(0.5, 1, (34, 8)), dtype)
    resized = weights.resize_rows(
        table, num_kept=num_kept, num_rows=num_rows, key=jax.random.key(1)
    )
    assert (resized.shape, resized.dtype) == ((num_rows, 8), dtype)
    assert np.array_equal(resized[:num_kept], table[:num_kept])

    old, new = np.split(np.asarray(resized, np.float64), [num_kept])
    np.testing.assert_allclose(new, np.tile(old.mean(axis=0), (10, 1)), atol=0.015)
    # They differ, unlike the mean of so few rows in bfloat16.
    assert len(np.unique(new, axis=0)) > 1

    for state in rng.normal(0, 2, (100, 8)):
        share = np.exp(old @ state).sum() / np.exp(np.concatenate([old, new]) @ state).sum()
        assert share >= 0.98 * num_kept / num_rows


_SOURCE = []


@pytest.fixture
def source(small, fast_runs, tmp_path_factory):
    """A run that reserves a mask, and the configuration of one that starts from it."""
    small.tokenizer.reserve = "mask"
    small.model.tie_embeddings = False
    small.train.length = "1 steps"
    small.optimizer.warmup_steps = 0
    if not _SOURCE:
        _SOURCE.append(tmp_path_factory.mktemp("weights") / "source")
        run_training(small, _SOURCE[0])
    small.update(dict(init_from=str(_SOURCE[0]), init_resize=True))
    # With this learning rate the weights are those that the run started from.
    small.optimizer.learning_rate = 0.0
    return small


def params_of(run):
    """path -> (dtype, shape, bytes) of the parameters of a run."""
    state, _ = read_checkpoint(run, 1)
    return {path: array for path, array in state.items() if path.startswith("params/")}


@pytest.mark.parametrize(
    "mesh, reserve, vocab_size, num_rows",
    [
        (dict(fsdp=2, tensor=2), "mask,sep", 0, SIZE + 1),
        (dict(fsdp=1), "mask", 272, 272),  # rounded up, without new ids
        (dict(fsdp=1), "mask", 0, SIZE),
    ],
    ids=["a new id", "rounded", "the same"],
)
def test_a_run_starts_with_rows_for_new_tokens(
    source, tmp_path, mesh, reserve, vocab_size, num_rows
):
    source.mesh.update(mesh)
    source.tokenizer.reserve = reserve
    source.model.vocab_size = vocab_size
    run_training(source, tmp_path / "run", math.prod(mesh.values()))
    before, after = params_of(source.init_from), params_of(tmp_path / "run")

    new_rows = []
    for path, (dtype, shape, old) in before.items():
        if path not in TABLES:
            assert after[path] == before[path], path
            continue
        assert after[path][:2] == (dtype, (num_rows, *shape[1:]))
        assert after[path][2].startswith(old)
        new_rows.append(after[path][2][len(old) :])
    embed, head = new_rows
    assert embed != head or num_rows == SIZE


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokenizer.reserve": "sep,mask"}, "init_resize = True: .* 1 of those ids are other"),
        ({"tokenizer.reserve": ""}, "init_resize = True: .* 1 of those ids .* or none"),
        ({"tokenizer.reserve": "mask,sep", "init_resize": False}, "mask,sep.*init_resize = True"),
        ({"init_from": ""}, "init_resize = True resizes .* config.init_from"),
    ],
)
def test_what_is_not_resized(source, tmp_path, changes, message):
    source.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        run_training(source, tmp_path / "run")


TRAINED = "*_lora_?,embed/table,head/table"


def test_new_rows_under_a_frozen_table(source, tmp_path):
    """33: nobody would learn them."""
    source.tokenizer.reserve = "mask,sep"
    source.model.lora_rank = 4
    message = r"1 new ids, .*\['embed/table', 'head/table'\].*trained = '(\S+)' trains"
    with pytest.raises(ValueError, match=message) as error:
        run_training(source, tmp_path / "run")
    assert re.search(message, str(error.value))[1] == TRAINED


@pytest.mark.parametrize("kind", ["a run", slow("a Hugging Face directory")])
def test_new_rows_that_are_trained_are_merged(source, tmp_path, kind):
    """33: by the key that the error names."""
    base, _ = read_checkpoint(source.init_from, 1)
    if kind == "a run":
        source.tokenizer.reserve = "mask,sep"
    else:
        directory = tmp_path / "base"
        convert.export_checkpoint(epath.Path(source.init_from), directory, jax.devices()[:1])
        source.init_from = source.tokenizer.path = str(directory)
        source.tokenizer.reserve = "sep"
    source.optimizer.learning_rate = 1e-2
    source.model.lora_rank = 4
    source.train.trained = TRAINED
    run_training(source, tmp_path / "run")

    run, target = epath.Path(tmp_path / "run"), epath.Path(tmp_path / "merged")
    convert.merge(run, source.init_from, target, jax.devices()[:1])
    tuned, _ = read_checkpoint(run, 1)
    merged, _ = read_checkpoint(target, 0)
    for path in TABLES:
        assert merged[path] == tuned[path]
        assert merged[path][1][0] == SIZE + 1
        assert not merged[path][2].startswith(base[path][2])
