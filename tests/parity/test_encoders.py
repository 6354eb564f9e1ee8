"""BERT and RoBERTa against transformers, in f32, on models drawn at random; their tokenizers."""

import json
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers as t
from flax import nnx

from lm.data import tokenizer as lm_tokenizers
from lm.hf import directory as hf
from lm.hf import families
from lm.objectives import masked
from tests.helpers import ROOT, read_jsonl, run_commands
from tests.parity.test_families import load
from tests.parity.test_tokenizers import CORPUS, STRINGS

SIZES = dict(
    num_hidden_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=96,
    # Larger than transformers' own, so that every part of the model matters.
    initializer_range=0.3,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
BERT = SIZES | dict(max_position_embeddings=64, pad_token_id=0)
ROBERTA = SIZES | dict(max_position_embeddings=66, pad_token_id=1)
CONFIGS = {
    "bert": (t.BertConfig, BERT),
    "bert-gelu_new": (t.BertConfig, BERT | dict(hidden_act="gelu_new")),
    "bert-one-type": (t.BertConfig, BERT | dict(type_vocab_size=1, layer_norm_eps=1e-3)),
    "roberta": (t.RobertaConfig, ROBERTA | dict(type_vocab_size=1, layer_norm_eps=1e-5)),
    "roberta-two-types": (t.RobertaConfig, ROBERTA),
}
TEXT = np.random.default_rng(0).integers(5, 96, (3, 40)).astype(np.int32)
LENGTHS = np.array([40, 23, 1])
RIGHT = np.arange(40) < LENGTHS[:, None]


def make(name, directory, **changes):
    """A model of transformers whose biases and norms aren't what they begin as, saved."""
    torch.manual_seed(0)
    config_class, arguments = CONFIGS[name]
    model = t.AutoModelForMaskedLM.from_config(config_class(**arguments | changes)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                around = 1.0 if "weight" in parameter_name else 0.0
                parameter.normal_(around, 0.2)
    model.save_pretrained(directory)
    return model


def make_batch(valid, name):
    padding = CONFIGS[name][1]["pad_token_id"]
    segments = valid.astype(np.int32)
    positions = np.where(valid, np.cumsum(segments, axis=1) - 1, 0).astype(np.int32)
    return dict(
        tokens=np.where(valid, TEXT, padding).astype(np.int32),
        positions=positions,
        segments=segments,
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits_are_the_same(name, side, tmp_path):
    """Of texts padded on the right and on the left."""
    reference = make(name, tmp_path)
    _, graphdef, params = load(tmp_path)
    valid = RIGHT if side == "right" else RIGHT[:, ::-1]
    batch = make_batch(valid, name)

    @jax.jit
    def call(params):
        model = nnx.merge(graphdef, params)
        output = model(batch["tokens"], batch["positions"], batch["segments"])
        return model.logits(output.hidden)

    # BERT counts positions over the padding unless it is told them.
    positions = {}
    if name.startswith("bert"):
        positions = dict(position_ids=torch.tensor(batch["positions"]).long())
    with torch.no_grad():
        theirs = reference(
            torch.tensor(batch["tokens"]).long(),
            attention_mask=torch.tensor(batch["segments"]).long(),
            **positions,
        ).logits.numpy()[valid]
    ours = np.asarray(call(params))[valid]
    assert np.abs(theirs).max() > 1
    difference = np.abs(ours - theirs).max()
    print(f"{name}: {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_checkpoint_goes_there_and_back(name, tmp_path):
    """Bit for bit, and transformers finds all that it wants."""
    reference = make(name, tmp_path / "theirs")
    source, _, params = load(tmp_path / "theirs")
    params = jax.tree.map(np.asarray, params)
    assert families.family_of_fields(source.fields).name == reference.config.model_type
    hf.save(tmp_path / "ours", source.family, source.fields, params, token_ids={})

    again, info = t.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, tensor in reference.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key].numpy(), tensor.numpy(), err_msg=key)


def test_older_names_and_parts_of_pretraining(tmp_path):
    """bert-base-uncased's file has gamma and beta, a pooler and the next sentence's head."""
    torch.manual_seed(0)
    model = t.BertForPreTraining(t.BertConfig(**BERT)).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {}
    for name, tensor in safetensors.numpy.load_file(path).items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        tensors[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})

    _, graphdef, params = load(tmp_path)
    tokens = TEXT[:1]
    with torch.no_grad():
        theirs = model(torch.tensor(tokens).long()).prediction_logits.numpy()
    merged = nnx.merge(graphdef, params)
    positions = np.arange(40, dtype=np.int32)[None]
    ours = merged.logits(merged(tokens, positions, np.ones_like(tokens)).hidden)
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-4


def masked_batches(count):
    rng = np.random.default_rng(1)
    for _ in range(count):
        targets = rng.integers(5, 96, (4, 24)).astype(np.int32)
        weights = (rng.random(targets.shape) < 0.15).astype(np.float32)
        weights[0, 0] = 1
        tokens = np.where(weights > 0, 4, targets).astype(np.int32)
        positions = np.broadcast_to(np.arange(24, dtype=np.int32), targets.shape)
        segments = np.ones_like(targets)
        yield dict(
            tokens=tokens, targets=targets, weights=weights, positions=positions, segments=segments
        )


def their_loss(reference, batch):
    labels = np.where(batch["weights"] > 0, batch["targets"], -100)
    return reference(torch.tensor(batch["tokens"]).long(), labels=torch.tensor(labels).long()).loss


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_fifty_steps_are_the_same(name, tmp_path):
    """Masked batches from the same weights: the gradient of the first, and each step's loss."""
    reference = make(name, tmp_path)
    _, graphdef, params = load(tmp_path)
    loss_fn = masked.make_loss(chunk=8)

    def mean_loss(params, batch):
        total, count, _ = loss_fn(nnx.merge(graphdef, params), batch, None)
        return total / count

    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
    theirs = torch.optim.AdamW(
        reference.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(mean_loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, grads

    state = optimizer.init(params)
    for number, batch in enumerate(masked_batches(50)):
        # optax multiplies floats by integers.
        with jax.numpy_dtype_promotion("standard"):
            params, state, loss, grads = step(params, state, batch)
        theirs.zero_grad()
        their = their_loss(reference, batch)
        their.backward()
        if number == 0:
            table = dict(reference.named_parameters())
            body = CONFIGS[name][0].model_type
            embedding = table[f"{body}.embeddings.word_embeddings.weight"].grad.numpy()
            np.testing.assert_allclose(grads["embed"]["table"], embedding, atol=1e-3, rtol=1e-3)
            query = table[f"{body}.encoder.layer.1.attention.self.query.weight"].grad.numpy()
            ours = np.asarray(grads["layers"]["attention"]["query"][1]).reshape(32, 32).T
            np.testing.assert_allclose(ours, query, atol=1e-3, rtol=1e-3)
        theirs.step()
        assert abs(float(loss) - float(their)) < 1e-4, number


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(is_decoder=True), "is_decoder = True is not supported for bert"),
        # Its head has a bias that is another parameter.
        (dict(tie_word_embeddings=False), "tie_word_embeddings = False is not supported for bert"),
        # transformers has another activation in the head.
        (
            dict(model_type="roberta", pad_token_id=1, hidden_act="relu"),
            "hidden_act = 'relu' is not supported for roberta",
        ),
        (
            dict(position_embedding_type="relative_key"),
            "position_embedding_type = 'relative_key' is not supported",
        ),
    ],
)
def test_what_is_no_encoder(changes, message):
    config = t.BertConfig(**BERT).to_dict() | changes
    with pytest.raises(ValueError, match=message):
        families.read_config(config)


