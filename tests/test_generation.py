"""Samples: the artifact, prompts that can't work, and that only the model changes them."""

from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx

from lm import build, decode, sharding, step
from lm import config as config_lib
from lm.data.pack import Encoder
from lm.data.tokenizer import ByteTokenizer
from lm.evals import generation
from lm.evals.common import Artifact, PredictFns
from lm.evals.tree import grow

LENGTH = 24
ENCODER = Encoder(ByteTokenizer(), "")


class Parrot:
    """PredictFns whose model says the prompt again, backwards."""
    length = LENGTH

    def __init__(self):
        self.calls = []

    def check_prompts(self, prompts, max_new_tokens):
        pass

    def generate(self, params, prompts, **options):
        self.calls.append((prompts, options))
        return [ids[:0:-1] for ids in prompts]


@cache
def model():
    """(graphdef, parameters) of a small Transformer with weights large enough to have opinions."""
    c = config_lib.default()
    c.data.length = LENGTH
    c.model.update(dict(vocab_size=264, context_length=LENGTH, num_layers=1, embed_dim=16, mlp_dim=32, num_heads=2, num_kv_heads=2, head_dim=8,
                        activation="silu", tie_embeddings=False, param_dtype="float32", compute_dtype="float32"))
    _, make_model = build.model(c, 258, "cpu")
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make_model(jax.random.key(0))), nnx.Param)
    rng = np.random.default_rng(1)
    fill = lambda path, p: (1.0 if path[-1].key == "scale" else 0.0) + rng.normal(0, 0.4, p.shape).astype(p.dtype)
    return graphdef, jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(abstract))


def make_fns(make_generate=None):
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    make_generate = make_generate or (lambda **kwargs: decode.make_generate(model()[0], eos_id=257, vocab_size=258, **kwargs))
    return PredictFns(mesh, batch_size=2, length=LENGTH, token_logprobs=len, tree_logprobs=step.make_tree_logprobs(model()[0]),
                      make_generate=make_generate, check_stop=lambda: None)


@cache
def real_fns():
    return make_fns()


def samples(fns, prompts=("ab", "é"), max_new_tokens=6, temperature=0.8, top_k=50):
    return generation.Samples(fns, encoder=ENCODER, prompts=prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)


def test_artifact():
    fns = Parrot()
    values = dict(samples(fns, prompts=("abc", "two\nlines", "")).run(None))
    artifact = values["samples"]
    assert list(values) == ["samples"] and isinstance(artifact, Artifact) and artifact.path == "samples.md" and artifact.append
    assert artifact.content.startswith("```\n")  # the heading with the step is the trainer's
    blocks = artifact.content.split("```\n")[1::2]
    assert blocks == ["abc⟫cba\n", "two\nlines⟫senil\nowt\n", "⟫\n"]
    prompts, options = fns.calls[0]
    assert prompts[0] == [256, *b"abc"] and prompts[2] == [256]  # as a document begins
    assert options == dict(max_new_tokens=6, temperature=0.8, top_k=50, seed=0)


def test_samples_are_the_model_s():
    _, params = model()
    first, again = (dict(samples(real_fns()).run(params))["samples"] for _ in range(2))
    assert first == again
    drawn = [real_fns().generate(params, [[256, 97, 98], [256, *"é".encode()]], max_new_tokens=6, temperature=0.8, top_k=50, seed=s) for s in (0, 1)]
    assert drawn[0] != drawn[1] and all(ENCODER.tokenizer.decode(ids) in first.content for ids in drawn[0])
    other = jax.tree.map(lambda p: p[..., ::-1].copy(), params)
    assert dict(samples(real_fns()).run(other))["samples"] != first


def test_greedy_is_the_best_token_each_time():
    # The cache, the padding of prompts of several lengths, and the positions: against a whole pass for each token.
    fns = real_fns()
    _, params = model()
    prompts = [[256], [256, 97, 98, 99, 100, 101], [256, 120]]
    found = fns.generate(params, prompts, max_new_tokens=8, temperature=0, top_k=0, seed=0)
    for ids, continuation in zip(prompts, found):
        expected, ids = [], list(ids)
        while len(expected) < 8:
            best = int(np.argmax(fns.tree_logprobs(params, [grow(ids, [[token] for token in range(258)])])[0][0]))
            if best == 257:
                break
            expected.append(best)
            ids.append(best)
        assert continuation == expected


def test_what_follows_eos_is_dropped():
    def make_generate(**options):
        return lambda params, prompts, lengths, key: (jax.numpy.tile(jax.numpy.arange(6), (2, 1)), jax.numpy.array([0, 4]))
    fns = make_fns(make_generate)
    assert fns.generate({}, [[256], [256]], max_new_tokens=6, temperature=0, top_k=0, seed=0) == [[], [0, 1, 2, 3]]


def test_prompts_that_do_not_fit():
    fns = real_fns()
    options = dict(max_new_tokens=6, temperature=0.0, top_k=0, seed=0)
    for ids, found in (([256] * 19, 19), ([], 0)):
        with pytest.raises(ValueError, match=f"a prompt has {found} tokens; wanted 1 to 18"):
            fns.generate({}, [[256], ids], **options)
    with pytest.raises(ValueError, match="wanted 1 to"):
        fns.generate({}, [[256]], **options | dict(max_new_tokens=LENGTH))


def test_prompts_are_checked_before_training():
    # Not by the first evaluation, which may come after hours.
    with pytest.raises(ValueError, match="a prompt has 19 tokens; wanted 1 to 18"):
        samples(real_fns(), prompts=("ab", "x" * 18))
    assert samples(real_fns(), prompts=("", "x" * 17))
