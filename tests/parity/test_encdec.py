"""T5, BART and Marian against transformers, in f32, on models drawn at random."""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
import sentencepiece
import torch
import transformers as t
from etils import epath
from flax import nnx

from lm import config as config_lib
from lm import convert, sharding, step
from lm.data import seq2seq as seq2seq_data
from lm.data import tokenizer as lm_tokenizers
from lm.data.corruption import SpanCorruption
from lm.data.pack import Encoder
from lm.data.sources import Document
from lm.decoding.beams import Beams, search
from lm.decoding.generator import Generator, Sources
from lm.decoding.sampling import Sampling, row_keys
from lm.evals.predict import CompiledFns, PredictFns
from lm.evals.source_answers import SourceAnswers
from lm.hf import directory as hf
from lm.hf import families
from lm.models import encdec
from lm.nn.positions import bucket_of_distance
from lm.objectives import seq2seq
from tests.helpers import ROOT, read_jsonl, run_commands, run_training
from tests.parity.test_families import with_layouts
from tests.parity.test_tokenizers import CORPUS, STRINGS
from tests.test_encdec import configure

T5 = dict(
    num_layers=2,
    d_model=32,
    d_kv=12,  # heads that don't fill the residual stream
    d_ff=48,
    num_heads=4,
    vocab_size=96,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=20,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)
