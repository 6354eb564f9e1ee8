"""Classification by a model's probabilities of label words: lm's own tasks ("ours"; pictures and
intervals left out), and lm on the tasks of lm_eval ("harness"), beside lm_eval's own `hf` backend
("theirs"), on the same Llama of 41M parameters, drawn at random, and the same CPU in one run.
Examples a second, tokenization included, and the tokens that go through the model.

    pip install -c constraints.txt -e '.[parity]'
    python benchmarks/evals.py

The tasks are of synthetic words, as long and with as many labels of as many tokens as what they are
named after. lm_eval merges requests that differ in their last token only (its logits cache, on by
default). Compiling is not counted: both sides run the task once before.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from lm.evals import entries

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DISABLE_MULTIPROC": "1",
    "JAX_PLATFORMS": "cpu",
}
SIZES = dict(
    num_hidden_layers=8,
    hidden_size=512,
    num_attention_heads=8,
    num_key_value_heads=8,
    intermediate_size=1536,
    vocab_size=32000,
    max_position_embeddings=1024,
)
# name -> (labels, tokens of a label, tokens of a question, questions answered before, examples)
TASKS = {
    "sst2-like, 4-shot": (2, 1, 50, 4, 64),
    "trec-like, 4-shot": (6, 3, 30, 4, 48),
    "banking77-like": (77, 8, 26, 0, 16),
}


def make(directory):
    """A checkpoint with a tokenizer whose words are w0 to w31999, a token each."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, initializer_range=0.05, bos_token_id=0, eos_token_id=1
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 32000)}, unk_token="<s>"
        )
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>")
        )
    )


