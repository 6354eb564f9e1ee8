"""Reads configurations drawn at random, of every family, beside transformers.

    python -m tests.parity.fuzz_checkpoints --cases=1000 --seed=0 --family=qwen2,llama

A case is a config.json: a small model of the family, over the attributes of transformers' class and
those that its code reads, of which up to one is left out, null or altered. transformers makes the
model that it says, with weights drawn at random. Then lm reads both files. A case is

- equal: the logits are the same;
- refused: lm refuses an attribute of it by its name, before weights are read;
- unread: transformers has no such model, and lm reads one;
- wrong: anything else. One is printed with its config.json, and is a failure.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import inspect
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from lm import config as config_lib
from lm import sharding
from lm.hf import directory as hf
from lm.hf import families
from lm.models.transformer import Config, Transformer

TOKENS = np.random.default_rng(0).integers(3, 64, (2, 40)).astype(np.int32)
MAX_PARAMETERS = 20_000_000
MAX_DIFFERENCE = 2e-4  # as a share of the largest logit

ABSENT = object()
ACTIVATIONS = "silu gelu gelu_new gelu_pytorch_tanh gelu_fast relu relu2 swish tanh quick_gelu"

# What a small model's attributes are drawn from. Lengths and windows are below the text's length
# and above it.
VALUES = dict(
    vocab_size=[64, 70],
    hidden_size=[64],
    intermediate_size=[24, 48],
    num_hidden_layers=[2, 3],
    num_attention_heads=[4, 8],
    num_key_value_heads=[1, 2, 4],
    head_dim=[4, 8, 16],
    max_position_embeddings=[24, 64, 128],
    rms_norm_eps=[1e-6, 1e-3],
    layer_norm_eps=[1e-6, 1e-3],
    layer_norm_epsilon=[1e-6, 1e-3],
    norm_epsilon=[1e-6, 1e-3],
    hidden_act=ACTIVATIONS.split(),
    activation_function=ACTIVATIONS.split(),
    afn=["gelu", "relu", "silu", "swish", "gelu_new"],
    sliding_window=[7, 100],
    max_window_layers=[0, 1, 5],
    layer_types=[["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention"] * 3],
    num_experts=[4, 6],
    num_local_experts=[4, 6],
    num_experts_per_tok=[1, 2],
    moe_intermediate_size=[16, 24],
    shared_expert_intermediate_size=[16, 40],
    decoder_sparse_step=[1, 2],
    mlp_only_layers=[[], [1]],
    router_jitter_noise=[0.0, 0.1],
    n_inner=[40, 80],
    word_embed_proj_dim=[16, 32],
    ffn_dim=[24, 48],
    pad_token_id=[0, 2],
    bos_token_id=[1],
    eos_token_id=[2],
    rope_theta=[500, 1e6],
    rotary_emb_base=[500, 1e6],
    partial_rotary_factor=[0.5, 1.0],
    rotary_pct=[0.5, 1.0],
    original_max_position_embeddings=[16, 32],
    n_embd=[64],
    n_layer=[2, 3],
    n_head=[4, 8],
    n_positions=[64, 128],
)
# Without these the model is large, or its sizes don't fit each other: a base always has them.
ALWAYS = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads max_position_embeddings num_experts num_local_experts num_experts_per_tok
    moe_intermediate_size shared_expert_intermediate_size word_embed_proj_dim ffn_dim pad_token_id
    n_embd n_layer n_head n_positions
""".split()
# Attributes that files have beside those of the classes.
EXTRAS = """
    rope_scaling rope_theta partial_rotary_factor rotary_emb_base rotary_pct
    original_max_position_embeddings is_causal layer_types sliding_window head_dim attention_bias
    mlp_bias use_mrope qk_layernorm logit_scale clip_qkv use_sliding_window
""".split()
# That transformers' own code has, and a checkpoint's files don't: how it executes the model.
INTERNAL = re.compile(r"^_|^(per_layer_config|is_heterogeneous|num_labels|output_.*|return_dict)$")


