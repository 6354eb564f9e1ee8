"""Evals that generate text: samples of fixed prompts, and answers that are scored."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from lm import build, sharding
from lm import config as config_lib
from lm.data.pack import Encoder
from lm.data.tokenizer import ByteTokenizer
from lm.decoding.generator import Generator
from lm.decoding.sampling import Sampling
from lm.evals import entries, generation
from lm.evals.predict import Artifact, PredictFns, Prompt, Question
from tests.helpers import model_config, random_model

LENGTH = 24
ENCODER = Encoder(ByteTokenizer(), "")
BOS, EOS, VOCAB = 256, 257, 258  # of ByteTokenizer


@functools.cache
def model():
    """(its Config, graphdef, parameters) of a small Transformer with weights large enough to have
    opinions.
    """
    config = model_config(
        vocab_size=264,
        context_length=LENGTH,
        num_layers=1,
        embed_dim=16,
        mlp_dim=32,
        num_heads=2,
        num_kv_heads=2,
    )
    return config, *random_model(config, std=0.4)


def make_generator(params, sampling, stop_ids=(EOS,)):
    config, graphdef, _ = model()
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    return Generator(config, graphdef, params, mesh, sampling, stop_ids=stop_ids, vocab_size=VOCAB)


@functools.cache
def model_fns():
    """PredictFns of the small Transformer, compiled once."""
    _, graphdef, _ = model()
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    objective = build.make_objective(config_lib.default())
    fns = build.make_eval_fns(graphdef, objective, mesh)
    fns = dataclasses.replace(fns, make_generator=make_generator)
    return PredictFns(fns, batch_size=2, length=LENGTH)


def make_samples(fns, prompts=("ab", "é"), max_new_tokens=6):
    return generation.Samples(
        fns,
        name="samples",
        encoder=ENCODER,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        temperature=0.8,
        top_k=50,
    )


# --- samples ---


class Parrot:
    """PredictFns whose model says the prompt again, backwards, without its first token."""

    length = LENGTH
    reads_sources = False

    def __init__(self):
        self.calls = []

    def room_of_prompt(self, max_new_tokens):
        return self.length - max_new_tokens

    def check_stop(self):
        pass

    def make_generator(self, params, sampling):
        self.sampling = sampling
        return self

    def generate(self, prompts, max_new_tokens, keys_B):
        self.calls.append((prompts, max_new_tokens, keys_B))
        return [ids[:0:-1] for ids in prompts]


def test_artifact():
    parrot = Parrot()

    values = dict(make_samples(parrot, prompts=("abc", "two\nlines", "")).run(None))

    artifact = values["samples"]
    assert list(values) == ["samples"]
    assert isinstance(artifact, Artifact)
    assert artifact.path == "samples.md" and artifact.append
    assert artifact.content.startswith("```\n")  # the heading with the step is the trainer's
    blocks = artifact.content.split("```\n")[1::2]
    assert blocks == ["abc⟫cba\n", "two\nlines⟫senil\nowt\n", "⟫\n"]


def test_samples_are_drawn_with_a_fixed_seed():
    parrot = Parrot()

    dict(make_samples(parrot, prompts=("abc", "")).run(None))

    ((prompts, max_new_tokens, keys_B),) = parrot.calls
    assert prompts == [[BOS, *b"abc"], [BOS]]  # as a document begins
    assert max_new_tokens == 6
    assert parrot.sampling == Sampling(temperature=0.8, top_k=50)
    # A key of its own for each row, from seed 0.
    assert (keys_B == jax.random.split(jax.random.key(0), 2)).all()


def test_samples_are_the_models():
    _, _, params = model()
    sampling = Sampling(temperature=0.8, top_k=50)
    prompts = [[BOS, *b"ab"], [BOS, *"é".encode()]]

    # The same texts each time, and those that a generator gives for seed 0.
    first = dict(make_samples(model_fns()).run(params))["samples"]
    again = dict(make_samples(model_fns()).run(params))["samples"]
    generator = model_fns().make_generator(params, sampling)
    continuations = generator.generate(prompts, 6, jax.random.split(jax.random.key(0), 2))
    other_seed = generator.generate(prompts, 6, jax.random.split(jax.random.key(1), 2))

    assert first == again
    assert continuations != other_seed
    for ids in continuations:
        assert ENCODER.tokenizer.decode(ids) in first.content

    # Another model says something else.
    other_params = jax.tree.map(lambda p: p[..., ::-1].copy(), params)
    assert dict(make_samples(model_fns()).run(other_params))["samples"] != first


def test_prompts_are_checked_before_training():
    """Not by the first evaluation, which may come after hours."""
    with pytest.raises(
        ValueError,
        match="config.evals.samples.prompts: 'x+' has 19 tokens; wanted 1 to 18: config.data",
    ):
        make_samples(model_fns(), prompts=("ab", "x" * 18))
    # No room for any prompt.
    with pytest.raises(ValueError, match="wanted 1 to 0"):
        make_samples(model_fns(), prompts=("",), max_new_tokens=LENGTH)
    assert make_samples(model_fns(), prompts=("", "x" * 17))


# --- the generator that evals are given ---


def greedy(prompts, max_new_tokens, stop_ids=(EOS,)):
    """The model's best continuations."""
    _, _, params = model()
    generator = make_generator(params, Sampling(temperature=0), stop_ids)
    keys_B = jax.random.split(jax.random.key(0), len(prompts))
    return generator.generate(prompts, max_new_tokens, keys_B)


