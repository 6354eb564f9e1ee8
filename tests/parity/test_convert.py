"""lm.convert and config.init_from, from the command to what transformers makes of the result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from etils import epath

from lm import build, convert, evaluate, train
from lm.data import pack
from lm.data import tokenizer as lm_tokenizers
from tests.parity import references

ROOT = Path(__file__).parent.parent.parent
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def write_tokenizer(directory, kind):
    """A small tokenizer of 96 ids or fewer, as checkpoints have it, that knows ASCII letters."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    alphabet = [*"abcdefghijklmnopqrstuvwxyz0123456789.,", "Ġ", "Ċ"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<|endoftext|>", "<s>"], initial_alphabet=alphabet
    )
    found.train_from_iterator(["the cat and the hat, then the other one."] * 3, trainer)
    if kind == "tokenizer.json":
        found.save(str(directory / "tokenizer.json"))
    else:
        found.model.save(str(directory))
    about = dict(
        tokenizer_class="GPT2Tokenizer",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(about))


def checkpoint_directory(tmp_path, name="llama-3.2", kind="tokenizer.json", dtype=torch.float32):
    references.make(name).to(dtype).save_pretrained(tmp_path, max_shard_size="30KB")
    write_tokenizer(tmp_path, kind)
    return tmp_path


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "lm.convert", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=""),
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name, kind, dtype",
    [("llama-3.2", "tokenizer.json", torch.bfloat16), ("gpt2", "vocab.json", torch.float32)],
)
def test_the_commands(name, kind, dtype, tmp_path):
    """There and back: every file is the source's, but for the index's count of parameters; and
    transformers loads it, chat template included.
    """
    source = checkpoint_directory(tmp_path / "source", name, kind, dtype)
    code, said = command("import", f"--from={source}", f"--workdir={tmp_path}/run")
    assert code == 0 and "is the checkpoint at step 0" in said, said
    code, said = command("export", f"--workdir={tmp_path}/run", f"--to={tmp_path}/back")
    assert code == 0, said
    back = tmp_path / "back"
    assert {p.name for p in back.iterdir()} == {p.name for p in source.iterdir()}
    for path in source.iterdir():
        if path.suffix == ".json" and "index" in path.name:
            assert (
                json.loads(path.read_text())["weight_map"]
                == json.loads((back / path.name).read_text())["weight_map"]
            )
        elif path.suffix == ".safetensors":
            pass  # tests/parity/test_families.py compares tensors
        else:
            assert path.read_bytes() == (back / path.name).read_bytes(), path.name
    theirs = transformers.AutoTokenizer.from_pretrained(back)
    ours = lm_tokenizers.load(tmp_path / "run/tokenizer")
    for text in ("the cat, and 12 hats.\n the end", " a", "x" * 50):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids and ours.decode(ids) == text == theirs.decode(ids)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (1, 0)
    assert (
        theirs.apply_chat_template([dict(role="user", content="hi")], tokenize=False)
        == "<|user|>hi"
    )

    code, said = command("import", f"--from={source}", f"--workdir={tmp_path}/run")
    assert code == 1 and "is in use; take another --workdir" in said
    code, said = command("export", f"--workdir={tmp_path}/run", f"--to={back}")
    assert code == 1 and "is not empty; take another --to" in said
    code, said = command(
        "export", f"--workdir={tmp_path}/run", f"--to={tmp_path}/other", "--family=opt"
    )
    assert code == 1 and "no opt has" in said and not (tmp_path / "other").exists()


