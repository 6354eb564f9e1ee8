"""Measures how fast each family of config.py trains, and in how much memory.

    python experiments/families/speed.py

They take turns, each in a process of its own. Tokens are the positions of rows: of sources and
targets, where there are both. Memory is the most that the process has held, the compiler's with it.
"""

import concurrent.futures
import multiprocessing
import resource
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lm
from etils import epath

from experiments.families.config import STEPS, get_config
from lm import files, startup, train
from lm.reports.tables import align

TURNS = 2
MEASURED = 50  # steps of a run


def measure(family: str) -> tuple[float, float]:
    """(tokens a second, GiB) of a run without evals and checkpoints."""
    config = get_config(family)
    config.evals = {}
    config.checkpoint.every = 0
    config.train.update(length=f"{MEASURED} steps", log_every=5)
    with tempfile.TemporaryDirectory() as run:
        train.train(config.lock(), epath.Path(run), startup.start("cpu"))
        lines = files.read_jsonl_log(epath.Path(run) / "metrics.jsonl")

    speeds = []
    for line in lines:
        if "train/tokens_per_second" in line:
            speeds.append(line["train/tokens_per_second"])
    positions = config.data.length + config.objective.get("source_length", 0)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return statistics.median(speeds) * positions / config.data.length, memory


def main() -> None:
    measured: dict[str, list[tuple[float, float]]] = {family: [] for family in STEPS}
    context = multiprocessing.get_context("spawn")
    for _ in range(TURNS):
        for family in STEPS:
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                measured[family].append(pool.submit(measure, family).result())

    causal = statistics.mean(speed for speed, _ in measured["causal"])
    rows = [("family", "tokens/s", "of causal's", "GiB")]
    for family, turns in measured.items():
        speed = statistics.mean(speed for speed, _ in turns)
        memory = max(memory for _, memory in turns)
        rows.append((family, f"{speed:,.0f}", f"{speed / causal:.2f}", f"{memory:.2f}"))
    print(align(rows))


if __name__ == "__main__":
    main()
