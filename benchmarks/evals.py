"""Speed of classification by a model's probabilities of label words, in examples a second.

Three contenders evaluate the same Llama of 41M random parameters, on the same CPU in one run:

  ours      lm's own tasks, without their pictures and intervals
  harness   lm_eval's tasks on lm
  theirs    lm_eval's tasks on its own `hf` backend

Tokenization is included. The tokens that go through the model are counted.

    pip install -c constraints.txt -e '.[parity]'
    python benchmarks/evals.py

The tasks are of synthetic words. Each is as long as the data set that it is named after, and has as
many labels of as many tokens. lm_eval merges requests that differ in their last token only (its
logits cache, on by default). Compiling is not counted: every contender runs the task once before.
"""

import argparse
import functools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Read when jax, transformers and datasets are imported.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DISABLE_MULTIPROC": "1",
    "JAX_PLATFORMS": "cpu",
}

import jax
import lm_eval
import numpy as np
import tokenizers
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm import build
from lm import config as config_lib
from lm.data import tokenizer as tokenizer_lib
from lm.data.pack import Encoder
from lm.evals import causal_answers, classification, entries, harness, label_results
from lm.evals.predict import PredictFns
from lm.evals.scores import calibration
from lm.hf import directory as hf

SIZES = dict(
    num_hidden_layers=8,
    hidden_size=512,
    num_attention_heads=8,
    num_key_value_heads=8,
    intermediate_size=1536,
    vocab_size=32000,
    max_position_embeddings=1024,
)
BATCH_SIZE = 8


class Task(NamedTuple):
    """The size of a task."""

    labels: int
    label_tokens: int
    question_tokens: int
    shots: int
    examples: int


TASKS = {
    "sst2-like, 4-shot": Task(2, 1, 50, 4, 64),
    "trec-like, 4-shot": Task(6, 3, 30, 4, 48),
    "banking77-like": Task(77, 8, 26, 0, 16),
}


def make_checkpoint(directory: Path) -> None:
    """Writes a checkpoint with a tokenizer whose words are w2 to w31999, a token each."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, initializer_range=0.05, bos_token_id=0, eos_token_id=1
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)

    # With whole words as tokens, lengths in words are lengths in tokens.
    vocabulary = {"<s>": 0, "</s>": 1}
    for i in range(2, SIZES["vocab_size"]):
        vocabulary[f"w{i}"] = i
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>"
    )
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def draw_text(rng: random.Random, num_words: int) -> str:
    words = [f"w{rng.randrange(2, SIZES['vocab_size'])}" for _ in range(num_words)]
    return " ".join(words)


def write_task(folder: Path, name: str, task: Task) -> dict:
    """Writes a task's data and lm_eval's file of it.

    Returns:
      The arguments of our evaluator of the same task.
    """
    rng = random.Random(0)
    choices = []
    for _ in range(task.labels):
        # Labels of several tokens differ in length; the mean is as asked for.
        num_words = task.label_tokens
        if num_words > 1:
            num_words = rng.randint(2, 2 * task.label_tokens - 2)
        choices.append(draw_text(rng, num_words))

    # The same examples before each question, "first_n" on both sides.
    num_records = {"test": task.examples, "train": task.shots}
    data_files = {}
    for split, count in num_records.items():
        lines = ""
        for _ in range(count):
            record = dict(
                text=draw_text(rng, task.question_tokens), label=rng.randrange(task.labels)
            )
            lines += json.dumps(record) + "\n"

        path = folder / f"{name}-{split}.jsonl"
        path.write_text(lines)
        if count:
            data_files[split] = str(path)

    their_task = dict(
        task=name,
        dataset_path="json",
        dataset_kwargs=dict(data_files=data_files),
        test_split="test",
        fewshot_split="train" if task.shots else None,
        fewshot_config=dict(sampler="first_n"),
        num_fewshot=task.shots,
        output_type="multiple_choice",
        doc_to_text="{{text}} w2",
        doc_to_target="label",
        doc_to_choice=choices,
        metric_list=[dict(metric="acc")],
    )
    (folder / f"{name}.yaml").write_text(json.dumps(their_task))  # JSON is YAML

    # The labels are numbers: a word, its space before it, for each.
    words = tuple((str(i), (f" {choice}",)) for i, choice in enumerate(choices))
    (folder / "ours.toml").write_text('type = "lm.evals.classification.PromptClassification"')
    arguments = entries.task(
        str(folder / "ours.toml"),
        source=dict(path=str(folder / f"{name}-{{split}}.jsonl"), shots_split="train"),
        priors=(),
        prompt=dict(templates=("{text} w2",), shots=task.shots, sampler="first_n"),
        verbalizer=dict(words=(words,)),
    ).to_dict()

    for key in ("type", "every", "batch_size"):  # read by lm.build
        del arguments[key]
    return arguments


class Model(NamedTuple):
    """The checkpoint in lm."""

    fns: PredictFns
    params: Any
    tokenizer: tokenizer_lib.Tokenizer


def load_model(directory: Path) -> Model:
    checkpoint = hf.Checkpoint(directory)
    tokenizer = tokenizer_lib.load(directory)
    config = config_lib.default()
    config.model.update(checkpoint.fields)
    config.model.param_dtype = config.model.compute_dtype = "float32"
    config.model.scan_unroll = SIZES["num_hidden_layers"]  # faster on CPUs
    model = build.abstract_model(config, jax.devices()[:1], tokenizer.vocab_size)

    fns = PredictFns(
        build.make_eval_fns(model.graphdef, build.make_objective(config), model.mesh),
        batch_size=BATCH_SIZE,
        length=SIZES["max_position_embeddings"],
    )
    return Model(fns, checkpoint.load(model.params), tokenizer)


def load_hf(directory: Path) -> HFLM:
    return HFLM(
        pretrained=str(directory),
        batch_size=BATCH_SIZE,
        dtype="float32",
        device="cpu",
        max_length=SIZES["max_position_embeddings"],
    )


class TokenCounts:
    """Counts the tokens that go through the models: lm's without padding, hf's with it."""

    def __init__(self, hf_model: HFLM):
        self.lm = 0
        self.hf = 0
        # All that a model computes passes through one of these two.
        self._merge_trees = causal_answers.merge_trees
        self._model_call = hf_model._model_call
        causal_answers.merge_trees = self._count_trees
        hf_model._model_call = self._count_inputs

    def _count_trees(self, trees, max_tokens):
        rows = self._merge_trees(trees, max_tokens)
        self.lm += sum(len(row.tree.tokens) for row in rows)
        return rows

    def _count_inputs(self, inputs, *args, **kwargs):
        self.hf += inputs.numel()
        return self._model_call(inputs, *args, **kwargs)


def run_lm_eval(model, name: str, manager: TaskManager) -> np.ndarray:
    """Log-probabilities of the labels [examples, K], by lm_eval's task."""
    report = lm_eval.simple_evaluate(model, tasks=[name], task_manager=manager, bootstrap_iters=0)

    samples = sorted(report["samples"][name], key=lambda sample: sample["doc_id"])
    logprobs = []
    for sample in samples:
        logprobs.append([logprob for logprob, _ in sample["filtered_resps"]])
    return np.array(logprobs)