BART = dict(
    encoder_layers=2,
    decoder_layers=2,
    d_model=32,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    vocab_size=96,
    max_position_embeddings=64,
    dropout=0.0,
    pad_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=2,
)
MARIAN = BART | dict(
    pad_token_id=95, decoder_start_token_id=95, eos_token_id=0, scale_embedding=True
)
CONFIGS = {
    "t5": (t.T5Config, T5),
    "t5-shallow-decoder": (t.T5Config, T5 | dict(num_layers=3, num_decoder_layers=2)),
    "t5-v1.1": (t.T5Config, T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "t5-silu": (t.T5Config, T5 | dict(feed_forward_proj="gated-silu")),
    "bart": (t.BartConfig, BART),
    "bart-scaled": (
        t.BartConfig,
        BART | dict(scale_embedding=True, activation_function="relu", encoder_layers=3),
    ),
    "marian": (t.MarianConfig, MARIAN | dict(activation_function="swish")),
    # Where the decoder begins with padding, torch doesn't train how it reads that token.
    "marian-plain": (
        t.MarianConfig,
        MARIAN | dict(scale_embedding=False, decoder_start_token_id=94),
    ),
}
CLASSES = {
    "t5": t.T5ForConditionalGeneration,
    "bart": t.BartForConditionalGeneration,
    "marian": t.MarianMTModel,
}
RNG = np.random.default_rng(0)
SOURCE = RNG.integers(3, 95, (3, 30)).astype(np.int32)
TARGET = RNG.integers(3, 95, (3, 20)).astype(np.int32)
SOURCE_VALID = np.arange(30) < np.array([30, 17, 1])[:, None]
TARGET_VALID = np.arange(20) < np.array([20, 3, 11])[:, None]


def make(name, directory):
    """A model of transformers all of whose parts matter, saved. The head of v1.1 is its own."""
    config_class, arguments = CONFIGS[name]
    config = config_class(**arguments)
    model = CLASSES[config.model_type](config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "embed_positions" in key and config.model_type == "marian":
                continue
            around = 1.0 if parameter.ndim == 1 and key.endswith("weight") else 0.0
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * (0.15 if parameter.ndim == 1 else 0.25) + around)
        if hasattr(model, "final_logits_bias"):
            drawn = torch.randn(model.final_logits_bias.shape, generator=generator)
            model.final_logits_bias.copy_(drawn)
    model.tie_weights()
    model.save_pretrained(directory)
    if name == "t5-v1.1":
        path = directory / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        drawn = np.random.default_rng(1).normal(0, 0.25, (96, 32)).astype(np.float32)
        safetensors.numpy.save_file(tensors | {"lm_head.weight": drawn}, path, {"format": "pt"})
        model = CLASSES["t5"].from_pretrained(directory).eval()
        np.testing.assert_array_equal(model.lm_head.weight.detach().numpy(), drawn)
    return model


def load(directory):
    """(source, graphdef, parameters) of a checkpoint directory, by lm."""
    source = hf.Checkpoint(directory)
    fields = source.model(config_lib.default().model).to_dict()
    fields |= dict(param_dtype="float32", compute_dtype="float32")
    assert fields.pop("type") == "lm.models.encdec"
    config = encdec.Config(**fields)
    abstract = nnx.eval_shape(lambda: encdec.Model(config, jax.random.key(0)))
    graphdef, params = nnx.split(abstract, nnx.Param)
    axes = sharding.logical_axes(params)
    params = nnx.to_pure_dict(params)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    layouts = sharding.shardings(params, axes, mesh)
    return source, graphdef, source.load(with_layouts(params, layouts))


def arrays_of(valid):
    segments = valid.astype(np.int32)
    return np.where(valid, np.cumsum(segments, axis=1) - 1, 0).astype(np.int32), segments


# Of padding on the left only T5's: the others' positions count over it in transformers.
PADDED = [(name, "right") for name in CONFIGS] + [("t5", "left"), ("t5-v1.1", "left")]


@pytest.mark.parametrize("name, side", PADDED)
def test_logits_are_the_same(name, side, tmp_path):
    """Of sources padded on the right and on the left."""
    reference = make(name, tmp_path)
    _, graphdef, params = load(tmp_path)
    source_valid = SOURCE_VALID if side == "right" else SOURCE_VALID[:, ::-1]
    padding = reference.config.pad_token_id
    source = np.where(source_valid, SOURCE, padding).astype(np.int32)
    positions, segments = arrays_of(TARGET_VALID)

    @jax.jit
    def call(params):
        model = nnx.merge(graphdef, params)
        source_arrays = (source, *arrays_of(source_valid))
        return model.logits(model(TARGET, positions, segments, source=source_arrays).hidden)

    started = TARGET.copy()
    started[:, 0] = reference.config.decoder_start_token_id
    with torch.no_grad():
        theirs = reference(
            torch.tensor(source).long(),
            attention_mask=torch.tensor(source_valid.astype(np.int64)),
            decoder_input_ids=torch.tensor(started).long(),
            decoder_attention_mask=torch.tensor(segments).long(),
        ).logits.numpy()[TARGET_VALID]
    ours = np.asarray(call(params))[TARGET_VALID]
    assert np.abs(theirs).max() > 0.5
    difference = np.abs(ours - theirs).max()
    print(f"{name}: {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_checkpoint_goes_there_and_back(name, tmp_path):
    """Bit for bit, and transformers finds all that it wants and computes the same."""
    reference = make(name, tmp_path / "theirs")
    source, _, params = load(tmp_path / "theirs")
    params = jax.tree.map(np.asarray, params)
    fields = source.model(config_lib.default().model).to_dict()
    assert families.family_of_fields(fields).name == reference.config.model_type
    token_ids = dict(pad_token_id=reference.config.pad_token_id)
    hf.save(tmp_path / "ours", source.family, fields, params, token_ids=token_ids)

    again, info = type(reference).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, tensor in reference.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key].numpy(), tensor.numpy(), err_msg=key)
    ids = torch.tensor(SOURCE[:1]).long()
    with torch.no_grad():
        logits = [m(ids, decoder_input_ids=ids).logits for m in (reference, again.eval())]
    np.testing.assert_array_equal(*[x.numpy() for x in logits])

    hf.save_as(tmp_path / "as", source.record(), fields, params)
    saved = [
        safetensors.numpy.load_file(tmp_path / folder / "model.safetensors")
        for folder in ("theirs", "as")
    ]
    assert saved[0].keys() == saved[1].keys()
    for key, tensor in saved[0].items():
        np.testing.assert_array_equal(saved[1][key], tensor, err_msg=key)


PROMPTS = [SOURCE[0].tolist(), SOURCE[1, :9].tolist(), SOURCE[2, :1].tolist()]
MAX_NEW_TOKENS = 24


def make_generator(graphdef, params, stop_ids=(-1,), never_ids=()):
    return Generator(
        nnx.merge(graphdef, params).config,
        graphdef,
        params,
        sharding.make_mesh({}, jax.devices()[:1]),
        Sampling(temperature=0.0),
        stop_ids=stop_ids,
        vocab_size=96,
        sources=Sources((), never_ids),
    )