def draw_rope(rng) -> dict:
    """Parameters of a rotary embedding, under either name of their type."""
    types = ["linear", "llama3", "yarn", "dynamic", "longrope", "unknown"]
    name = "default" if rng.random() < 0.4 else str(rng.choice(types))
    parameters: dict = {str(rng.choice(["type", "rope_type"])): name}
    if name != "default":
        parameters["factor"] = float(rng.choice([1.0, 4.0]))
    if name == "llama3":
        parameters |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    if name == "longrope":
        for key in ("short_factor", "long_factor"):
            parameters[key] = rng.uniform(1, 4, 4).round(2).tolist()
    optional = dict(
        original_max_position_embeddings=[16, 32],
        rope_theta=[500.0, 1e6],
        partial_rotary_factor=[0.5, 1.0],
    )
    if name == "yarn":
        optional |= dict(
            attention_factor=[0.8, None],
            beta_fast=[16.0, None],
            beta_slow=[2, None],
            mscale=[0.7],
            mscale_all_dim=[0.9],
            truncate=[False, True],
        )
    for key, values in optional.items():
        if rng.random() < 0.4:
            parameters[key] = values[rng.integers(len(values))]
    return parameters


def draw_value(rng, name: str, like):
    """A value of an attribute; `like` is its default, which is another where it can be."""
    if name in ("rope_parameters", "rope_scaling"):
        return draw_rope(rng)
    values = VALUES.get(name)
    if values is None and isinstance(like, bool):
        return not like
    if values is None:
        values = [True, 0.5, 3, "x", [1], {"a": 1}]
    return values[rng.integers(len(values))]


@functools.cache
def config_class(family: str):
    return type(transformers.AutoConfig.for_model(family))


@functools.cache
def attributes(family: str) -> dict:
    """name -> default, of all that may stand in a config.json."""
    found = {}
    for field in dataclasses.fields(config_class(family)):
        if not INTERNAL.search(field.name):
            found[field.name] = None if field.default is dataclasses.MISSING else field.default

    # What the model's code reads besides.
    reference = transformers.AutoModelForCausalLM._model_mapping[config_class(family)]
    source = inspect.getsource(inspect.getmodule(reference))
    source += inspect.getsource(transformers.masking_utils)
    named = re.findall(r"getattr\((?:self\.)?config, \"(\w+)\"", source)
    for name in [*config_class(family).attribute_map, *named, *EXTRAS]:
        if not INTERNAL.search(name):
            found.setdefault(name, None)
    return found


def draw_base(rng, family: str) -> dict:
    """A config.json that says little more than a model's sizes."""
    own = [field.name for field in dataclasses.fields(config_class(family))]
    base: dict = dict(model_type=family)
    for name, default in attributes(family).items():
        if name in own and (name in ALWAYS or (name in VALUES and rng.random() < 0.3)):
            base[name] = draw_value(rng, name, default)
        elif name in own and isinstance(default, bool) and rng.random() < 0.15:
            base[name] = draw_value(rng, name, default)

    # Most cases are to be models that there are.
    if family == "opt":
        base["max_position_embeddings"] = 64
    if family == "helium":
        base["head_dim"] = base["hidden_size"] // base["num_attention_heads"]
    if base.get("word_embed_proj_dim") and rng.random() < 0.5:
        base["word_embed_proj_dim"] = base["hidden_size"]
    if "layer_types" in base:
        base["layer_types"] = base["layer_types"][:1] * base["num_hidden_layers"]
    if "rope_parameters" in attributes(family) and rng.random() < 0.4:
        base[str(rng.choice(["rope_parameters", "rope_scaling"]))] = draw_rope(rng)
    return base


def cases(family: str, rng):
    """Yields (config.json, name of the attribute that was changed, "" if none) without end: each
    attribute left out, null and altered, and drawn ones as they are.
    """
    while True:
        yield draw_base(rng, family), ""
        for name, default in attributes(family).items():
            changed = draw_base(rng, family)
            kind = rng.integers(3)
            if kind == 0:
                changed.pop(name, None)
            elif kind == 1:
                changed[name] = None
            else:
                changed[name] = draw_value(rng, name, default)
            yield changed, name


# --- a case ---


def make_reference(directory: Path, config: dict):
    """Writes a checkpoint of transformers' model of this config.json.

    Returns:
      (the model, config.json as transformers writes it); None if it has no such model.
    """
    (directory / "config.json").write_text(json.dumps(config))
    try:
        read = transformers.AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            size = transformers.AutoModelForCausalLM.from_config(read).num_parameters()
        if size > MAX_PARAMETERS:
            return None
        read = transformers.AutoConfig.from_pretrained(directory)
        model = transformers.AutoModelForCausalLM.from_config(read, attn_implementation="eager")
        randomize(model)
        model.save_pretrained(directory)
    except Exception:
        return None
    written = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config))
    return model, written


