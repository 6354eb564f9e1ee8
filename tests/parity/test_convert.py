"""lm.convert and config.init_from, from the command to what transformers makes of the result."""

import json
import runpy

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from etils import epath

from lm import build, claim, convert, evaluate, train
from lm.data import pack
from lm.data import tokenizer as lm_tokenizers
from tests.helpers import ROOT, run_commands
from tests.parity import references

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


# --- checkpoints, and transformers' view of them ---


def write_tokenizer(directory, main_file):
    """Writes a small tokenizer of at most 96 ids that knows ASCII letters, as checkpoints have it.

    Args:
      main_file: tokenizer.json, or vocab.json (with merges.txt), as older checkpoints have.
    """
    alphabet = [*"abcdefghijklmnopqrstuvwxyz0123456789.,", "Ġ", "Ċ"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<|endoftext|>", "<s>"], initial_alphabet=alphabet
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(["the cat and the hat, then the other one."] * 3, trainer)

    if main_file == "tokenizer.json":
        tokenizer.save(str(directory / "tokenizer.json"))
    else:
        tokenizer.model.save(str(directory))
    config = dict(
        tokenizer_class="GPT2Tokenizer",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def make_checkpoint(
    directory, name="llama-3.2", tokenizer_file="tokenizer.json", dtype=torch.float32
):
    """Writes a reference model and a tokenizer to a directory, and returns that."""
    references.make(name).to(dtype).save_pretrained(directory, max_shard_size="30KB")
    write_tokenizer(directory, tokenizer_file)
    return directory


def mean_loss_in_transformers(directory, texts, length):
    """Mean negative log-probability by transformers, of the windows that lm's perplexity uses."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    total, count = 0.0, 0
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        ids = [tokenizer.bos_token_id] + encoded["input_ids"]
        for window in pack.windows(ids, length):
            tokens = torch.tensor(window["tokens"])[None].long()
            targets = torch.tensor(window["targets"]).long()
            with torch.no_grad():
                logits = model(tokens).logits[0]
            loss = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum")
            total += float(loss)
            count += len(targets)
    return total / count


# --- the commands ---


@pytest.mark.parametrize(
    "name, tokenizer_file, dtype",
    [("llama-3.2", "tokenizer.json", torch.bfloat16), ("gpt2", "vocab.json", torch.float32)],
)
def test_import_and_export(name, tokenizer_file, dtype, tmp_path):
    """Every file is the source's again, but for the index's count of parameters; and transformers
    loads it, chat template included.
    """
    source = make_checkpoint(tmp_path / "source", name, tokenizer_file, dtype)
    run, back, other = tmp_path / "run", tmp_path / "back", tmp_path / "other"
    import_it = ["import", f"--from={source}", f"--workdir={run}"]
    export_it = ["export", f"--workdir={run}", f"--to={back}"]
    wrong = [
        # What is there is not written over.
        (import_it, "is in use; take another --workdir"),
        (export_it, "is not empty; take another --to"),
        (["export", f"--workdir={run}", f"--to={other}", "--family=opt"], "no opt has"),
    ]
    commands = [import_it, export_it, *(arguments for arguments, _ in wrong)]
    imported, exported, *failed = run_commands("lm.convert", commands, tmp_path / "commands")

    assert (imported[0], exported[0]) == (0, 0), (imported, exported)
    assert "is the checkpoint at step 0" in imported[1]
    assert_same_files(back, source)
    assert_same_tokenizer(run / "tokenizer", back)

    for (_, message), (status, _, log) in zip(wrong, failed, strict=True):
        assert status == 1
        assert message in log
    assert not other.exists()


def assert_same_files(actual, expected):
    """Checks all files but tensors, which tests/parity/test_families.py compares."""
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in actual.iterdir()} == names
    for name in names:
        if name.endswith(".safetensors"):
            continue
        if name.endswith(".index.json"):
            actual_index = json.loads((actual / name).read_text())
            expected_index = json.loads((expected / name).read_text())
            assert actual_index["weight_map"] == expected_index["weight_map"]
        else:
            assert (actual / name).read_bytes() == (expected / name).read_bytes(), name


def assert_same_tokenizer(our_directory, their_directory):
    ours = lm_tokenizers.load(our_directory)
    theirs = transformers.AutoTokenizer.from_pretrained(their_directory)

    # With spaces at the start, a line break, and a word that isn't in the vocabulary.
    for text in ("the cat, and 12 hats.\n the end", " a", "x" * 50):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
        assert theirs.decode(ids) == text

    assert (ours.bos_id, ours.eos_id) == (1, 0)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 0)
    conversation = [dict(role="user", content="hi")]
    assert theirs.apply_chat_template(conversation, tokenize=False) == "<|user|>hi"


def test_the_byte_tokenizer_is_exported(tmp_path):
    ours = lm_tokenizers.ByteTokenizer()
    ours.save(epath.Path(tmp_path))

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(theirs) == ours.vocab_size
    for text in (
        "def f(x):\n\treturn  'é – 日本 🙂' \r\n",
        " a  b ",
        "".join(map(chr, range(0x250))),
    ):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text


def test_a_tokenizer_with_more_ids_than_the_embedding(tmp_path):
    source = make_checkpoint(tmp_path / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    new_token = dict(id=200, content="<new>")
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | new_token)
    tokenizer["model"]["vocab"]["<new>"] = 200
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))

    with pytest.raises(ValueError, match="vocab_size = 96 is below the tokenizer's 201"):
        convert.import_checkpoint(source, epath.Path(tmp_path / "run"), jax.devices()[:1])

    assert not (tmp_path / "run").exists()


def test_a_workdir_that_another_process_has(tmp_path):
    source, workdir = make_checkpoint(tmp_path / "source"), epath.Path(tmp_path / "run")
    with claim.Claim(workdir):
        with pytest.raises(claim.Taken, match="run is in use by process"):
            convert.import_checkpoint(source, workdir, jax.devices()[:1])
    assert not (workdir / "checkpoints").exists()


# --- runs ---


# Without pictures.
fast_runs = pytest.mark.usefixtures("fast_runs")


def perplexity_entry(**options):
    """An entry of config.evals that evaluates the validation split at the end."""
    return dict(type="lm.evals.perplexity.Perplexity", every=0, split="validation", **options)


@fast_runs
def test_a_run_starts_from_a_directory(tiny, tmp_path):
    """init_from decides model and tokenizer. The loss of lm's evaluation is transformers'. Training
    goes on from there, and the export is a checkpoint of the same family.
    """
    source = make_checkpoint(tmp_path / "source", "mistral")
    devices = jax.devices()[:1]
    config = tiny.copy_and_resolve_references()
    with config.unlocked():
        config.init_from = str(source)
        config.optimizer.learning_rate = 1e-5
        config.evals.validation = perplexity_entry(batch_size=8, max_documents=0)

    # The model is the checkpoint's in what is built, and only there.
    applied = build.apply_hf_config(config)
    assert applied.model.window == 7
    assert applied.model.num_kv_heads == 2
    assert config.model.window == 0

    # Evaluation keeps the source's float32; training takes it if it is asked to.
    texts = [document.text for document in build.documents(config, "validation")]
    assert config.model.param_dtype == "bfloat16"
    results = evaluate.evaluate(config, epath.Path(tmp_path / "eval"), devices)
    loss = results["eval/validation/loss"]
    their_loss = mean_loss_in_transformers(source, texts, config.data.length)
    assert loss == pytest.approx(their_loss, abs=1e-4)

    with config.unlocked():
        config.model.param_dtype = "float32"
    # With a learning rate this small the loss gets better only if training starts from there.
    results = train.train(config, epath.Path(tmp_path / "run"), devices)
    trained_loss = results["eval/validation/loss"]
    assert trained_loss < loss

    out = tmp_path / "out"
    assert convert.export_checkpoint(epath.Path(tmp_path / "run"), out, devices) == "mistral"
    their_loss = mean_loss_in_transformers(out, texts, config.data.length)
    assert their_loss == pytest.approx(trained_loss, abs=1e-4)


@fast_runs
def test_a_checkpoint_gets_tokens(tiny, tmp_path):
    """Tokens that transformers adds to its tokenizer, with init_resize: the old ids' probabilities
    are those of the source, less the new ids' share, which is theirs by number.
    """
    source = make_checkpoint(tmp_path / "source", "mistral")
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    num_old = len(theirs)
    tokens = [f"<extra_id_{i}>" for i in range(40)]
    theirs.add_special_tokens(dict(mask_token="<mask>", extra_special_tokens=tokens))
    theirs.save_pretrained(tmp_path / "more")
    config = tiny.copy_and_resolve_references()
    with config.unlocked():
        config.init_from, config.tokenizer.path = str(source), str(tmp_path / "more")
        config.model.param_dtype = "float32"
        config.optimizer.learning_rate = 0.0
        config.optimizer.warmup_steps = 0
        config.train.length = "1 steps"
    run, devices = epath.Path(tmp_path / "run"), jax.devices()[:1]
    with pytest.raises(ValueError, match="below the tokenizer's .*config.init_resize = True"):
        train.train(config, run, devices)

    with config.unlocked():
        config.init_resize = True
        config.tokenizer.reserve = "mask,sentinels:40"  # they are there
    train.train(config, run, devices)
    out = tmp_path / "out"
    assert convert.export_checkpoint(run, out, devices) == "mistral"

    saved = transformers.AutoTokenizer.from_pretrained(out)
    assert saved.mask_token_id == lm_tokenizers.load(out).role("mask") >= num_old
    ids = torch.tensor([theirs("the cat and the hat")["input_ids"]])
    logits = []
    for directory in (source, out):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
        logits.append(model(ids).logits.detach().numpy())
    np.testing.assert_allclose(logits[1][..., :num_old], logits[0][..., :num_old], atol=1e-5)
    new = logits[1][..., num_old:]
    assert new.shape[-1] >= len(tokens) + 1
    mean = logits[0][..., :num_old].mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(new, np.broadcast_to(mean, new.shape), atol=0.02)


@fast_runs
def test_pydocs_is_exported(tmp_path):
    """The README's configuration, trained for a few steps on our own pages: transformers has the
    same validation loss, with the same tokenizer.
    """
    config = runpy.run_path(str(ROOT / "configs/pydocs.py"))["get_config"]("micro").unlock()
    config.train.length = "4 steps"
    config.optimizer.warmup_steps = 1
    config.tokenizer.vocab_size = 512
    config.data.source = "lm.data.sources.text"
    config.data.source_args = dict(
        path=str(ROOT / "docs/*.md"), held_out=0.1, held_out_by="hash", document_chars=1000
    )
    config.data.update(dict(length=128, batch_size=4, streams=4, cache_dir=str(tmp_path / "cache")))
    config.model.compute_dtype = "float32"
    config.mesh.fsdp = 1
    config.evals = dict(part=perplexity_entry(batch_size=16, max_documents=12))
    run, out = tmp_path / "run", tmp_path / "out"

    results = train.train(config.lock(), epath.Path(run), jax.devices()[:1])
    loss = results["eval/part/loss"]
    assert np.isfinite(loss)
    assert convert.export_checkpoint(epath.Path(run), out, jax.devices()[:1]) == "arcee"

    # The 12 documents that max_documents takes, spread over the split.
    documents = build.documents(config, "validation")
    texts = [documents[i * len(documents) // 12].text for i in range(12)]
    their_loss = mean_loss_in_transformers(out, texts, config.data.length)
    assert their_loss == pytest.approx(loss, abs=1e-3)