def run_ours(model: Model, arguments: dict) -> np.ndarray:
    """Log-probabilities of the labels [examples, K], by our evaluator."""
    evaluator = classification.PromptClassification(
        model.fns, name="ours", encoder=Encoder(model.tokenizer, ""), **arguments
    )
    # Not `evaluator.run`: pictures and bootstrap intervals are no part of lm_eval's work either.
    prompt_set = evaluator.prompt_set
    (scores,) = label_results.score_prompts(model.fns, model.params, prompt_set)
    logprobs = scores.examples.tokens.sum(axis=2)
    calibration.ece(calibration.softmax(logprobs), prompt_set.gold)
    return logprobs


def measure(name: str, contenders: dict[str, Callable], counts: TokenCounts, turns: int) -> dict:
    """Runs a task in turns.

    Args:
      contenders: name -> a function that runs the task and returns the labels' log-probabilities.

    Returns:
      The line to print: speeds, ratios over the turns (median, least and most), tokens.
    """
    # Once before the clock runs: this compiles, and shows that all compute the same.
    logprobs = {contender: run() for contender, run in contenders.items()}
    differences = []
    for contender in ("ours", "harness"):
        differences.append(np.abs(logprobs[contender] - logprobs["theirs"]).max())

    # In turns, so that what else the machine does hits all of them.
    seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
    counts.lm = counts.hf = 0
    for turn in range(turns):
        for contender, run in contenders.items():
            tokens_before = counts.lm
            began = time.perf_counter()
            run()
            seconds[contender].append(time.perf_counter() - began)
            # The harness has the same tokens: they are counted once.
            if contender == "ours":
                counts.lm = tokens_before
        latest = ", ".join(f"{contender} {s[-1]:.2f} s" for contender, s in seconds.items())
        print(f"  turn {turn + 1}/{turns}: {latest}", file=sys.stderr, flush=True)

    # Speeds are medians over the turns, ratios are taken within a turn.
    speeds = {}
    for contender, times in seconds.items():
        speeds[contender] = round(TASKS[name].examples / statistics.median(times), 2)

    ratios = {}
    for contender in ("ours", "harness"):
        values = np.divide(seconds["theirs"], seconds[contender])
        middle = np.median(values)
        ratios[contender] = f"{middle:.2f} ({values.min():.2f} to {values.max():.2f})"

    return dict(
        task=name,
        examples_per_second=speeds,
        ratio=ratios,
        tokens=dict(lm=counts.lm // turns, theirs=counts.hf // turns),
        largest_difference=float(f"{max(differences):.1e}"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()

    # With the results, so that tables can say what they were measured with.
    print(
        f"{os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}, lm_eval "
        f"{lm_eval.__version__}",
        file=sys.stderr,
    )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        directory = folder / "checkpoint"
        directory.mkdir()
        make_checkpoint(directory)

        model = load_model(directory)
        harness_model = harness.HarnessModel(model.fns, model.params, model.tokenizer)
        hf_model = load_hf(directory)
        counts = TokenCounts(hf_model)

        for task_name, task in TASKS.items():
            arguments = write_task(folder, task_name, task)
            manager = TaskManager(include_path=str(folder), include_defaults=False)
            contenders = {
                "ours": functools.partial(run_ours, model, arguments),
                "harness": functools.partial(run_lm_eval, harness_model, task_name, manager),
                "theirs": functools.partial(run_lm_eval, hf_model, task_name, manager),
            }
            print(json.dumps(measure(task_name, contenders, counts, args.turns)), flush=True)


if __name__ == "__main__":
    main()
