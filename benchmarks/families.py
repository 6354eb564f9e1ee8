"""Speed of other families, each against its measure, in tokens a second, in f32.

    python benchmarks/families.py                 # masked against causal; needs no package
    pip install torch transformers                # 2.13.0, 5.23.0 here
    python benchmarks/families.py --measure=lstm  # an LSTM against torch.nn.LSTM
    python benchmarks/families.py --measure=t5    # T5's decoding against transformers'

masked: a BERT-shaped model on masked tokens, and the same model on the next token of these texts.
lstm: two layers of 384 units with a tied head, on the same ids; torch's with its fused AdamW.
t5: greedy text of a T5 small drawn at random, of 8 sources; transformers' by generate() or by a
loop over its own cache, whichever is faster.

Contenders take turns. The ratio is the median over the turns.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from lm import build, files, train
from lm import config as config_lib
from lm.decoding.generator import Generator
from lm.decoding.sampling import Sampling, row_keys
from lm.hf import directory as hf
from lm.models import presets, recurrent
from lm.objectives import causal

STEPS = 60
LOG_EVERY = 10
VOCAB, UNITS, LAYERS = 2048, 384, 2
ROWS, LENGTH = 16, 256
REPEATS = 10


# --- masked against causal ---


def make_config(objective: str) -> ConfigDict:
    c = config_lib.default()
    c.model.update(presets.get("bert_mini"))
    c.model.update(vocab_size=0, compute_dtype="float32", scan_unroll=c.model.num_layers)
    c.tokenizer.reserve = "mask"
    c.data.length = LENGTH
    c.data.batch_size = ROWS
    if objective == "masked":
        c.objective = ConfigDict(dict(type="lm.objectives.masked", rate=0.15, chunk=64))
    else:
        c.model.visible = "causal"
    c.train.length = f"{STEPS} steps"
    c.train.log_every = LOG_EVERY
    return c


def of_a_run(objective: str, folder: Path) -> float:
    """Trains once; the median over the lines of the log."""
    train.train(make_config(objective).lock(), epath.Path(folder), jax.devices()[:1])
    speeds = []
    for _, line in files.read_jsonl(str(folder / "metrics.jsonl")):
        if "train/tokens_per_second" in line:
            speeds.append(line["train/tokens_per_second"])
    return statistics.median(speeds)


def measure_masked(turns: int) -> list[float]:
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(turns):
            order = ("masked", "causal") if turn % 2 == 0 else ("causal", "masked")
            speeds = {name: of_a_run(name, Path(folder) / f"{name}-{turn}") for name in order}
            ratios.append(speeds["masked"] / speeds["causal"])
            print(turn, speeds, f"{ratios[-1]:.3f}", flush=True)
    return ratios


# --- an LSTM against torch's ---


def make_batch(step: int) -> np.ndarray:
    """[B, T + 1] ids."""
    return np.random.default_rng(step).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)


def our_step() -> Callable[[np.ndarray], float]:
    fields = config_lib.model(
        "lm.models.recurrent",
        vocab_size=VOCAB,
        num_layers=LAYERS,
        embed_dim=UNITS,
        hidden_dim=UNITS,
        param_dtype="float32",
        compute_dtype="float32",
    ).to_dict()
    del fields["type"]
    model = recurrent.Recurrent(recurrent.Config(**fields), jax.random.key(0))
    graphdef, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)
    optimizer = optax.adamw(1e-3)
    loss_fn = causal.make_loss(z_loss=0.0, chunk=0)
    opt_state = optimizer.init(params)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    ones = np.ones((ROWS, LENGTH), np.int32)

    @jax.jit
    def update(params, opt_state, ids):
        batch = dict(tokens=ids[:, :-1], targets=ids[:, 1:], weights=ones.astype(np.float32))
        batch |= dict(positions=positions, segments=ones)

        def mean_loss(params):
            total, count, _ = loss_fn(nnx.merge(graphdef, params), batch, None)
            return total / count

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def step(ids: np.ndarray) -> float:
        nonlocal params, opt_state
        params, opt_state, loss = update(params, opt_state, ids)
        return float(loss)

    return step


def torch_step() -> Callable[[np.ndarray], float]:
    import torch

    embed = torch.nn.Embedding(VOCAB, UNITS)
    cells = torch.nn.LSTM(UNITS, UNITS, num_layers=LAYERS, batch_first=True)
    parameters = [*embed.parameters(), *cells.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step(ids: np.ndarray) -> float:
        tokens = torch.from_numpy(ids).long()
        hidden, _ = cells(embed(tokens[:, :-1]))
        logits = hidden @ embed.weight.T
        targets = tokens[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def of_steps(step: Callable[[np.ndarray], float]) -> float:
    start = time.perf_counter()
    for number in range(REPEATS):
        step(make_batch(number))
    return REPEATS * ROWS * LENGTH / (time.perf_counter() - start)


def measure_lstm(turns: int) -> list[float]:
    steps = {"lm": our_step(), "torch": torch_step()}
    for step in steps.values():
        of_steps(step)  # compiled, and warm

    ratios = []
    for turn in range(turns):
        order = ("lm", "torch") if turn % 2 == 0 else ("torch", "lm")
        speeds = {name: of_steps(steps[name]) for name in order}
        ratios.append(speeds["lm"] / speeds["torch"])
        print(turn, speeds, f"{ratios[-1]:.3f}", flush=True)
    return ratios


# --- T5's decoding against transformers' ---


SOURCES, SOURCE_TOKENS, NEW_TOKENS = 8, 64, 64


def our_texts(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    source = hf.Checkpoint(folder)
    config = config_lib.default()
    config.model = source.model(config.model)
    config.model.update(param_dtype="float32", compute_dtype="float32")
    config.model.scan_unroll = config.model.encoder_layers
    model = build.abstract_model(config, jax.devices()[:1], config.model.vocab_size)
    generator = Generator(
        model.model_config,
        model.graphdef,
        source.load(model.params),
        model.mesh,
        Sampling(temperature=0.0),
        stop_ids=(-1,),
        vocab_size=config.model.vocab_size,
    )

    def run(ids: np.ndarray) -> np.ndarray:
        texts = generator.generate(ids.tolist(), NEW_TOKENS, row_keys([0] * len(ids)))
        return np.array(texts)

    return run


def their_texts(folder: Path, by: str) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    import transformers

    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()

    def generate(ids: np.ndarray) -> np.ndarray:
        options = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        output = model.generate(torch.from_numpy(ids).long(), eos_token_id=None, **options)
        return output[:, 1:].numpy()

    def loop(ids: np.ndarray) -> np.ndarray:
        source = model.encoder(torch.from_numpy(ids).long())
        token, cache, tokens = torch.zeros((len(ids), 1), dtype=torch.long), None, []
        for _ in range(NEW_TOKENS):
            output = model(
                encoder_outputs=source,
                decoder_input_ids=token,
                past_key_values=cache,
                use_cache=True,
            )
            cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
            tokens.append(token)
        return torch.cat(tokens, 1).numpy()

    def run(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return (generate if by == "generate" else loop)(ids)

    return run


def measure_t5(turns: int) -> list[float]:
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = dict(d_model=512, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    ids = np.random.default_rng(0).integers(3, 32000, (SOURCES, SOURCE_TOKENS)).astype(np.int32)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        runs = {by: their_texts(Path(folder), by) for by in ("generate", "loop")}
        runs |= {"lm": our_texts(Path(folder))}
        # Compiled, and warm; a random model has near-ties, so that texts may part.
        texts = {name: run(ids) for name, run in runs.items()}
        agreement = np.mean(texts["lm"] == texts["loop"])
        print(f"the same tokens: {agreement:.3f}")
        for turn in range(turns):
            order = list(runs) if turn % 2 == 0 else list(runs)[::-1]
            speeds = {}
            for name in order:
                start = time.perf_counter()
                runs[name](ids)
                speeds[name] = SOURCES * NEW_TOKENS / (time.perf_counter() - start)
            ratios.append(speeds["lm"] / max(speeds["generate"], speeds["loop"]))
            print(turn, speeds, f"{ratios[-1]:.3f}", flush=True)
    return ratios


MEASURES = {"masked": measure_masked, "lstm": measure_lstm, "t5": measure_t5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=MEASURES, default="masked")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    ratios = MEASURES[arguments.measure](arguments.turns)
    print(f"{arguments.measure}: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
