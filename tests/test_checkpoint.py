"""Checkpoints: which are kept, damage, a full disk, restoring to other layouts, and what does not
fit.
"""

import json
import logging
import os
import resource
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import checkpoint
from lm.data import tokenizer as tokenizers
from lm.evals import entries, perplexity
from tests.helpers import assert_same_run, run_training, snapshot

pytestmark = pytest.mark.usefixtures("fast_runs")

NEVER = 1 << 30  # a step that no test reaches
ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(value, size=64):
    """A small state, which differs with `value` in every array."""
    return {
        "params": {
            "a": jnp.full((size, 4), value, jnp.bfloat16),
            "b": jnp.arange(size, dtype=jnp.float32) + value,
        },
        "step": jnp.int32(value),
    }


def abstract(shape, dtype, sharding=ONE_DEVICE):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


ABSTRACT = jax.tree.map(lambda x: abstract(x.shape, x.dtype), jax.eval_shape(lambda: state(0)))


def make(directory, **kwargs):
    return checkpoint.Checkpointer(epath.Path(directory), **{"keep": 2, **kwargs})


def save(checkpointer, step, loss=None, value=None):
    """Saves `state(value)`, by default of the step's number."""
    metrics = {} if loss is None else {"eval/v/loss": loss}
    value = step if value is None else value
    checkpointer.save(step, state(value), {"streams": {"0": step}}, metrics)
    checkpointer.wait()


def save_steps(directory, steps, **kwargs):
    """Leaves checkpoints of the steps in a directory."""
    checkpointer = make(directory, **kwargs)
    for step in steps:
        save(checkpointer, step)
    checkpointer.close()


def restored_value(checkpointer, step):
    """What the state was made with, after checking all of it."""
    restored, meta = checkpointer.restore(step, ABSTRACT), checkpointer.meta(step)
    jax.tree.map(np.testing.assert_array_equal, restored, state(int(restored["step"])))
    assert meta == {"streams": {"0": step}}
    return int(restored["step"])


def kept(directory):
    return checkpoint.steps(epath.Path(directory))


def restore_params(workdir):
    """(parameters, step, meta) of a run's newest checkpoint."""
    with checkpoint.open_run(epath.Path(workdir)) as saved:
        params = saved.restore_params(ABSTRACT["params"], averaged=True)
    return params, saved.step, saved.meta


def assert_params(params, value):
    jax.tree.map(np.testing.assert_array_equal, params, state(value)["params"])


# --- damage ---


