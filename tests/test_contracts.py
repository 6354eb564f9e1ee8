"""The contracts of docs/design.md, by toys that use what the shipped models and objectives don't:
the same on every mesh and with accumulation, and bit-equal after a stop.
"""

import json
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from lm import build, convert, evaluate, generate, sharding, stopping, trained
from lm import config as config_lib
from lm.data import pack
from lm.decoding.sampling import Sampling, row_keys
from lm.evals import entries
from tests.helpers import (
    CONFIG_FILE,
    NO_CURVES,
    ROOT,
    assert_same_run,
    read_checkpoint,
    read_metrics,
    run_training,
    saved_steps,
    slow,
    small_encdec,
    terminate_at,
)
from tests.toys import sampling

pytestmark = pytest.mark.usefixtures("fast_runs")

OBJECTIVES = {
    "masked": ({"type": "tests.toys.masked", "rate": 0.3}, {"model.heads": "classes:3"}),
    "weighted": ({"type": "tests.toys.weighted"}, {"model.dropout": 0.2}),
    "encoder": (
        {"type": "lm.objectives.masked", "rate": 0.3, "chunk": 8},
        {
            "model.visible": "full",
            "model.vocab_size": 260,  # the mask is the 259th id, and the mesh splits them
            "model.embed_norm": True,
            "model.token_types": 2,
            "model.head_transform": True,
            "model.bias": "qkv,out,mlp,head",
            "model.dropout": 0.2,
            "tokenizer.reserve": "mask",
        },
    ),
}
OBJECTIVES["spans"] = (
    {"type": "lm.objectives.span_corruption", "source_length": 48, "rate": 0.3, "chunk": 8},
    # A vocabulary that the mesh splits.
    {"tokenizer.reserve": "sentinels:22", "model.vocab_size": 280, "data.label_prompt": ""},
)
OBJECTIVES["recurrent"] = OBJECTIVES["spans"]
NAMES = ["masked", "weighted", slow("encoder"), slow("spans"), slow("recurrent")]
# (mesh, who writes the collectives, microbatches)
EXECUTIONS = {
    "accumulated": ({}, "partitioner", 4),
    "by hand": (dict(data=2, fsdp=2, fsdp2=2), "by_hand", 1),
    "by the partitioner": (dict(fsdp=2, tensor=2, sequence=2), "partitioner", 2),
}


def execute(config, execution):
    """Changes how a configuration of one device is executed; returns the number of devices."""
    sizes, fsdp, accumulation = EXECUTIONS[execution]
    if "source_length" in config.objective and "sequence" in sizes:
        # Rows of two lengths aren't split.
        sizes = dict(fsdp=2, tensor=2, data=2)
    one = dict(data=1, fsdp=1, fsdp2=1, tensor=1, sequence=1)
    config.mesh.update(one | sizes)
    config.train.update(dict(fsdp=fsdp, accumulation=accumulation))
    return int(np.prod(list(sizes.values()), dtype=int))


def configure(tiny, folder, name):
    """The configuration of an objective; its reference model is trained first."""
    objective, changes = OBJECTIVES[name]
    config = tiny.copy_and_resolve_references().unlock()
    if name == "weighted":
        reference = config.copy_and_resolve_references()
        reference.update_from_flattened_dict({"model.num_layers": 1, "train.length": "3 steps"})
        run_training(reference, folder / "reference")
        config.models.reference = ConfigDict(
            {"init_from": str(folder / "reference"), "model": {"remat": "full"}}
        )
    config.objective = ConfigDict(objective)
    config.model.param_dtype = "float32"
    config.evals.text = entries.perplexity(every=3, batch_size=8)
    if name in ("encoder", "spans", "recurrent"):
        config.evals.text = entries.held_out("TextLoss", every=3, batch_size=8)
    if name == "spans":
        config.model = small_encdec(source_length=48, dropout=0.2, bias="qkv,out,mlp,head")
    if name == "recurrent":
        config.model = config_lib.model("lm.models.recurrent", context_length=32, source_length=48)
        config.model.update(embed_dim=32, hidden_dim=48, param_dtype="float32")
    config.update_from_flattened_dict(changes)
    if "scan_unroll" in config.model:
        config.model.scan_unroll = config.model.num_layers  # see build._check_simulated
    return config


