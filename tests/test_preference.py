"""Preferences and rewards: what their losses are of a batch, on every mesh, and packed in any way.
What they teach is tested in test_tuning.py.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from lm import build, collectives, sharding, step, trained
from lm import config as config_lib
from lm.data import batch as batch_contract
from lm.data import chat, conversations, pack, units
from lm.data.tokenizer import ByteTokenizer
from lm.nn.layers import VocabHead
from lm.nn.loss import chunked_logprobs
from lm.objectives import preference, preference_losses, reward
from tests.helpers import assert_trees_close, model_config, random_model, slow
from tests.toys import every_loss

LENGTH, ROWS = 64, 16  # of a batch
# (mesh, who writes the collectives, microbatches)
EXECUTIONS = {
    "accumulated": ({}, "partitioner", 4),
    "by hand": (dict(data=2, fsdp=2, sequence=2), "by_hand", 1),
    "by hand, accumulated": (dict(fsdp=2, fsdp2=2, sequence=2), "by_hand", 2),
    "by the partitioner": (dict(fsdp=2, tensor=2, sequence=2), "partitioner", 2),
}


# --- batches ---


@functools.cache
def encoded(kind="pair", *, swapped=False, count=12):
    """Units of random prompts and answers, of many lengths."""
    rng = np.random.default_rng(3)

    def text(most):
        return "".join(rng.choice(list("abcdefgh"), rng.integers(1, most)))

    examples = []
    for number in range(count):
        prompt = dict(role="user", content=text(9))
        answers = [text(7), text(7) + "z"]
        sides = [[prompt, dict(role="assistant", content=answer)] for answer in answers]
        sign = -1.0 if swapped else 1.0
        if kind == "pair":
            value, sides = 0.25 * number, sides[::-1] if swapped else sides
        else:
            value, sides = sign * (-1.0) ** (number // 2), sides[:1]
        example = conversations.Example(tuple(sides), kind, value, None, f"{number}", "")
        examples.append(example)
    how = dict(learnt="answers", too_long="drop", length=LENGTH, seed=0)
    tokenizer = chat.with_template(ByteTokenizer(), "plain")
    return units.encode(conversations.as_documents(examples), tokenizer, **how)


def rows_of(some_units, length=LENGTH):
    """Units packed into rows."""
    windows = [unit.arrays for unit in some_units]
    return pack.evaluation_rows(windows, length, pack.UnitLayout(2))


def batch_of(rows, size=ROWS):
    """A batch of rows, and of padding behind them."""
    padding = batch_contract.empty_row(len(rows[0]["tokens"]), pack.UnitLayout.arrays)
    rows = [*rows, *[padding] * (size - len(rows))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def packed_batch(kind="pair", **changes):
    """Several units in a row, and rows of padding."""
    batch = batch_of(rows_of(encoded(kind, **changes)))
    assert batch["segments"].max() > 3 and not batch["segments"][-1].any()
    return batch


def apart_batch(kind="pair"):
    """Each unit in a row of its own, in another order."""
    rows = []
    for unit in [*encoded(kind)][::-1]:
        rows += rows_of([unit])
    return batch_of(rows)


# --- programs ---


def words_config(objective, mesh=(), fsdp="partitioner", accumulation=1):
    """The configuration of a model without attention, with an adapter and a head."""
    c = config_lib.default()
    c.tokenizer.kind = "bytes"
    c.model = ConfigDict(dict(type="tests.toys.words", vocab_size=0, compute_dtype=""))
    c.model.update(dict(lora_rank=2, heads="scalar"))
    c.data.update(dict(length=LENGTH, batch_size=ROWS, streams=4))
    c.objective = ConfigDict(objective)
    c.init_from = "nowhere"  # parameters are drawn here
    is_reward = "reward" in objective["type"] or "every" in objective["type"]
    c.train.trained = "*_lora_?,heads/*" if is_reward else "*_lora_?"
    c.optimizer.update(dict(learning_rate=0.01, warmup_steps=0, eps=1e-3, schedule="constant"))
    c.train.update(dict(length="6 steps", fsdp=fsdp, accumulation=accumulation))
    c.mesh.update(dict(fsdp=1) | dict(mesh))
    return c


def drawn_params(abstract):
    """Parameters in which adapters and the head have an effect, and KTO's z0 is above 0."""
    rng = np.random.default_rng(17)

    def draw(leaf):
        return jnp.asarray(rng.normal(0, 0.4, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, abstract)


class Steps:
    """The train step of a configuration, from drawn parameters."""

    def __init__(self, config):
        devices = math.prod(config.mesh.to_dict().values())
        self._program = build.program(config, jax.devices()[:devices], 258, 6)

    def __call__(self, *batches):
        """(trained parameters, metrics of each step) after steps on batches."""
        p = self._program
        layouts = jax.tree.map(lambda leaf: leaf.sharding, p.abstract_params)
        with jax.set_mesh(p.mesh):
            params = jax.device_put(drawn_params(p.abstract_params), layouts)
            params, frozen = trained.split(params, p.is_trained)
            state = p.init_state(params)
            fixed = p.abstract_fixed._replace(frozen=frozen)
            lines = []
            for batch in batches:
                arrays = {name: batch[name] for name in p.objective.arrays}
                arrays = jax.device_put(arrays, p.batch_shardings())
                state, metrics = p.train_step(state, arrays, fixed)
                lines.append(jax.device_get(metrics))
            return jax.device_get(state.params), lines


EVERY_LOSS = dict(type="tests.toys.every_loss")


@functools.cache
def one_device():
    """The steps of all losses at once, on one device."""
    return Steps(words_config(EVERY_LOSS))


def means(metrics):
    """name -> mean of the terms of a step."""
    pairs = {name: pair for name, pair in metrics.items() if isinstance(pair, tuple)}
    return {name: float(total) / float(count) for name, (total, count) in pairs.items()}


def assert_same_steps(got, wanted, rtol):
    """The same parameters, and the same terms in each step."""
    params, lines = got
    wanted_params, wanted_lines = wanted
    assert_trees_close(params, wanted_params, rtol=rtol, atol=rtol)
    for line, wanted_line in zip(lines, wanted_lines, strict=True):
        line, wanted_line = means(line), means(wanted_line)
        assert line == pytest.approx(wanted_line, rel=10 * rtol, abs=10 * rtol)


# --- losses as their papers have them ---


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


class Parts:
    """What the model of tests/toys/words.py says of the parts of units, each by itself, in f64."""

    def __init__(self, params, some_units):
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        table, up = params["embed"]["table"], params["up"]
        adapted = up + 2.0 * params["up_lora_a"] @ params["up_lora_b"]  # alpha / r is 4 / 2
        self.logprobs, self.references, self.scores, self.tokens = [], [], [], []
        for unit in some_units:
            arrays = unit.arrays
            x = table[arrays["tokens"]] * (1 + arrays["positions"] / 10)[:, None]
            hidden = np.tanh(x @ adapted)
            of_targets = np.arange(len(x)), arrays["targets"]
            logprobs = log_softmax(hidden @ table.T)[of_targets]
            references = log_softmax(np.tanh(x @ up) @ table.T)[of_targets]
            scores = hidden @ params["heads"]["scalar"]["weight"][:, 0]
            for part in (0, 1):
                is_part = arrays["part"] == part
                is_learnt = is_part & (arrays["weights"] > 0)
                self.logprobs.append(logprobs[is_learnt].sum())
                self.references.append(references[is_learnt].sum())
                self.scores.append(scores[is_part][-1])
                self.tokens.append(is_learnt.sum())
        self.values = np.array([unit.arrays["values"][0] for unit in some_units], np.float64)

    def z0(self):
        gains = np.array(self.logprobs) - self.references
        return max(gains[1::2].mean(), 0)

    def losses(self, z0=None):
        """name -> the mean loss, with the arguments of tests/toys/every_loss.py."""
        logprobs, references = np.array(self.logprobs), np.array(self.references)
        gains, by_token = logprobs - references, logprobs / self.tokens
        gain = gains[::2] - gains[1::2]
        odds = np.exp(by_token) / (1 - np.exp(by_token))
        right, wrong = -np.log(sigmoid(0.1 * gain)), -np.log(sigmoid(-0.1 * gain))
        gains_by_token = gains / self.tokens
        difference_by_token = by_token[::2] - by_token[1::2]

        z0 = self.z0() if z0 is None else z0
        good = 1.5 * (1 - sigmoid(0.3 * (gains[::2] - z0)))
        bad = 0.5 * (1 - sigmoid(0.3 * (z0 - gains[::2])))
        chosen, rejected = np.array(self.scores[::2]), np.array(self.scores[1::2])
        losses = {
            "dpo": 0.9 * right + 0.1 * wrong,
            "robust": (0.8 * right - 0.2 * wrong) / 0.6,
            "hinge": np.maximum(0, 1 - 0.1 * gain),
            "ipo": (gains_by_token[::2] - gains_by_token[1::2] - 1) ** 2,
            "orpo": -by_token[::2] - 0.1 * np.log(sigmoid(np.log(odds[::2] / odds[1::2]))),
            "simpo": -np.log(sigmoid(2 * difference_by_token - 0.5)),
            "kto": np.where(self.values > 0, good, bad),
            "reward": -np.log(sigmoid(chosen - rejected - self.values))
            + 0.005 * (chosen + rejected) ** 2,
        }
        return {name: value.mean() for name, value in losses.items()}


@functools.cache
def gradients():
    """A function (parameters, batch) -> name of a loss -> f32 gradient of its mean."""
    program = one_device()._program
    prepare, names = every_loss.make_prepare(), every_loss.NAMES
    losses = {name: every_loss.make_one_loss(name) for name in names}
    loss_fns = step.LossFns(losses["kto"], prepare)
    of_kto = step.make_mean_gradient(program.graphdef, loss_fns, accumulation=1, wrap_gradient=None)

    @jax.jit
    def compute(params, batch):
        trained_params, frozen = trained.split(params, program.is_trained)
        batch = batch | prepare(batch, nnx.merge(program.graphdef, params))

        def means_of(trained_params):
            model = nnx.merge(program.graphdef, trained.merge(trained_params, frozen))
            once, values = every_loss.Once(model), []
            for loss in losses.values():
                total, count, _ = loss(once, batch, None)
                values.append(total / count)
            return jnp.stack(values)

        grads = jax.jacrev(means_of)(trained_params)
        by_name = {}
        for i, name in enumerate(names):
            by_name[name] = jax.tree.map(lambda g, i=i: g[i], grads)
        # As a step computes it: what is prepared has no gradient.
        fixed = step.Fixed(frozen, {})
        by_name["kto"] = of_kto(trained_params, batch, jax.random.key(0), fixed)[0]
        return by_name

    return compute


@pytest.mark.parametrize("kind", ["pair", "judged"])
def test_losses_are_those_of_the_papers(kind):
    """Their values, and their gradients along a direction; KTO's without that of z0."""
    batch, some_units = packed_batch(kind), encoded(kind)
    params = drawn_params(one_device()._program.abstract_params)
    _, (line,) = one_device()(batch)
    found = means(line)
    parts = Parts(params, some_units)
    for name, value in parts.losses().items():
        assert found[f"{name}/loss"] == pytest.approx(value, rel=1e-4), name
    assert found["kto/z0"] == pytest.approx(parts.z0(), rel=1e-4)
    assert parts.z0() > 0.1  # or else nothing of it is seen

    direction = drawn_params(jax.tree.map(lambda x: x.T, params))
    direction = jax.tree.map(lambda d, x: d.T * np.float32(1e-4), direction, params)
    is_trained = one_device()._program.is_trained
    direction, _ = trained.split(direction, is_trained)
    _, frozen = trained.split(params, is_trained)

    def moved(sign):
        start, _ = trained.split(params, is_trained)
        there = jax.tree.map(
            lambda x, d: np.asarray(x, np.float64) + sign * np.asarray(d, np.float64),
            start,
            direction,
        )
        return Parts(trained.merge(there, frozen), some_units).losses(z0=parts.z0())

    forward, backward = moved(1), moved(-1)
    for name, grads in gradients()(params, batch).items():
        products = jax.tree.map(lambda g, d: np.vdot(g, d), grads, direction)
        slope = sum(map(float, jax.tree.leaves(products)))
        assert slope == pytest.approx((forward[name] - backward[name]) / 2, rel=2e-3), name


@pytest.mark.parametrize(
    "execution",
    ["accumulated", "by hand", slow("by the partitioner"), slow("by hand, accumulated")],
)
def test_losses_are_the_same_on_every_mesh(execution):
    """11: with accumulation too; and where the sequence axis is manual."""
    mesh, fsdp, accumulation = EXECUTIONS[execution]
    batches = [packed_batch(), packed_batch("judged")]
    chunk = 8 if execution == "by hand" else 0
    got = Steps(words_config(EVERY_LOSS | dict(chunk=chunk), mesh, fsdp, accumulation))(*batches)
    assert_same_steps(got, one_device()(*batches), 1e-5 if mesh else 1e-6)


REAL = {name: dict(type="lm.objectives.preference", loss=name) for name in every_loss.NAMES}
REAL["reward"] = dict(type="lm.objectives.reward")


@pytest.mark.slow
@pytest.mark.parametrize("name", every_loss.NAMES)
def test_each_loss_by_itself(name):
    """11: as it is configured."""
    objective = REAL[name] | every_loss.ARGUMENTS.get(name, {})
    if name != "reward":
        none = name in preference_losses.WITHOUT_REFERENCE
        objective["reference"] = "none" if none else "base"
    batch = packed_batch("judged" if name == "kto" else "pair")
    wanted = Steps(words_config(objective))(batch, batch)
    execution = EXECUTIONS["by hand, accumulated"]
    assert_same_steps(Steps(words_config(objective, *execution))(batch, batch), wanted, 1e-5)
    together = means(one_device()(batch)[1][0])
    assert means(wanted[1][0])["loss"] == pytest.approx(together[f"{name}/loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["pair", "judged"])
def test_packing_changes_nothing(kind):
    """Rows of their own, another order, rows of padding."""
    packed, apart = packed_batch(kind), apart_batch(kind)
    assert (packed["segments"].max(axis=1) > 2).any() and apart["segments"].max() == 2
    assert_same_steps(one_device()(apart, apart), one_device()(packed, packed), 1e-6)


@pytest.mark.slow
def test_longer_rows_change_nothing():
    """More units in a row, and other shapes."""
    program = one_device()._program
    params = drawn_params(program.abstract_params)

    @jax.jit
    def terms(params, batch):
        model = nnx.merge(program.graphdef, params)
        batch = batch | every_loss.make_prepare()(batch, model)
        return every_loss.make_loss()(model, batch, None)[2]

    longer = batch_of(rows_of(encoded(), 2 * LENGTH), ROWS // 2)
    wanted = means(one_device()(packed_batch())[1][0])
    assert means(terms(params, longer)) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_swapped_labels_are_learnt_the_other_way():
    """A small step takes the answers that are better without a swap up, and with one down."""
    program = one_device()._program
    start = drawn_params(program.abstract_params)
    start_params, frozen = trained.split(start, program.is_trained)

    def margin(params, kind):
        """How much likelier the better answers are."""
        parts = Parts(params, encoded(kind))
        logprobs = np.array(parts.logprobs)
        if kind == "judged":
            return (parts.values * logprobs[::2]).mean()
        return (logprobs[::2] - logprobs[1::2]).mean()

    for kind, sign in (("pair", 1), ("pair", -1), ("judged", 1), ("judged", -1)):
        by_name = gradients()(start, packed_batch(kind, swapped=sign < 0))
        for name in ["kto"] if kind == "judged" else preference_losses.LOSSES:
            params = jax.tree.map(
                lambda x, g: x - np.float32(0.01) * g, start_params, by_name[name]
            )
            change = margin(trained.merge(params, frozen), kind) - margin(start, kind)
            assert sign * change > 1e-4, (name, sign)


# --- parts ---


def test_chunks_are_the_whole():
    """Log-probabilities and their gradients, with another weight for each."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(0, 1, (4, 16, 16)).astype(np.float32)
    table = rng.normal(0, 1, (40, 16)).astype(np.float32)
    targets = rng.integers(0, 40, (4, 16)).astype(np.int32)
    factors = rng.normal(0, 1, (4, 16)).astype(np.float32)

    def plain(hidden, table):
        logits = jnp.einsum("btd,vd->btv", hidden, table, precision="highest")
        log_z = jax.nn.logsumexp(logits, axis=-1)
        logprobs = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_z
        return jnp.sum(logprobs * factors), (logprobs, log_z)

    def chunked(hidden, table, chunk=4):
        weight = nnx.Param(table, logical_axes=("vocab", "embed"))
        head = VocabHead(hidden, weight, None)
        logprobs, log_z = chunked_logprobs(head, targets, chunk=chunk, dtype=jnp.float32)
        return jnp.sum(logprobs * factors), (logprobs, log_z)

    def of(function, **options):
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True), **options)

    wanted = of(plain)(hidden, table)
    assert_trees_close(of(chunked)(hidden, table), wanted, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="config.objective.chunk = 5 must divide"):
        chunked(hidden, table, chunk=5)

    mesh = sharding.make_mesh(dict(fsdp=4, tensor=2), jax.devices())
    layouts = []
    for axes in (("batch", "length", None), ("vocab", "embed")):
        layouts.append(NamedSharding(mesh, sharding.spec(axes, mesh)))
    with jax.set_mesh(mesh):
        got = of(chunked, in_shardings=layouts)(hidden, table)
    assert_trees_close(got, wanted, rtol=2e-5, atol=2e-5)


def test_sums_over_segments():
    """Padding counts in none, wherever it lies, and a row may have as many as positions."""
    segments = np.array([[1, 1, 2, 0, 0], [0, 0, 0, 0, 0], [1, 2, 3, 4, 5]], np.int32)
    values = np.arange(15, dtype=np.float32).reshape(3, 5) + 1
    sums, parts = collectives.segment_sums(jnp.asarray(values), jnp.asarray(segments))
    assert sums.shape == (3, 5) and parts == 1
    np.testing.assert_array_equal(sums, [[3, 3, 0, 0, 0], [0, 0, 0, 0, 0], [11, 12, 13, 14, 15]])


def test_a_batch_of_padding_has_no_loss():
    empty = batch_of([batch_contract.empty_row(LENGTH, pack.UnitLayout.arrays)])
    _, (line,) = one_device()(empty)
    for name, value in line.items():
        if isinstance(value, tuple):
            assert value == (0, 0), name
    assert not line["halted"] and line["grad_norm"] == 0


@pytest.mark.parametrize("logprob", [0.0, -1e-7, -1e-3, -50.0])
def test_orpo_is_finite_for_answers_that_are_certain(logprob):
    """19: and so are its gradients."""
    one = jnp.ones(1, jnp.float32)

    def loss(chosen, rejected):
        pairs = preference_losses.Pairs(chosen, rejected, 0 * one, 0 * one, one, one)
        return preference_losses.pair_losses(pairs, name="orpo", beta=0.1).sum()

    for chosen, rejected in ((logprob, -1.0), (-1.0, logprob), (logprob, logprob)):
        results = jax.value_and_grad(loss, argnums=(0, 1))(chosen * one, rejected * one)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(results)), (chosen, rejected)


# --- rewards ---


def test_a_score_is_that_of_the_last_token_alone():
    """Whatever stands beside it, behind it and in other rows. Matmuls of more rows may round
    otherwise, which depends on the CPU.
    """
    config = model_config(vocab_size=258, context_length=2 * LENGTH, num_layers=1, heads="scalar")
    graphdef, params = random_model(config, std=0.2)

    @jax.jit
    def compute(params, batch):
        model = nnx.merge(graphdef, params)
        hidden_BTD = model(batch["tokens"], batch["positions"], batch["segments"]).hidden
        return model.head_outputs("scalar", hidden_BTD)[..., 0], reward.is_last(batch["segments"])

    def last_scores(rows):
        """The scores of rows' parts, sorted."""
        scores_BT, last_BT = compute(params, batch_of(rows))
        return np.sort(np.asarray(scores_BT)[np.asarray(last_BT) > 0])

    alone = []
    for unit in encoded():
        (row,) = rows_of([unit])
        scores = last_scores([row])
        ends = np.flatnonzero(np.diff(row["segments"]))
        of_row = np.asarray(compute(params, batch_of([row]))[0][0])
        np.testing.assert_array_equal(np.sort(of_row[ends]), scores)
        assert len(set(of_row.tolist())) > 10
        alone += scores.tolist()

    for length in (LENGTH, 2 * LENGTH):
        together = last_scores(rows_of(encoded(), length))
        np.testing.assert_allclose(together, np.sort(alone), rtol=1e-5, atol=1e-6)


# --- what is refused ---


def preference_config(**changes):
    c = words_config(dict(type="lm.objectives.preference", loss="dpo", reference="base"))
    c.train.trained = "*"
    c.update_from_flattened_dict(changes)
    return c


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objective.reference": "model"}, "needs config.models.reference, with the init_from"),
        ({"model.lora_rank": 0}, "what is trained besides changes it: .*lora_rank above 0"),
        ({"train.trained": "*_lora_?,up"}, "what is trained besides changes it: .'up'.;"),
        ({"train.trained": "*_lora_?,heads/*"}, "changes it: .'heads/scalar/weight'.;"),
        # 15: what is dropped would be in the ratio
        ({"model.dropout": 0.1}, "config.model.dropout = 0.1 would make answers likelier"),
        ({"objective.loss": "ppo"}, "config.objective.loss = 'ppo'; valid: .*'kto'"),
        ({"objective.reference": "none"}, "reference = 'none'; valid .* 'dpo': .'model', 'base'."),
        ({"objective.loss": "simpo"}, "reference = 'base'; valid .*'simpo': .'none'."),
    ],
)
def test_what_preferences_refuse(changes, message):
    config = preference_config(**changes)
    with pytest.raises(ValueError, match=message):
        Steps(config)(packed_batch())


def test_other_arguments_that_are_refused():
    for label_smoothing in (-0.1, 0.5):
        with pytest.raises(ValueError, match=f"label_smoothing = {label_smoothing}; wanted"):
            preference.make_loss(label_smoothing=label_smoothing)
    for field in ("dropout", "attention_dropout"):
        model = model_config(heads="scalar", **{field: 0.1})
        with pytest.raises(ValueError, match=f"config.model.{field} = 0.1"):
            reward.check(model, ["heads/scalar/weight"])
        with pytest.raises(ValueError, match=f"config.model.{field} = 0.1"):
            preference.check(model, ["embed/table"], reference="model")


@pytest.mark.parametrize(
    "changes",
    [{"model.heads": "", "train.trained": "*_lora_?"}, {"train.trained": "*_lora_?"}],
    ids=["missing", "frozen"],
)
def test_a_reward_model_trains_its_head(changes):
    config = words_config(dict(type="lm.objectives.reward"))
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match="a reward model trains its head"):
        Steps(config)
