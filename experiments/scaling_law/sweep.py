"""How does the loss fall with parameters and tokens, and can it be foreseen? See README.md.

    python -m lm.sweep --sweep=experiments/scaling_law/sweep.py --workdir=runs/scaling_law
    python experiments/scaling_law/fit.py --workdir=runs/scaling_law

Four budgets of model FLOPs, each spent on models of several sizes (Hoffmann et al. 2022, arXiv
2203.15556, section 3.2), and a larger budget that the fit doesn't see.
"""

from configs import pydocs
from lm import build
from lm.sweep.axes import product, seeds

VOCAB_SIZE = 1024
ROW, BATCH = 128, 8  # tokens of a row, rows of a step
# name -> (layers, width); heads of 32
SIZES = {
    "d32": (2, 32),
    "d64": (2, 64),
    "d96": (3, 96),
    "d128": (4, 128),
    "d160": (5, 160),
    "d192": (6, 192),
}
# model FLOPs of a run -> the sizes that they are spent on
BUDGETS = {
    2e11: ("d32", "d64", "d96"),
    6e11: ("d32", "d64", "d96", "d128"),
    2e12: ("d32", "d64", "d96", "d128"),
    6e12: ("d64", "d96", "d128", "d160"),
}
HELD_OUT = {2e13: ("d192",)}


def get_config():
    c = pydocs.get_config("micro")
    c.tokenizer.vocab_size = VOCAB_SIZE
    c.model.vocab_size = VOCAB_SIZE
    c.model.context_length = ROW
    c.model.compute_dtype = "float32"  # at these widths faster than bfloat16, on CPUs
    c.data.length = ROW
    c.data.batch_size = BATCH
    c.optimizer.warmup_steps = 30
    c.train.log_every = 50

    # One metric: the loss on 1,000 documents, at the end.
    c.evals = dict(validation=c.evals.validation)
    c.evals.validation.max_documents = 1000
    c.checkpoint.every = 500
    c.checkpoint.best = ""
    return c


def get_sweep():
    points = []
    for budget, names in (BUDGETS | HELD_OUT).items():
        for name in names:
            points.append(point(budget, *SIZES[name]))
    return product(points, seeds(3))


def point(budget: float, layers: int, width: int) -> dict:
    """A model of a size, trained for as many steps as the budget pays for."""
    heads = width // 32
    model = dict(
        num_layers=layers,
        scan_unroll=layers,
        embed_dim=width,
        mlp_dim=4 * width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=32,
    )
    config = get_config()
    config.model.update(model)
    steps = round(budget / flops_of_a_step(config))
    return {"model": model, "train.length": f"{steps} steps"}


def flops_of_a_step(config) -> float:
    """Model FLOPs, as train/mfu counts them."""
    model_config, _ = build.make_model_fn(config, VOCAB_SIZE, "cpu")
    per_token = build.model_module(config).flops_per_token(model_config, ROW)
    return per_token * ROW * BATCH
