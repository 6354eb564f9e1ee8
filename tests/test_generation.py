"""Samples: the artifact, prompts that can't work, and that only the model changes them."""

import json
from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx

from lm import build, sharding, step
from lm import config as config_lib
from lm.data.pack import Encoder
from lm.data.tokenizer import ByteTokenizer
from lm.evals import entries, generation
from lm.evals.predict import Artifact, PredictFns
from lm.evals.tree import build_tree

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
    c.model.update(
        dict(
            vocab_size=264,
            context_length=LENGTH,
            num_layers=1,
            embed_dim=16,
            mlp_dim=32,
            num_heads=2,
            num_kv_heads=2,
            head_dim=8,
            activation="silu",
            tie_embeddings=False,
            param_dtype="float32",
            compute_dtype="float32",
        )
    )
    _, make_model = build.model(c, 258, "cpu")
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make_model(jax.random.key(0))), nnx.Param)
    rng = np.random.default_rng(1)
    fill = lambda path, p: (
        (1.0 if path[-1].key == "scale" else 0.0) + rng.normal(0, 0.4, p.shape).astype(p.dtype)
    )
    return graphdef, jax.tree_util.tree_map_with_path(fill, nnx.to_pure_dict(abstract))


def make_fns(make_generate=None):
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    make_generate = make_generate or (
        lambda **kwargs: make_generate(model()[0], eos_id=257, vocab_size=258, **kwargs)
    )
    return PredictFns(
        mesh,
        batch_size=2,
        length=LENGTH,
        token_logprobs=len,
        tree_logprobs=step.make_tree_logprobs(model()[0]),
        make_generate=make_generate,
        check_stop=lambda: None,
    )


@cache
def real_fns():
    return make_fns()


def samples(fns, prompts=("ab", "é"), max_new_tokens=6, temperature=0.8, top_k=50):
    return generation.Samples(
        fns,
        encoder=ENCODER,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
    )


def test_artifact():
    fns = Parrot()
    values = dict(samples(fns, prompts=("abc", "two\nlines", "")).run(None))
    artifact = values["samples"]
    assert (
        list(values) == ["samples"]
        and isinstance(artifact, Artifact)
        and artifact.path == "samples.md"
        and artifact.append
    )
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
    drawn = [
        real_fns().generate(
            params,
            [[256, 97, 98], [256, *"é".encode()]],
            max_new_tokens=6,
            temperature=0.8,
            top_k=50,
            seed=s,
        )
        for s in (0, 1)
    ]
    assert drawn[0] != drawn[1] and all(
        ENCODER.tokenizer.decode(ids) in first.content for ids in drawn[0]
    )
    other = jax.tree.map(lambda p: p[..., ::-1].copy(), params)
    assert dict(samples(real_fns()).run(other))["samples"] != first


def test_greedy_is_the_best_token_each_time():
    # The cache, the padding of prompts of several lengths, and the positions: against a whole pass
    # for each token.
    fns = real_fns()
    _, params = model()
    prompts = [[256], [256, 97, 98, 99, 100, 101], [256, 120]]
    found = fns.generate(params, prompts, max_new_tokens=8, temperature=0, top_k=0, seed=0)
    for ids, continuation in zip(prompts, found):
        expected, ids = [], list(ids)
        while len(expected) < 8:
            best = int(
                np.argmax(
                    fns.tree_logprobs(params, [build_tree(ids, [[token] for token in range(258)])])[
                        0
                    ][0]
                )
            )
            if best == 257:
                break
            expected.append(best)
            ids.append(best)
        assert continuation == expected


def test_what_follows_eos_is_dropped():
    def make_generate(**options):
        return lambda params, prompts, lengths, key: (
            jax.numpy.tile(jax.numpy.arange(6), (2, 1)),
            jax.numpy.array([0, 4]),
        )

    fns = make_fns(make_generate)
    assert fns.generate({}, [[256], [256]], max_new_tokens=6, temperature=0, top_k=0, seed=0) == [
        [],
        [0, 1, 2, 3],
    ]


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


# Answers to prompts


class Reader:
    """PredictFns whose model says, of a question "WORD N?", " WORD" N times and then EOS."""

    length, batch_size = 64, 4

    def __init__(self):
        self.prompts = []

    def check_stop(self):
        pass

    def make_generator(self, params, sampling):
        assert sampling.temperature == 0
        return self

    def stream(self, prompts, max_new_tokens, seeds):
        assert len(prompts) == self.batch_size
        self.prompts += prompts
        texts = [
            bytes(ids[1:]).decode().split("\n")[-1].removesuffix("?").split() for ids in prompts
        ]
        said = [[*(f" {word}" * int(count)).encode(), 257] for word, count in texts]
        for i in range(max_new_tokens):
            yield np.array([ids[i] if i < len(ids) else -1 for ids in said])


