"""What somebody else made is data: a run directory, a Hugging Face checkpoint, a tokenizer, a chat
template. Nothing outside is written, nothing is imported, and every case ends in time.
"""

import json
import os
import resource
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
from etils import epath

from lm import checkpoint, convert, evaluate, generate
from lm.data import chat
from lm.data import tokenizer as tokenizers
from lm.decoding.sampling import Sampling
from lm.evals import entries
from lm.hf import directory as hf
from lm.hf import safetensors
from tests.helpers import run_training

pytestmark = pytest.mark.usefixtures("fast_runs", "limits")

MAX_SECONDS, MAX_GIB = 60, 4


@pytest.fixture
def limits():
    """A case that reads a pipe, loops or allocates without end fails."""

    def fail(*unused):
        raise AssertionError(f"it took more than {MAX_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(MAX_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < MAX_GIB * 2**20


_MADE = {}


@pytest.fixture
def received(small, tmp_path, tmp_path_factory):
    """A run directory of two steps, imported from a Hugging Face checkpoint as far as its metadata
    say; a copy for each test.
    """
    small.train.length = "2 steps"
    small.optimizer.warmup_steps = 0
    small.evals.text = entries.perplexity(every=0, batch_size=8)
    if not _MADE:
        run = tmp_path_factory.mktemp("made") / "run"
        run_training(small, run)
        _MADE["run"] = run
    shutil.copytree(_MADE["run"], tmp_path / "run")
    return tmp_path / "run"


def rewrite_manifest(folder):
    """As one who changes a checkpoint would: its files and its manifest agree."""
    checksums = checkpoint._checksums(epath.Path(folder))
    (folder / checkpoint.MANIFEST).write_text(json.dumps(checksums))


def change_meta(run, change):
    """Changes the metadata of the run's checkpoint."""
    folder = run / "checkpoints/2"
    path = folder / "meta/metadata"
    meta = json.loads(path.read_text())
    changed = change(meta)
    path.write_text(json.dumps(meta if changed is None else changed))
    rewrite_manifest(folder)


def load(run):
    return generate.load(epath.Path(run), jax.devices()[:1], Sampling())


def export(run):
    target = run.parent / "export"
    convert.export_checkpoint(epath.Path(run), target, jax.devices()[:1])


# Code.

EVIL = """
import pathlib
pathlib.Path({victim!r}).write_text("ran")
from lm.models.transformer import *
"""


@pytest.mark.parametrize("use", [load, export])
def test_a_stored_model_imports_nothing(received, monkeypatch, use):
    victim = received.parent / "victim"
    (received / "evil.py").write_text(EVIL.format(victim=str(victim)))
    monkeypatch.syspath_prepend(str(received))
    monkeypatch.delitem(sys.modules, "evil", raising=False)

    def name_code(meta):
        meta["config"]["model"]["type"] = "evil"

    change_meta(received, name_code)
    with pytest.raises(ValueError, match="module 'evil', which would be imported.*--model_type"):
        use(received)
    assert not victim.exists()

    # The user's own command may name it.
    generate.load(epath.Path(received), jax.devices()[:1], Sampling(), model_type="evil")
    assert victim.read_text() == "ran"


# Metadata.


def set_path(meta, path, value):
    *parents, last = path.split(".")
    for key in parents:
        meta = meta.setdefault(key, {})
    if value is None:
        del meta[last]
    else:
        meta[last] = value


@pytest.mark.parametrize("use", [load, export])
@pytest.mark.parametrize(
    "path, value, message",
    [
        ("config", None, "has config = None; wanted a dict"),
        ("config", [1], r"has config = \[1\]; wanted a dict"),
        ("config.model", 3, "no config.model with a type"),
        ("config.model.type", None, "no config.model with a type"),
        ("config.model.num_layers", 10**8, "config.model.num_layers = 100000000; wanted 1 to"),
        ("config.model.num_layers", "2", "config.model.num_layers = '2'; wanted an integer"),
        ("config.model.embed_dim", 2**17, "GB, and its model would have"),
        ("config.model.rope_theta", float("nan"), "config.model.rope_theta = nan"),
        ("config.model.activation", None, "config.model.activation is missing"),
        ("config.model.surprise", 1, "config.model.surprise is no key"),
        ("tokenizer", None, "has tokenizer = None"),
        ("tokenizer.files", "x", "has tokenizer.files = x; wanted a dict"),
        ("tokenizer.vocab_size", "many", "has tokenizer.vocab_size = many; wanted a int"),
        ("tokenizer.files", {"../victim": "eA=="}, "names the file '../victim'"),
        ("tokenizer.files", {"/tmp/victim": "eA=="}, "names the file '/tmp/victim'"),
        ("tokenizer.files", {"tokenizer.bytes": 3}, "tokenizer.bytes"),
        ("tokenizer.files", {"tokenizer.json": "eA=="}, "tokenizer.json"),
    ],
)
def test_metadata_that_lie(received, use, path, value, message):
    change_meta(received, lambda meta: set_path(meta, path, value))
    with pytest.raises(ValueError, match=message):
        use(received)


@pytest.mark.parametrize("content", ["[1]", "3", '{"a":' * 100_000, "{", "\0"])
def test_metadata_that_are_none(received, content):
    (received / "checkpoints/2/meta/metadata").write_text(content)
    rewrite_manifest(received / "checkpoints/2")
    with pytest.raises(ValueError, match="metadata of checkpoint 2 in .* can't be read"):
        load(received)


@pytest.mark.parametrize("content", ["[1]", "3", '{"a":' * 100_000, "{", "\0"])
def test_a_manifest_that_is_none(received, content):
    (received / "checkpoints/2/MANIFEST.json").write_text(content)
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        load(received)


@pytest.mark.parametrize(
    "path, value",
    [
        ("streams", []),
        ("corpus", 1),
        ("interval", [1]),
        ("evals", None),
        ("frozen.init_from", 3),
    ],
)
def test_a_run_does_not_go_on_from_metadata_that_lie(received, small, path, value):
    small.train.length = "4 steps"
    change_meta(received, lambda meta: set_path(meta, path, value))
    with pytest.raises(ValueError, match=f"has {path} = .*; wanted a"):
        run_training(small, received)


@pytest.mark.parametrize("content", ["[1]", '{"a":' * 100_000, "{", '"x"'])
def test_a_config_json_that_is_none(received, small, content):
    (received / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json is"):
        run_training(small, received)


# Where an export writes.


@pytest.mark.parametrize(
    "file", ["../victim.safetensors", "/tmp/victim.safetensors", "a/b.safetensors", "config.json"]
)
def test_an_export_writes_only_into_its_directory(received, file):
    victim = received.parent / "victim.safetensors"
    victim.write_text("mine")

    def record(meta):
        config = {"model_type": "arcee"}
        meta["hf"] = {"config": config, "tensors": {"lm_head.weight": ["F32", file]}}

    change_meta(received, record)
    with pytest.raises(ValueError, match="names the file|ends in .safetensors"):
        export(received)
    assert victim.read_text() == "mine"
    with pytest.raises(ValueError, match="names the file|ends in .safetensors"):
        hf._check_record({"config": {}, "tensors": {"lm_head.weight": ["F32", file]}})


# Links, pipes and devices.


def make_fifo(path, victim):
    del victim
    os.mkfifo(path)


def make_link(path, victim):
    path.symlink_to(victim)


def make_device(path, victim):
    del victim
    path.symlink_to("/dev/zero")


USES = dict(load=load, export=export)


@pytest.mark.parametrize("make", [make_fifo, make_link, make_device])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "metrics.jsonl",
        "tokenizer/tokenizer.model",
        "checkpoints/2/state/surprise",
        "checkpoints/2/MANIFEST.json",
        "checkpoints/3",
    ],
)
def test_nothing_that_leads_elsewhere_is_used(received, small, make, name):
    victim = received.parent / "victim"
    victim.write_text("mine")
    path = received / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    make(path, victim)

    small.train.length = "4 steps"
    with pytest.raises(ValueError, match=f"{name} is a"):
        run_training(small, received)
    with pytest.raises(ValueError, match=f"{name} is a"):
        evaluate.evaluate(small, epath.Path(received), jax.devices()[:1])
    if name.startswith("checkpoints"):
        for use in USES.values():
            with pytest.raises(ValueError, match=f"{name} is a"):
                use(received)
    assert victim.read_text() == "mine"