def files_in(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


def flip(path):
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def largest(step):
    """The largest file of a checkpoint's arrays."""
    return max(files_in(step / "state"), key=lambda path: path.stat().st_size)


WAYS_TO_DAMAGE = (
    "bit",
    "truncated",
    "file missing",
    "no manifest",
    "manifest cut",
    "half deleted",
    "empty",
)


def damage(step, how):
    """Damages the folder of a checkpoint in one of the `WAYS_TO_DAMAGE`."""
    match how:
        case "bit":
            flip(largest(step))
        case "truncated":
            truncate(largest(step))
        case "file missing":
            largest(step).unlink()
        case "no manifest":
            (step / checkpoint.MANIFEST).unlink()
        case "manifest cut":
            os.truncate(step / checkpoint.MANIFEST, 20)
        case "half deleted":
            shutil.rmtree(step / "state")
        case "empty":
            shutil.rmtree(step)
            step.mkdir()


# --- which are kept ---


@pytest.mark.parametrize("restarts", [False, True])
def test_newest_and_best_are_kept(tmp_path, restarts):
    nan = float("nan")
    # (step, loss, steps that are kept after it)
    history = [
        (1, 5.0, [1]),
        (2, 3.0, [1, 2]),
        (3, None, [2, 3]),
        (4, 4.0, [2, 3, 4]),
        (5, nan, [2, 4, 5]),
        (6, None, [2, 5, 6]),
        (7, 3.5, [2, 6, 7]),
        (8, 2.0, [7, 8]),
        (9, nan, [8, 9]),
        (10, 6.0, [8, 9, 10]),
        (11, 7.0, [8, 10, 11]),
    ]

    checkpointer = make(tmp_path, best="eval/v/loss")
    for step, loss, wanted in history:
        save(checkpointer, step, loss)
        if restarts:
            checkpointer.close()
        assert kept(tmp_path) == wanted, step
        if restarts:
            checkpointer = make(tmp_path, best="eval/v/loss")
            assert checkpointer.latest() == step

    for step in (8, 10, 11):
        assert restored_value(checkpointer, step) == step
    checkpointer.close()


def test_without_best_only_the_newest_are_kept(tmp_path):
    checkpointer = make(tmp_path, keep=3)
    for step in range(6):
        save(checkpointer, step, loss=step)

    assert kept(tmp_path) == [3, 4, 5]
    assert checkpointer.latest() == 5
    checkpointer.close()


def test_keeping_none_is_refused(small, tmp_path):
    # A run would end without its weights.
    small.checkpoint.keep = 0
    with pytest.raises(ValueError, match="config.checkpoint.keep = 0"):
        run_training(small, tmp_path / "run")


def test_best_of_another_metric_is_not_compared(tmp_path):
    # config.checkpoint may change when a run goes on.
    checkpointer = make(tmp_path, best="eval/v/loss", keep=1)
    save(checkpointer, 1, loss=0.1)
    checkpointer.close()

    checkpointer = make(tmp_path, best="eval/w/nll", keep=1)
    for step, value in ((2, 5.0), (3, 6.0), (4, 7.0)):
        checkpointer.save(step, state(step), {}, {"eval/w/nll": value, "eval/v/loss": 0.2})
        checkpointer.wait()

    assert kept(tmp_path) == [2, 4]
    checkpointer.close()


def test_best_is_what_was_measured_at_that_step(small, tmp_path, monkeypatch):
    # The loss is measured every second step, another eval and a checkpoint come every step: an old
    # value is not a new checkpoint's.
    losses = iter([3.0, 4.0, 5.0])
    monkeypatch.setattr(
        perplexity.Perplexity, "run", lambda *unused: iter([("loss", next(losses))])
    )
    small.evals.loss = entries.perplexity(every=2, batch_size=8)
    small.evals.samples = entries.samples(("ab",), every=1, max_new_tokens=1)
    small.checkpoint.update(dict(every=1, keep=1, best="eval/loss/loss"))

    run_training(small.lock(), tmp_path / "run")

    assert kept(tmp_path / "run/checkpoints") == [2, 6]


# --- saving ---


def test_saving_again_replaces(tmp_path):
    checkpointer = make(tmp_path, best="eval/v/loss", keep=1)
    save(checkpointer, 1, loss=1.0)
    save(checkpointer, 2, loss=5.0)

    save(checkpointer, 2, loss=0.5, value=22)
    assert restored_value(checkpointer, 2) == 22
    assert checkpoint.problems(epath.Path(tmp_path / "2")) == []

    # With the new loss 2 is the best.
    save(checkpointer, 3, loss=0.7)
    assert kept(tmp_path) == [2, 3]
    checkpointer.close()

    checkpointer = make(tmp_path)
    assert restored_value(checkpointer, 2) == 22
    checkpointer.close()


def test_save_does_not_see_what_comes_after_it(tmp_path):
    # Training goes on while files are written, and takes the same memory.
    @jax.jit(donate_argnums=0)
    def update(tree):
        return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tree)

    # What goes wrong depends on timing: several attempts.
    for attempt in range(3):
        checkpointer = make(tmp_path / str(attempt))
        arrays = {f"w{i}": jnp.arange(1 << 18, dtype=jnp.float32) + i for i in range(8)}
        wanted = jax.tree.map(np.array, arrays)

        checkpointer.save(1, arrays, {}, {})
        for _ in range(20):
            arrays = update(arrays)
        checkpointer.wait()

        wanted_abstract = jax.tree.map(lambda x: abstract(x.shape, x.dtype), wanted)
        restored = checkpointer.restore(1, wanted_abstract)
        jax.tree.map(np.testing.assert_array_equal, restored, wanted)
        checkpointer.close()


# --- damaged checkpoints ---


@pytest.mark.parametrize("how", WAYS_TO_DAMAGE)
def test_damaged_newest_is_put_aside(tmp_path, caplog, how):
    checkpointer = make(tmp_path, keep=3, best="eval/v/loss")
    for step in (1, 2, 3):
        save(checkpointer, step, loss=step)
    checkpointer.close()
    damage(tmp_path / "3", how)

    with caplog.at_level(logging.WARNING):
        checkpointer = make(tmp_path, keep=3, best="eval/v/loss")

    assert "checkpoint 3 is damaged" in caplog.text
    assert "going back to 2" in caplog.text
    assert checkpointer.latest() == 2
    assert restored_value(checkpointer, 2) == 2

    # The step can be saved anew.
    save(checkpointer, 3, value=33)
    assert checkpointer.latest() == 3
    assert restored_value(checkpointer, 3) == 33
    assert kept(tmp_path) == [1, 2, 3]
    checkpointer.close()