@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_text_is_the_same(name, tmp_path):
    """Of a batch of unequal sources, each as transformers has it alone. Padding is never chosen."""
    reference = make(name, tmp_path)
    _, graphdef, params = load(tmp_path)
    padding = reference.config.pad_token_id
    generator = make_generator(graphdef, params, never_ids=(padding,))
    continuations = generator.generate(PROMPTS, MAX_NEW_TOKENS, keys_B=row_keys([0, 0, 0]))
    for prompt, ours in zip(PROMPTS, continuations):
        ids = torch.tensor([prompt])
        output = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_NEW_TOKENS,
            min_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            forced_eos_token_id=None,
            bad_words_ids=[[padding]],
        )
        assert output[0, 1:].tolist() == ours
        assert padding not in ours


BEAMS = [(4, 1.0, True), (3, 0.0, True), (5, 2.0, False), (1, 1.0, True)]


@pytest.mark.parametrize("num_beams, length_penalty, ends", BEAMS)
@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_beams_are_the_same(name, num_beams, length_penalty, ends, tmp_path):
    """All beams of each source with their scores, as transformers has them alone; where texts end
    early, and where they are cut.
    """
    reference = make(name, tmp_path)
    _, graphdef, params = load(tmp_path)
    padding = reference.config.pad_token_id
    stop_ids = [-1]
    if ends:
        # Tokens that the model chooses within the first texts.
        free = make_generator(graphdef, params, never_ids=(padding,))
        texts = free.generate(PROMPTS, MAX_NEW_TOKENS, keys_B=row_keys([0, 0, 0]))
        stop_ids = sorted({texts[0][7], texts[1][3]})
    model = make_generator(graphdef, params, stop_ids, never_ids=(padding,))
    beams = Beams(num_beams, length_penalty)
    num_stopped = 0
    for prompt, ours in zip(PROMPTS, search(model, PROMPTS, MAX_NEW_TOKENS, beams)):
        ids = torch.tensor([prompt])
        output = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            length_penalty=length_penalty,
            early_stopping=False,
            eos_token_id=stop_ids if ends else None,
            forced_eos_token_id=None,
            bad_words_ids=[[padding]],
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert len(ours) == num_beams
        for number, theirs in enumerate(output.sequences[:, 1:].tolist()):
            stops = [place for place, token in enumerate(theirs) if token in stop_ids]
            num_stopped += bool(stops)
            assert ours[number].ids == (theirs[: stops[0]] if stops else theirs)
            if num_beams > 1:
                score = float(output.sequences_scores[number])
                assert abs(ours[number].score - score) < 1e-3
    assert num_stopped or not ends


def test_beams_above_the_vocabulary_are_refused(tmp_path):
    make("t5", tmp_path)
    _, graphdef, params = load(tmp_path)
    with pytest.raises(ValueError, match="num_beams = 97 is above the vocabulary's 96 tokens"):
        search(make_generator(graphdef, params), PROMPTS, 4, Beams(97))


def seq2seq_batches(count):
    rng = np.random.default_rng(1)
    for _ in range(count):
        targets = rng.integers(3, 95, (4, 12)).astype(np.int32)
        positions = np.broadcast_to(np.arange(12, dtype=np.int32), targets.shape)
        source_positions = np.broadcast_to(np.arange(10, dtype=np.int32), (4, 10))
        yield dict(
            tokens=np.concatenate([targets[:, :1] * 0, targets[:, :-1]], axis=1),
            targets=targets,
            weights=(rng.random(targets.shape) < 0.8).astype(np.float32),
            positions=positions,
            segments=np.ones_like(targets),
            source=rng.integers(3, 95, (4, 10)).astype(np.int32),
            source_positions=source_positions,
            source_segments=np.ones_like(source_positions),
        )


# Of each a parameter of theirs, and the same of ours.
GRADIENTS = {
    "t5": ("decoder.block.1.layer.1.EncDecAttention.k.weight", "source_attention", "key"),
    "bart": ("model.decoder.layers.1.encoder_attn.k_proj.weight", "source_attention", "key"),
    "marian-plain": ("model.decoder.layers.1.self_attn.q_proj.weight", "attention", "query"),
}