def test_old_temporary_names_are_not_followed(received, small):
    victim = received.parent / "victim"
    victim.write_text("mine")
    small.train.length = "4 steps"
    run_training(small, received)
    for name in ("config.json.tmp", "metrics.jsonl.tmp", "curves.png.tmp"):
        (received / name).symlink_to(victim)
    with pytest.raises(ValueError, match="is a link"):
        run_training(small, received)
    assert victim.read_text() == "mine"


# Hugging Face directories.


def write_hf(folder, **changes):
    """A directory whose config.json may lie about its one small tensor."""
    folder.mkdir()
    config = dict(
        model_type="llama",
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=16,
        max_position_embeddings=32,
    )
    (folder / "config.json").write_text(json.dumps(config | changes))
    table = {"model.embed_tokens.weight": (np.dtype("float32"), (16, 8))}
    safetensors.write(folder / "model.safetensors", table, [np.zeros((16, 8), np.float32)])
    return folder


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "vocab_size", "intermediate_size", "hidden_size"]
)
def test_sizes_are_checked_before_anything_of_that_size_is_made(tmp_path, field):
    with pytest.raises(ValueError, match="config.json"):
        hf.Checkpoint(write_hf(tmp_path / "hf", **{field: 10**8}))


def test_a_doubled_name_costs_no_time(tmp_path):
    names = ",".join('"a":{}' for _ in range(300_000))
    header = ("{" + names + "}").encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"\['a'\] twice"):
        safetensors.entries(tmp_path / "x")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pipe_in_a_hugging_face_directory(tmp_path, name):
    folder = write_hf(tmp_path / "hf")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    read = tokenizers.load if name == "tokenizer.json" else hf.Checkpoint
    with pytest.raises(ValueError, match="not a plain file"):
        read(folder)