def randomize(model) -> None:
    """Weights large enough for every part to matter."""
    model.eval().float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            std = 0.15 if param.ndim == 1 else 0.25
            mean = param.ndim == 1 and name.endswith("weight")
            param.copy_(torch.randn(param.shape, generator=generator) * std + mean)
    model.tie_weights()


def their_logits(model):
    """None if the model can't be run."""
    try:
        with torch.no_grad():
            logits = model(torch.tensor(TOKENS).long(), use_cache=False).logits.numpy()
    except Exception:
        return None
    return logits if np.isfinite(logits).all() else None


@functools.cache
def compiled(config: Config):
    """(abstract parameters, a function from parameters to logits) of one of our models."""
    model = nnx.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    graphdef, abstract = nnx.split(model, nnx.Param)
    layout = sharding.replicated(sharding.make_mesh({}, jax.devices()[:1]))
    abstract = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=layout),
        nnx.to_pure_dict(abstract),
    )

    @jax.jit
    def logits(params):
        model = nnx.merge(graphdef, params)
        positions = np.broadcast_to(np.arange(TOKENS.shape[1], dtype=np.int32), TOKENS.shape)
        return model.logits(model(TOKENS, positions, np.ones_like(TOKENS)).hidden)

    return abstract, logits


def our_logits(directory: Path) -> np.ndarray:
    source = hf.Checkpoint(directory)
    fields = config_lib.default().model.to_dict() | source.fields
    del fields["type"]
    fields |= dict(param_dtype="float32", compute_dtype="float32")
    abstract, logits = compiled(Config(**fields))
    return np.asarray(logits(source.load(abstract)))


def run(config: dict, changed: str) -> tuple[str, str]:
    """(how a case ends, what is to be said of it)."""
    # What is refused needs no model beside it.
    try:
        families.read_config(config)
    except ValueError as error:
        # Of two attributes that don't fit each other either may be named.
        nested = [key for value in config.values() if isinstance(value, dict) for key in value]
        names = {changed, *config, *nested} - {"", "model_type"}
        if any(re.search(rf"\b{name}\b", str(error)) for name in names):
            return "refused", str(error)
        return "wrong", f"refused without the name: {error}"
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"

    with tempfile.TemporaryDirectory() as folder:
        reference = make_reference(Path(folder), config)
        theirs = None if reference is None else their_logits(reference[0])
        if theirs is None:
            return "unread", "transformers has no such model"
        try:
            ours = our_logits(Path(folder))
            if families.read_config(reference[1]) != families.read_config(config):
                return "wrong", f"another model as transformers writes it: {reference[1]}"
        except Exception as error:
            return "wrong", f"{type(error).__name__}: {error}"

    if ours.shape != theirs.shape:
        return "wrong", f"logits {ours.shape}, transformers' {theirs.shape}"
    difference = np.abs(ours - theirs).max() / max(1, np.abs(theirs).max())
    if difference > MAX_DIFFERENCE:
        return "wrong", f"logits differ by {difference:.1e}"
    return "equal", f"{difference:.1e}"


@contextlib.contextmanager
def quiet():
    """Without what transformers says of odd configurations, and without threads, which models this
    small only wait for.
    """
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Case(NamedTuple):
    config: dict
    changed: str  # the attribute that was changed; "" for a model as it was drawn
    ending: str
    reason: str


def fuzz(family: str, num_cases: int, seed: int) -> Iterator[Case]:
    """Runs cases of a family."""
    rng = np.random.default_rng([seed, *family.encode()])
    with quiet():
        for _, (config, changed) in zip(range(num_cases), cases(family, rng)):
            yield Case(config, changed, *run(config, changed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="of all families together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", default=",".join(families.FAMILIES))
    parser.add_argument("--verbose", action="store_true", help="print every case")
    options = parser.parse_args()

    names = options.family.split(",")
    num_wrong = 0
    for family in names:
        endings: collections.Counter = collections.Counter()
        for case in fuzz(family, -(-options.cases // len(names)), options.seed):
            endings[case.ending] += 1
            if case.ending == "wrong" or (options.verbose and case.ending != "equal"):
                print(f"{case.ending} {case.changed}: {case.reason}\n  {json.dumps(case.config)}")
        num_wrong += endings["wrong"]
        print(f"{family}: {dict(endings)}", flush=True)
    raise SystemExit(num_wrong > 0)


if __name__ == "__main__":
    main()
