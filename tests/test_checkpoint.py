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
from test_train import _quick, _small, assert_same_run, go, snapshot  # noqa: F401

from lm import checkpoint
from lm.data import tokenizer as tokenizers
from lm.evals import entries, perplexity


def state(value, size=64):
    return {
        "params": {
            "a": jnp.full((size, 4), value, jnp.bfloat16),
            "b": jnp.arange(size, dtype=jnp.float32) + value,
        },
        "step": jnp.int32(value),
    }


ABSTRACT = jax.eval_shape(lambda: state(0))
ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=ONE), ABSTRACT)


def make(directory, **kwargs):
    return checkpoint.Checkpointer(epath.Path(directory), **{"keep": 2, **kwargs})


def save(checkpointer, step, loss=None, value=None):
    checkpointer.save(
        step,
        state(step if value is None else value),
        {"streams": {"0": step}},
        {} if loss is None else {"eval/v/loss": loss},
    )
    checkpointer.wait()


def value_of(checkpointer, step):
    """What the state was made with, after checking all of it."""
    restored, meta = checkpointer.restore(step, ABSTRACT)
    jax.tree.map(np.testing.assert_array_equal, restored, state(int(restored["step"])))
    assert meta == {"streams": {"0": step}}
    return int(restored["step"])


def kept(directory):
    return checkpoint.steps(epath.Path(directory))


def flip(path, where=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1
    path.write_bytes(data)


def biggest(step):
    """The biggest file of a checkpoint's arrays."""
    return max(
        (p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )


DAMAGE = {
    "bit": lambda step: flip(biggest(step)),
    "truncated": lambda step: os.truncate(biggest(step), biggest(step).stat().st_size - 1),
    "file missing": lambda step: biggest(step).unlink(),
    "no manifest": lambda step: (step / checkpoint.MANIFEST).unlink(),
    "manifest cut": lambda step: os.truncate(step / checkpoint.MANIFEST, 20),
    "half deleted": lambda step: shutil.rmtree(step / "state"),
    "empty": lambda step: [shutil.rmtree(step), step.mkdir()],
}


@pytest.mark.parametrize("restarts", [False, True])
def test_newest_and_best_are_kept(tmp_path, restarts):
    losses = {
        1: 5.0,
        2: 3.0,
        3: None,
        4: 4.0,
        5: float("nan"),
        6: None,
        7: 3.5,
        8: 2.0,
        9: float("nan"),
        10: 6.0,
        11: 7.0,
    }
    wanted = {
        1: [1],
        2: [1, 2],
        3: [2, 3],
        4: [2, 3, 4],
        5: [2, 4, 5],
        6: [2, 5, 6],
        7: [2, 6, 7],
        8: [7, 8],
        9: [8, 9],
        10: [8, 9, 10],
        11: [8, 10, 11],
    }
    checkpointer = make(tmp_path, best="eval/v/loss")
    for step, loss in losses.items():
        save(checkpointer, step, loss)
        if restarts:
            checkpointer.close()
        assert kept(tmp_path) == wanted[step], step
        if restarts:
            checkpointer = make(tmp_path, best="eval/v/loss")
            assert checkpointer.latest() == step
    assert [value_of(checkpointer, step) for step in (8, 10, 11)] == [8, 10, 11]
    checkpointer.close()


def test_without_best_only_the_newest_are_kept(tmp_path):
    checkpointer = make(tmp_path, keep=3)
    for step in range(6):
        save(checkpointer, step, loss=step)
    assert kept(tmp_path) == [3, 4, 5] and checkpointer.latest() == 5
    checkpointer.close()


def test_keeping_none_is_refused(small, tmp_path):
    # A run would end without its weights.
    small.checkpoint.keep = 0
    with pytest.raises(ValueError, match="config.checkpoint.keep = 0"):
        go(small, tmp_path / "run")


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
    # figure is not a new checkpoint's.
    losses = iter([3.0, 4.0, 5.0])
    monkeypatch.setattr(
        perplexity.Perplexity, "run", lambda *unused: iter([("loss", next(losses))])
    )
    small.evals.loss = entries.perplexity(every=2, batch_size=8)
    small.evals.samples = entries.samples(("ab",), every=1, max_new_tokens=1)
    small.checkpoint.update(dict(every=1, keep=1, best="eval/loss/loss"))
    go(small.lock(), tmp_path / "run")
    assert kept(tmp_path / "run/checkpoints") == [2, 6]


def test_saving_again_replaces(tmp_path):
    checkpointer = make(tmp_path, best="eval/v/loss", keep=1)
    save(checkpointer, 1, loss=1.0)
    save(checkpointer, 2, loss=5.0)
    save(checkpointer, 2, loss=0.5, value=22)
    assert value_of(checkpointer, 2) == 22 and checkpoint.problems(epath.Path(tmp_path / "2")) == []
    save(checkpointer, 3, loss=0.7)
    assert kept(tmp_path) == [2, 3]  # with the new figure 2 is the best
    checkpointer.close()
    checkpointer = make(tmp_path)
    assert value_of(checkpointer, 2) == 22
    checkpointer.close()


def test_save_does_not_see_what_comes_after_it(tmp_path):
    # Training goes on while files are written, and takes the same memory.
    update = jax.jit(
        lambda x: jax.tree.map(lambda a: a + jnp.ones((), a.dtype), x), donate_argnums=0
    )
    for attempt in range(3):
        checkpointer = make(tmp_path / str(attempt))
        now = {f"w{i}": jnp.arange(1 << 18, dtype=jnp.float32) + i for i in range(8)}
        wanted = jax.tree.map(np.array, now)
        checkpointer.save(1, now, {}, {})
        for _ in range(20):
            now = update(now)
        restored, _ = (
            checkpointer.wait(),
            checkpointer.restore(
                1,
                jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=ONE), wanted
                ),
            ),
        )[1]
        jax.tree.map(np.testing.assert_array_equal, restored, wanted)
        checkpointer.close()


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_newest_is_put_aside(tmp_path, caplog, kind):
    checkpointer = make(tmp_path, keep=3, best="eval/v/loss")
    for step in (1, 2, 3):
        save(checkpointer, step, loss=step)
    checkpointer.close()
    DAMAGE[kind](tmp_path / "3")
    with caplog.at_level(logging.WARNING):
        checkpointer = make(tmp_path, keep=3, best="eval/v/loss")
    assert "checkpoint 3 is damaged" in caplog.text and "going back to 2" in caplog.text
    assert checkpointer.latest() == 2 and value_of(checkpointer, 2) == 2
    save(checkpointer, 3, value=33)
    assert (
        checkpointer.latest() == 3
        and value_of(checkpointer, 3) == 33
        and kept(tmp_path) == [1, 2, 3]
    )
    checkpointer.close()


