"""Mutates configurations, a key or two at a time, and command lines, and sees how each ends:

    python -m tests.fuzz_config --num=5000 --seed=1

A mutation is accepted, or refused by a ValueError that names its key before data are read (evals:
before anything is computed). Anything else is printed, and is a fault.
"""

import argparse
import collections
import contextlib
import functools
import json
import logging
import random
import signal
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
from absl import flags

from lm import build, command_line
from lm import config as config_lib
from lm.data import sources
from lm.evals import entries
from tests.helpers import CONFIG_FILE, VERBALIZER, write_corpus

MAX_SECONDS = 30

INTEGERS = (-1, 0, 1, 2, 3, 7, 64, 2**20, 2**31 - 1, 2**31, 2**63, 10**30, -(2**40))
NUMBERS = (-1.0, 0.0, 1e-30, 0.5, 1.0, 1.5, 1e9, 1e38, 1e308, float("nan"), float("inf"), -1e-9)
TEXTS = ("", "x", "../..", "/dev/null", "a" * 1000, "\0", "\x1b[31m", "lm", "lm.nn", "os.system")
LENGTHS = ("0 steps", "-3 steps", "5", "1e999999999 steps", "1/0 steps", "nan epochs", "3 tokens")
# What may stand behind --config.KEY=
WORDS = ("", "x", "None", "True", "false", "-1", "0", "1.5", "1e400", "nan", "-inf", "[1,2]", "(1,")
WORDS += ("()", "('a',)", "{}", "{'a':1}", "'x'", '"', "1_0", "0x10", "\uff19", "a=b", "lambda: 1")
WORDS += ("\x1b[31m", "(" * 300, "9" * 5000, "1e999999999 steps", "5 steps", "lm.nn", "print(1)")
OTHERS = (None, True, [], (), {}, [1], (1.5, "a"), ("",), {"a": 1})


class DataRead(Exception):
    """All that needs no data has been checked."""


class Unclear(Exception):
    """A mutation that ended otherwise than accepted, or refused by its key."""


def base_config(folder):
    """A complete small configuration with evals of each kind that needs no download."""
    write_corpus(folder / "corpus.jsonl")
    c = config_lib.default()
    c.data.source = "lm.data.sources.jsonl"
    c.data.source_args = dict(
        path=str(folder / "corpus.jsonl"), held_out=0.25, label_key="label", text_key="text"
    )
    c.data.cache_dir = str(folder / "cache")
    c.data.label_prompt = "\n="
    c.data.update(dict(length=32, batch_size=8, streams=4))
    c.tokenizer.kind = "bytes"
    c.model.update(dict(context_length=64, num_layers=2, embed_dim=32, mlp_dim=64, head_dim=8))
    c.optimizer.warmup_steps = 2
    c.train.length = "100 steps"
    c.mesh.fsdp = 1
    c.evals.text = entries.perplexity(every=1, batch_size=8)
    c.evals.labels = entries.classification(VERBALIZER, every=2, batch_size=8)
    c.evals.samples = entries.samples(("ab",), every=0, max_new_tokens=4)
    return c


def mutate(config, draw):
    """Changes one or two keys of `config`; returns {key: value}."""
    keys = sorted(config_lib.flatten(config))
    changes = {}
    for key in draw.sample(keys, draw.choice((1, 1, 1, 2))):
        *groups, last = key.split(".")
        group = config
        for name in groups:
            group = group[name]
        pool = {int: INTEGERS, float: NUMBERS, bool: OTHERS, str: TEXTS}
        values = pool.get(type(group[last]), OTHERS)
        if key == "train.length":
            values = LENGTHS
        # Now and then a value of another type.
        value = draw.choice(draw.choice((values, values, values, OTHERS, INTEGERS, TEXTS)))
        with group.ignore_type():
            group[last] = value
        changes[key] = value
    return changes