def test_greedy_is_the_best_token_each_time():
    """The cache, the padding of prompts of several lengths, and the positions: against a whole
    forward pass for each token.
    """
    _, _, params = model()
    all_tokens = [[token] for token in range(VOCAB)]
    prompts = [[BOS], [BOS, 97, 98, 99, 100, 101], [BOS, 120]]

    # Without a cache: all tokens as continuations of what is there so far, one after the other.
    for prompt, continuation in zip(prompts, greedy(prompts, 8)):
        expected = []
        while len(expected) < 8:
            question = Question(Prompt(prompt + expected), all_tokens)
            (answers,) = model_fns().logprobs(params, [question])
            best = int(np.argmax([answer.logprobs for answer in answers]))
            if best == EOS:
                break
            expected.append(best)
        assert continuation == expected


def test_prompts_that_do_not_fit():
    for ids in ([BOS] * 19, []):
        with pytest.raises(ValueError, match=f"prompt 1 has {len(ids)} tokens; wanted 1 to 18"):
            greedy([[BOS], ids], 6)
    with pytest.raises(ValueError, match="wanted 1 to 0"):
        greedy([[BOS]], LENGTH)


def test_a_continuation_ends_before_its_stop_token():
    """Rows end on their own: the other one goes on."""
    prompts = [[BOS], [BOS, 97, 98, 99, 100, 101]]
    unstopped = greedy(prompts, 8)
    # A token that the model says in the middle becomes one that ends it.
    stop_token = unstopped[0][4]

    stopped = greedy(prompts, 8, stop_ids=(EOS, stop_token))

    # The rows end at different steps.
    assert len(stopped[0]) <= 4 and len(stopped[0]) != len(stopped[1])
    for ids, all_ids in zip(stopped, unstopped):
        end = all_ids.index(stop_token) if stop_token in all_ids else len(all_ids)
        assert ids == all_ids[:end]


class Script:
    """PredictFns whose model says the given ids, a list for each row, whatever the prompts."""

    def __init__(self, ids):
        self.batch_size = len(ids)
        self._ids = ids

    def check_stop(self):
        pass

    def make_generator(self, params, sampling):
        return self

    def stream(self, prompts, max_new_tokens, keys_B):
        for i in range(max_new_tokens):
            yield np.array([ids[i] for ids in self._ids])


def test_what_follows_eos_is_dropped():
    # The first row ends at once, the second one before its last token.
    texts = generation.generate(
        Script([[EOS, *b"abcde"], [*b"abcd", EOS, *b"e"]]),
        None,
        ENCODER.tokenizer,
        [[BOS], [BOS]],
        max_new_tokens=6,
        stop=(),
        sampling=Sampling(),
        seeds=(0, 1),
    )

    assert texts == ["", "abcd"]