# --- tokenizers ---


def word_piece(directory, settings, form):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=400,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (directory / "vocab.txt").write_text("\n".join(token for token, _ in vocab) + "\n")
    (directory / "config.json").write_text('{"model_type": "bert"}')
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if form == "json":
        t.BertTokenizer.from_pretrained(directory).backend_tokenizer.save(
            str(directory / "tokenizer.json")
        )
        (directory / "vocab.txt").unlink()


@pytest.mark.parametrize("form", ["vocab", "json"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(do_lower_case=False),
        dict(do_lower_case=True, strip_accents=False, tokenize_chinese_chars=False),
    ],
)
def test_word_pieces_are_the_same(settings, form, tmp_path):
    word_piece(tmp_path, settings, form)
    ours, theirs = lm_tokenizers.load(tmp_path), t.AutoTokenizer.from_pretrained(tmp_path)
    for text in STRINGS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.prompt(text) == theirs.encode(text), text
    assert ours.around == ((theirs.cls_token_id,), (theirs.sep_token_id,))
    assert ours.role("mask") == theirs.mask_token_id

    # As a run keeps it.
    ours.save(tmp_path / "kept")
    kept = lm_tokenizers.load(tmp_path / "kept")
    assert kept.fingerprint == ours.fingerprint
    assert [kept.encode(text) for text in STRINGS] == [ours.encode(text) for text in STRINGS]