@contextlib.contextmanager
def time_limit():
    def fail(*unused):
        raise Unclear(f"more than {MAX_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(MAX_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@functools.wraps(sources.jsonl)
def read_nothing(*unused, **arguments):
    raise DataRead


def end_of(config, changes):
    """ "accepted" or "refused".

    Raises:
      Unclear: neither.
    """
    devices = jax.devices()[:1]
    needs_data = any(key.startswith(("evals.", "data.source_args")) for key in changes)
    try:
        with time_limit():
            if needs_data:
                build.build(config, devices).make_evaluators()
            else:
                with mock.patch.object(sources, "jsonl", read_nothing):
                    build.build(config, devices)
    except DataRead:
        return "accepted"
    except Unclear:
        raise
    except ValueError as error:
        # What a source takes is its own affair: its arguments are named together.
        names = [key.removesuffix(key.partition("source_args")[2]) for key in changes]
        if any(f"config.{name}" in str(error) for name in names):
            return "refused"
        raise Unclear(f"without the key: {error}") from error
    except Exception as error:
        raise Unclear(f"{type(error).__name__}: {error}") from error
    return "accepted"


def fuzz(num, seed, folder):
    """Returns (Counter of ends, messages of those that are unclear)."""
    draw = random.Random(seed)
    ends = collections.Counter()
    unclear = []
    for number in range(num):
        config = base_config(folder)
        changes = mutate(config, draw)
        try:
            ends[end_of(config, changes)] += 1
        except Unclear as error:
            ends["unclear"] += 1
            unclear.append(f"{number}: {changes!r:.200}: {error!s:.300}")
    return ends, unclear


@contextlib.contextmanager
def flags_restored():
    """Overrides become flags of their own, which are looked for in sys.argv."""
    argv, before = sys.argv, set(flags.FLAGS)
    try:
        yield
    finally:
        sys.argv = argv
        flags.FLAGS.unparse_flags()
        flags.FLAGS["config"].unparse()
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def end_of_command_line(config_flag, config_file, argument, key):
    """ "accepted" or "refused".

    Raises:
      Unclear: neither.
    """
    with flags_restored():
        sys.argv = ["main", f"--config={config_file}", argument]
        try:
            command_line.parse(list(sys.argv))
        except SystemExit as error:
            if f"config.{key}" in str(error) or f"configuration key {key!r}" in str(error):
                return "refused"
            raise Unclear(f"without the key: {error}") from error
        except Exception as error:
            raise Unclear(f"{type(error).__name__}: {error}") from error
        return end_of(config_flag.value, {key: argument})


def fuzz_command_lines(num, seed, folder):
    """Returns (Counter of ends, messages of those that are unclear)."""
    draw = random.Random(seed)
    config_flag = command_line.config_flag()
    config_file = folder / "config.py"
    config_file.write_text(CONFIG_FILE.format(text=json.dumps(base_config(folder).to_dict())))
    keys = sorted(config_lib.flatten(base_config(folder)))
    keys += [*config_lib.GROUPS, "evals", "evals.text"]

    ends = collections.Counter()
    unclear = []
    for number in range(num):
        key, word = draw.choice(keys), draw.choice(WORDS)
        with_word = [f"--config.{key}={word}", f"-config.{key}={word}"]
        argument = draw.choice([*with_word, *with_word, f"--config.{key}", f"--noconfig.{key}"])
        try:
            ends[end_of_command_line(config_flag, config_file, argument, key)] += 1
        except Unclear as error:
            ends["unclear"] += 1
            unclear.append(f"{number}: {argument!r:.200}: {error!s:.300}")
    return ends, unclear


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--num", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable()
    failed = False
    for fuzzer in (fuzz, fuzz_command_lines):
        with tempfile.TemporaryDirectory() as folder:
            ends, unclear = fuzzer(arguments.num, arguments.seed, Path(folder))
        print("\n".join([*unclear, f"{fuzzer.__name__}: {dict(ends)}"]))
        failed = failed or bool(unclear)
    sys.exit(failed)


if __name__ == "__main__":
    main()