# --- answers to prompts ---


class Reader:
    """PredictFns whose model says, of a question "WORD N?", " WORD" N times and then EOS."""

    length = 64
    batch_size = 4
    reads_sources = False

    def __init__(self):
        self.prompts = []

    def check_stop(self):
        pass

    def make_generator(self, params, sampling):
        assert sampling.temperature == 0
        return self

    def stream(self, prompts, max_new_tokens, keys_B):
        assert len(prompts) == self.batch_size
        self.prompts += prompts
        # Examples stand before the question, on lines of their own.
        answers = []
        for ids in prompts:
            question = bytes(ids[1:]).decode().split("\n")[-1]
            word, count = question.removesuffix("?").split()
            answers.append([*(f" {word}" * int(count)).encode(), EOS])

        for i in range(max_new_tokens):
            yield np.array([ids[i] if i < len(ids) else -1 for ids in answers])


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_arguments(folder, records, **changes):
    """Those of a TextGeneration of records, which are written to `folder`."""
    write_jsonl(folder / "test.jsonl", records)
    write_jsonl(folder / "train.jsonl", [dict(q=f"ex {i}", a=["ex"]) for i in range(5)])
    (folder / "g.toml").write_text('type = "lm.evals.generation.TextGeneration"')
    options = dict(
        source=dict(path=str(folder / "{split}.jsonl"), shots_split="train"),
        prompt=dict(template="{q}?"),
        target=" {a[0]}",
        references="{a}",
        scores=("exact_match", "f1"),
        output=dict(max_new_tokens=20),
    )
    arguments = entries.task(str(folder / "g.toml"), **options | changes).to_dict()
    for key in ("type", "every", "batch_size"):  # read by lm.build
        del arguments[key]
    return arguments


RECORDS = [
    dict(q="cat 2", a=["cat cat"]),
    dict(q="dog 1", a=["Dogs", "The dog."]),
    dict(q="ab 3", a=["ab"]),
    dict(q="x 9", a=["y"]),
    dict(q="no 0", a=["z"]),
]


def evaluate(folder, records=RECORDS, **changes):
    """(values, the lines of predictions/, the Reader that answered)."""
    fns = Reader()
    arguments = make_arguments(folder, records, **changes)
    evaluator = generation.TextGeneration(fns, name="g", encoder=ENCODER, **arguments)
    values = dict(evaluator.run(None))
    lines = list(map(json.loads, values["predictions"].content.splitlines()))
    return values, lines, fns


def column(lines, key):
    return [line[key] for line in lines]


def test_answers_are_scored(tmp_path):
    values, lines, _ = evaluate(tmp_path)

    assert column(lines, "text") == [" cat cat", " dog", " ab ab ab", " x" * 9, ""]
    assert column(column(lines, "scores"), "f1") == [1, 0, 0.5, 0, 0]
    assert values["exact_match"] == 0.2
    assert values["f1"] == pytest.approx((1 + 0 + 0.5) / 5)
    assert values["f1_low"] <= values["f1"] <= values["f1_high"]
    assert values["empty"] == 0.2
    assert values["examples"] == 5


def test_answers_are_normalised(tmp_path):
    values, _, _ = evaluate(tmp_path, output=dict(max_new_tokens=20, normalize="squad"))

    # One of two references, without article, case and point.
    assert values["exact_match"] == 0.4


def test_answers_end_at_stop_strings(tmp_path):
    _, lines, _ = evaluate(tmp_path, output=dict(max_new_tokens=20, stop=("b a", "g")))

    # The first stop string counts, wherever the tokens end.
    assert column(lines, "text") == [" cat cat", " do", " a", " x" * 9, ""]