def their_loss(directory, texts, length):
    """Mean negative log-probability by transformers, of the windows that lm's perplexity is of."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    total, count = 0.0, 0
    for text in texts:
        ids = [tokenizer.bos_token_id] + tokenizer(
            text, add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        for window in pack.windows(ids, length):
            with torch.no_grad():
                logits = model(torch.tensor(window["tokens"])[None].long()).logits[0]
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.double(), torch.tensor(window["targets"]).long(), reduction="sum"
                )
            )
            count += len(window["targets"])
    return total / count


def test_a_run_starts_from_a_directory(tiny, tmp_path):
    """init_from decides model and tokenizer; the loss that the evaluation finds is transformers';
    training goes on from there, and its export is a checkpoint of the same family.
    """
    source = checkpoint_directory(tmp_path / "source", "mistral")
    config = tiny.copy_and_resolve_references()
    with config.unlocked():
        config.init_from = str(source)
        config.model.param_dtype = "float32"
        config.optimizer.learning_rate = 1e-5
        config.evals.validation = dict(
            type="lm.evals.perplexity.Perplexity",
            every=0,
            batch_size=8,
            split="validation",
            max_documents=0,
        )
    adopted = build.apply_hf_config(config)
    assert (
        adopted.model.window == 7 and adopted.model.num_kv_heads == 2 and config.model.window == 0
    )
    texts = [document.text for document in build.documents(config, "validation")]
    wanted = their_loss(source, texts, config.data.length)
    found = evaluate.evaluate(config, epath.Path(tmp_path / "eval"), jax.devices()[:1])[
        "eval/validation/loss"
    ]
    assert found == pytest.approx(wanted, abs=1e-4)
    after = train.train(config, epath.Path(tmp_path / "run"), jax.devices()[:1])[
        "eval/validation/loss"
    ]
    assert after < found
    assert (
        convert.export_checkpoint(epath.Path(tmp_path / "run"), tmp_path / "out", jax.devices()[:1])
        == "mistral"
    )
    assert their_loss(tmp_path / "out", texts, config.data.length) == pytest.approx(after, abs=1e-4)


def test_bytes_are_theirs_too(tmp_path):
    ours = lm_tokenizers.ByteTokenizer()
    ours.save(epath.Path(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (
        ours.bos_id,
        ours.eos_id,
        ours.vocab_size,
    )
    for text in (
        "def f(x):\n\treturn  'é – 日本 🙂' \r\n",
        " a  b ",
        "".join(map(chr, range(0x250))),
    ):
        assert (
            theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
            and theirs.decode(ours.encode(text)) == text
        )


def test_pydocs_is_exported(tmp_path):
    """The README's configuration, trained for a few steps: transformers has the same validation
    loss, with the same tokenizer.
    """
    import runpy

    config = runpy.run_path(str(ROOT / "configs/pydocs.py"))["get_config"]("micro").unlock()
    config.train.length = "24 steps"
    config.optimizer.warmup_steps = 4
    config.data.source_args.data_dir = config.data.cache_dir = str(tmp_path / "cache")
    config.model.compute_dtype = "float32"
    config.mesh.fsdp = 1
    config.evals = dict(
        part=dict(
            type="lm.evals.perplexity.Perplexity",
            every=0,
            batch_size=16,
            split="validation",
            max_documents=12,
        )
    )
    found = train.train(config.lock(), epath.Path(tmp_path / "run"), jax.devices()[:1])[
        "eval/part/loss"
    ]
    assert (
        convert.export_checkpoint(epath.Path(tmp_path / "run"), tmp_path / "out", jax.devices()[:1])
        == "arcee"
    )
    documents = build.documents(config, "validation")
    texts = [documents[i * len(documents) // 12].text for i in range(12)]
    assert their_loss(tmp_path / "out", texts, config.data.length) == pytest.approx(found, abs=1e-3)
    assert np.isfinite(found)


def test_a_tokenizer_with_more_ids_than_the_embedding(tmp_path):
    source = checkpoint_directory(tmp_path / "source")
    about = json.loads((source / "tokenizer.json").read_text())
    about["added_tokens"].append(about["added_tokens"][0] | dict(id=200, content="<new>"))
    about["model"]["vocab"]["<new>"] = 200
    (source / "tokenizer.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="vocab_size = 96 is below the tokenizer's 201"):
        convert.import_checkpoint(source, epath.Path(tmp_path / "run"), jax.devices()[:1])
    assert not (tmp_path / "run").exists()
