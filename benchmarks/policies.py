"""Speed of reinforcement learning, of a Llama of 20M parameters drawn at random, in f32.

    python benchmarks/policies.py                          # rollouts against lm.generate's batches
    pip install -c constraints.txt -e '.[parity]'
    python benchmarks/policies.py --measure=iterations     # against trl's GRPOTrainer

decoding: the same prompts and numbers of texts; once all texts reach the limit, and once they end
by themselves, at a fortieth of the limit and later. lm.generate's batches have as many rows as a
rollout has slots. A text's tokens count, not what is decoded behind its end.
iterations: of GRPO with a reference: 8 prompts of 64 tokens, 8 texts of 64 tokens each, one update.
Each side is a process of its own, and an iteration's parts are timed: the texts, the reference's
log-probabilities, and the rest, which is the update.

Contenders take turns. A ratio is the median over the turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 8, 8, 64, 64
SIZES = dict(
    num_layers=8,
    embed_dim=384,
    mlp_dim=1024,
    num_heads=6,
    num_kv_heads=6,
    head_dim=64,
    context_length=256,
    vocab_size=8192,
)
ITERATIONS = 4  # of a turn, behind one that compiles


def vowels(records, texts) -> list[float]:
    """A reward that costs nothing: the share of a text's characters that are vowels."""
    return [_share_of_vowels(text.text) for text in texts]


def _share_of_vowels(text: str) -> float:
    return sum(character in "aeiou" for character in text) / max(len(text), 1)


# --- rollouts against batches ---


def make_generator(stop_ids: Sequence[int]):
    import jax

    from lm import build
    from lm import config as config_lib
    from lm.decoding.generator import Generator
    from lm.decoding.sampling import Sampling

    config = config_lib.default()
    config.model.update(SIZES)
    config.model.update(param_dtype="float32", compute_dtype="float32")
    config.model.scan_unroll = config.model.num_layers
    model = build.abstract_model(config, jax.devices()[:1], SIZES["vocab_size"])
    program = build.program(config, jax.devices()[:1], SIZES["vocab_size"], 100)
    return Generator(
        model.model_config,
        model.graphdef,
        program.make_params(jax.random.key(0)),
        model.mesh,
        Sampling(temperature=1.0),
        stop_ids=tuple(stop_ids),
        vocab_size=SIZES["vocab_size"],
    )


def by_rollout(generator, prompts: Sequence[Sequence[int]], slots: int) -> int:
    """Draws SAMPLES texts of each prompt; returns how many tokens they have."""
    import jax

    from lm.decoding import batched

    drawn = batched.draw(
        generator,
        prompts,
        samples=SAMPLES,
        max_new_tokens=NEW_TOKENS,
        temperature=1.0,
        key=jax.random.key(1),
        slots=slots,
    )
    return sum(len(text.ids) for texts in drawn for text in texts)


def by_batches(generator, prompts: Sequence[Sequence[int]], rows: int) -> int:
    """The same, as lm.generate does it."""
    from lm.decoding.sampling import row_keys

    asked = [prompt for prompt in prompts for _ in range(SAMPLES)]
    num_tokens = 0
    for start in range(0, len(asked), rows):
        batch = asked[start : start + rows]
        seeds = range(start, start + len(batch))
        for text in generator.generate(batch, NEW_TOKENS, row_keys(list(seeds))):
            num_tokens += min(len(text) + 1, NEW_TOKENS)  # with what ends it
    return num_tokens


def measure_decoding(turns: int) -> None:
    import numpy as np

    slots, rng = 32, np.random.default_rng(0)
    prompts = rng.integers(1000, 8192, (4 * PROMPTS, PROMPT_TOKENS)).tolist()
    for name, stop_ids in (("at the limit", [0]), ("ending by themselves", range(200))):
        generator = make_generator(stop_ids)
        sides: dict[str, Callable] = {"rollout": by_rollout, "batches": by_batches}
        for side in sides.values():
            side(generator, prompts, slots)  # compiled

        ratios = []
        for turn in range(turns):
            speeds = {}
            for side in list(sides) if turn % 2 == 0 else list(sides)[::-1]:
                start = time.perf_counter()
                num_tokens = sides[side](generator, prompts, slots)
                speeds[side] = num_tokens / (time.perf_counter() - start)
            ratios.append(speeds["rollout"] / speeds["batches"])
            print(name, turn, speeds, f"{ratios[-1]:.3f}", flush=True)
        print(f"{name}: rollout / batches: {statistics.median(ratios):.3f}")


# --- iterations against trl's ---


def write_model(folder: Path) -> None:
    """Writes a Llama drawn at random with a tokenizer, and prompts."""
    import tokenizers
    import torch
    import transformers

    from lm.data import pydocs

    texts = [d.text for d in pydocs.pydocs("train", data_dir="~/.cache/lm") if len(d.text) > 1000]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)

    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    saved.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SIZES["vocab_size"],
        hidden_size=SIZES["embed_dim"],
        intermediate_size=SIZES["mlp_dim"],
        num_hidden_layers=SIZES["num_layers"],
        num_attention_heads=SIZES["num_heads"],
        num_key_value_heads=SIZES["num_kv_heads"],
        max_position_embeddings=SIZES["context_length"],
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)

    lines = []
    for text in texts[: PROMPTS * (ITERATIONS + 1)]:
        # Without what begins a document.
        ids = tokenizer.encode(text).ids[: PROMPT_TOKENS - 1]
        lines.append(json.dumps(dict(prompt=tokenizer.decode(ids))) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines))


