"""--mode=reference: a reference's log-probabilities, computed beforehand, are what the reference
says in training.
"""

import json
import math

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from lm import reference
from lm.evals import entries
from tests.helpers import read_metrics, run_training, with_conversations

pytestmark = pytest.mark.usefixtures("fast_runs")

PAIRS = [
    dict(prompt=f"{i} and {i % 5}?", chosen=f"yes {i % 3}", rejected="no" * (1 + i % 4))
    for i in range(24)
]


@pytest.fixture
def preferring(tiny, tmp_path):
    """A run of DPO on pairs, from a base that was trained a little."""
    config = with_conversations(tiny, tmp_path, PAIRS)
    config.chat.template = "plain"
    config.evals = ConfigDict()
    config.train.length = "4 steps"
    base = config.copy_and_resolve_references()
    answers = [dict(prompt=pair["prompt"], completion=pair["chosen"]) for pair in PAIRS]
    (tmp_path / "base_data").mkdir()
    base = with_conversations(base, tmp_path / "base_data", answers)
    run_training(base, tmp_path / "base")

    config.init_from = str(tmp_path / "base")
    config.objective = ConfigDict(dict(type="lm.objectives.preference", loss="dpo"))
    config.models.reference = ConfigDict(dict(init_from=str(tmp_path / "base"), model={}))
    config.evals.held_out = entries.held_out("Preferences", every=2, split="train", batch_size=8)
    return config


def stored(config, folder):
    """The same with what --mode=reference wrote in the reference's place."""
    config = config.copy_and_resolve_references()
    config.models = ConfigDict()
    config.objective.reference = "stored"
    config.chat.reference_logprobs = str(folder / "reference" / "reference.npz")
    workdir = epath.Path(folder / "reference")
    assert "24 examples" in reference.write(config.lock(), workdir, jax.devices()[:1])
    return config.unlock()


def numbers(run):
    lines = []
    for line in read_metrics(run):
        lines.append({k: v for k, v in line.items() if k != "train/flops"})
    return lines


def test_stored_is_as_the_model_says(preferring, tmp_path):
    run_training(preferring, tmp_path / "model")
    config = stored(preferring, tmp_path)
    run_training(config, tmp_path / "stored")
    by_model, by_file = numbers(tmp_path / "model"), numbers(tmp_path / "stored")
    assert len(by_model) == len(by_file)
    for ours, theirs in zip(by_file, by_model):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if isinstance(value, float):
                np.testing.assert_allclose(value, theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert abs(by_file[0]["train/loss"] - math.log(2)) < 1e-6


def test_examples_are_found_whatever_their_order(preferring, tmp_path):
    config = stored(preferring, tmp_path)
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[::-1][:20]))
    run_training(config, tmp_path / "reversed")
    assert abs(numbers(tmp_path / "reversed")[0]["train/loss"] - math.log(2)) < 1e-6

    changed = dict(PAIRS[0], chosen="another answer")
    path.write_text("".join(json.dumps(pair) + "\n" for pair in [*PAIRS[1:], changed]))
    with pytest.raises(ValueError, match="reference_logprobs = .* lacks .*conversations.jsonl:24"):
        run_training(config, tmp_path / "changed")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}"])
def test_a_file_that_is_none(preferring, tmp_path, content):
    (tmp_path / "reference.npz").write_bytes(content)
    preferring.objective.reference = "stored"
    preferring.models = ConfigDict()
    preferring.chat.reference_logprobs = str(tmp_path / "reference.npz")
    with pytest.raises(ValueError, match="can't be read .*--mode=reference writes one"):
        run_training(preferring, tmp_path / "run")
    preferring.chat.reference_logprobs = ""
    with pytest.raises(ValueError, match="'stored' needs a file"):
        run_training(preferring, tmp_path / "run")
