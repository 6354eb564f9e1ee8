"""Tuning to conversations and preferences by whole runs: that they begin where their base is, go on
bit-equal after a stop, and teach what their data say.
"""

import json
import math
import random
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from lm import build, generate, stopping, weights
from lm import config as config_lib
from lm.data import pack
from lm.data.loader import Loader
from lm.decoding.sampling import Sampling, row_keys
from lm.evals import entries
from lm.nn import lora
from lm.objectives import causal, reward
from tests.helpers import (
    CONFIG_FILE,
    assert_same_run,
    read_metrics,
    run_training,
    terminate_at,
)
from tests.test_contracts import run_killed_once

pytestmark = pytest.mark.usefixtures("fast_runs")

CAUSAL = config_lib.default().objective.to_dict()


def text(rng, letters, length):
    return "".join(rng.choice(letters) for _ in range(length))


def write(path, records):
    """Writes records as JSONL, once; returns the path as text."""
    if not path.exists():
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def conversations(config, path):
    """`config`, reading conversations of a file, of which the last quarter is held out."""
    config.data.source = "lm.data.conversations.conversations"
    config.data.source_args = ConfigDict(dict(path=path, held_out=0.25, held_out_by="tail"))
    config.data.label_prompt = ""
    config.chat.template = "plain"
    return config


def answered(count):
    """Random prompts in letters with random answers in digits."""
    rng = random.Random(0)
    records = []
    for _ in range(count):
        prompt, answer = text(rng, string.ascii_lowercase, 6), text(rng, string.digits, 5)
        records.append(dict(prompt=prompt, completion=answer))
    return records


def pair(rng):
    """Two answers of the same length, of which the better one has a digit somewhere."""
    length = rng.randint(3, 6)
    worse = text(rng, "abcdef", length)
    place = rng.randrange(length)
    better = text(rng, "abcdef", length)
    better = better[:place] + rng.choice("0123456789") + better[place + 1 :]
    return dict(prompt=text(rng, "ghij", 2), chosen=better, rejected=worse)


def pairs(count):
    rng = random.Random(1)
    return [pair(rng) for _ in range(count)]


# --- the beginning, and exact resume ---


@pytest.fixture
def folder(tmp_path_factory):
    """The same for all tests: documents are named by their file."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def answers(small, folder):
    """The configuration of tuning to answers."""
    small.optimizer.learning_rate = 1e-2
    return conversations(small, write(folder / "answers.jsonl", answered(64)))


_BASE = []


@pytest.fixture
def preferred(small, folder, tmp_path_factory):
    """The configuration of DPO with adapters, on a base that was trained on texts."""
    small.optimizer.learning_rate = 1e-2
    if not _BASE:
        _BASE.append(tmp_path_factory.mktemp("tuning") / "base")
        run_training(small, _BASE[0])
    config = conversations(small, write(folder / "pairs.jsonl", pairs(64)))
    config.init_from = str(_BASE[0])
    config.model.lora_rank = 4
    config.objective = ConfigDict(
        dict(type="lm.objectives.preference", loss="dpo", reference="base")
    )
    return config


def with_model_as_reference(config):
    """All of the model is trained, and the base is another one."""
    config.model.lora_rank = 0
    config.objective.reference = "model"
    config.models.reference = ConfigDict({"init_from": config.init_from, "model": {}})
    return config


def assert_begins_at_the_reference(line):
    """15: the ratio is 0, not nearly, and DPO's loss ln 2 but for its sum's rounding."""
    assert line["train/loss"] == pytest.approx(math.log(2), rel=2e-7)
    assert line["train/margin"] == 0 and line["train/accuracy"] == 0


def test_preferences_begin_at_the_base_and_resume(preferred, tmp_path, monkeypatch):
    run_training(preferred, tmp_path / "whole")
    lines = read_metrics(tmp_path / "whole")
    assert_begins_at_the_reference(lines[0])
    assert lines[-1]["train/margin"] != 0
    stop_and_go_on(preferred, tmp_path, monkeypatch)


def stop_and_go_on(config, folder, monkeypatch):
    """Stops a run by a signal at some step; it ends as the one in whole/."""
    with monkeypatch.context() as patch:
        terminate_at(patch, Loader, "next", random.randint(2, 5))
        with pytest.raises(stopping.Stopped):
            run_training(config, folder / "run")
    run_training(config, folder / "run")
    assert_same_run(folder / "run", folder / "whole", 6)


@pytest.mark.slow
def test_preferences_begin_at_another_model(preferred, tmp_path, monkeypatch):
    config = with_model_as_reference(preferred)
    run_training(config, tmp_path / "whole")
    assert_begins_at_the_reference(read_metrics(tmp_path / "whole")[0])
    stop_and_go_on(config, tmp_path, monkeypatch)


@pytest.mark.slow
def test_answers_resume(answers, tmp_path, monkeypatch):
    run_training(answers, tmp_path / "whole")
    stop_and_go_on(answers, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapters", "preferences"])
def test_a_killed_run_goes_on_bit_equal(preferred, folder, tmp_path, name):
    """SIGKILL, on 8 devices, with the collectives written out, and rows in parts."""
    config = preferred
    if name != "preferences":
        config.data.source_args.path = write(folder / "answers.jsonl", answered(64))
        config.objective = ConfigDict(CAUSAL)
    config.mesh.update(dict(data=2, fsdp=2, sequence=2))
    config.train.update(dict(fsdp="by_hand", length="16 steps"))
    config.checkpoint.every = 4
    config_file = tmp_path / "config.py"
    config_file.write_text(CONFIG_FILE.format(text=json.dumps(config.to_dict())))

    run_training(config, tmp_path / "whole", devices=8)
    run_killed_once(config_file, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole", 16)


# --- what is refused ---


@pytest.mark.parametrize(
    "objective, message",
    [
        (CAUSAL, "takes text or conversation, .*'pair'"),
        (dict(type="lm.objectives.preference", loss="kto"), "takes judged, .*'pair'"),
    ],
)
def test_pairs_are_for_preferences(preferred, objective, message):
    preferred.objective = ConfigDict(objective)
    with pytest.raises(ValueError, match=message):
        build.build(preferred, jax.devices()[:1])


@pytest.mark.parametrize("type_", ["preference", "reward"])
def test_conversations_have_no_preference(answers, type_):
    answers.objective = ConfigDict(dict(type=f"lm.objectives.{type_}"))
    answers.model.heads = "scalar"
    with pytest.raises(ValueError, match="takes pair, and .* examples of the kind 'conversation'"):
        build.build(answers, jax.devices()[:1])


def test_conversations_have_no_perplexity(answers):
    """Not that of a text: how they are divided into words and bytes isn't said."""
    answers.evals.text = entries.perplexity(every=0, batch_size=8)
    experiment = build.build(answers, jax.devices()[:1])
    with pytest.raises(
        ValueError, match="Perplexity takes text, and .* of the kind 'conversation'"
    ):
        experiment.make_evaluators()