class Clock:
    """Seconds of the calls of functions, by name."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Replaces a function by one that takes its time."""
        function = getattr(owner, attribute)

        def timed(*arguments, **options):
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds.setdefault(name, []).append(time.perf_counter() - start)

        setattr(owner, attribute, timed)


def of_parts(clock: Clock) -> dict[str, float]:
    """Median seconds of an iteration, and of its parts."""
    medians = {name: statistics.median(taken[1:]) for name, taken in clock.seconds.items()}
    medians["update"] = medians["iteration"] - medians["texts"] - medians["reference"]
    return medians


def ours(folder: Path) -> dict[str, float]:
    import jax
    from etils import epath

    from configs import rl
    from lm import train
    from lm.decoding import batched
    from lm.rl import rollouts

    c = rl.get_config(f"grpo,{folder},{folder / 'prompts.jsonl'}")
    c.model.update(param_dtype="float32", compute_dtype="float32")
    c.model.update(scan_unroll=SIZES["num_layers"], context_length=SIZES["context_length"])
    c.data.batch_size = PROMPTS * SAMPLES
    c.data.length = PROMPT_TOKENS + NEW_TOKENS
    c.rollout.update(samples=SAMPLES, max_new_tokens=NEW_TOKENS, slots=PROMPTS * SAMPLES)
    c.rewards.right.type = "policies.vowels"
    del c.rewards.right["key"]
    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 1e-6
    c.evals = {}
    c.train.length = f"{ITERATIONS + 1} steps"

    clock = Clock()
    clock.watch(batched, "draw", "texts")
    clock.watch(rollouts.RolloutLoader, "_add_scores", "reference")

    # An iteration goes from one batch's beginning to the next one's.
    began, following = [], rollouts.RolloutLoader.next

    def next_batch(self, params):
        jax.block_until_ready(params)
        began.append(time.perf_counter())
        return following(self, params)

    rollouts.RolloutLoader.next = next_batch
    with tempfile.TemporaryDirectory() as workdir:
        train.train(c.lock(), epath.Path(workdir), jax.devices()[:1])
    clock.seconds["iteration"] = [after - before for before, after in zip(began, began[1:])]
    return of_parts(clock)


def theirs(folder: Path) -> dict[str, float]:
    import datasets
    import transformers
    import trl

    lines = (folder / "prompts.jsonl").read_text().splitlines()
    with tempfile.TemporaryDirectory() as output:
        arguments = trl.GRPOConfig(
            output_dir=output,
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            max_steps=ITERATIONS + 1,
            learning_rate=1e-6,
            beta=0.04,
            temperature=1.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder),
            reward_funcs=lambda completions, **_: [_share_of_vowels(text) for text in completions],
            args=arguments,
            train_dataset=datasets.Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        )
        clock = Clock()
        clock.watch(trainer, "_generate", "texts")
        generate_and_score = trainer._generate_and_score_completions

        def scored(*arguments, **options):
            # What it asks of models beside the texts is the reference's log-probabilities.
            before = len(clock.seconds.get("forward", []))
            found = generate_and_score(*arguments, **options)
            clock.seconds.setdefault("reference", []).append(sum(clock.seconds["forward"][before:]))
            return found

        trainer._generate_and_score_completions = scored
        clock.watch(trainer, "_get_per_token_logps_and_entropies", "forward")
        began = []

        class Watch(transformers.TrainerCallback):
            def on_step_begin(self, *unused, **options):
                began.append(time.perf_counter())

        trainer.add_callback(Watch())
        trainer.train()
    clock.seconds["iteration"] = [after - before for before, after in zip(began, began[1:])]
    return of_parts(clock)


SIDES = {"ours": ours, "theirs": theirs}


def measure_iterations(turns: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder)
        ratios: dict[str, list[float]] = {}
        for turn in range(turns):
            seconds = {}
            for side in list(SIDES) if turn % 2 == 0 else list(SIDES)[::-1]:
                command = [sys.executable, __file__, f"--side={side}", f"--folder={folder}"]
                output = subprocess.run(command, capture_output=True, text=True)
                if output.returncode:
                    sys.exit(output.stderr)
                seconds[side] = json.loads(output.stdout.splitlines()[-1])
                print(turn, side, seconds[side], flush=True)
            for part in ("iteration", "texts", "reference", "update"):
                ratio = seconds["theirs"][part] / seconds["ours"][part]
                ratios.setdefault(part, []).append(ratio)
        for part, values in ratios.items():
            print(f"{part}: theirs / ours, in time: {statistics.median(values):.3f}")


MEASURES = {"decoding": measure_decoding, "iterations": measure_iterations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=MEASURES, default="decoding")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="of one turn; printed as JSON")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments.folder)))
    else:
        MEASURES[arguments.measure](arguments.turns)


if __name__ == "__main__":
    main()
