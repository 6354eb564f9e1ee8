"""Reinforcement learning: advantages, the loss, what is drawn, and runs."""

import collections
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import rl
from lm import audit, build, checkpoint, stopping, train
from lm.decoding import batched
from lm.decoding.sampling import Sampling
from lm.evals import entries
from lm.objectives import policy
from lm.rl import advantages, rollouts
from tests.helpers import (
    assert_same_run,
    read_checkpoint,
    read_metrics,
    run_training,
    saved_steps,
    slow,
    terminate_at,
)

# --- advantages ---


def test_advantages_of_groups():
    rewards = np.array([[1.0, 0.0, 0.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    centred = np.array([0.25, -0.75, -0.75, 1.25])
    got = {name: advantages.of_groups(rewards, name) for name in advantages.OF_GROUPS}
    np.testing.assert_allclose(got["dr_grpo"][0], centred)
    np.testing.assert_allclose(got["grpo"][0], centred / (np.std(rewards[0], ddof=1) + 1e-4))
    # Of the first: 1 less the mean of 0, 0, 2.
    np.testing.assert_allclose(got["rloo"][0], [1 - 2 / 3, -1, -1, 2 - 1 / 3])
    for values in got.values():
        np.testing.assert_array_equal(values[1], 0)
    np.testing.assert_array_equal(advantages.is_dead(rewards), [False, True])


def test_equal_prompts_are_groups_of_their_own():
    """Rewards all 0 and all 1 say nothing, though the prompts are the same."""
    rewards = np.array([[0.0] * 4, [1.0] * 4])
    assert advantages.is_dead(rewards).all()
    assert not advantages.of_groups(rewards, "grpo").any()


def test_nothing_behind_a_text_gets_into_its_advantages():
    got, returns = advantages.generalized(
        np.array([[0.0, 1.0, 0.0]]), np.array([[0.0, 0.0, 100.0]]), [2], gamma=1.0, lam=0.95
    )
    np.testing.assert_allclose(got, [[0.95, 1.0, 0.0]])
    np.testing.assert_allclose(returns, [[0.95, 1.0, 0.0]])


def test_generalized_advantages():
    """By the definition, a sum over all later steps; with gamma = lambda = 1 they are R - V."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    lengths, gamma, lam = [6, 4, 1], 0.9, 0.7
    got, returns = advantages.generalized(rewards, values, lengths, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        v = [*values[row, :length], 0.0]
        for t in range(length):
            deltas = [rewards[row, k] + gamma * v[k + 1] - v[k] for k in range(t, length)]
            wanted = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas))
            assert got[row, t] == pytest.approx(wanted)
            assert returns[row, t] == pytest.approx(wanted + v[t])
        assert not got[row, length:].any()

    got, _ = advantages.generalized(rewards, values, lengths, gamma=1.0, lam=1.0)
    assert got[0, 0] == pytest.approx(rewards[0].sum() - values[0, 0])

    weights = np.arange(6)[None] < np.array(lengths)[:, None]
    whitened = advantages.whitened(got, weights)
    assert whitened[weights].mean() == pytest.approx(0, abs=1e-9)
    assert whitened[weights].std(ddof=1) == pytest.approx(1, abs=1e-6)


# --- the gradient ---

VOCAB, GROUP, NUM = 5, 4, 20_000


class Bandit:
    """A policy of texts of two tokens, each with logits of its own."""

    config = types.SimpleNamespace(bias="")

    def __init__(self, params):
        self._params = params

    def __call__(self, tokens_BT, positions_BT, segments_BT, keys_B=None):
        first_BV = jnp.broadcast_to(self._params["first"], (len(tokens_BT), VOCAB))
        second_BV = self._params["second"][tokens_BT[:, 1]]
        return types.SimpleNamespace(hidden=jnp.stack([first_BV, second_BV], axis=1), aux={})

    def logits(self, hidden_BTV):
        return hidden_BTV


@pytest.mark.parametrize("name", ["rloo", "dr_grpo", "ppo"])
def test_the_gradient_is_that_of_the_expected_reward(name):
    """Over all 25 texts, against the mean of 20,000 that are drawn."""
    rng = np.random.default_rng(1)
    params = dict(first=rng.normal(size=VOCAB), second=rng.normal(size=(VOCAB, VOCAB)))
    params = jax.tree.map(jnp.float32, params)
    reward_of = jnp.float32(rng.normal(size=(VOCAB, VOCAB)))

    def expected(params):
        first = jax.nn.softmax(params["first"])
        return jnp.sum(first[:, None] * jax.nn.softmax(params["second"], axis=1) * reward_of)

    first_key, second_key = jax.random.split(jax.random.key(0))
    first = jax.random.categorical(first_key, params["first"], shape=(NUM,))
    second = jax.random.categorical(second_key, params["second"][first])
    rewards = np.asarray(reward_of[first, second])
    scale = 1.0
    if name == "ppo":
        # Any values of what stands before a token may be taken off.
        values = np.stack([np.full(NUM, 0.3), np.asarray(first) / 5 - 0.4], axis=1)
        by_token = np.stack([np.zeros(NUM), rewards], axis=1)
        found, _ = advantages.generalized(by_token, values, [2] * NUM, gamma=1.0, lam=1.0)
    else:
        found = advantages.of_groups(rewards.reshape(-1, GROUP), name).reshape(-1, 1)
        found = np.broadcast_to(found, (NUM, 2))
        # A text is in the mean that is taken off its reward.
        scale = GROUP / (GROUP - 1) if name == "dr_grpo" else 1.0

    zeros = jnp.zeros(NUM, first.dtype)
    batch = dict(
        tokens=jnp.stack([zeros, first], axis=1),
        targets=jnp.stack([first, second], axis=1),
        advantages=jnp.float32(found),
        weights=jnp.ones((NUM, 2)),
        sampled_logprobs=jnp.zeros((NUM, 2)),
    )
    batch |= dict(positions=batch["tokens"], segments=batch["tokens"])
    loss = policy.make_loss(aggregate="sums", importance_cap=0.0)

    def estimate(params, group):
        total, count, _ = loss(Bandit(params), group, None)
        return -total / count * scale

    groups = jax.tree.map(lambda x: x.reshape(-1, GROUP, *x.shape[1:]), batch)
    grads = jax.jit(jax.vmap(jax.grad(estimate), (None, 0)))(params, groups)
    wanted = jax.grad(expected)(params)
    flat = np.concatenate([np.asarray(g).reshape(NUM // GROUP, -1) for g in grads.values()], axis=1)
    exact = np.concatenate([np.asarray(wanted[key]).reshape(-1) for key in grads])
    mean, error = flat.mean(axis=0), flat.std(axis=0, ddof=1) / len(flat) ** 0.5
    assert (np.abs(mean - exact) < 3 * error).all(), (mean - exact) / error
    assert mean @ exact / np.linalg.norm(mean) / np.linalg.norm(exact) > 0.99


def test_what_is_no_text_has_no_gradient():
    """However unlikely a prompt's tokens are: exponentials of their log-probabilities are
    infinite.
    """
    params = dict(first=jnp.float32([0, -200, 0, 0, 0]), second=jnp.zeros((VOCAB, VOCAB)))
    ones, zeros = jnp.ones((2, 2), jnp.int32), jnp.zeros((2, 2))
    batch = dict(tokens=ones, targets=ones, positions=ones, segments=ones)
    batch |= dict(weights=jnp.float32([[0, 1], [0, 0]]), advantages=zeros + 1)
    batch |= dict.fromkeys(("sampled_logprobs", "old_logprobs", "reference_logprobs"), zeros)
    options = dict(old="stored", reference="model", kl=0.1, aggregate="sequence_means")
    for estimator in ("k1", "k2", "k3"):
        loss = policy.make_loss(kl_estimator=estimator, **options)
        value, grads = jax.value_and_grad(lambda p: loss(Bandit(p), batch, None)[0])(params)  # noqa: B023
        assert np.isfinite(value) and np.abs(grads["second"]).max() > 0
        assert not np.asarray(grads["first"]).any()


# --- runs ---

PROMPTS = ["ab", "cde", "f", "gh ij", "k", "lmn", "op", "q r"]


def configure(tiny, folder, **changes):
    c = tiny.copy_and_resolve_references().unlock()
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    c.data.source = "lm.data.prompts.jsonl"
    c.data.source_args = ConfigDict(dict(path=str(path), held_out=0.0))
    c.data.loader = "lm.rl.rollouts.RolloutLoader"
    c.data.label_prompt = ""
    c.data.update(dict(length=16, batch_size=16, streams=1))
    c.model.num_layers = 1
    c.model.scan_unroll = 1
    c.model.param_dtype = "float32"
    c.rollout.update(dict(samples=4, max_new_tokens=8, advantage="grpo"))
    c.rewards.even = ConfigDict(dict(type="tests.toys.rewards.even", weight=1.0))
    c.objective = ConfigDict(dict(type="lm.objectives.policy"))
    c.objective.aggregate = "token_mean"
    c.objective.old = "present"
    c.objective.value_weight = 0.0
    c.objective.update(temperature=1.0, chunk=0, reference="none", kl=0.0, ratio="token", places=0)
    c.optimizer.learning_rate = 1e-2
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.optimizer.weight_decay = 0.0
    c.train.length = "6 steps"
    c.update_from_flattened_dict(changes)
    return c


def read_rollouts(run):
    return {path.name: path.read_text() for path in (run / "rollouts").iterdir()}


KINDS = {
    "grpo": {},
    "dr_grpo": {"rollout.advantage": "dr_grpo", "objective.aggregate": "sums"},
    "rloo": {"rollout.advantage": "rloo", "objective.aggregate": "sums"},
    "steps": {"objective.old": "stored", "rollout.steps": 2, "rollout.epochs": 1},
    "ppo": {
        "rollout.advantage": "gae",
        "rollout.samples": 1,
        "rollout.epochs": 2,
        "objective.old": "stored",
        "objective.value_weight": 0.1,
        "model.heads": "scalar",
    },
    "warm": {"objective.temperature": 1.5},
}


@pytest.mark.usefixtures("fast_runs")
@pytest.mark.parametrize(
    "kind", ["grpo", "ppo", "warm", slow("dr_grpo"), slow("rloo"), slow("steps")]
)
def test_a_policy_learns(tiny, tmp_path, kind):
    config = configure(tiny, tmp_path, **KINDS[kind] | {"train.length": "40 steps"})
    run_training(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    rewards = [line["train/reward"] for line in lines if "train/reward" in line]
    assert np.mean(rewards[:2]) < 0.7 and np.mean(rewards[-2:]) > 0.85, rewards

    # The trainer has the log-probabilities that the texts were drawn with.
    assert max(line["train/mismatch"] for line in lines) < 1e-4


@pytest.mark.usefixtures("fast_runs")
@pytest.mark.parametrize("kind", ["grpo", slow("ppo")])
def test_a_killed_run_writes_the_same_texts(tiny, tmp_path, monkeypatch, kind):
    """Killed in a rollout, an update or a save, or stopped in a step: all that it leaves is as of a
    run that wasn't.
    """
    config = configure(tiny, tmp_path, **KINDS[kind] | {"checkpoint.every": 2})
    run_training(config, tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(*unused):
        raise Killed

    places = {
        "rollout": (rollouts.RolloutLoader, "_add_advantages"),
        "files": (rollouts, "_terms"),
        "update": (train.Run, "read_metrics"),
        "save": (checkpoint.Checkpointer, "save"),
    }
    for run, (owner, name) in places.items():
        with monkeypatch.context() as patch:
            calls = []
            original = getattr(owner, name)

            def third(*args, calls=calls, original=original, **options):
                calls.append(0)
                return kill() if len(calls) == 3 else original(*args, **options)

            patch.setattr(owner, name, third)
            with pytest.raises(Killed):
                run_training(config, tmp_path / run)
        run_training(config, tmp_path / run)
        assert_same_run(tmp_path / run, tmp_path / "whole", 6)
        assert read_rollouts(tmp_path / run) == read_rollouts(tmp_path / "whole")

    with monkeypatch.context() as patch:
        terminate_at(patch, rollouts, "_terms", 2)
        with pytest.raises(stopping.Stopped):
            run_training(config, tmp_path / "stopped")
    run_training(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole", 6)
    assert read_rollouts(tmp_path / "stopped") == read_rollouts(tmp_path / "whole")


def test_a_rollouts_weights_are_whole(tiny, tmp_path):
    """But for the tensor axis."""
    config = configure(tiny, tmp_path)
    config.mesh.update(dict(fsdp=2, fsdp2=2, tensor=2))
    experiment = build.build(config, jax.devices()[:8])
    with jax.set_mesh(experiment.program.mesh):
        params = experiment.program.make_params(jax.random.key(0))
        gathered = rollouts.make_reshard(experiment.program)(params)
    axes = set()
    for leaf, whole in zip(jax.tree.leaves(params), jax.tree.leaves(gathered), strict=True):
        np.testing.assert_array_equal(leaf, whole)
        for entry in whole.sharding.spec:
            axes |= {entry} if isinstance(entry, str) else set(entry or ())
    assert axes == {"tensor"}


@pytest.mark.usefixtures("fast_runs")
@pytest.mark.parametrize("fsdp", ["partitioner", slow("by_hand")])
def test_any_mesh_draws_the_same_texts(tiny, tmp_path, fsdp):
    changes = {"objective.aggregate": "sequence_means", "objective.ratio": "sequence"}
    changes["objective.places"] = 8
    config = configure(tiny, tmp_path, **changes)
    run_training(config, tmp_path / "one")
    sizes = dict(data=2, fsdp=2, sequence=2) if fsdp == "by_hand" else dict(fsdp=4, tensor=2)
    config.mesh.update(sizes)
    config.train.fsdp = fsdp
    config.rollout.reshard = fsdp == "partitioner"
    run_training(config, tmp_path / "mesh", devices=8)

    wanted = read_rollouts(tmp_path / "one")
    for name, text in read_rollouts(tmp_path / "mesh").items():
        for line, other in zip(text.splitlines(), wanted[name].splitlines(), strict=True):
            line, other = json.loads(line), json.loads(other)
            assert line["ids"] == other["ids"]
            np.testing.assert_allclose(line["logprobs"], other["logprobs"], rtol=1e-4, atol=1e-4)
    lines, others = read_metrics(tmp_path / "mesh"), read_metrics(tmp_path / "one")
    for line, other in zip(lines, others, strict=True):
        assert line["train/loss"] == pytest.approx(other["train/loss"], abs=1e-5)
        assert line["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-3)


@pytest.mark.usefixtures("fast_runs")
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_logits_of_texts_alone_are_enough(tiny, tmp_path, kind):
    """The same texts, losses and gradients, for fewer FLOPs."""
    flops = []
    for places in (0, 8):
        run = tmp_path / f"places-{places}"
        config = configure(tiny, tmp_path, **KINDS[kind] | {"objective.places": places})
        run_training(config, run)
        flops.append(read_metrics(run)[-1]["train/flops"])
    assert flops[1] < flops[0]

    wanted, got = read_rollouts(tmp_path / "places-0"), read_rollouts(tmp_path / "places-8")
    assert wanted.keys() == got.keys()
    for name, text in got.items():
        for line, other in zip(text.splitlines(), wanted[name].splitlines(), strict=True):
            assert json.loads(line)["ids"] == json.loads(other)["ids"]
    lines, others = read_metrics(tmp_path / "places-8"), read_metrics(tmp_path / "places-0")
    for line, other in zip(lines, others, strict=True):
        for key in ("loss", "grad_norm", "mismatch"):
            assert line[f"train/{key}"] == pytest.approx(other[f"train/{key}"], rel=1e-3, abs=1e-5)


def test_microbatches_are_the_whole(tiny, tmp_path):
    for aggregate in ("sequence_means", "sums"):
        losses = []
        for accumulation in (1, 4):
            run = tmp_path / f"{aggregate}-{accumulation}"
            changes = {"objective.aggregate": aggregate, "train.accumulation": accumulation}
            run_training(configure(tiny, tmp_path, **changes), run)
            losses.append([(x["train/loss"], x["train/grad_norm"]) for x in read_metrics(run)])
        np.testing.assert_allclose(*losses, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("fast_runs")
def test_the_divergence_is_from_the_reference(tiny, tmp_path):
    """0 from itself; by itself, as all there is of the reward, it brings the policy back."""
    away = configure(tiny, tmp_path, **{"train.length": "30 steps"})
    run_training(away, tmp_path / "away")
    config = configure(
        tiny,
        tmp_path,
        **{
            "init_from": str(tmp_path / "away"),
            "objective.reference": "model",
            "objective.kl": 0.1,
            "train.length": "2 steps",
        },
    )
    config.models.reference = ConfigDict(dict(init_from=str(tmp_path / "away"), model={}))
    run_training(config, tmp_path / "itself")
    first = read_metrics(tmp_path / "itself")[0]
    assert abs(first["train/kl"]) < 1e-6 and abs(first["train/kl_of_text"]) < 1e-4

    run_training(configure(tiny, tmp_path, **{"train.length": "1 steps"}), tmp_path / "begun")
    config.models.reference.init_from = str(tmp_path / "begun")
    config.rewards.even.type = "tests.toys.rewards.constant"
    config.update_from_flattened_dict(
        {
            "objective.kl": 0.0,
            "rollout.kl": 1.0,
            "rollout.patience": 100,
            "rollout.advantage": "rloo",
            "train.length": "30 steps",
        }
    )
    run_training(config, tmp_path / "back")
    nats = [line["train/kl_of_text"] for line in read_metrics(tmp_path / "back")]
    assert np.mean(nats[-3:]) < np.mean(nats[:3]) / 2, nats


@pytest.mark.usefixtures("fast_runs")
def test_the_base_without_adapters_is_a_reference(tiny, tmp_path):
    run_training(configure(tiny, tmp_path, **{"train.length": "2 steps"}), tmp_path / "base")
    config = configure(
        tiny,
        tmp_path,
        **{
            "init_from": str(tmp_path / "base"),
            "model.lora_rank": 4,
            "objective.reference": "base",
            "objective.kl": 0.1,
            "optimizer.learning_rate": 0.1,
        },
    )
    run_training(config, tmp_path / "run")
    kl = [line["train/kl"] for line in read_metrics(tmp_path / "run")]
    assert abs(kl[0]) < 1e-6 and kl[-1] > 1e-3, kl


def evaluated(run):
    """The one loss on texts that a run has found."""
    (line,) = [line for line in read_metrics(run) if "eval/text/loss" in line]
    return line["eval/text/loss"]


@pytest.mark.usefixtures("fast_runs")
def test_what_is_watched_beside_the_prompts(tiny, tmp_path):
    """Where nothing is learnt, the loss on the base's texts is the base's own, and samples are
    those of the reference that stand beside them.
    """
    base = configure(tiny, tmp_path)
    base.data = tiny.data
    base.data.length = 16
    base.objective = CAUSAL
    base.evals.text = entries.perplexity(every=0)
    base.train.length = "2 steps"
    run_training(base, tmp_path / "base")
    wanted = evaluated(tmp_path / "base")

    config = configure(tiny, tmp_path, **{"init_from": str(tmp_path / "base")})
    config.models.reference = ConfigDict(dict(init_from=str(tmp_path / "base"), model={}))
    config.rewards.even.type = "tests.toys.rewards.constant"
    config.train.length = "2 steps"
    texts = dict(source=tiny.data.source, source_args=tiny.data.source_args.to_dict())
    config.evals.text = entries.perplexity(every=0, **texts)
    config.evals.samples = entries.samples(("ab",), every=0, beside="reference", max_new_tokens=4)
    run_training(config, tmp_path / "run")
    assert evaluated(tmp_path / "run") == wanted
    samples = (tmp_path / "run/samples.md").read_text()
    _, reference, policy_text = re.split("by reference:|by the model:", samples)
    assert reference.strip() == policy_text.strip() and "ab⟫" in reference

    config.evals.samples.beside = "base"
    with pytest.raises(ValueError, match="beside = 'base'; config.models has .'reference'"):
        run_training(config, tmp_path / "other")
    config.evals = dict(text=entries.perplexity(every=0, split="train"))
    with pytest.raises(
        ValueError, match="and config.data.source has examples of the kind 'prompt'"
    ):
        run_training(config, tmp_path / "other")


@pytest.mark.usefixtures("fast_runs")
def test_beginnings_of_texts_are_prompts(tiny, tmp_path):
    config = configure(tiny, tmp_path, **{"rollout.prompt_tokens": 5, "train.length": "2 steps"})
    lengths = [3, 5, 6, 7, 9]
    lines = [{"text": "abcdefghij"[:n], "label": str(n)} for n in lengths]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.data.source = "lm.data.sources.jsonl"
    config.data.source_args = ConfigDict(dict(path=str(path), held_out=0.0, label_key="label"))
    experiment = build.build(config, jax.devices()[:1])
    prompts = list(experiment.train_documents)
    # A text that ends within them leaves nothing to be written.
    assert [prompt.record["label"] for prompt in prompts] == ["6", "7", "9"]
    assert {prompt.ids for prompt in prompts} == {(256, *b"abcde")}
    run_training(config, tmp_path / "run")

    config.rollout.prompt_tokens = 8
    with pytest.raises(ValueError, match="prompt_tokens = 8, with 1 before .* = 8"):
        build.build(config, jax.devices()[:1])
    config.rollout.prompt_tokens = 0
    with pytest.raises(ValueError, match="kind 'text'; config.rollout.prompt_tokens makes"):
        build.build(config, jax.devices()[:1])


# --- what is drawn ---


@pytest.mark.usefixtures("fast_runs")
def test_what_is_learnt_is_what_was_drawn(tiny, tmp_path):
    """The ids themselves, not those of the decoded text: most of these bytes are no characters."""
    config = configure(tiny, tmp_path)
    experiment = build.build(config, jax.devices()[:1])
    loader = rollouts.RolloutLoader(experiment)
    with jax.set_mesh(experiment.program.mesh):
        batch, _ = loader.next(experiment.program.make_params(jax.random.key(0)))
    (shown,) = loader.report()[1].values()
    for number, line in enumerate(map(json.loads, shown.splitlines())):
        row = {name: np.asarray(array[number]) for name, array in batch.items()}
        written = row["weights"] > 0
        assert row["targets"][written].tolist() == line["ids"]
        logprobs = row["sampled_logprobs"][written]
        np.testing.assert_array_equal(logprobs, np.float32(line["logprobs"]))


def make_generator(config):
    e = build.build(config, jax.devices()[:1])
    params = e.program.make_params(jax.random.key(0))
    # Tokens with probabilities far apart.
    params = jax.tree.map(lambda x: x * 4, params)
    return e.eval_fns().make_generator(params, Sampling(temperature=1.0))


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_texts_depend_on_neither_slots_nor_neighbours(tiny, tmp_path, positions):
    generator = make_generator(configure(tiny, tmp_path, **{"model.positions": positions}))
    prompts = [[256, *text.encode()] for text in PROMPTS]
    options = dict(samples=2, max_new_tokens=8, temperature=1.0, key=jax.random.key(3))
    wanted = batched.draw(generator, prompts, slots=16, **options)
    assert len({tuple(text.ids) for texts in wanted for text in texts}) > 8
    assert {text.has_ended for texts in wanted for text in texts} == {False, True}

    for slots in (2, 6):
        got = batched.draw(generator, prompts, slots=slots, **options)
        for texts, others in zip(got, wanted, strict=True):
            for text, other in zip(texts, others, strict=True):
                assert text.ids == other.ids and text.has_ended == other.has_ended
                np.testing.assert_allclose(text.logprobs, other.logprobs, atol=1e-4)

    # Another key draws others; so does the same prompt at another place.
    others = batched.draw(generator, prompts, slots=16, **options | dict(key=jax.random.key(4)))
    assert others != wanted
    twice = batched.draw(generator, [prompts[0]] * 2, slots=4, **options)
    assert twice[0] != twice[1]


@pytest.mark.usefixtures("fast_runs")
def test_a_frozen_policy_writes_other_texts_each_time(tiny, tmp_path):
    """Of the same prompt too; and the trainer gives them the sampler's log-probabilities."""
    frozen = {"objective.temperature": 0.7, "optimizer.learning_rate": 1e-12}
    config = configure(tiny, tmp_path, **frozen)
    run_training(config, tmp_path / "run")
    texts = collections.defaultdict(list)
    for text in read_rollouts(tmp_path / "run").values():
        for line in map(json.loads, text.splitlines()):
            texts[line["prompt"]].append(tuple(line["ids"]))
    assert len(texts) == len(PROMPTS) and {len(x) for x in texts.values()} == {12}  # 3 epochs
    # Of 12 texts of up to 8 of 258 tokens, none should come twice.
    assert all(len(set(x)) == 12 for x in texts.values())
    assert max(x["train/mismatch"] for x in read_metrics(tmp_path / "run")) < 1e-5


@pytest.mark.usefixtures("fast_runs")
def test_the_schedule_counts_updates(tiny, tmp_path):
    """Not rollouts, of which each serves four: the last update has the last learning rate."""
    changes = KINDS["steps"] | {"rollout.epochs": 2, "train.length": "8 steps"}
    changes |= {"optimizer.schedule": "linear", "optimizer.final_learning_rate": 1e-4}
    run_training(configure(tiny, tmp_path, **changes), tmp_path / "run")
    rates = [line["train/learning_rate"] for line in read_metrics(tmp_path / "run")]
    assert len(rates) == 8 and rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1e-2) and rates[-1] < 2e-3
    assert sorted(read_rollouts(tmp_path / "run")) == ["0.jsonl", "4.jsonl"]


# --- what gives nothing to learn ---


@pytest.mark.usefixtures("fast_runs")
def test_without_signal_nothing_moves_and_the_run_stops(tiny, tmp_path):
    config = configure(tiny, tmp_path, **{"optimizer.weight_decay": 0.1, "rollout.patience": 3})
    config.rewards.even.type = "tests.toys.rewards.constant"
    with pytest.raises(rollouts.NoSignal, match="in 3 rollouts in a row .* the means are"):
        run_training(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [line["train/texts_learnt"] for line in lines] == [0, 0]
    # The steps before are saved, as they began.
    assert saved_steps(tmp_path / "run") == [2]
    first = build.build(config, jax.devices()[:1]).program.make_params(jax.random.key(config.seed))
    state, _ = read_checkpoint(tmp_path / "run", 2)
    begun = {np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(first)}
    for path, (_, shape, data) in state.items():
        # The parameters as they were drawn, and moments that are 0.
        assert shape == () or data in begun or not any(data), path


@pytest.mark.usefixtures("fast_runs")
def test_a_rollout_can_be_looked_at_beforehand(tiny, tmp_path):
    """By --mode=audit, with the weights that the run begins with."""
    run_training(configure(tiny, tmp_path, **{"train.length": "2 steps"}), tmp_path / "base")
    config = configure(tiny, tmp_path, **{"init_from": str(tmp_path / "base")})
    text = audit.audit(config, epath.Path(tmp_path / "audit"), jax.devices()[:1], 2)
    assert "learnt" in text and "rows" in text


def test_evals_fall_between_rollouts():
    for size in rl.SIZES:
        c = rl.get_config(size)
        for entry in c.evals.values():
            assert entry.every % (c.rollout.steps * c.rollout.epochs) == 0, size
        assert c.data.batch_size * c.rollout.steps % c.rollout.samples == 0
    with pytest.raises(ValueError, match="wanted SIZE,BASE,PROMPTS,REWARD"):
        rl.get_config("grpo,a,b,c,d")


def test_what_is_rewarded():
    """A reward model's score, beside the rule that it learnt, which is watched."""
    weights = {}
    for argument in ("grpo", "ppo,,docstring_commands", "ppo,,docstring_commands,JUDGE"):
        rewards = rl.get_config(argument).rewards
        weights[argument] = {entry.type: entry.weight for entry in rewards.values()}
    pattern = "lm.rl.rewards.pattern"
    assert list(weights.values()) == [
        {"lm.rl.rewards.exact": 1},
        {pattern: 1},
        {pattern: 0, "lm.rl.judges.RewardModel": 1},
    ]
    c = rl.get_config("verbalizer,BASE,,JUDGE")
    assert c.models.judge.init_from == "JUDGE" and c.models.reference.init_from == "BASE"
    # One way: the places follow the length, and not the length the places.
    c.rollout.max_new_tokens = 17
    assert c.objective.places == 17
    c.objective.places = 0
    assert c.rollout.max_new_tokens == 17

    assert rl.get_config("grpo,,questions/*.jsonl.gz").data.source == "lm.data.prompts.jsonl"
    assert re.search(rl.COMMAND, " Return x.") and not re.search(rl.COMMAND, "Returns x.")


@pytest.mark.usefixtures("fast_runs")
def test_what_a_reward_cannot_tell_is_left_out(tiny, tmp_path):
    config = configure(tiny, tmp_path)
    lines = [{"prompt": text, "bad": i < 6} for i, text in enumerate(PROMPTS)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.rewards.even = ConfigDict(
        dict(type="tests.toys.rewards.nothing_of", weight=1.0, key="bad")
    )
    # What weighs nothing leaves nothing out.
    watched = dict(type="tests.toys.rewards.nothing_of", weight=0.0, key="prompt")
    config.rewards.watched = ConfigDict(watched)
    config.train.length = "2 steps"
    run_training(config, tmp_path / "run")
    shares = [line["train/texts_unscored"] for line in read_metrics(tmp_path / "run")]
    assert np.mean(shares) == 0.75  # of an epoch
    for text in read_rollouts(tmp_path / "run").values():
        for line in map(json.loads, text.splitlines()):
            is_bad = int(line["prompt"].rpartition(":")[2]) <= 6
            assert (line["rewards"]["even"] is None) == is_bad
            assert not (is_bad and line["is_learnt"])


@pytest.mark.usefixtures("fast_runs")
def test_texts_at_the_limit_can_be_left_out(tiny, tmp_path):
    config = configure(tiny, tmp_path, **{"rollout.overlong": "leave_out"})
    run_training(config, tmp_path / "run")
    left_out = 0
    for text in read_rollouts(tmp_path / "run").values():
        lines = [json.loads(line) for line in text.splitlines()]
        for start in range(0, len(lines), 4):
            # They are among those that the others of their prompt are compared with.
            group = lines[start : start + 4]
            earned = np.array([[line["rewards"]["even"] for line in group]])
            (wanted,) = advantages.of_groups(earned, "grpo")
            for line, advantage in zip(group, wanted):
                assert line["advantage"] == pytest.approx(advantage, rel=1e-5)
                assert line["has_ended"] or not line["is_learnt"]
                left_out += not line["has_ended"]
    assert left_out > 10


CAUSAL = ConfigDict(dict(type="lm.objectives.causal", z_loss=0.0, balance_loss=0.0, chunk=0))


@pytest.mark.usefixtures("fast_runs")
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rewards.even.type": "tests.toys.rewards.broken"}, "missing a required argument: 'how'"),
        ({"rewards.even.type": "tests.toys.rewards.none"}, "rewards.even.type = .* can't be"),
        ({"rewards.even.weight": 0.0}, "rewards has no entry with a weight, of .'even'"),
        ({"objective": CAUSAL}, "takes text or conversation"),
        ({"objective.aggregate": "mean"}, r"aggregate = 'mean'; valid: \['sequence_means'"),
        ({"objective.temperature": 0.0}, "temperature = 0.0; wanted a number above 0"),
        ({"rollout.samples": 3}, "rollout.samples = 3 must divide"),
        ({"rollout.samples": 1}, "samples = 1: 'grpo' compares a prompt's texts"),
        ({"rollout.slots": 2}, "rollout.slots = 2: a prompt's 4 texts are decoded together"),
        ({"objective.reference": "model"}, "'model' needs config.models.reference"),
        ({"objective.chunk": 8, "objective.temperature": 0.5}, "wanted config.objective.chunk = 0"),
        ({"objective.places": 5}, "places = 5: a text has up to .*max_new_tokens = 8; wanted that"),
        ({"objective.places": 8, "objective.chunk": 16}, "chunk = 16 must divide .*places = 8"),
        ({"rollout.steps": 2}, "wanted config.objective.old = 'stored'"),
        ({"rollout.advantage": "gae"}, "'gae' needs a critic"),
        ({"objective.value_weight": 0.1}, "wanted config.model.heads = 'scalar'"),
        ({"rollout.kl": 0.1}, "rollout.kl = 0.1 needs config.objective.reference"),
        ({"rollout.max_new_tokens": 15}, "no prompt is left: .*longer than config.data.length"),
        ({"model.dropout": 0.1}, "config.model.dropout = 0.1"),
        ({"data.loader": ""}, "wanted config.data.loader"),
        ({"train.length": "1 epochs"}, "rollouts have no epochs"),
    ],
)
def test_what_cannot_work(tiny, tmp_path, changes, message):
    objective = changes.get("objective")
    config = configure(tiny, tmp_path, **{} if objective else changes)
    config.objective = objective or config.objective
    with pytest.raises(ValueError, match=message):
        run_training(config, tmp_path / "run")


@pytest.mark.usefixtures("fast_runs")
@pytest.mark.parametrize(
    "how, error, message",
    [
        ("nan", ValueError, r"the reward 'even' .* gave nan for the text"),
        ("few", ValueError, r"the reward 'even' .* gave 1 scores of 16 texts"),
        ("dies", RuntimeError, "this reward is broken"),
    ],
)
def test_broken_rewards(tiny, tmp_path, how, error, message):
    config = configure(tiny, tmp_path)
    config.rewards.even = ConfigDict(dict(type="tests.toys.rewards.broken", weight=1.0, how=how))
    with pytest.raises(error, match=message):
        run_training(config, tmp_path / "run")
