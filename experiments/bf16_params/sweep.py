"""Do bf16 parameters train as well as f32 ones? README.md beside this file has the answer.

python -m lm.sweep --sweep=experiments/bf16_params/sweep.py --workdir=runs/bf16_params
"""

from configs import pydocs
from lm.sweep.axes import product, seeds, zipped

STEPS = 500


def get_config():
    """A small model, in f32 arithmetic, whose learning rate falls to zero."""
    c = pydocs.get_config("micro")
    c.model.embed_dim = 128
    c.model.mlp_dim = 512
    c.model.num_heads = 2
    c.model.num_kv_heads = 2
    c.model.head_dim = 64
    c.model.compute_dtype = "float32"
    c.data.length = 128
    c.data.batch_size = 16

    c.optimizer.name = "adamw"
    c.optimizer.learning_rate = 3e-3
    c.optimizer.schedule = "linear"
    c.optimizer.final_learning_rate = 0.0
    c.optimizer.warmup_steps = 50
    c.optimizer.b2 = 0.99

    # Five points on each curve; the other evals of the configuration are left out.
    c.train.length = f"{STEPS} steps"
    c.evals = dict(validation=c.evals.validation)
    c.evals.validation.every = STEPS // 5
    c.evals.validation.max_documents = 300
    c.checkpoint.every = 0
    c.checkpoint.best = ""
    return c


def get_sweep():
    """f32, and bf16 with both ways of rounding; plain rounding is there for contrast."""
    parameters = zipped(
        {
            "model.param_dtype": ["float32", "bfloat16", "bfloat16"],
            "optimizer.rounding": ["nearest", "stochastic", "nearest"],
        }
    )
    return product(seeds(3), parameters)