def write_task(folder, rows, **changes):
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "train.jsonl").write_text(
        "".join(json.dumps(dict(q=f"ex {i}", a=["ex"])) + "\n" for i in range(5))
    )
    (folder / "g.toml").write_text('type = "lm.evals.generation.TextGeneration"')
    options = (
        dict(
            source=dict(path=str(folder / "{split}.jsonl"), shots_split="train"),
            prompt=dict(template="{q}?"),
            target=" {a[0]}",
            references="{a}",
            scores=("exact_match", "f1"),
            output=dict(max_new_tokens=20),
        )
        | changes
    )
    return {
        key: value
        for key, value in entries.task(str(folder / "g.toml"), **options).to_dict().items()
        if key not in ("type", "every", "batch_size")
    }


ROWS = [
    dict(q="cat 2", a=["cat cat"]),
    dict(q="dog 1", a=["Dogs", "The dog."]),
    dict(q="ab 3", a=["ab"]),
    dict(q="x 9", a=["y"]),
    dict(q="no 0", a=["z"]),
]


def answer(folder, rows=ROWS, **changes):
    fns = Reader()
    values = dict(
        generation.TextGeneration(
            fns, name="g", encoder=ENCODER, **write_task(folder, rows, **changes)
        ).run(None)
    )
    return values, [json.loads(line) for line in values["predictions"].content.splitlines()], fns


def test_answers_are_scored(tmp_path):
    values, lines, _ = answer(tmp_path)
    assert [line["text"] for line in lines] == [" cat cat", " dog", " ab ab ab", " x" * 9, ""]
    assert (
        values["exact_match"] == 0.2
        and values["f1"] == pytest.approx((1 + 0 + 0.5) / 5)
        and values["empty"] == 0.2
        and values["examples"] == 5
    )
    assert [line["scores"]["f1"] for line in lines] == [1, 0, 0.5, 0, 0] and values[
        "f1_low"
    ] <= values["f1"] <= values["f1_high"]
    squad, _, _ = answer(tmp_path, output=dict(max_new_tokens=20, normalize="squad"))
    assert squad["exact_match"] == 0.4  # one of two references, without article, case and point


def test_answers_end_at_stop_strings_and_are_extracted(tmp_path):
    values, lines, _ = answer(tmp_path, output=dict(max_new_tokens=20, stop=("b a", "g")))
    assert [line["text"] for line in lines] == [" cat cat", " do", " a", " x" * 9, ""]
    values, lines, _ = answer(
        tmp_path, output=dict(max_new_tokens=20, extract=r"[a-z]+"), scores=("exact_match",)
    )
    assert [line["answer"] for line in lines] == ["cat", "dog", "ab", "x", None] and values[
        "unmatched"
    ] == 0.2
    assert values["exact_match"] == 0.4  # cat: of references too
    with pytest.raises(
        ValueError, match=r"g.output.extract = '\[0-9\]' finds nothing in the reference 'cat cat'"
    ):
        answer(tmp_path, output=dict(extract="[0-9]"))


def test_prompts_have_examples_and_leave_room(tmp_path):
    _, _, fns = answer(tmp_path, prompt=dict(template="{q}?", shots=2, separator="\n"))
    first = bytes(fns.prompts[0][1:]).decode().split("\n")
    assert len(first) == 3 and all(
        line.startswith("ex ") and line.endswith("? ex") for line in first[:2]
    )
    values, _, fns = answer(tmp_path, [dict(q="long " * 30 + "\ncat 1", a=["cat"])])
    assert (
        values["cut"] == 1
        and values["exact_match"] == 1
        and len(fns.prompts[0]) == 64 - 20
        and fns.prompts[0][0] == 256
    )
    with pytest.raises(ValueError, match="a continuation of 65 tokens leaves no room"):
        answer(tmp_path, output=dict(max_new_tokens=64))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(output=dict(max_new_tokens=0)), "max_new_tokens = 0; wanted 1 or above"),
        (dict(scores=("f2",)), r"scores has \['f2'\]; valid: \['exact_match', 'f1'"),
        (dict(scores=()), "scores has"),
        (dict(output=dict(extract="(")), "is no regular expression"),
        (dict(output=dict(normalize="lower")), "normalize = 'lower'; valid"),
        (dict(references="{b}"), "needs the column 'b'"),
        (
            dict(target=" {q:strip}", prompt=dict(template="{a}", shots=1)),
            "gives 2 texts for one record",
        ),
    ],
)
def test_tasks_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        answer(tmp_path, **changes)


def test_no_reference(tmp_path):
    with pytest.raises(ValueError, match="g.references = '{a}' gives no text for a record"):
        answer(tmp_path, [dict(q="x 1", a=[])])
