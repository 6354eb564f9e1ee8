"""What texts earn: answers, instructions, mathematics, and the word of another model."""

import functools
import json
import types

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from lm import build, weights
from lm.rl import instructions, judges, maths, rewards
from tests.helpers import VERBALIZER, run_training, write_task
from tests.test_policy import KINDS, configure

CORPUS = "\n="


def texts_of(*texts):
    return [rewards.Text(text, (0,), tuple(range(len(text.split()))), True) for text in texts]


def test_exact_answers():
    records = [{"answer": "42"}, {"answer": 42}, {"answer": "Yes"}, {"answer": ""}, {}]
    texts = texts_of(" 42\n", "41", "yes", "", "x")
    assert rewards.exact(records, texts) == [1, 0, 0, None, None]
    assert rewards.exact(records, texts, lowercase=True) == [1, 0, 1, None, None]
    assert rewards.exact([{"right": "b"}], texts_of("b"), key="right") == [1]


def test_patterns():
    texts = texts_of("so #### 7", "#### 8 ", "none")
    records = [{"answer": "7"}, {"answer": 7}, {"answer": 7}]
    assert rewards.pattern(records, texts, pattern=r"####") == [1, 1, 0]
    assert rewards.pattern(records, texts, pattern=r"#### *(\d+)", key="answer") == [1, 0, 0]
    assert rewards.pattern([{}], texts[:1], pattern=r"(\d)", key="answer") == [None]
    assert rewards.pattern(records, texts, pattern=r"so|(8)", key="answer") == [0, 0, 0]
    with pytest.raises(ValueError, match="has no group"):
        rewards.pattern(records, texts, pattern=r"\d", key="answer")


def test_lengths():
    texts = texts_of("a b c d", "a", "a b c d e f")
    assert rewards.length([{}] * 3, texts, least=2, most=4) == [0, -0.25, -0.5]
    assert rewards.ended([{}] * 3, texts) == [1, 1, 1]


@pytest.mark.parametrize(
    "instruction, kept, broken",
    [
        (dict(type="least_words", count=2), "a b", "a"),
        (dict(type="most_words", count=2), "a b", "a b c"),
        (dict(type="sentences", count=2), "It is. Is it?", "It is."),
        (dict(type="paragraphs", count=2), "a\n\nb", "a\nb"),
        (dict(type="bullets", count=2), "* a\n- b", "* a\nb"),
        (dict(type="includes", words=["cat"]), "The Cat sat", "concatenate"),
        (dict(type="excludes", words=["cat"]), "concatenate", "a cat"),
        (dict(type="starts_with", words="Yes"), "Yes, so", "So yes"),
        (dict(type="ends_with", words="end."), "the end.\n", "the end"),
        (dict(type="lower_case"), "all low, 1", "Not low"),
        (dict(type="upper_case"), "ALL UP, 1", "Not UP"),
        (dict(type="no_commas"), "a b", "a, b"),
        (dict(type="json"), '```json\n{"a": [1]}\n```', "{a: 1}"),
    ],
)
def test_instructions(instruction, kept, broken):
    assert instructions.keeps(kept, instruction)
    assert not instructions.keeps(broken, instruction)


def test_shares_of_instructions():
    record = {"instructions": [dict(type="no_commas"), dict(type="lower_case")]}
    texts = texts_of("a b", "a, b", "A, b")
    assert instructions.followed([record] * 3, texts) == [1, 0.5, 0]
    assert instructions.followed([record] * 3, texts, all_or_none=True) == [1, 0, 0]
    assert instructions.followed([{}], texts[:1]) == [None]
    assert len(instructions.CHECKS) >= 10
    assert not instructions.keeps("a" * 100_000, dict(type="sentences", count=1))  # in no time
    with pytest.raises(ValueError, match="type = 'rhymes'; valid: .'least_words'"):
        instructions.keeps("a", dict(type="rhymes"))
    with pytest.raises(ValueError, match="most_words.*missing 1 required"):
        instructions.keeps("a", dict(type="most_words"))


def test_mathematics():
    """A right answer that is none is told apart from a wrong one; what takes for ever is wrong."""
    records = [{"answer": r"\frac{1}{2}"}] * 4 + [{"answer": "x^"}, {"answer": ""}]
    texts = texts_of("so it is $0.5$", "$2$", r"\boxed{\frac{2}{4}}", "$9^{9^{9^{9^9}}}$", "1", "1")
    assert maths.right(records, texts) == [1, 0, 1, 0, None, None]


# --- judges ---