def test_each_file_counts(tmp_path):
    # Whichever file is damaged: either it is noticed and the one before is taken, or it restores
    # all the same.
    checkpointer = make(tmp_path / "good")
    for step in (1, 2):
        save(checkpointer, step)
    checkpointer.close()
    files = sorted(
        p.relative_to(tmp_path / "good/2") for p in (tmp_path / "good/2").rglob("*") if p.is_file()
    )
    assert len(files) > 5
    for number, name in enumerate(files):
        for what, ruin in (
            ("flip", flip),
            ("empty", lambda p: os.truncate(p, 0)),
            ("delete", os.unlink),
        ):
            directory = tmp_path / f"{what}{number}"
            shutil.copytree(tmp_path / "good", directory)
            if (directory / "2" / name).stat().st_size or what == "delete":
                ruin(directory / "2" / name)
            checkpointer = make(directory)
            assert checkpointer.latest() in (1, 2), (what, name)
            assert value_of(checkpointer, checkpointer.latest()) == checkpointer.latest(), (
                what,
                name,
            )
            if (
                name.parts[0] in ("state", "meta", checkpoint.MANIFEST)
                and (tmp_path / "good/2" / name).stat().st_size
            ):
                assert checkpointer.latest() == 1, (what, name)
            checkpointer.close()


