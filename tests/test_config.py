"""Each key has a range, and is refused by its name before anything is read."""

import math
from unittest import mock

import jax
import pytest

from lm import build
from lm import config as config_lib
from lm.nn.layers import ACTIVATIONS, NORMS
from lm.optim import OPTIMIZERS
from lm.sharding import MESH_AXES
from tests import fuzz_config


def set_key(config, key, value):
    *groups, last = key.split(".")
    for name in groups:
        config = config[name]
    with config.ignore_type():
        config[last] = value


IMPOSSIBLE = [
    ("optimizer.clip_norm", -1.0),
    ("optimizer.learning_rate", -1.0),
    ("optimizer.b1", 1.5),
    ("optimizer.b2", 1.0),
    ("optimizer.eps", -1.0),
    ("optimizer.ema_decay", 1.5),
    ("optimizer.weight_decay", math.nan),
    ("optimizer.weight_decay", -0.1),
    ("optimizer.learning_rate", math.inf),
    ("optimizer.warmup_steps", -5),
    ("optimizer.final_learning_rate", 2.0),
    ("optimizer.name", "adam"),
    ("optimizer.rounding", "up"),
    ("model.norm_eps", -1.0),
    ("model.rope_theta", 0.0),
    ("model.rope_scaling", (1.0, math.nan, 1.0, 1.0)),
    ("model.rope_scaling", ("linear", "linear")),
    ("model.num_layers", True),
    ("model.type", 3),
    ("train.log_every", 0),
    ("train.nonfinite", "ignore"),
    ("train.length", "1e999999999 steps"),
    ("train.length", "nan steps"),
    ("train.length", "3000000000 steps"),
    ("checkpoint.every", -1),
    ("checkpoint.keep", 0),
    ("data.batch_size", 2**31),
    ("data.packing", "best_fit"),
    ("data.length", 2**30),
    ("seed", -1),
    ("seed", 2**32),
    ("mesh.fsdp", -2),
    ("mesh.data", 0),
    ("platform", "cuda"),
    ("objective.z_loss", -1.0),
    ("objective.type", None),
    ("evals.text.every", -1),
    ("evals.text.batch_size", 0),
    ("evals.text.type", None),
    ("evals.text.max_documents", "all"),
    ("evals.text", 3),
    ("evals.samples.prompts", "ab"),
    ("evals.labels.verbalizer", (("red", "blue"),)),
    ("optimizer", 3),
    ("evals", ()),
]


@pytest.mark.parametrize("key, value", IMPOSSIBLE)
def test_impossible_values_are_refused_by_their_key(tmp_path, key, value):
    config = fuzz_config.base_config(tmp_path)
    set_key(config, key, value)
    read = mock.Mock(side_effect=AssertionError("data are read"))
    with mock.patch.object(build, "documents", read):
        with pytest.raises(ValueError, match=f"config.{key}"):
            build.build(config, jax.devices()[:1])


def test_missing_and_unknown_keys_are_named(tmp_path):
    config = fuzz_config.base_config(tmp_path)
    del config.optimizer.b1
    config.train.surprise = 1
    config.extra = 1
    del config.evals.text.every
    with pytest.raises(ValueError) as raised:
        config_lib.check(config)
    for line in (
        "config.optimizer.b1 is missing",
        "config.train.surprise is no key",
        "config.extra is no key",
        "config.evals.text.every is missing",
    ):
        assert line in str(raised.value)


def test_a_batch_has_a_largest_size(tmp_path):
    config = fuzz_config.base_config(tmp_path)
    config.data.update(dict(batch_size=2**20, length=2**10))
    with pytest.raises(ValueError, match="config.data.batch_size = 1048576 rows of config.data"):
        config_lib.check(config)


def test_streams_divide_the_batch(tmp_path):
    config = fuzz_config.base_config(tmp_path)
    config.data.update(dict(batch_size=8, streams=3))
    message = "config.data.streams = 3 must divide config.data.batch_size = 8"
    with pytest.raises(ValueError, match=message):
        config_lib.check(config)


def test_a_model_larger_than_the_machine_is_refused(tmp_path):
    config = fuzz_config.base_config(tmp_path)
    config.model.update(dict(num_layers=4096, embed_dim=2**18, mlp_dim=2**20))
    with pytest.raises(ValueError, match="config.model and config.optimizer make a train state"):
        build.build(config, jax.devices()[:1])


def test_names_that_a_key_may_have_are_those_that_there_are():
    def names(group, key):
        return set(group.__dataclass_fields__[key].metadata["valid"])

    assert names(config_lib.ModelFields, "activation") == set(ACTIVATIONS)
    assert names(config_lib.ModelFields, "norm") == set(NORMS)
    assert names(config_lib.OptimizerFields, "name") == set(OPTIMIZERS)
    assert tuple(config_lib.MeshAxes.__dataclass_fields__) == MESH_AXES


@pytest.mark.parametrize(
    "text, shown",
    [
        (config_lib.Range(least=0, below=1), "at least 0 and below 1"),
        (config_lib.Range(least=1, most=9, besides=(-1,)), "1 to 9, or -1"),
        (config_lib.Range(), "any finite number"),
    ],
)
def test_ranges_say_what_they_want(text, shown):
    assert str(text) == shown


def test_mutated_configurations_end_clearly(tmp_path):
    """200 mutations; `python -m tests.fuzz_config` tries thousands."""
    ends, unclear = fuzz_config.fuzz(200, seed=0, folder=tmp_path)
    assert not unclear, "\n".join(unclear)
    assert ends["accepted"] > 10
    assert ends["refused"] > 100


def test_mutated_command_lines_end_clearly(tmp_path):
    ends, unclear = fuzz_config.fuzz_command_lines(100, seed=0, folder=tmp_path)
    assert not unclear, "\n".join(unclear)
    assert ends["accepted"] > 3
    assert ends["refused"] > 50