def test_a_reference_that_is_missing(preferred, tmp_path):
    config = with_model_as_reference(preferred)
    config.models.reference.init_from = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="config.models.reference.init_from = .* has no checkpo"):
        build.build(config, jax.devices()[:1])
    del config.models["reference"]
    with pytest.raises(ValueError, match="needs config.models.reference, with the init_from"):
        run_training(config, tmp_path / "run")


def test_a_reference_of_adapters_alone(preferred, tmp_path):
    base = preferred.init_from
    run_training(preferred, tmp_path / "adapters")
    config = with_model_as_reference(preferred)
    config.models.reference.init_from = str(tmp_path / "adapters")
    with pytest.raises(ValueError, match=f"are in '{base}'. python -m lm.convert merge makes"):
        run_training(config, tmp_path / "run")


# --- what is learnt ---


def learner(config, steps):
    """`config` of 2 layers of 64, in f32."""
    config.model.update(dict(num_layers=2, embed_dim=64, mlp_dim=128, num_heads=4, head_dim=16))
    config.model.update(dict(num_kv_heads=4, context_length=64, scan_unroll=2))
    config.model.param_dtype = "float32"
    config.data.update(dict(length=64, batch_size=4))
    config.optimizer.update(dict(learning_rate=5e-3, warmup_steps=10, weight_decay=0.0))
    config.train.update(dict(length=f"{steps} steps", log_every=10))
    return config


def loaded(config, run):
    """(experiment, the parameters of a run)."""
    experiment = build.build(config, jax.devices()[:1])
    with jax.set_mesh(experiment.program.mesh):
        params, _ = weights.load_weights(experiment, epath.Path(run), averaged=False)
    return experiment, params