def test_damaged_older_one_changes_nothing_for_the_newest(tmp_path):
    checkpointer = make(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(checkpointer, step)
    checkpointer.close()
    DAMAGE["half deleted"](tmp_path / "1")  # killed while it was removed
    checkpointer = make(tmp_path, keep=3)
    assert (
        checkpointer.latest() == 3
        and value_of(checkpointer, 3) == 3
        and value_of(checkpointer, 2) == 2
    )
    checkpointer.close()


def test_all_damaged_is_an_error_and_overwrites_nothing(small, tmp_path):
    small.checkpoint.every = 2
    run = tmp_path / "run"
    go(small, run)
    for step in (4, 6):
        flip(biggest(run / "checkpoints" / str(step)))
    before = snapshot(run)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match=r"has checkpoints \[4, 6\], but none can be read .*Not starting over at step 0",
        ):
            go(small, run)
        assert snapshot(run) == before
    small.init_from = str(run)
    with pytest.raises(ValueError, match="has no checkpoint that can be read"):
        go(small, tmp_path / "other")
    assert snapshot(run) == before


@pytest.mark.parametrize("kind", ["bit", "no manifest"])
def test_run_goes_on_from_the_one_before_the_damaged_one(small, tmp_path, caplog, kind):
    small.evals.validation = entries.perplexity(every=2, batch_size=8)
    small.checkpoint.update(dict(every=2, best="eval/validation/loss"))
    small.train.log_every = 3
    go(small, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    DAMAGE[kind](tmp_path / "run/checkpoints/6")
    go(small, tmp_path / "run")
    assert "going back to 4" in caplog.text
    checkpointer = make(tmp_path / "run/checkpoints")
    stored = checkpointer.meta(6)["tokenizer"]
    checkpointer.close()
    assert (
        checkpoint.unpack_tokenizer(stored["files"]).fingerprint
        == stored["fingerprint"]
        == "bytes-1"
        and stored["vocab_size"] == 258
    )
    assert_same_run(tmp_path / "run", tmp_path / "whole", 6)


@pytest.fixture
def disk(monkeypatch):
    """`disk["full_from"]`: the step from whose checkpoint on there is no space."""
    disk, real = {"full_from": 1 << 30}, checkpoint.Checkpointer._write_manifest

    def write(self):
        if self._saving >= disk["full_from"]:
            raise OSError(28, "No space left on device")
        real(self)

    monkeypatch.setattr(checkpoint.Checkpointer, "_write_manifest", write)
    return disk


@pytest.mark.parametrize("keep", [1, 2])
def test_full_disk_leaves_the_checkpoints_before(tmp_path, disk, keep):
    checkpointer = make(tmp_path, keep=keep, best="eval/v/loss")
    save(checkpointer, 1, loss=1.0)
    save(checkpointer, 2, loss=2.0)
    disk["full_from"] = 3
    before = snapshot(tmp_path)
    checkpointer.save(3, state(3), {"streams": {"0": 3}}, {"eval/v/loss": 0.0})
    with pytest.raises(
        OSError,
        match=r"checkpoint 3 could not be written .*No space left.*Checkpoint 2 is whole and kept; free space and start again",  # noqa: E501
    ):
        checkpointer.wait()
    # what was half written is gone too: it may be the space that is missing
    assert snapshot(tmp_path) == before
    assert checkpointer.latest() == 2
    checkpointer.close()
    disk["full_from"] = 1 << 30
    checkpointer = make(tmp_path, keep=keep, best="eval/v/loss")
    assert value_of(checkpointer, checkpointer.latest()) == 2
    save(checkpointer, 3, loss=3.0)
    assert checkpointer.latest() == 3 and 1 in kept(tmp_path)  # 1 is still the best
    checkpointer.close()


def test_write_that_fails_in_the_array_library(tmp_path):
    # A limit on the size of a file fails as a full disk does, below Python, where the arrays are
    # written.
    checkpointer = make(tmp_path)
    save(checkpointer, 1)
    before, old = snapshot(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = {"w": jax.random.normal(jax.random.key(0), (1 << 18,))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, old[1]))
    try:
        checkpointer.save(2, noise, {}, {})
        with pytest.raises(
            OSError, match="checkpoint 2 could not be written .*Checkpoint 1 is whole and kept"
        ):
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert snapshot(tmp_path) == before
    save(checkpointer, 2)  # the same process may go on
    assert value_of(checkpointer, 2) == 2
    checkpointer.close()


def test_full_disk_at_the_first_checkpoint(tmp_path, disk):
    disk["full_from"] = 1
    checkpointer = make(tmp_path)
    checkpointer.save(1, state(1), {}, {})
    with pytest.raises(OSError, match="No checkpoint is kept"):
        checkpointer.save(2, state(2), {}, {})  # here at the latest
    checkpointer.close()
    disk["full_from"] = 1 << 30
    checkpointer = make(tmp_path)
    assert checkpointer.latest() is None
    save(checkpointer, 1)
    assert value_of(checkpointer, 1) == 1
    checkpointer.close()


@pytest.mark.parametrize("killed", [False, True])
def test_full_disk_while_saving_again_keeps_the_old(tmp_path, disk, killed):
    # A checkpoint is saved again when an eval comes after it; there may be no other.
    checkpointer = make(tmp_path, keep=1)
    save(checkpointer, 4)
    disk["full_from"] = 4
    checkpointer.save(4, state(4), {"streams": {"0": 4}}, {})
    if killed:  # nobody cleans up
        with pytest.raises(OSError):
            checkpointer._manager.wait_until_finished()
    else:
        with pytest.raises(OSError, match="Checkpoint 4 is whole and kept"):
            checkpointer.wait()
        checkpointer.close()
    disk["full_from"] = 1 << 30
    checkpointer = make(tmp_path, keep=1)
    assert checkpointer.latest() == 4 and value_of(checkpointer, 4) == 4
    checkpointer.close()


def test_run_on_a_full_disk_goes_on_later(small, tmp_path, disk):
    small.evals.validation = entries.perplexity(every=2, batch_size=8)
    small.checkpoint.every = 2
    go(small, tmp_path / "whole")
    disk["full_from"] = 4
    with pytest.raises(
        OSError, match=r"checkpoint 4 could not be written .*No space left.*Checkpoint 2 is whole"
    ):
        go(small, tmp_path / "run")
    assert kept(tmp_path / "run/checkpoints") == [2]
    disk["full_from"] = 1 << 30
    go(small, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole", 6)


def test_restores_on_any_layout(tmp_path):
    devices = np.array(jax.devices())
    layouts = [
        NamedSharding(Mesh(devices, "x"), PartitionSpec("x")),
        NamedSharding(Mesh(devices.reshape(2, 4), ("x", "y")), PartitionSpec("y", "x")),
        NamedSharding(Mesh(devices[:2], "x"), PartitionSpec()),
        ONE,
    ]
    values = {"w": np.arange(64, dtype=np.float32).reshape(16, 4)}
    for number, one in enumerate(layouts):
        checkpointer = make(tmp_path / str(number))
        checkpointer.save(1, jax.device_put(values, one), {}, {})
        checkpointer.wait()
        for other in layouts:
            restored, _ = checkpointer.restore(
                1, {"w": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=other)}
            )
            np.testing.assert_array_equal(restored["w"], values["w"])
            assert restored["w"].sharding == other
        checkpointer.close()


@pytest.mark.parametrize(
    "path,leaf,message",
    [
        (
            "a",
            jax.ShapeDtypeStruct((64, 5), jnp.bfloat16),
            r"params/a is bfloat16\[64, 4\] there, and this state has bfloat16\[64, 5\]",
        ),
        (
            "b",
            jax.ShapeDtypeStruct((64,), jnp.bfloat16),
            r"params/b is float32\[64\] there, and this state has bfloat16\[64\]",
        ),
        (
            "c",
            jax.ShapeDtypeStruct((64,), jnp.float32),
            r"has no 'params/c'; it has \['params/a', 'params/b', 'step'\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, path, leaf, message):
    checkpointer = make(tmp_path)
    save(checkpointer, 1)
    leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=ONE)
    with pytest.raises(ValueError, match=message):
        checkpointer.restore(1, ABSTRACT | {"params": ABSTRACT["params"] | {path: leaf}})
    checkpointer.close()


def test_reading_another_run_leaves_it_as_it_is(tmp_path):
    checkpointer = make(tmp_path / "checkpoints")
    for step in (1, 2):
        save(checkpointer, step)
    checkpointer.close()
    flip(biggest(tmp_path / "checkpoints/2"))
    before = snapshot(tmp_path)
    metas = []
    wanted = lambda meta: (metas.append(meta), ABSTRACT["params"])[1]
    params, step = checkpoint.restore_weights(epath.Path(tmp_path), wanted, averaged=True)
    jax.tree.map(np.testing.assert_array_equal, params, state(1)["params"])
    assert metas == [{"streams": {"0": 1}}] and step == 1
    assert snapshot(tmp_path) == before
    with pytest.raises(ValueError, match="nowhere has no checkpoint that can be read"):
        checkpoint.restore_weights(epath.Path(tmp_path / "nowhere"), wanted, averaged=True)
    assert not (tmp_path / "nowhere").exists()


def test_reading_a_run_that_was_killed_while_it_replaced_a_checkpoint(tmp_path):
    """What is newest lies aside: neither an older one is taken for it, nor is a run repaired by a
    reader.
    """
    checkpointer = make(tmp_path / "checkpoints")
    for step in (1, 2):
        save(checkpointer, step)
    checkpointer.close()
    read = lambda: checkpoint.restore_weights(
        epath.Path(tmp_path), lambda meta: ABSTRACT["params"], averaged=True
    )
    (tmp_path / "checkpoints/2").rename(tmp_path / "checkpoints/replaced-2")
    before = snapshot(tmp_path)
    with pytest.raises(
        ValueError,
        match="saving checkpoint 2 again, or was when it was killed: wait, or start that run again",
    ):
        read()
    assert snapshot(tmp_path) == before
    make(tmp_path / "checkpoints").close()
    assert read()[1] == 2


def test_older_checkpoints_are_left_as_they_are(tmp_path, caplog):
    checkpointer = make(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(checkpointer, step)
    checkpointer.close()
    flip(biggest(tmp_path / "1"))
    make(tmp_path, keep=3).close()
    assert "damaged" not in caplog.text and kept(tmp_path) == [1, 2, 3]


def test_relative_directory(tmp_path, monkeypatch):
    # As in --workdir=runs/pydocs.
    monkeypatch.chdir(tmp_path)
    checkpointer = make("run/checkpoints")
    save(checkpointer, 3)
    checkpointer.close()
    params, step = checkpoint.restore_weights(
        epath.Path("run"), lambda meta: ABSTRACT["params"], averaged=True
    )
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, params, state(3)["params"])


def test_flatten_and_unflatten(tmp_path):
    tree = {"a": {"b": 1, "c": (2, [3])}, "d": 4}
    flat = checkpoint.flatten(tree)
    assert sorted(flat.values()) == [1, 2, 3, 4] and flat["a/b"] == 1
    assert checkpoint.unflatten(dict(reversed(flat.items())), tree) == tree


def test_tokenizer_travels_inside(tmp_path, monkeypatch):
    texts = ["red green blue " * 9, "ab cde é\n"] * 9
    for tokenizer in (
        tokenizers.ByteTokenizer(),
        tokenizers.train_sentencepiece(texts, 280, epath.Path(tmp_path / "model")),
    ):
        packed = json.loads(json.dumps(checkpoint.pack_tokenizer(tokenizer)))
        again = checkpoint.unpack_tokenizer(packed)
        assert (again.fingerprint, again.vocab_size, again.bos_id, again.eos_id) == (
            tokenizer.fingerprint,
            tokenizer.vocab_size,
            tokenizer.bos_id,
            tokenizer.eos_id,
        )
        assert again.encode("red é\nß") == tokenizer.encode("red é\nß")
    # A name out of a checkpoint, which is not trusted, writes nowhere else.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = checkpoint.pack_tokenizer(tokenizers.ByteTokenizer())
    checkpoint.unpack_tokenizer({f"../{name}": content for name, content in files.items()})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