@pytest.mark.parametrize("form", ["vocab", "json"])
def test_robertas_tokens_are_the_same(form, tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    if form == "json":
        t.RobertaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "json")
        tmp_path = tmp_path / "json"
        (tmp_path / "config.json").write_text('{"model_type": "roberta"}')

    ours, theirs = lm_tokenizers.load(tmp_path), t.AutoTokenizer.from_pretrained(tmp_path)
    for text in STRINGS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.prompt(text) == theirs.encode(text), text
    assert ours.role("mask") == theirs.mask_token_id
    assert ours.around == ((theirs.cls_token_id,), (theirs.sep_token_id,))


# --- what it is asked ---

TASK = """
type = "lm.evals.classification.PromptClassification"
label = "label"
priors = []

[source]
path = "data.jsonl"
split = "test"

[prompt]
templates = ["{text}\\nIt was"]

[[verbalizer.words]]
short = [" the"]
long = [" other hat"]

[verbalizer]
after = " ."
"""


def their_distribution(model, tokenizer, text, fill):
    """Of the words "the" and "other hat", by transformers, row by row."""
    before = [
        tokenizer.cls_token_id,
        *tokenizer(text + "\nIt was", add_special_tokens=False).input_ids,
    ]
    after = [*tokenizer(" .", add_special_tokens=False).input_ids, tokenizer.sep_token_id]

    def logprobs(blank):
        with torch.no_grad():
            logits = model(torch.tensor([[*before, *blank, *after]])).logits[0]
        return torch.log_softmax(logits, -1).numpy()[len(before) :]

    scores = []
    for word in ("the", "other hat"):
        ids = tokenizer(word, add_special_tokens=False).input_ids
        blank = [tokenizer.mask_token_id] * len(ids)
        score = 0.0
        for place, token in enumerate(ids):
            score += logprobs(blank)[place, token]
            if fill == "ltr":
                blank[place] = token
        scores.append(score)
    return np.exp(scores) / np.exp(scores).sum()


@pytest.mark.parametrize("fill", ["ltr", "parallel"])
def test_a_checkpoint_is_asked_for_label_words(fill, tmp_path):
    """As by hand in transformers, by the command; and it is imported and exported as it was."""
    model = make("bert", tmp_path / "bert", vocab_size=400)
    config_json = (tmp_path / "bert" / "config.json").read_text()
    word_piece(tmp_path / "bert", {}, "vocab")
    (tmp_path / "bert" / "config.json").write_text(config_json)
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "bert")
    texts = ["the cat", "the other one, the hat and the cat", "12"]
    lines = [json.dumps(dict(text=text, label="short")) for text in texts]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "words.toml").write_text(TASK)

    arguments = [
        f"--config={ROOT}/configs/tasks.py:{tmp_path}/words.toml",
        f"--workdir={tmp_path}/run",
        "--mode=eval",
        f"--config.init_from={tmp_path}/bert",
        "--config.data.length=48",
        f"--config.evals.words.verbalizer.fill={fill}",
    ]
    command = [sys.executable, "-m", "lm.main", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text, line in zip(texts, read_jsonl(tmp_path / "run" / "predictions" / "words-0.jsonl")):
        wanted = their_distribution(model, tokenizer, text, fill)
        got = [line["distribution"][label] for label in ("short", "long")]
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)

    if fill == "ltr":
        imported = ["import", f"--from={tmp_path}/bert", f"--workdir={tmp_path}/imported"]
        exported = ["export", f"--workdir={tmp_path}/imported", f"--to={tmp_path}/again"]
        for status, _, err in run_commands(
            "lm.convert", [imported, exported], tmp_path / "convert"
        ):
            assert status == 0, err
        again = t.AutoModelForMaskedLM.from_pretrained(tmp_path / "again")
        for key, tensor in model.state_dict().items():
            np.testing.assert_array_equal(again.state_dict()[key].numpy(), tensor.numpy())
        assert t.AutoTokenizer.from_pretrained(tmp_path / "again")(texts) == tokenizer(texts)