@pytest.mark.parametrize("name", NAMES)
def test_objectives_are_the_same_on_every_mesh(tiny, tmp_path, name):
    config = configure(tiny, tmp_path, name)
    wanted = run_training(config, tmp_path / "one")
    lines = read_metrics(tmp_path / "one")
    assert "eval/text/loss" in wanted
    assert wanted["train/loss"] < lines[0]["train/loss"]  # it learns

    keys = ("train/loss", "train/class_loss", "train/reference_loss", "train/grad_norm")
    for execution in EXECUTIONS:
        run = tmp_path / execution
        run_training(config, run, devices=execute(config, execution))
        for line, other in zip(lines, read_metrics(run), strict=True):
            assert line.get("train/batch_hash") == other.get("train/batch_hash")
            for key in line.keys() & set(keys):
                assert other[key] == pytest.approx(line[key], rel=1e-4), (execution, key)


@pytest.mark.parametrize("name", NAMES)
def test_objectives_resume_bit_equal(tiny, tmp_path, monkeypatch, name):
    config = configure(tiny, tmp_path, name)
    run_training(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        terminate_at(patch, build.Program, "batch_shardings", 1)  # before the first step
        with pytest.raises(stopping.Stopped):
            run_training(config, tmp_path / "run")
    stop_in_step(config, tmp_path / "run", monkeypatch, random.randint(1, 5))
    run_training(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole", 6)


def stop_in_step(config, run, monkeypatch, step):
    """Runs to a signal while the batch of this step is fetched."""
    from lm.data.loader import Loader

    owner = sampling.SamplingLoader if config.data.loader else Loader
    with monkeypatch.context() as patch:
        terminate_at(patch, owner, "next", step)
        with pytest.raises(stopping.Stopped):
            run_training(config, run)


def test_transforms_are_a_function_of_the_row():
    """Its random numbers are those of the seed, the stream and the row's number."""

    class Stream:
        def __init__(self):
            self.count = 0

        def __next__(self):
            self.count += 1
            return self.count

        def get_state(self):
            return self.count

        def set_state(self, state):
            self.count = state

    def make(seed=0, number=0):
        return pack.TransformedStream(
            Stream(), lambda row, random: (row, random.random()), seed=seed, number=number
        )

    stream = make()
    rows = [next(stream) for _ in range(4)]
    restored = make()
    restored.set_state({"rows_transformed": 2, "stream": 2})
    assert [next(restored), next(restored)] == rows[2:]
    assert len({random for _, random in rows} | {next(make(1))[1], next(make(0, 1))[1]}) == 6


def test_a_reference_stays_what_it_is(tiny, tmp_path):
    """Its loss on a batch is the same in the first step, whatever is trained, and where it is from
    is checked before.
    """
    config = configure(tiny, tmp_path, "weighted")
    run_training(config, tmp_path / "run")
    config.seed = 3
    config.data.streams = 8
    run_training(config, tmp_path / "other")
    firsts = [read_metrics(tmp_path / name)[0] for name in ("run", "other")]
    assert firsts[0]["train/reference_loss"] < firsts[0]["train/loss"]

    config.models.reference.init_from = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="config.models.reference.init_from = .* has no checkpo"):
        run_training(config, tmp_path / "third")
    config.models.reference.init_from = ""
    with pytest.raises(ValueError, match="config.models.reference.init_from is empty"):
        run_training(config, tmp_path / "third")


# --- a loader that samples ---


def test_a_loader_sees_the_parameters_and_stops_at_its_boundaries(tiny, tmp_path, monkeypatch):
    config = tiny.copy_and_resolve_references().unlock()
    config.data.loader = "tests.toys.sampling.SamplingLoader"
    config.model.param_dtype = "float32"
    run_training(config, tmp_path / "whole")
    hashes = [line["train/batch_hash"] for line in read_metrics(tmp_path / "whole")]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]

    stop_in_step(config, tmp_path / "run", monkeypatch, 3)
    assert saved_steps(tmp_path / "run") == [4]
    run_training(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole", 6)

    # On a mesh the same model draws the same.
    config.mesh.update(dict(data=2, fsdp=2, tensor=2))
    run_training(config, tmp_path / "mesh", devices=8)
    assert read_metrics(tmp_path / "mesh")[0]["train/batch_hash"] == hashes[0]
    config.mesh.update(dict(data=1, fsdp=1, tensor=1))

    # Another model draws other rows.
    config.seed = 1
    run_training(config, tmp_path / "seed")
    assert read_metrics(tmp_path / "seed")[0]["train/batch_hash"] != hashes[0]


@pytest.mark.parametrize("key, value", [("checkpoint.every", 3), ("train.length", "5 steps")])
def test_checkpoints_off_the_boundaries(tiny, tmp_path, key, value):
    config = tiny.copy_and_resolve_references().unlock()
    config.data.loader = "tests.toys.sampling.SamplingLoader"
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"config.{key}: a checkpoint can't be saved after"):
        run_training(config, tmp_path / "run")