@pytest.mark.parametrize("ruin", [flip, empty, os.unlink])
def test_each_file_counts(tmp_path, ruin):
    # Whichever file is damaged: either it is noticed and the one before is taken, or it restores
    # all the same.
    intact = tmp_path / "intact"
    save_steps(intact, (1, 2))
    names = sorted(path.relative_to(intact / "2") for path in files_in(intact / "2"))
    assert len(names) > 5

    for number, name in enumerate(names):
        directory = tmp_path / str(number)
        shutil.copytree(intact, directory)
        has_content = (intact / "2" / name).stat().st_size > 0
        if has_content or ruin is os.unlink:
            ruin(directory / "2" / name)

        checkpointer = make(directory)
        latest = checkpointer.latest()
        assert latest in (1, 2), name
        assert restored_value(checkpointer, latest) == latest, name
        # What holds the run is always noticed.
        if name.parts[0] in ("state", "meta", checkpoint.MANIFEST) and has_content:
            assert latest == 1, name
        checkpointer.close()


def test_damaged_older_one_changes_nothing_for_the_newest(tmp_path):
    save_steps(tmp_path, (1, 2, 3), keep=3)
    damage(tmp_path / "1", "half deleted")  # killed while it was removed

    checkpointer = make(tmp_path, keep=3)

    assert checkpointer.latest() == 3
    assert restored_value(checkpointer, 3) == 3
    assert restored_value(checkpointer, 2) == 2
    checkpointer.close()


def test_older_checkpoints_are_left_as_they_are(tmp_path, caplog):
    save_steps(tmp_path, (1, 2, 3), keep=3)
    flip(largest(tmp_path / "1"))

    make(tmp_path, keep=3).close()

    assert "damaged" not in caplog.text
    assert kept(tmp_path) == [1, 2, 3]


def test_all_damaged_is_an_error_and_overwrites_nothing(small, tmp_path):
    small.checkpoint.every = 2
    run = tmp_path / "run"
    run_training(small, run)
    for step in (4, 6):
        flip(largest(run / "checkpoints" / str(step)))
    before = snapshot(run)

    # A second start is refused as the first one is.
    message = r"has checkpoints \[4, 6\], but none can be read .*Not starting over at step 0"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            run_training(small, run)
        assert snapshot(run) == before

    small.init_from = str(run)
    with pytest.raises(ValueError, match="has no checkpoint that can be read"):
        run_training(small, tmp_path / "other")
    assert snapshot(run) == before


