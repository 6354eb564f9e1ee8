"""What is shown while something takes long."""

import logging
import re
import threading
import time
import types
from fractions import Fraction

import pytest

from lm import progress
from lm.data import pack
from lm.data.sources import Document, Documents


@pytest.fixture(autouse=True)
def log(caplog, monkeypatch):
    """The log's lines; seconds go by fast."""
    for name in ("QUIET_SECONDS", "SECONDS_BETWEEN_LINES", "SECONDS_ON_TERMINAL"):
        monkeypatch.setattr(progress, name, 0.05)
    caplog.set_level(logging.INFO)
    return caplog


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_over_soon_is_not_worth_a_word(log, monkeypatch):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 60.0)
    with progress.activity("reading", 3, "files") as reading:
        assert list(reading.each("abc")) == ["a", "b", "c"]
    assert not log.messages


def test_lines_now_and_then_without_a_terminal(log):
    with progress.activity("reading", 3, "files") as reading:
        for _ in reading.each("abc"):
            seen = len(log.messages)
            wait_for(lambda seen=seen: len(log.messages) > seen + 1)
    assert "reading: 0 of 3 files, 0 s" in log.messages
    rated = r"reading: 2 of 3 files, \S+ files/s, 0 s left, 0 s"
    assert any(re.fullmatch(rated, message) for message in log.messages)
    assert log.messages[-1].startswith("reading took 0.")


def test_one_line_on_a_terminal(log, monkeypatch):
    shown = []
    terminal = types.SimpleNamespace(isatty=lambda: True, write=shown.append, flush=lambda: None)
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with pytest.raises(KeyError), progress.activity("compiling"):
        wait_for(lambda: "\rcompiling: 0 s\033[K" in shown)
        raise KeyError
    # An error has a line of its own.
    assert "".join(shown).endswith("\r\033[K")
    assert not log.messages


def test_nothing_where_the_log_leaves_it_out(log):
    log.set_level(logging.WARNING)
    before = threading.active_count()
    with progress.activity("reading", 2, "files") as reading:
        assert threading.active_count() == before
        assert list(reading.each("ab")) == ["a", "b"]
    assert not log.messages


def test_the_tokenizer_and_the_count_of_an_epoch(log, monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    documents = Documents([Document("red green blue " * 9, "one", "")] * 5, "fingerprint")
    sizes = dict(vocab_size=280, max_documents=3, label_prompt="")
    for _ in range(2):
        tokenizer = pack.train_tokenizer(documents, cache_dir=str(tmp_path), **sizes)
    what = "training a tokenizer of 280 ids on 3 documents"
    assert log.messages.count(what) == 1  # and not of one that was kept

    log.clear()
    packing = pack.Packing("first_fit", 32, 4)
    streams = dict(num_streams=1, seed=0, epochs=Fraction(1))
    assert pack.count_rows(documents, pack.Encoder(tokenizer, ""), packing, **streams)[0] > 0
    assert any(message.startswith("counting tokens took") for message in log.messages)