@pytest.mark.parametrize("name", list(GRADIENTS))
def test_fifty_steps_are_the_same(name, tmp_path):
    """From the same weights: the gradient of the first batch, and each step's loss."""
    reference = make(name, tmp_path)
    _, graphdef, params = load(tmp_path)
    loss_fn = seq2seq.make_loss(source_length=10)

    # It is no parameter of theirs.
    frozen = params.pop("head_bias", None)

    def mean_loss(params, batch):
        whole = params if frozen is None else params | {"head_bias": frozen}
        total, count, _ = loss_fn(nnx.merge(graphdef, whole), batch, None)
        return total / count

    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01)
    trained = [p for p in reference.parameters() if p.requires_grad]
    theirs = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)

    @jax.jit
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(mean_loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, grads

    state = optimizer.init(params)
    for number, batch in enumerate(seq2seq_batches(50)):
        # optax multiplies floats by integers.
        with jax.numpy_dtype_promotion("standard"):
            params, state, loss, grads = step(params, state, batch)
        theirs.zero_grad()
        labels = np.where(batch["weights"] > 0, batch["targets"], -100)
        tokens = torch.tensor(batch["tokens"]).long()
        tokens[:, 0] = reference.config.decoder_start_token_id
        their = reference(
            torch.tensor(batch["source"]).long(),
            decoder_input_ids=tokens,
            labels=torch.tensor(labels).long(),
        ).loss
        their.backward()
        if number == 0:
            hf_name, attention, part = GRADIENTS[name]
            gradient = dict(reference.named_parameters())[hf_name].grad.numpy()
            ours = np.asarray(grads["layers"][attention][part][1]).reshape(32, -1).T
            np.testing.assert_allclose(ours, gradient, atol=1e-3, rtol=1e-3)
        theirs.step()
        assert abs(float(loss) - float(their.detach())) < 1e-4, number


@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 20), (6, 5), (64, 1000)])
def test_buckets_are_the_same(buckets, distance):
    """Of all distances, to both sides."""
    from transformers.models.t5.modeling_t5 import T5Attention

    places = torch.arange(-2 * distance, 2 * distance + 1)
    for both_sides in (True, False):
        theirs = T5Attention._relative_position_bucket(places, both_sides, buckets, distance)
        one_side = bucket_of_distance(buckets // 2 if both_sides else buckets, distance)
        ours = []
        for place in places.tolist():
            bucket = int(one_side[min(abs(place), distance)])
            if place > 0:
                bucket = bucket + buckets // 2 if both_sides else 0
            ours.append(bucket)
        assert ours == theirs.tolist()


@pytest.mark.parametrize(
    "changes, scaled",
    [
        (dict(tie_word_embeddings=True), True),  # as v1.0's files say it
        (dict(tie_word_embeddings=False), False),  # as v1.1's and FLAN's
        # as transformers 5 writes both
        (dict(tie_word_embeddings=True, scale_decoder_outputs=False), False),
        (dict(tie_word_embeddings=True, scale_decoder_outputs=True), True),
    ],
)
def test_what_says_that_t5_scales_its_logits(changes, scaled):
    config = dict(model_type="t5", d_model=32, vocab_size=96) | changes
    assert families.read_config(config)["head_scale"] is scaled
    assert t.T5Config(**config).scale_decoder_outputs is scaled


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("bart", dict(decoder_ffn_dim=40), "decoder_ffn_dim = 40 is not supported for bart"),
        ("bart", dict(add_final_layer_norm=True), "add_final_layer_norm = True is not supported"),
        (
            "marian",
            dict(share_encoder_decoder_embeddings=False),
            "share_encoder_decoder_embeddings = False is not supported",
        ),
        ("t5", dict(feed_forward_proj="gated-relu"), "feed_forward_proj = 'gated-relu' is not"),
        ("t5", dict(is_decoder=True), "is_decoder = True is not supported for t5"),
    ],
)
def test_what_is_no_encoder_decoder(name, changes, message):
    config_class, arguments = CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        families.read_config(config_class(**arguments).to_dict() | changes)


# --- tokenizers ---


