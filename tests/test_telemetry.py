"""Means from sums and counts, a metrics file that follows the checkpoints, and its curves."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from lm import files, telemetry
from tests.helpers import PNG, read_jsonl


def test_means_of_uneven_batches():
    """The mean over all tokens, not over batches; and in float64: half a million small terms don't
    get lost beside a big one.
    """
    total = {}
    telemetry.accumulate(total, {"loss": (np.float32(6.0), np.float32(3.0)), "z": (1.0, 4)})
    telemetry.accumulate(total, {"loss": (jnp.float32(1.0), jnp.float32(1.0))})
    assert telemetry.means(total) == {"loss": 7 / 4, "z": 0.25}

    # f32 has no number between 1e9 and 1e9 + 64.
    total = {"loss": (1e9, 1e9)}
    for _ in range(1000):
        telemetry.accumulate(total, {"loss": (np.float32(0.125), np.float32(0.125))})
    assert total["loss"] == (1e9 + 125, 1e9 + 125)


def test_the_mean_of_nothing_is_not_a_number():
    assert math.isnan(telemetry.means({"loss": (0.0, 0.0)})["loss"])


def test_writer_goes_on_after_a_step(tmp_path):
    """What was written after the step that a run goes on from is removed, what came before stays,
    once.
    """
    path = epath.Path(tmp_path)
    log = tmp_path / "metrics.jsonl"
    writer = telemetry.Writer(path, 0)
    assert writer.lines() == []
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 1.0 / step, "train/batch_hash": f"hash {step}"})
    writer.write(2, {"eval/validation/loss": 7})
    writer.close()
    first_run = read_jsonl(log)
    assert [line["step"] for line in first_run] == [1, 2, 3, 2]

    # Step 3 was after the checkpoint of step 2.
    writer = telemetry.Writer(path, 2)
    up_to_2 = [first_run[0], first_run[1], first_run[3]]
    assert writer.lines() == up_to_2
    assert read_jsonl(log) == up_to_2

    # A step without metrics has no line.
    writer.write(3, {"train/loss": 0.5})
    writer.write(4, {})
    writer.close()
    assert writer.lines() == up_to_2 + [{"step": 3, "train/loss": 0.5}]
    assert read_jsonl(log) == writer.lines()


def test_writer_drops_a_half_written_line(tmp_path):
    log = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "train/loss": 2.0}\n'
    for half in ('{"step": 2, "train/lo', '{"step": 2, "train/loss": 1.0'):
        log.write_text(whole + half)
        assert files.read_jsonl_log(epath.Path(log)) == [{"step": 1, "train/loss": 2.0}]
        telemetry.Writer(epath.Path(tmp_path), 5).close()
        assert log.read_text() == whole

    # An editor may have left out the newline: the line is whole.
    log.write_text(whole.strip())
    assert files.read_jsonl_log(epath.Path(log)) == [{"step": 1, "train/loss": 2.0}]


@pytest.mark.parametrize("line", ["", "\0\0", '{"step": 2', "[2]"])
def test_a_damaged_log_is_named(tmp_path, line):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2 is"):
        telemetry.Writer(epath.Path(tmp_path), 5)


def test_writer_keeps_numbers_that_json_has_no_word_for(tmp_path):
    writer = telemetry.Writer(epath.Path(tmp_path), 0)
    writer.write(1, {"train/loss": math.inf, "train/grad_norm": math.nan})
    writer.close()

    (line,) = telemetry.Writer(epath.Path(tmp_path), 1).lines()
    assert line["train/loss"] == math.inf
    assert math.isnan(line["train/grad_norm"])


def test_curves_are_a_picture_of_any_run():
    metrics = {
        "eval/v/bits_per_byte": 3.0,
        "eval/v/accuracy": 0.5,
        "eval/v/majority_accuracy": 0.5,
    }
    lines = [{"step": 1, "train/loss": 2.0}, {"step": 1} | metrics]
    assert telemetry.plot_curves([]).startswith(PNG)
    assert telemetry.plot_curves(lines).startswith(PNG)


def test_goodput_is_over_all_starts(tmp_path, monkeypatch):
    """A start goes on counting from the lines before it, and knows what it does again."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: clock.now)

    def start(step):
        writer = telemetry.Writer(epath.Path(tmp_path), step)
        sizes = dict(flops_per_token=1.0, full_flops_per_token=1.0, batch_tokens=10)
        start = telemetry.Start()
        timer = telemetry.Timer(jax.devices()[:1], **sizes, start=start, writer=writer)
        clock.now += 4
        timer.mark_first_step(())
        return writer, timer

    def write(writer, timer, step):
        clock.now += 3
        line = timer.line(step)
        writer.write(step, line)
        return line

    writer, timer = start(0)
    first = write(writer, timer, 1)
    assert first["train/goodput"] == pytest.approx(3 / 7)
    assert first["train/start_seconds_first_step"] == first["train/seconds_first_step"] == 4
    second = write(writer, timer, 2)
    assert second["train/goodput"] == pytest.approx(6 / 10)
    assert second["train/tokens_per_second"] == pytest.approx(10 / 3)
    assert "train/start_seconds_first_step" not in second

    # Killed a while ago; the last checkpoint was that of step 1.
    clock.now = 1000.0
    again = write(*start(1), 2)
    assert again["train/seconds_repeated"] == 3
    assert again["train/seconds_first_step"] == 8
    assert again["train/seconds_total"] == 17
    assert again["train/goodput"] == pytest.approx(6 / 17)
    assert again["train/start_seconds_first_step"] == 4
    assert "train/tokens_per_second" not in again