@pytest.fixture
def policy(tiny, tmp_path):
    """(experiment, its parameters, the policy's run): a policy with a reward model beside it."""
    config = configure(tiny, tmp_path, **KINDS["ppo"] | {"train.length": "2 steps"})
    run_training(config, tmp_path / "judge")
    config.models.reward = ConfigDict(dict(init_from=str(tmp_path / "judge"), model={}))
    experiment = build.build(config, jax.devices()[:1])
    experiment.others.update(weights.load_others(experiment))
    return experiment


def hidden_alone(experiment, ids):
    """A judge's model, and its hidden states of one text."""
    other = experiment.program.others["reward"]
    model = nnx.merge(other.graphdef, experiment.others["reward"])
    arrays = (np.array([ids]), np.arange(len(ids))[None], np.ones((1, len(ids)), int))
    return model, model(*(np.asarray(x, np.int32) for x in arrays)).hidden


@pytest.mark.usefixtures("fast_runs")
def test_a_reward_models_score_is_that_of_the_last_token(policy):
    """Whatever stands beside a text, and behind it."""
    judge = judges.RewardModel(policy, model="reward")
    texts = []
    for prompt, ids in [((256, 97), (98, 99, 257)), ((256,), (100,)), ((256, 5, 6), (7,) * 8)]:
        texts.append(rewards.Text("", prompt, ids, True))
    with jax.set_mesh(policy.program.mesh):
        got = judge([{}] * 3, texts, None)
        for text, score in zip(texts, got, strict=True):
            model, hidden = hidden_alone(policy, [*text.prompt_ids, *text.ids])
            wanted = model.head_outputs("scalar", hidden)[0, -1, 0]
            assert score == pytest.approx(float(wanted), abs=1e-5)
        assert judge([{}], texts[1:2], None) == [got[1]]


@pytest.mark.usefixtures("fast_runs")
def test_a_verbalizers_reward_is_the_labels_probability(policy, tmp_path):
    path = write_task(tmp_path / "task.toml", "{text}" + CORPUS.replace("\n", "\\n"))
    record = json.dumps(dict(text="x", label="red")) + "\n"
    for split in ("train", "test", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(record)

    make = functools.partial(judges.Verbalizer, policy, model="reward", task=path)
    texts = [rewards.Text(text, (256, 97), (*text.encode(), 257), True) for text in ("ab", "c", "")]
    labels = ["red", "blue", "nothing"]
    with jax.set_mesh(policy.program.mesh):
        got = make()([{"label": label} for label in labels], texts, None)
        for text, label, score in zip(texts[:2], labels, got):
            wanted = probabilities(policy, text.text + CORPUS)
            assert score == pytest.approx(wanted[label], abs=1e-5)
        assert got[2] is None

        # One label for all, the prompt before it, and corrected by a prior.
        (score,) = make(label="red", with_prompt=True)([{}], texts[:1], None)
        assert score == pytest.approx(probabilities(policy, "aab" + CORPUS)["red"], abs=1e-5)
        each = [
            make(label=label, prior="content_free")([{}], texts[:1], None) for label in VERBALIZER
        ]
        assert sum(score for (score,) in each) == pytest.approx(1)

    with pytest.raises(ValueError, match="label = 'pink'; it has .'red', 'green', 'blue'"):
        make(label="pink")
    with pytest.raises(ValueError, match="prior = 'batch'; wanted one of"):
        make(prior="batch")
    with pytest.raises(ValueError, match="asks config.models.other, which isn't there"):
        judges.Verbalizer(policy, model="other", task=path)


def probabilities(experiment, prompt):
    """Label -> its probability among the labels, by a forward pass for each label word."""
    tokenizer = experiment.tokenizer
    logprobs = {}
    for label, (word,) in VERBALIZER.items():
        before, ids = tokenizer.prompt(prompt), tokenizer.encode(word)
        model, hidden = hidden_alone(experiment, [*before, *ids])
        table = jax.nn.log_softmax(model.logits(hidden))[0]
        places = range(len(before) - 1, len(before) + len(ids) - 1)
        logprobs[label] = sum(float(table[place, i]) for place, i in zip(places, ids))
    total = np.logaddexp.reduce(list(logprobs.values()))
    return {label: float(np.exp(value - total)) for label, value in logprobs.items()}


def test_a_reward_needs_a_head(policy):
    other = policy.program.others["reward"]
    plain = other._replace(model_config=types.SimpleNamespace(heads="", context_length=99))
    policy.program.others["reward"] = plain
    with pytest.raises(ValueError, match="has the heads ''; a reward model has 'scalar'"):
        judges.RewardModel(policy, model="reward")