# --- a model whose cache is a state ---


def configure_recurrent(tiny):
    config = tiny.copy_and_resolve_references().unlock()
    config.model = ConfigDict(
        {"type": "tests.toys.recurrent", "vocab_size": 0, "compute_dtype": "", "embed_dim": 32}
    )
    config.optimizer.learning_rate = 1e-2
    return config


def test_a_recurrent_model_is_the_same_on_every_mesh(tiny, tmp_path):
    config = configure_recurrent(tiny)
    config.train.length = "12 steps"
    run_training(config, tmp_path / "one")
    lines = read_metrics(tmp_path / "one")
    assert lines[-1]["train/loss"] < lines[0]["train/loss"] - 0.5

    meshes = {
        "by_hand": (dict(data=2, fsdp=2, fsdp2=2), 1),
        "partitioner": (dict(data=1, fsdp=2, fsdp2=1, sequence=4), 4),
    }
    for fsdp, (sizes, accumulation) in meshes.items():
        config.mesh.update(sizes)
        config.train.update(dict(fsdp=fsdp, accumulation=accumulation))
        run_training(config, tmp_path / fsdp, devices=8)
        for line, other in zip(lines, read_metrics(tmp_path / fsdp), strict=True):
            assert other["train/loss"] == pytest.approx(line["train/loss"], rel=1e-4)