def write_task(folder, name, labels, label_tokens, question, shots, examples):
    rng = random.Random(0)
    text = lambda n: " ".join(f"w{rng.randrange(2, 32000)}" for _ in range(n))
    choices = [
        text(label_tokens if label_tokens == 1 else rng.randint(2, 2 * label_tokens - 2))
        for _ in range(labels)
    ]
    for split, count in (("test", examples), ("train", shots)):
        rows = [dict(text=text(question), label=rng.randrange(labels)) for _ in range(count)]
        (folder / f"{name}-{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    files = {
        split: str(folder / f"{name}-{split}.jsonl")
        for split in ("test", "train")[: 1 + bool(shots)]
    }
    (folder / f"{name}.yaml").write_text(
        json.dumps(
            dict(
                task=name,
                dataset_path="json",
                dataset_kwargs=dict(data_files=files),
                test_split="test",
                fewshot_split="train" if shots else None,
                fewshot_config=dict(sampler="first_n"),
                num_fewshot=shots,
                output_type="multiple_choice",
                doc_to_text="{{text}} w2",
                doc_to_target="label",
                doc_to_choice=choices,
                metric_list=[dict(metric="acc")],
            )
        )
    )
    (folder / "ours.toml").write_text('type = "lm.evals.classification.PromptClassification"')
    words = (tuple((str(i), (f" {choice}",)) for i, choice in enumerate(choices)),)

    made = entries.task(
        str(folder / "ours.toml"),
        source=dict(path=str(folder / f"{name}-{{split}}.jsonl"), shots_split="train"),
        priors=(),
        prompt=dict(templates=("{text} w2",), shots=shots, sampler="first_n"),
        verbalizer=dict(words=words),
    )
    return {
        key: value
        for key, value in made.to_dict().items()
        if key not in ("type", "every", "batch_size")
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    import jax
    import lm_eval
    import numpy as np
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from lm import build, step
    from lm import config as config_lib
    from lm.data import tokenizer as tokenizers
    from lm.data.pack import Encoder
    from lm.evals import calibration, classification, common, harness, label_results
    from lm.evals.predict import PredictFns
    from lm.hf import directory as hf
    from lm.objectives import causal

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "checkpoint"
        checkpoint.mkdir()
        make(checkpoint)
        source, tokenizer = hf.Checkpoint(checkpoint), tokenizers.load(checkpoint)
        config = config_lib.default()
        config.model.update(
            source.fields
            | dict(
                param_dtype="float32",
                compute_dtype="float32",
                scan_unroll=SIZES["num_hidden_layers"],
            )
        )
        made = build.abstract_model(config, jax.devices()[:1], tokenizer.vocab_size)
        fns = PredictFns(
            made.mesh,
            batch_size=8,
            length=SIZES["max_position_embeddings"],
            token_logprobs=step.make_token_logprobs(made.graphdef, causal.token_logprobs),
            tree_logprobs=step.make_tree_logprobs(made.graphdef),
            make_generate=None,
            check_stop=lambda: None,
        )
        tokens = {"lm": 0, "theirs": 0}
        real = common.join

        def counted(trees, most):
            rows = real(trees, most)
            tokens["lm"] += sum(len(row.tree.tokens) for row in rows)
            return rows

        common.join = counted
        theirs = HFLM(
            pretrained=str(checkpoint),
            batch_size=8,
            dtype="float32",
            device="cpu",
            max_length=SIZES["max_position_embeddings"],
        )
        call = theirs._model_call

        def their_call(inputs, *more, **options):
            tokens["theirs"] += inputs.numel()
            return call(inputs, *more, **options)

        theirs._model_call = their_call
        params = source.load(made.params)
        sides = {"harness": harness.HarnessModel(fns, params, tokenizer), "theirs": theirs}
        print(
            f"{os.cpu_count()} cores, jax {jax.__version__}, torch {torch.__version__}, lm_eval "
            f"{lm_eval.__version__}",
            file=sys.stderr,
        )
        for task, sizes in TASKS.items():
            ours = write_task(folder, task, *sizes)
            manager = TaskManager(include_path=str(folder), include_defaults=False)
            run = lambda side: lm_eval.simple_evaluate(
                sides[side],
                tasks=[task],  # noqa: B023
                task_manager=manager,  # noqa: B023
                bootstrap_iters=0,
            )

            def own():
                evaluator = classification.PromptClassification(
                    fns,
                    name="ours",
                    encoder=Encoder(tokenizer, ""),
                    **ours,  # noqa: B023
                )
                (found,) = label_results.score_prompts(fns, params, evaluator.prompt_set)
                sums = found.examples.tokens.sum(axis=2)
                calibration.ece(calibration.softmax(sums), evaluator.prompt_set.gold)
                return sums

            answers = {
                side: np.array(
                    [
                        [x[0] for x in s["filtered_resps"]]
                        for s in sorted(run(side)["samples"][task], key=lambda s: s["doc_id"])
                    ]
                )
                for side in sides
            } | {"ours": own()}
            worst = max(
                np.abs(answers[side] - answers["theirs"]).max() for side in ("harness", "ours")
            )
            seconds = {side: [] for side in ("ours", *sides)}
            tokens.update(lm=0, theirs=0)
            for turn in range(args.turns):
                for side in seconds:
                    began, before = time.perf_counter(), tokens["lm"]
                    own() if side == "ours" else run(side)
                    seconds[side].append(time.perf_counter() - began)
                    tokens["lm"] = before if side == "ours" else tokens["lm"]  # the same in both
                print(
                    f"  turn {turn + 1}/{args.turns}: "
                    + ", ".join(f"{side} {s[-1]:.2f} s" for side, s in seconds.items()),
                    file=sys.stderr,
                    flush=True,
                )
            speed = {
                side: round(sizes[-1] / statistics.median(s), 2) for side, s in seconds.items()
            }
            ratios = {
                side: [b / a for a, b in zip(seconds[side], seconds["theirs"])]
                for side in ("ours", "harness")
            }
            shown = {
                side: f"{statistics.median(x):.2f} ({min(x):.2f} to {max(x):.2f})"
                for side, x in ratios.items()
            }
            print(
                json.dumps(
                    dict(
                        task=task,
                        examples_per_second=speed,
                        ratio=shown,
                        tokens={side: n // args.turns for side, n in tokens.items()},
                        largest_difference=float(f"{worst:.1e}"),
                    )
                ),
                flush=True,
            )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