def test_answers_are_extracted(tmp_path):
    values, lines, _ = evaluate(
        tmp_path, output=dict(max_new_tokens=20, extract=r"[a-z]+"), scores=("exact_match",)
    )

    assert column(lines, "answer") == ["cat", "dog", "ab", "x", None]
    assert values["unmatched"] == 0.2
    assert values["exact_match"] == 0.4  # cat: of references too
    with pytest.raises(
        ValueError, match=r"g.output.extract = '\[0-9\]' finds nothing in the reference 'cat cat'"
    ):
        evaluate(tmp_path, output=dict(extract="[0-9]"))


def test_references_without_tokens_are_said(tmp_path, caplog):
    records = [dict(q="cat 1", a=["今天天气很好"])] * 2
    scores = ("bleu", "rougeL")
    values, _, _ = evaluate(tmp_path, records, scores=scores)
    assert "bleu with output.tokenize = '13a': none of 2 references has four tokens" in caplog.text
    assert "rougeL with output.tokenize = '13a': 2 of 2 references have no token" in caplog.text
    caplog.clear()
    evaluate(tmp_path, records, scores=scores, output=dict(max_new_tokens=20, tokenize="zh"))
    assert not caplog.text
    with pytest.raises(ValueError, match="config.evals.g.output.tokenize = 'cn'; valid"):
        evaluate(tmp_path, records, output=dict(tokenize="cn"))


def test_prompts_have_examples(tmp_path):
    _, _, fns = evaluate(tmp_path, prompt=dict(template="{q}?", shots=2, separator="\n"))

    *shots, _ = bytes(fns.prompts[0][1:]).decode().split("\n")
    assert len(shots) == 2
    for shot in shots:
        assert shot.startswith("ex ") and shot.endswith("? ex")


def test_prompts_leave_room_for_the_answer(tmp_path):
    values, (line,), fns = evaluate(tmp_path, [dict(q="long " * 30 + "\ncat 1", a=["cat"])])

    assert values["cut"] == 1
    assert line["prompt"] == "long " * 30 + "\ncat 1?"
    assert line["cut"] == 1 + len(line["prompt"]) - len(fns.prompts[0])
    assert values["exact_match"] == 1
    assert len(fns.prompts[0]) == 64 - 20
    assert fns.prompts[0][0] == BOS
    with pytest.raises(ValueError, match="a continuation of 65 tokens leaves no room"):
        evaluate(tmp_path, output=dict(max_new_tokens=64))


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
        evaluate(tmp_path, **changes)


def test_no_reference(tmp_path):
    with pytest.raises(ValueError, match="g.references = '{a}' gives no text for a record"):
        evaluate(tmp_path, [dict(q="x 1", a=[])])


UNANSWERABLE = [
    dict(q="cat 1", a=["cat"]),
    dict(q="dog 1", a=[]),
    dict(q="Unanswerable. 1", a=[]),
    dict(q="unanswerable 1", a=["ant"]),
    dict(q="none 0", a=[]),
]


def test_questions_without_an_answer(tmp_path):
    """As SQuAD 2.0's script: without an answer "" is right, and what says that there is none."""
    output = dict(max_new_tokens=20, normalize="squad", no_answer="unanswerable")
    values, lines, _ = evaluate(tmp_path, UNANSWERABLE, output=output)

    assert column(column(lines, "scores"), "exact_match") == [1, 0, 1, 0, 1]
    assert values["f1"] == 0.6
    assert values["f1_answerable"] == values["exact_match_answerable"] == 0.5
    assert values["f1_unanswerable"] == values["exact_match_unanswerable"] == pytest.approx(2 / 3)
    assert column(lines, "references") == [["cat"], [], [], ["ant"], []]


def test_examples_without_an_answer(tmp_path):
    arguments = make_arguments(
        tmp_path,
        RECORDS,
        prompt=dict(template="{q}?", shots=3, separator="\n"),
        output=dict(max_new_tokens=20, no_answer="none"),
    )
    write_jsonl(tmp_path / "train.jsonl", [dict(q=f"ex {i}", a=[]) for i in range(5)])
    evaluator = generation.TextGeneration(Reader(), name="g", encoder=ENCODER, **arguments)
    assert evaluator.about["prompts"][0]["before"].count("? none\n") == 3