def test_a_recurrent_model_resumes(tiny, tmp_path, monkeypatch):
    config = configure_recurrent(tiny)
    run_training(config, tmp_path / "whole")
    stop_in_step(config, tmp_path / "run", monkeypatch, 3)
    run_training(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole", 6)


def test_a_recurrent_model_decodes(tiny, tmp_path):
    """Greedy text token by token is the best next token of the whole so far, each time."""
    config = configure_recurrent(tiny)
    config.evals.samples = entries.samples(("ab", "cde ab"), every=0, max_new_tokens=8)
    config.evals.text = entries.perplexity(every=0, batch_size=8)
    run_training(config, tmp_path / "run")
    assert "⟫" in (tmp_path / "run" / "samples.md").read_text()

    e = build.build(config, jax.devices()[:1])
    with jax.set_mesh(e.program.mesh):
        params = e.program.make_params(jax.random.key(0))
        generator = e.eval_fns().make_generator(params, Sampling(temperature=0.0))
        prompts = [[256, 97, 98], [256, 99]]
        scored = list(generator.stream_scored(prompts, 6, row_keys([0, 1])))
        first, second = np.array([token_B for token_B, _ in scored]).T.tolist()
        logprobs_BT = np.array([logprob_B for _, logprob_B in scored]).T
        model = nnx.merge(e.program.graphdef, params)
        for prompt, continuation, logprobs_T in zip(prompts, (first, second), logprobs_BT):
            ids = list(prompt)
            for token, logprob in zip(continuation, logprobs_T):
                if token < 0:
                    break  # the row has ended
                arrays = np.array([ids, range(len(ids)), [1] * len(ids)], np.int32)[:, None]
                logits = model.logits(model(*arrays).hidden)[0, -1]
                assert int(jnp.argmax(logits[:258])) == token
                wanted = jax.nn.log_softmax(logits[:258])[token]
                assert logprob == pytest.approx(float(wanted), abs=1e-4)
                ids.append(token)
    assert first


# --- a part of the parameters ---


def configure_adapter(tiny, folder):
    """An adapter on a base that was trained without it."""
    base = tiny.copy_and_resolve_references().unlock()
    run_training(base, folder / "base")
    config = base.copy_and_resolve_references()
    config.model.type = "tests.toys.adapter"
    config.init_from = str(folder / "base")
    config.init_new = config.train.trained = "down,up"
    config.optimizer.learning_rate = 1e-2
    config.evals.text = entries.perplexity(every=3, batch_size=8)
    return config


def test_what_is_frozen_is_in_no_checkpoint(tiny, tmp_path):
    """Nor is it changed: the state has the adapter alone, and evals have both."""
    config = configure_adapter(tiny, tmp_path)
    run_training(config, tmp_path / "run")
    state, meta = read_checkpoint(tmp_path / "run", 6)
    paths = [path for path in state if "embed" in path or "layers" in path]
    assert not paths
    assert {path for path in state if path.startswith("params/")} == {"params/down", "params/up"}
    assert meta["frozen"]["init_from"] == str(tmp_path / "base")

    lines = read_metrics(tmp_path / "run")
    losses = [line["eval/text/loss"] for line in lines if "eval/text/loss" in line]
    assert losses[1] < losses[0]
    one = evaluate.evaluate(config, epath.Path(tmp_path / "run"), jax.devices()[:1])
    assert one["eval/text/loss"] == losses[1]

    # Without the base there is no model, and another base is noticed.
    with pytest.raises(ValueError, match="has trained parameters only; .*which --base should name"):
        generate.load(
            epath.Path(tmp_path / "run"),
            jax.devices()[:1],
            Sampling(),
            model_type="tests.toys.adapter",
        )
    other = tiny.copy_and_resolve_references().unlock()
    other.seed = 5
    run_training(other, tmp_path / "other")
    config.init_from = str(tmp_path / "other")
    with pytest.raises(ValueError, match="frozen parameters with the fingerprint"):
        evaluate.evaluate(config, epath.Path(tmp_path / "run"), jax.devices()[:1])


def test_an_adapter_generates(tiny, tmp_path):
    """As a whole: the form for decoding has it too."""
    config = configure_adapter(tiny, tmp_path)
    e = build.build(config, jax.devices()[:1])
    with jax.set_mesh(e.program.mesh):
        params = e.program.make_params(jax.random.key(0))
        params["up"] = 3 * jax.random.normal(jax.random.key(1), params["up"].shape)
        generator = e.eval_fns().make_generator(params, Sampling(temperature=0.0))
        scored = generator.stream_scored([[256, 97, 98]], 4, row_keys([0]))
        ids, logprobs = [256, 97, 98], []
        for token_B, logprob_B in scored:
            ids.append(int(token_B[0]))
            logprobs.append(float(logprob_B[0]))

        model = nnx.merge(e.program.graphdef, params)
        arrays = np.array([ids, range(len(ids)), [1] * len(ids)], np.int32)[:, None]
        logits = model.logits(model(*arrays).hidden)[0, 2:-1, :258]
    wanted = jax.nn.log_softmax(logits)[np.arange(len(logprobs)), np.array(ids[3:])]
    np.testing.assert_allclose(logprobs, wanted, rtol=1e-3, atol=1e-3)


def test_an_adapter_is_the_same_on_every_mesh_and_resumes(tiny, tmp_path, monkeypatch):
    config = configure_adapter(tiny, tmp_path)
    config.model.param_dtype = "bfloat16"
    run_training(config, tmp_path / "one")
    stop_in_step(config, tmp_path / "stopped", monkeypatch, 4)
    run_training(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "one", 6)

    lines = read_metrics(tmp_path / "one")
    for name in EXECUTIONS:
        run_training(config, tmp_path / name, devices=execute(config, name))
        for line, other in zip(lines, read_metrics(tmp_path / name), strict=True):
            for key in ("train/loss", "train/grad_norm"):
                if key in line:
                    assert other[key] == pytest.approx(line[key], rel=1e-3), (name, key)


def test_only_what_is_trained_is_differentiated(tiny, tmp_path):
    """The base's weight gradients are gone from the program, and its moments from the state."""
    config = configure_adapter(tiny, tmp_path)
    config.optimizer.ema_decay = 0.9

    def measure():
        program = build.build(config, jax.devices()[:1]).program
        batch = program.abstract_batch(config.data.batch_size)
        with jax.set_mesh(program.mesh):
            lowered = program.train_step.lower(
                program.abstract_state, batch, program.abstract_fixed
            )
        size = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state))
        return lowered.cost_analysis()["flops"], size

    adapter_flops, adapter_size = measure()
    config.train.trained = "*"
    flops, size = measure()
    assert adapter_size < 0.02 * size
    assert adapter_flops < 0.8 * flops