def unigram(directory, form, settings):
    """A Unigram model as T5's is: padding, EOS and the unknown piece come first."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(directory / "spiece"),
        model_type="unigram",
        vocab_size=400,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (directory / "spiece.vocab").unlink()
    (directory / "config.json").write_text('{"model_type": "t5"}')
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if form == "json":
        t.T5Tokenizer.from_pretrained(directory).backend_tokenizer.save(
            str(directory / "tokenizer.json")
        )
        (directory / "spiece.model").unlink()


@pytest.mark.parametrize("form", ["spiece", "json"])
@pytest.mark.parametrize(
    "settings", [{}, dict(extra_ids=7), dict(tokenizer_class="T5Tokenizer", extra_ids=0)]
)
def test_t5s_tokens_are_the_same(settings, form, tmp_path):
    """With its sentinels, which stand behind the others, the last one first."""
    unigram(tmp_path, form, settings)
    ours, theirs = lm_tokenizers.load(tmp_path), t.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*STRINGS, "a <extra_id_0> b<extra_id_1>", "the cat</s>"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
        assert ours.prompt(text) == theirs.encode(text), text
    ids = theirs.encode("the cat and the hat")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert seq2seq_data.ends(ours) == ((), (theirs.eos_token_id,))
    assert seq2seq_data.around(ours, "the cat") == theirs.encode("the cat")
    spans = SpanCorruption(ours, 0.3, 2.0, 64) if settings.get("extra_ids") != 0 else None
    if spans:
        document = Encoder(ours, "").training(Document("the cat and the hat", "", ""))
        (window,) = spans.windows(document, 32, np.random.default_rng(0))
        assert theirs.eos_token_id not in window["source"][:-1]
        assert window["source"][-1] == window["targets"][-1] == theirs.eos_token_id
    assert ours.stop_ids == (theirs.eos_token_id,)
    assert ours.role("pad") == theirs.pad_token_id
    count = settings.get("extra_ids", 100)
    if count:
        sentinels = ours.role_ids("sentinels")
        texts = [f"<extra_id_{i}>" for i in range(count)]
        assert list(sentinels) == theirs.convert_tokens_to_ids(texts)
        assert list(sentinels) == sorted(sentinels, reverse=True)

    # As a run keeps it.
    ours.save(tmp_path / "kept")
    kept = lm_tokenizers.load(tmp_path / "kept")
    assert kept.fingerprint == ours.fingerprint
    assert [kept.encode(text) for text in STRINGS] == [ours.encode(text) for text in STRINGS]


def test_a_model_file_with_too_many_sentinels(tmp_path):
    unigram(tmp_path, "spiece", dict(extra_ids=10**9))
    with pytest.raises(ValueError, match="extra_ids = 1000000000; wanted 0 to 10000"):
        lm_tokenizers.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "spiece.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="spiece.model"):
        lm_tokenizers.load(tmp_path)


# --- what it is asked ---

TASK = """
type = "lm.evals.classification.PromptClassification"
label = "label"
priors = []

[source]
path = "data.jsonl"
split = "test"

[prompt]
templates = ["{text} It was"]