def rows_of(experiment, config, split, count=None):
    """(units of a split, their rows, one each)."""
    documents = build.encoded(config, build.documents(config, split), experiment.tokenizer)
    some_units = [*documents][:count]
    layout = pack.layout_of(documents.kind, experiment.encoder)
    rows = []
    for unit in some_units:
        rows += pack.evaluation_rows([unit.arrays], config.data.length, layout)
    return some_units, {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.slow
def test_answers_are_learnt_and_prompts_are_not(tiny, folder, tmp_path):
    """32 random answers by heart, each with its end. What the prompts say costs as before."""
    path = write(folder / "heart.jsonl", answered(32))
    config = learner(conversations(tiny.unlock(), path), 160)
    config.data.source_args.held_out = 0.0
    last = run_training(config, tmp_path / "run")
    assert last["train/loss"] < 0.02

    generator, tokenizer = generate.load(
        epath.Path(tmp_path / "run"), jax.devices()[:1], Sampling(temperature=0.0)
    )
    prompts = [[tokenizer.bos_id, *tokenizer.encode(r["prompt"])] for r in answered(32)]
    wanted = [[*tokenizer.encode(r["completion"]), tokenizer.eos_id] for r in answered(32)]
    tokens = np.stack([*generator.stream(prompts, 8, row_keys(range(32)))], axis=1)
    right = [[t for t in row if t >= 0] == ids for row, ids in zip(tokens.tolist(), wanted)]
    assert sum(right) >= 30

    experiment, params = loaded(config, tmp_path / "run")
    start = experiment.program.make_params(jax.random.key(config.seed))
    _, rows = rows_of(experiment, config, "train")
    is_prompt = ((rows["segments"] > 0) & (rows["weights"] == 0)).astype(np.float32)

    @jax.jit
    def prompt_nll(params):
        model = nnx.merge(experiment.program.graphdef, params)
        logprobs_BT, _ = causal.token_logprobs(model, rows)
        return -jnp.sum(logprobs_BT * is_prompt) / is_prompt.sum()

    assert is_prompt.sum() == 32 * 6
    print("SFT", last["train/loss"], sum(right), prompt_nll(params) / prompt_nll(start))
    assert prompt_nll(params) >= 0.9 * prompt_nll(start)


@pytest.mark.slow
def test_a_rule_is_rewarded(tiny, folder, tmp_path):
    """20: held-out pairs, whose lengths say nothing."""
    path = write(folder / "rule.jsonl", pairs(2000))
    config = learner(conversations(tiny.unlock(), path), 60)
    config.model.heads = "scalar"
    config.objective = ConfigDict(dict(type="lm.objectives.reward"))
    run_training(config, tmp_path / "run")

    experiment, params = loaded(config, tmp_path / "run")
    some_units, rows = rows_of(experiment, config, "validation", 500)
    assert len(some_units) == 500

    @jax.jit
    def scores(params):
        model = nnx.merge(experiment.program.graphdef, params)
        hidden_BTD = model(rows["tokens"], rows["positions"], rows["segments"]).hidden
        scores_BT = model.head_outputs("scalar", hidden_BTD)[..., 0]
        return scores_BT, reward.is_last(rows["segments"])

    scores_BT, last_BT = scores(params)
    chosen, rejected = np.asarray(scores_BT)[np.asarray(last_BT) > 0].reshape(500, 2).T
    lengths = np.stack([np.sum(rows["segments"] == part, axis=1) for part in (1, 2)])
    by_length = np.mean(lengths[0] > lengths[1]) + np.mean(lengths[0] == lengths[1]) / 2
    print("reward", np.mean(chosen > rejected), by_length)
    assert np.mean(chosen > rejected) >= 0.9
    assert by_length <= 0.55


@pytest.mark.slow
def test_a_rule_is_preferred(tiny, folder, tmp_path):
    """15: DPO moves further from its reference, the smaller beta is."""
    records = pairs(1000)
    answers = []
    for record in records:
        answers += [dict(prompt=record["prompt"], completion=record[key]) for key in record]
    answers = [answer for answer in answers if answer["completion"] != answer["prompt"]]
    tiny = tiny.unlock()
    config = learner(conversations(tiny, write(folder / "sides.jsonl", answers)), 60)
    run_training(config, tmp_path / "base")

    config.data.source_args.path = write(folder / "preferred.jsonl", records)
    config.init_from = str(tmp_path / "base")
    config.model.update(dict(lora_rank=8))
    config.train.length = "100 steps"
    config.optimizer.learning_rate = 5e-4
    moved = {}
    for beta in (0.05, 0.5):
        config.objective = ConfigDict(
            dict(type="lm.objectives.preference", loss="dpo", reference="base", beta=beta)
        )
        # So that there is a distance at which it is least, and not only a direction.
        config.objective.label_smoothing = 0.3
        config.train.log_every = 1
        run = tmp_path / f"{beta}"
        run_training(config, run)
        assert_begins_at_the_reference(read_metrics(run)[0])
        shares, moved[beta] = preference_of(config, run)
        print("DPO", beta, shares, moved[beta])
        assert shares >= 0.9
    assert moved[0.05] > moved[0.5]


def preference_of(config, run):
    """(the share of held-out pairs whose better answer has gained more, KL to the reference by
    token of the answers).
    """
    experiment, params = loaded(config, run)
    program = experiment.program
    _, rows = rows_of(experiment, config, "validation")
    batch = {name: jnp.asarray(array) for name, array in rows.items()}
    prepare, loss = program.objective.prepare, program.objective.loss

    @jax.jit
    def measure(params, batch):
        model = nnx.merge(program.graphdef, params)
        _, count, terms = loss(model, batch | prepare(batch, model), None)

        def logprobs_BTV():
            hidden_BTD = model(batch["tokens"], batch["positions"], batch["segments"]).hidden
            return jax.nn.log_softmax(model.logits(hidden_BTD))

        policy_BTV = logprobs_BTV()
        with lora.off():
            base_BTV = logprobs_BTV()
        kl_BT = jnp.sum(jnp.exp(policy_BTV) * (policy_BTV - base_BTV), axis=-1)
        kl = jnp.sum(kl_BT * batch["weights"]) / batch["weights"].sum()
        return terms["accuracy"][0] / count, kl

    share, kl = measure(params, batch)
    return float(share), float(kl)