def test_what_is_frozen_lies_like_any_weights_and_is_not_donated(tiny, tmp_path):
    config = configure_adapter(tiny, tmp_path)
    config.mesh.update(dict(data=2, fsdp=2, tensor=2))
    program = build.build(config, jax.devices()).program
    _, frozen = trained.split(program.abstract_params, program.is_trained)
    assert program.abstract_fixed.frozen == frozen
    assert not frozen["layers"]["mlp"]["up"].sharding.is_fully_replicated

    batch = program.abstract_batch(config.data.batch_size)
    with jax.set_mesh(program.mesh):
        lowered = program.train_step.lower(program.abstract_state, batch, program.abstract_fixed)
    state, _, fixed = lowered.args_info[0]
    assert all(leaf.donated for leaf in jax.tree.leaves(state))
    assert not any(leaf.donated for leaf in jax.tree.leaves(fixed))


@pytest.mark.parametrize(
    "patterns, message",
    [
        ("nothing/*", "'nothing/\\*' matches no parameter; there are .*'embed/table'"),
        ("*,!*", "leaves nothing to train"),
        ("up", "keeps parameters as config.init_from has them, which is empty"),
    ],
)
def test_patterns_of_what_is_trained(tiny, patterns, message):
    config = tiny.copy_and_resolve_references().unlock()
    config.model.type = "tests.toys.adapter"
    config.train.trained = patterns
    with pytest.raises(ValueError, match=message):
        build.build(config, jax.devices()[:1])


def test_the_last_pattern_counts():
    tree = dict(embed=dict(table=1), layers=dict(up=2, down=3), norm=4)
    is_trained = trained.parse("*,!layers/*,layers/up", trained.paths_of(tree))
    kept, frozen = trained.split(tree, is_trained)
    assert kept == dict(embed=dict(table=1), layers=dict(up=2), norm=4)
    assert frozen == dict(layers=dict(down=3))
    assert trained.merge(kept, frozen) == tree


def test_fingerprints_of_parameters():
    """Of the bits and their places, on any mesh."""
    x = jax.random.normal(jax.random.key(0), (8, 4)).astype(jnp.bfloat16)
    mesh = sharding.make_mesh(dict(fsdp=4), jax.devices()[:4])
    layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    wanted = trained.fingerprint({"a": x})
    assert trained.fingerprint({"a": jax.device_put(x, layout)}) == wanted
    others = [{"b": x}, {"a": x[::-1]}, {"a": x.at[3, 2].add(0.1)}, {"a": x.reshape(4, 8)}]
    assert len({wanted, *map(trained.fingerprint, others)}) == 5


# --- the command, killed ---


def run_command(config_file, run):
    command = ["-m", "lm.main", f"--config={config_file}", f"--workdir={run}"]
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def run_killed_once(config_file, run):
    """A run that SIGKILL ends behind step 4, and that then goes on to its end."""
    process = run_command(config_file, run)
    while process.poll() is None and max(saved_steps(run), default=0) < 4:
        time.sleep(0.02)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()[-2000:]

    process = run_command(config_file, run)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked", "adapter", "sampling", "recurrent"])
def test_a_killed_command_goes_on_bit_equal(tiny, tmp_path, name):
    """SIGKILL, on 8 devices, with the collectives written out."""
    if name in OBJECTIVES:
        config = configure(tiny, tmp_path, name)
    elif name == "adapter":
        config = configure_adapter(tiny, tmp_path)
    else:
        config = configure_recurrent(tiny) if name == "recurrent" else tiny.unlock()
    if name == "sampling":
        config.data.loader = "tests.toys.sampling.SamplingLoader"
    config.mesh.update(dict(data=2, fsdp=2, fsdp2=2))
    config.train.update(dict(fsdp="by_hand", length="16 steps"))
    config.checkpoint.every = 4
    for entry in config.evals.values():
        entry.every = 8
    config_file = tmp_path / "config.py"
    config_file.write_text(NO_CURVES + CONFIG_FILE.format(text=json.dumps(config.to_dict())))

    run_training(config, tmp_path / "whole", devices=8)
    run_killed_once(config_file, tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole", 16)


def test_a_reference_is_the_model_that_its_files_say(tiny, tmp_path):
    """A Hugging Face directory's is a Transformer, whatever the run trains."""
    config = configure_adapter(tiny, tmp_path)
    base = epath.Path(tmp_path / "base")
    convert.export_checkpoint(base, tmp_path / "hf", jax.devices()[:1])
    config.models.reference = ConfigDict({"init_from": str(tmp_path / "hf"), "model": {}})
    program = build.build(config, jax.devices()[:1]).program
    assert "up" in program.abstract_params
    reference = program.abstract_fixed.others["reference"]
    assert not {"up", "down"} & reference.keys()