[[verbalizer.words]]
short = [" the"]
long = [" other hat"]
"""


def their_distribution(model, tokenizer, text, fill):
    """Of the words "the" and "other hat", by transformers, each alone."""
    source = tokenizer(text + " It was", add_special_tokens=False).input_ids
    begun = [model.config.decoder_start_token_id]
    if fill == "infill":
        sentinel = tokenizer.convert_tokens_to_ids("<extra_id_0>")
        source += [sentinel, *tokenizer(" .", add_special_tokens=False).input_ids]
        begun.append(sentinel)
    source.append(tokenizer.eos_token_id)

    scores = []
    for word in ("the", "other hat"):
        ids = tokenizer(word, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(
                torch.tensor([source]), decoder_input_ids=torch.tensor([[*begun, *ids]])
            ).logits[0]
        logprobs = torch.log_softmax(logits, -1).numpy()[len(begun) - 1 :]
        scores.append(sum(logprobs[place, token] for place, token in enumerate(ids)))
    return np.exp(scores) / np.exp(scores).sum()


@pytest.mark.parametrize("fill", ["ltr", "infill"])
def test_a_checkpoint_is_asked_for_label_words(fill, tmp_path):
    """As by hand in transformers, by the command; its texts are generated; and it is imported and
    exported as it was.
    """
    folder = tmp_path / "t5"
    folder.mkdir()
    unigram(folder, "spiece", {})
    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    CONFIGS["t5-words"] = (t.T5Config, T5 | dict(vocab_size=len(tokenizer)))
    model = make("t5-words", folder)

    texts = ["the cat", "the other one, the hat and the cat", "12"]
    lines = [json.dumps(dict(text=text, label="short")) for text in texts]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "words.toml").write_text(TASK)
    arguments = [
        f"--config={ROOT}/configs/tasks.py:{tmp_path}/words.toml",
        f"--workdir={tmp_path}/run",
        "--mode=eval",
        f"--config.init_from={folder}",
        "--config.data.length=48",
        f"--config.evals.words.verbalizer.fill={fill}",
    ]
    if fill == "infill":
        arguments.append("--config.evals.words.verbalizer.after= .")
    command = [sys.executable, "-m", "lm.main", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for text, line in zip(texts, read_jsonl(tmp_path / "run" / "predictions" / "words-0.jsonl")):
        wanted = their_distribution(model, tokenizer, text, fill)
        got = [line["distribution"][label] for label in ("short", "long")]
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-5)
    if fill == "infill":
        return

    ids = torch.tensor([tokenizer(texts[1]).input_ids])
    output = model.generate(
        ids, max_new_tokens=8, do_sample=False, num_beams=3, bad_words_ids=[[0]]
    )
    wanted = tokenizer.decode(output[0], skip_special_tokens=True)
    beams = [f"--from={folder}", f"--prompt={texts[1]}", "--num_beams=3", "--max_new_tokens=8"]
    ((status, out, err),) = run_commands("lm.generate", [beams], tmp_path / "generate")
    assert status == 0, err
    assert out.strip() == wanted.strip()

    imported = ["import", f"--from={folder}", f"--workdir={tmp_path}/imported"]
    exported = ["export", f"--workdir={tmp_path}/imported", f"--to={tmp_path}/again"]
    for status, _, err in run_commands("lm.convert", [imported, exported], tmp_path / "convert"):
        assert status == 0, err
    again = t.T5ForConditionalGeneration.from_pretrained(tmp_path / "again")
    for key, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key].numpy(), tensor.numpy())
    assert t.AutoTokenizer.from_pretrained(tmp_path / "again")(texts) == tokenizer(texts)


def test_a_run_is_written_as_a_t5(tiny, tmp_path):
    """As transformers reads it: its loss is ours."""
    changes = {"model.scale_scores": False, "train.length": "3 steps", "model.dropout": 0.0}
    config = configure(tiny, tmp_path, **changes)
    metrics = run_training(config, tmp_path / "run")
    family = convert.export_checkpoint(epath.Path(tmp_path / "run"), tmp_path / "hf", jax.devices())
    assert family == "t5"
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["pad_token_id"] == written["decoder_start_token_id"] == 0

    model = t.T5ForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    total, count = 0.0, 0
    for line in (tmp_path / "val.de").read_text().splitlines():
        ids = torch.tensor([[256, *line.encode(), 257]])
        with torch.no_grad():
            total += float(model(ids, labels=ids).loss) * ids.shape[1]
        count += ids.shape[1]
    assert total / count == pytest.approx(metrics["eval/held_out/loss"], abs=1e-4)


def test_lm_eval_asks_for_answers_to_sources(tmp_path):
    """Contexts and continuations are texts of their own: log-likelihoods as by hand."""
    from lm.evals import harness

    unigram(tmp_path, "spiece", {})
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path)
    CONFIGS["t5-words"] = (t.T5Config, T5 | dict(vocab_size=len(tokenizer)))
    model = make("t5-words", tmp_path)
    source, graphdef, params = load(tmp_path)
    answers = SourceAnswers(
        sharding.make_mesh({}, jax.devices()[:1]),
        step.make_tree_logprobs(graphdef),
        step.make_tree_states(graphdef),
        before=[],
        end=[tokenizer.eos_token_id],
        sentinels=[],
    )
    fns = PredictFns(
        CompiledFns(
            sharding.make_mesh({}, jax.devices()[:1]),
            reserved=2,
            source_length=64,
            context_length=32,
            logprobs=answers.logprobs,
        ),
        batch_size=4,
        length=32,
    )
    ours = harness.HarnessModel(fns, params, lm_tokenizers.load(tmp_path))
    pairs = [("the cat and", " the hat"), ("the other ", "one 12"), ("the cat", " and")]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    for (context, continuation), (got, _) in zip(pairs, ours.loglikelihood(requests)):
        ids = tokenizer(continuation.strip(), add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(
                torch.tensor([tokenizer(context.strip()).input_ids]),
                decoder_input_ids=torch.tensor([[0, *ids[:-1]]]),
            ).logits[0]
        logprobs = torch.log_softmax(logits, -1).numpy()
        wanted = sum(logprobs[place, token] for place, token in enumerate(ids))
        assert got == pytest.approx(wanted, abs=1e-3)
    with pytest.raises(ValueError, match="no token_logprobs, which lm_eval's loglikelihood_roll"):
        ours.loglikelihood_rolling([SimpleNamespace(args=("a text",))])