@pytest.mark.parametrize("how", ["bit", "no manifest"])
def test_run_goes_on_from_the_one_before_the_damaged_one(small, tmp_path, caplog, how):
    small.evals.validation = entries.perplexity(every=2, batch_size=8)
    small.checkpoint.update(dict(every=2, best="eval/validation/loss"))
    small.train.log_every = 3
    run_training(small, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    damage(tmp_path / "run/checkpoints/6", how)

    run_training(small, tmp_path / "run")

    assert "going back to 4" in caplog.text
    assert_same_run(tmp_path / "run", tmp_path / "whole", 6)

    # It is there until the run is past it.
    assert (tmp_path / "run/checkpoints/damaged-6").exists()
    with small.unlocked():
        small.train.length = "8 steps"
    run_training(small, tmp_path / "run")
    make(tmp_path / "run/checkpoints").close()
    assert not (tmp_path / "run/checkpoints/damaged-6").exists()

    checkpointer = make(tmp_path / "run/checkpoints")
    stored = checkpointer.meta(6)["tokenizer"]
    checkpointer.close()
    assert stored["fingerprint"] == "bytes-1"
    assert stored["vocab_size"] == 258
    assert checkpoint.tokenizer_from_meta(stored).fingerprint == "bytes-1"


# --- a full disk ---


@pytest.fixture
def disk(monkeypatch):
    """`disk["full_from"]`: the step from whose checkpoint on there is no space."""
    disk = {"full_from": NEVER}
    write_manifest = checkpoint.Checkpointer._write_manifest

    def write_if_there_is_space(self):
        if self._saving >= disk["full_from"]:
            raise OSError(28, "No space left on device")
        write_manifest(self)

    monkeypatch.setattr(checkpoint.Checkpointer, "_write_manifest", write_if_there_is_space)
    return disk


@pytest.mark.parametrize("keep", [1, 2])
def test_full_disk_leaves_the_checkpoints_before(tmp_path, disk, keep):
    checkpointer = make(tmp_path, keep=keep, best="eval/v/loss")
    save(checkpointer, 1, loss=1.0)
    save(checkpointer, 2, loss=2.0)
    before = snapshot(tmp_path)

    disk["full_from"] = 3
    checkpointer.save(3, state(3), {"streams": {"0": 3}}, {"eval/v/loss": 0.0})
    message = (
        r"checkpoint 3 could not be written .*No space left.*"
        "Checkpoint 2 is whole and kept; free space and start again"
    )
    with pytest.raises(OSError, match=message):
        checkpointer.wait()

    # What was half written is gone too: it may be the space that is missing.
    assert snapshot(tmp_path) == before
    assert checkpointer.latest() == 2
    checkpointer.close()

    disk["full_from"] = NEVER
    checkpointer = make(tmp_path, keep=keep, best="eval/v/loss")
    assert restored_value(checkpointer, checkpointer.latest()) == 2
    save(checkpointer, 3, loss=3.0)
    assert checkpointer.latest() == 3
    assert 1 in kept(tmp_path)  # still the best
    checkpointer.close()


def test_write_that_fails_in_the_array_library(tmp_path):
    # A limit on the size of a file fails as a full disk does, below Python, where the arrays are
    # written.
    checkpointer = make(tmp_path)
    save(checkpointer, 1)
    before = snapshot(tmp_path)
    noise = {"w": jax.random.normal(jax.random.key(0), (1 << 18,))}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    message = "checkpoint 2 could not be written .*Checkpoint 1 is whole and kept"
    try:
        checkpointer.save(2, noise, {}, {})
        with pytest.raises(OSError, match=message):
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert snapshot(tmp_path) == before
    save(checkpointer, 2)  # the same process may go on
    assert restored_value(checkpointer, 2) == 2
    checkpointer.close()


def test_full_disk_at_the_first_checkpoint(tmp_path, disk):
    disk["full_from"] = 1
    checkpointer = make(tmp_path)
    checkpointer.save(1, state(1), {}, {})
    with pytest.raises(OSError, match="No checkpoint is kept"):
        checkpointer.save(2, state(2), {}, {})  # here at the latest
    checkpointer.close()

    disk["full_from"] = NEVER
    checkpointer = make(tmp_path)
    assert checkpointer.latest() is None
    save(checkpointer, 1)
    assert restored_value(checkpointer, 1) == 1
    checkpointer.close()


@pytest.mark.parametrize("killed", [False, True])
def test_full_disk_while_saving_again_keeps_the_old(tmp_path, disk, killed):
    # A checkpoint is saved again when an eval comes after it; there may be no other.
    checkpointer = make(tmp_path, keep=1)
    save(checkpointer, 4)

    disk["full_from"] = 4
    checkpointer.save(4, state(4), {"streams": {"0": 4}}, {})
    if killed:
        # Nobody cleans up.
        with pytest.raises(OSError):
            checkpointer._manager.wait_until_finished()
    else:
        with pytest.raises(OSError, match="Checkpoint 4 is whole and kept"):
            checkpointer.wait()
        checkpointer.close()

    disk["full_from"] = NEVER
    checkpointer = make(tmp_path, keep=1)
    assert checkpointer.latest() == 4
    assert restored_value(checkpointer, 4) == 4
    checkpointer.close()


def test_run_on_a_full_disk_goes_on_later(small, tmp_path, disk):
    small.evals.validation = entries.perplexity(every=2, batch_size=8)
    small.checkpoint.every = 2
    run_training(small, tmp_path / "whole")

    disk["full_from"] = 4
    message = r"checkpoint 4 could not be written .*No space left.*Checkpoint 2 is whole"
    with pytest.raises(OSError, match=message):
        run_training(small, tmp_path / "run")
    assert kept(tmp_path / "run/checkpoints") == [2]

    disk["full_from"] = NEVER
    run_training(small, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole", 6)


# --- restoring ---


def test_restores_on_any_layout(tmp_path):
    devices = np.array(jax.devices())
    layouts = [
        NamedSharding(Mesh(devices, "x"), PartitionSpec("x")),
        NamedSharding(Mesh(devices.reshape(2, 4), ("x", "y")), PartitionSpec("y", "x")),
        NamedSharding(Mesh(devices[:2], "x"), PartitionSpec()),
        ONE_DEVICE,
    ]
    values = np.arange(64, dtype=np.float32).reshape(16, 4)

    for number, saved_layout in enumerate(layouts):
        checkpointer = make(tmp_path / str(number))
        checkpointer.save(1, {"w": jax.device_put(values, saved_layout)}, {}, {})
        checkpointer.wait()
        for layout in layouts:
            restored = checkpointer.restore(1, {"w": abstract((16, 4), jnp.float32, layout)})
            np.testing.assert_array_equal(restored["w"], values)
            assert restored["w"].sharding == layout
        checkpointer.close()


@pytest.mark.parametrize(
    "path, leaf, message",
    [
        (
            "a",
            abstract((64, 5), jnp.bfloat16),
            r"params/a is bfloat16\[64, 4\] there, and this state has bfloat16\[64, 5\]",
        ),
        (
            "b",
            abstract((64,), jnp.bfloat16),
            r"params/b is float32\[64\] there, and this state has bfloat16\[64\]",
        ),
        (
            "c",
            abstract((64,), jnp.float32),
            r"has no 'params/c'; it has \['params/a', 'params/b', 'step'\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, path, leaf, message):
    checkpointer = make(tmp_path)
    save(checkpointer, 1)

    wanted = ABSTRACT | {"params": ABSTRACT["params"] | {path: leaf}}
    with pytest.raises(ValueError, match=message):
        checkpointer.restore(1, wanted)
    checkpointer.close()


# --- reading another run ---


def test_reading_another_run_leaves_it_as_it_is(tmp_path):
    save_steps(tmp_path / "checkpoints", (1, 2))
    flip(largest(tmp_path / "checkpoints/2"))
    before = snapshot(tmp_path)

    params, step, meta = restore_params(tmp_path)

    assert_params(params, 1)
    assert step == 1
    assert meta == {"streams": {"0": 1}}
    assert snapshot(tmp_path) == before

    with pytest.raises(ValueError, match="nowhere has no checkpoint that can be read"):
        restore_params(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_reading_a_run_that_was_killed_while_it_replaced_a_checkpoint(tmp_path):
    """What is newest lies aside: neither an older one is taken for it, nor is a run repaired by a
    reader.
    """
    save_steps(tmp_path / "checkpoints", (1, 2))
    (tmp_path / "checkpoints/2").rename(tmp_path / "checkpoints/replaced-2")
    before = snapshot(tmp_path)

    message = "saving checkpoint 2 again, or was when it was killed: wait, or start that run again"
    with pytest.raises(ValueError, match=message):
        restore_params(tmp_path)
    assert snapshot(tmp_path) == before

    # The run's next start puts it back.
    make(tmp_path / "checkpoints").close()
    _, step, _ = restore_params(tmp_path)
    assert step == 2


def test_relative_directory(tmp_path, monkeypatch):
    # As in --workdir=runs/pydocs.
    monkeypatch.chdir(tmp_path)
    save_steps("run/checkpoints", [3])

    params, step, _ = restore_params("run")

    assert step == 3
    assert_params(params, 3)


# --- what a checkpoint is made of ---


def test_flatten_and_unflatten():
    tree = {"a": {"b": 1, "c": (2, [3])}, "d": 4}

    flat = checkpoint.flatten(tree)

    assert sorted(flat.values()) == [1, 2, 3, 4]
    assert flat["a/b"] == 1
    reordered = dict(reversed(flat.items()))
    assert checkpoint.unflatten(reordered, tree) == tree


def test_tokenizer_travels_inside(tmp_path):
    texts = ["red green blue " * 9, "ab cde é\n"] * 9
    trained = tokenizers.train_sentencepiece(texts, 280, epath.Path(tmp_path / "model"))

    for tokenizer in (tokenizers.ByteTokenizer(), trained):
        saved = json.loads(json.dumps(checkpoint.tokenizer_to_meta(tokenizer)))
        again = checkpoint.tokenizer_from_meta(saved)
        for field in ("fingerprint", "vocab_size", "bos_id", "eos_id"):
            assert getattr(again, field) == getattr(tokenizer, field)
        assert again.encode("red é\nß") == tokenizer.encode("red é\nß")


def test_tokenizer_writes_nowhere_else(tmp_path, monkeypatch):
    # A name out of a checkpoint is not trusted.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    saved = checkpoint.tokenizer_to_meta(tokenizers.ByteTokenizer())
    saved["files"] = {f"../{name}": content for name, content in saved["files"].items()}

    with pytest.raises(ValueError, match="plain name"):
        checkpoint.tokenizer_from_meta(saved)

    assert not list(tmp_path.iterdir())
