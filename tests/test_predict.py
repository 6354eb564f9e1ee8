"""What evaluators are given: programs that are compiled once for all, and refusals by name."""

import collections
import dataclasses
import json
import re

import jax
import pytest

from lm import build, sharding
from lm.data.pack import Encoder
from lm.data.tokenizer import ByteTokenizer
from lm.evals import entries, label_results
from lm.evals.predict import Artifact, CompiledFns, PredictFns, Prompt, Question
from tests.fake_models import Model, chain_rule, random_distribution
from tests.helpers import LABELS, ROOT, VERBALIZER, write_task

LINEAR = "lm.evals.linear.LinearVerbalizer"


@pytest.fixture(name="evals")
def _evals(tmp_path, monkeypatch):
    """Entries of config.evals, one of each type that asks the model something of its own."""
    for split in ("train", "test"):
        rows = [dict(text=f"{split} {i}", label=LABELS[i % 3]) for i in range(12)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    colours = write_task(tmp_path / "colours.toml", r"{text}\n?")
    choice = tmp_path / "choice.toml"
    choice.write_text(f"""type = "lm.evals.choice.MultipleChoice"
choices = [" red", " green", " blue"]
answers = ["red", "green", "blue"]
[source]
path = "{tmp_path}/{{split}}.jsonl"
[prompt]
template = "{{text}}:"
""")

    monkeypatch.setattr(label_results, "picture_artifacts", lambda *unused: ())
    return dict(
        perplexity=entries.perplexity(every=0),
        documents=entries.classification(VERBALIZER, every=0),
        words=entries.task(colours, priors=("content_free", "batch")),
        choice=entries.task(str(choice)),
        linear=entries.task(colours, type=LINEAR, train_examples=12, l2=1.0),
        samples=entries.samples(("ab",), every=0, max_new_tokens=4),
    )


def experiment_of(config, evals):
    with config.unlocked():
        config.evals = evals
    return build.build(config, jax.devices()[:1])


@pytest.fixture(name="compilations")
def _compilations():
    """Counts the programs that are compiled, by their names."""
    counts = collections.Counter()

    def count(event, seconds, **details):
        if event.endswith("backend_compile_duration"):
            counts[details["fun_name"]] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    yield counts
    jax.monitoring.unregister_event_duration_listener(count)


def metrics(values):
    return {name: value for name, value in values if not isinstance(value, Artifact)}


def test_evaluators_share_what_is_compiled(small, evals, compilations):
    """Evaluators that are made once more, and that ask the same under other names, compile
    nothing.
    """
    again = {f"{name}_again": entry for name, entry in evals.items()}
    experiment = experiment_of(small, evals | again)

    with jax.set_mesh(experiment.program.mesh):
        params = experiment.program.make_params(jax.random.key(0))
        compilations.clear()
        evaluators = experiment.make_evaluators()
        first = {name: list(evaluators[name].run(params)) for name in evals}
        programs = ("eval_step", "tree_logprobs", "tree_states", "head_rows", "generation_step")
        assert {f"jit({name})" for name in programs} <= compilations.keys()

        compilations.clear()
        evaluators = experiment.make_evaluators()
        for name in evals:
            # But for the names of files.
            assert metrics(evaluators[f"{name}_again"].run(params)) == metrics(first[name])
    assert not compilations


@pytest.mark.parametrize(
    "missing, name, changes",
    [
        ("token_logprobs", "perplexity", {}),
        ("logprobs", "documents", {}),
        ("logprobs", "words", {}),
        ("logprobs", "choice", {}),
        ("states", "linear", {}),
        ("head_rows", "linear", {}),
        ("states", "linear", {"init": "prototype"}),
        ("make_generator", "samples", {}),
    ],
)
def test_what_a_model_lacks_is_found_when_evaluators_are_built(
    tiny, evals, monkeypatch, missing, name, changes
):
    evals[name].update(changes)
    experiment = experiment_of(tiny, {name: evals[name]})
    eval_fns = dataclasses.replace(experiment.eval_fns(), **{missing: None})
    monkeypatch.setattr(build.Experiment, "eval_fns", lambda self: eval_fns)

    entry_type = evals[name].type
    message = (
        rf"^this model has no {missing}, which config.evals.{name}, a {entry_type}, asks for; "
    )
    with pytest.raises(ValueError, match=message + r"it has \['") as error:
        experiment.make_evaluators()
    assert "mesh" not in str(error.value)


def test_a_linear_verbalizer_that_starts_at_prototypes_needs_no_head(tiny, evals, monkeypatch):
    evals["linear"].init = "prototype"
    experiment = experiment_of(tiny, dict(linear=evals["linear"]))
    eval_fns = dataclasses.replace(experiment.eval_fns(), head_rows=None, logprobs=None)
    monkeypatch.setattr(build.Experiment, "eval_fns", lambda self: eval_fns)
    assert experiment.make_evaluators()


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("token_logprobs", ([],)),
        ("logprobs", ([Question(Prompt([1]), [[2]])],)),
        ("states", ([Prompt([1])],)),
        ("head_rows", ([1],)),
        ("make_generator", (None,)),
    ],
)
def test_an_evaluator_that_says_nothing_is_refused_when_it_asks(name, arguments):
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    fns = PredictFns(CompiledFns(mesh), batch_size=1, length=8, asked_by="config.evals.own")
    message = rf"no {name}, which config.evals.own asks for; it has \[\]"
    with pytest.raises(ValueError, match=message):
        getattr(fns, name)(None, *arguments)


def test_the_smallest_evaluator():
    """That of docs/design.md."""
    (code,) = re.findall(r"```python\n(class .*?)```", (ROOT / "docs/design.md").read_text(), re.S)
    names = dict(Prompt=Prompt, Question=Question)
    exec(code, names)

    evaluator = names["YesOrNo"](
        Model(random_distribution), name="x", encoder=Encoder(ByteTokenizer(), ""), text="Well?"
    )
    prompt = ByteTokenizer().prompt("Well?")
    expected = chain_rule(prompt, b" yes") - chain_rule(prompt, b" no")
    assert dict(evaluator.run(None)) == {"log_odds": pytest.approx(expected, abs=1e-4)}
