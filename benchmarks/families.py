"""Training speed of other families, each against its measure, in tokens a second, in f32.

    python benchmarks/families.py                 # masked against causal; needs no package
    pip install torch                             # 2.13.0 here
    python benchmarks/families.py --measure=lstm  # an LSTM against torch.nn.LSTM

masked: a BERT-shaped model on masked tokens, and the same model on the next token of these texts.
lstm: two layers of 384 units with a tied head, on the same ids; torch's with its fused AdamW.

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

from lm import config as config_lib
from lm import files, train
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


MEASURES = {"masked": measure_masked, "lstm": measure_lstm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", choices=MEASURES, default="masked")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    ratios = MEASURES[arguments.measure](arguments.turns)
    print(f"{arguments.measure}: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
