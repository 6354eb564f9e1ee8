"""How much does the way of asking matter? See README.md.

    python experiments/way_of_asking/records.py
    python -m lm.sweep --sweep=experiments/way_of_asking/sweep.py --workdir=runs/way_of_asking
    python experiments/way_of_asking/table.py --workdir=runs/way_of_asking

Every checkpoint is asked in all ways: templates x label words x examples. Two models are asked,
one that has seen one of these ways in training (`data.label_prompt`), and one that has seen none.
"""

from pathlib import Path

from configs import pydocs
from lm.evals import entries
from lm.sweep.axes import grid, product, seeds

TASK = str(Path(__file__).parent / "library.toml")
STEPS, EVERY = 450, 150

TRAINED = "\n\nLibrary:"  # with the words of `lower`
TEMPLATES = {
    "library": "{text}" + TRAINED,
    "package": "{text}\n\nPackage:",
    "code": "{text}\n\n>>> import",
}
WORDS = {
    "lower": {"python": [" python"], "numpy": [" numpy"], "scipy": [" scipy"], "jax": [" jax"]},
    "proper": {"python": [" Python"], "numpy": [" NumPy"], "scipy": [" SciPy"], "jax": [" JAX"]},
    "several": {
        "python": [" python", " Python", " stdlib"],
        "numpy": [" numpy", " NumPy", " np"],
        "scipy": [" scipy", " SciPy", " sp"],
        "jax": [" jax", " JAX", " jnp"],
    },
    "letters": {"python": [" A"], "numpy": [" B"], "scipy": [" C"], "jax": [" D"]},
}
# Four examples, one of each label; two draws of them.
EXAMPLES = {
    "none": dict(shots=0),
    "four": dict(shots=4, seeds=[0]),
    "others": dict(shots=4, seeds=[1]),
}


def ways() -> dict:
    """An eval for each template, words and examples."""
    evals = {}
    for template, text in TEMPLATES.items():
        for words, verbalizer in WORDS.items():
            for examples, prompt in EXAMPLES.items():
                evals[f"{template}_{words}_{examples}"] = entries.task(
                    TASK,
                    every=EVERY,
                    batch_size=72,  # few shapes to compile for
                    prompt=dict(templates=[text]) | prompt,
                    verbalizer=dict(words=verbalizer),
                )
    return evals


def get_config():
    c = pydocs.get_config("micro")
    c.model.num_layers = 3
    c.model.scan_unroll = 1  # evals compile for many shapes, each in a third of the time
    c.model.embed_dim = 128
    c.model.mlp_dim = 512
    c.model.num_heads = 2
    c.model.num_kv_heads = 2
    c.model.head_dim = 64
    c.model.compute_dtype = "float32"

    c.train.length = f"{STEPS} steps"
    c.evals = ways()
    c.checkpoint.every = EVERY
    c.checkpoint.best = ""
    return c


def get_sweep():
    return product(seeds(3), grid({"data.label_prompt": [TRAINED, ""]}))