# Tokenizers.


def tokenizer_json(**parts):
    vocab = {"a": 0, "b": 1, "</s>": 2}
    model = dict(type="BPE", vocab=vocab, merges=[])
    added = dict(id=2, content="</s>", special=True)
    added |= dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return dict(version="1.0", added_tokens=[added], model=model) | parts


def load_tokenizer(tmp_path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return tokenizers.load(tmp_path)


def replacement(content, **pattern):
    return dict(type="Replace", pattern=pattern, content=content)


EXPLODING = dict(
    type="Sequence", normalizers=[replacement("a" * 10, String="a") for _ in range(12)]
)
NESTED = dict(type="Sequence", normalizers=[EXPLODING])
SLOW_PATTERN = dict(type="Split", pattern=dict(Regex="(a+)+b"), behavior="Isolated", invert=False)


@pytest.mark.parametrize(
    "content, message",
    [
        (tokenizer_json(normalizer=EXPLODING), "may make a text 1e[+]12 times as long"),
        (tokenizer_json(normalizer=NESTED), "may make a text 1e[+]12 times as long"),
        (tokenizer_json(normalizer=replacement("a" * 99, Regex="x*")), "99 times as long"),
        (tokenizer_json(pre_tokenizer=SLOW_PATTERN), "repeats a repetition"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[]", "is a list"),
        ("{}", "can't be read"),
        (tokenizer_json(model=dict(type="BPE", vocab={"a": -1}, merges=[])), "can't be read"),
    ],
)
def test_tokenizers_that_take_without_end(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path, content)


def test_tokenizers_as_they_are_published(tmp_path):
    """GPT-4's pattern, and Llama's replacements of spaces."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)
    rules = dict(type="Sequence", normalizers=[replacement("▁", String=" ")])
    loaded = load_tokenizer(tmp_path, tokenizer_json(pre_tokenizer=split, normalizer=rules))
    assert loaded.encode("ab") == [0, 1]


# Chat templates.

MESSAGES = [dict(role="user", content="Hi")]


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ 'a' * 10**11 }}", "fails"),
        ("{{ ''.__class__.__mro__ }}", "fails"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{ messages[5].content }}", "fails"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ 'a' * 2**25 }}", "characters"),
    ],
)
def test_templates_that_take_without_end(source, message):
    with pytest.raises(ValueError, match=f"the chat template fails.*{message}|{message}"):
        chat.render(source, MESSAGES, tokens={})


def test_a_template_that_never_ends(monkeypatch):
    monkeypatch.setattr("lm.limited.SECONDS", 3)
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template fails: it (took more than|failed)"):
        chat.render(source, MESSAGES, tokens={})


# What is shown.


def test_a_models_text_obeys_no_terminal():
    class Terminal:
        def isatty(self):
            return True

    text = "a\x1b]0;title\x07b\x9b31mc\u202ed\te\n"
    assert generate._shown(text, Terminal()) == "a\\x1b]0;title\\x07b\\x9b31mc\\u202ed\te\n"

    Terminal.isatty = lambda self: False
    assert generate._shown(text, Terminal()) == text
