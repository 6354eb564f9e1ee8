"""Schedules, optimizers from optax, and the policy for bfloat16 parameters.

The transforms see f32 gradients and f32 parameters, so moments and updates are f32 whatever the
parameters' dtype. The learning rate is applied here, not inside optax, so that it follows the run's
step even where a step was skipped.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

ROUNDINGS = ("stochastic", "nearest", "master")


def make_schedule(
    name: str, *, peak: float, total_steps: int, warmup_steps: int, decay_steps: int, final: float
) -> Callable:
    """step -> learning rate. All warm up linearly from 0 over `warmup_steps`; `final` is a share of
    `peak`.

    cosine and linear fall from the peak to final * peak at `total_steps`; wsd (warm-up, stable,
    decay; Hu et al. 2024, arXiv 2404.06395) keeps the peak and falls linearly over the last
    `decay_steps`; constant stays at the peak.

    Raises:
      ValueError: an unknown name, or phases longer than the run.
    """
    rest = total_steps - warmup_steps
    if rest < 1:
        raise ValueError(
            f"config.optimizer.warmup_steps = {warmup_steps} must be below the run's "
            f"{total_steps} steps"
        )
    if name == "wsd" and not 0 < decay_steps <= rest:
        raise ValueError(
            f"config.optimizer.decay_steps = {decay_steps}: wsd needs between 1 and {rest} (total "
            "- warm-up) steps"
        )
    schedules = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=final),
        "linear": lambda: optax.linear_schedule(peak, final * peak, rest),
        "wsd": lambda: optax.linear_schedule(
            peak, final * peak, decay_steps, transition_begin=rest - decay_steps
        ),
    }
    if name not in schedules:
        raise ValueError(f"config.optimizer.schedule = {name!r}; valid: {sorted(schedules)}")
    # The first update has step 0: (step + 1) / warmup_steps makes it count.
    warmup = lambda step: peak * jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
    return optax.join_schedules([warmup, schedules[name]()], [warmup_steps])


def _matrix_dims(axes: tuple[str, ...]) -> MuonDimensionNumbers | None:
    """How a weight multiplies: (input dims, output dims) by its logical axes, heads merged; None if
    it isn't a hidden matrix. Layers and experts are each a matrix of their own; a router's outputs
    are choices, and Adam's, as a head's are.
    """
    dims = [i for i, name in enumerate(axes) if name not in ("layers", "expert")]
    names = tuple(axes[i] for i in dims)
    if (
        len(names) < 2
        or "vocab" in names
        or "position" in names
        or "router" in names
        or "embed" not in names
    ):
        return None
    embed = [i for i in dims if axes[i] == "embed"]
    other = [i for i in dims if axes[i] != "embed"]
    reduction, output = (embed, other) if names[0] == "embed" else (other, embed)
    return MuonDimensionNumbers(tuple(reduction), tuple(output))


def decay_mask(axes) -> Any:
    """True for the parameters that weight decay applies to: matrices and tables, not norms and
    biases.
    """
    return jax.tree.map(
        lambda names: (
            len([n for n in names if n not in ("layers", "head_dim", "head_dim_bias")]) > 1
        ),
        axes,
        is_leaf=_is_axes,
    )


def _is_axes(x) -> bool:
    return isinstance(x, tuple) and all(isinstance(n, str) for n in x)


def _per_layer(tx: optax.GradientTransformation, axes) -> optax.GradientTransformation:
    """`tx` on every layer of a stack by itself, so that a block of it (Adafactor's factors and
    clipping) never spans layers.

    Stacks and other parameters get a state each, of their own trees; the stacks' has a leading
    layers dim.
    """
    stacked = {
        name
        for name, tree in axes.items()
        if all(names[0] == "layers" for names in jax.tree.leaves(tree, is_leaf=_is_axes))
    }

    def split(tree):
        return {k: v for k, v in tree.items() if k in stacked}, {
            k: v for k, v in tree.items() if k not in stacked
        }

    def init(params):
        layers, rest = split(params)
        return {"stacks": jax.vmap(tx.init)(layers) if layers else (), "rest": tx.init(rest)}

    def update(updates, state, params=None):
        (layers, rest), (layer_params, rest_params), stacks = split(updates), split(params), ()
        if layers:
            layers, stacks = jax.vmap(tx.update)(layers, state["stacks"], layer_params)
        rest, rest_state = tx.update(rest, state["rest"], rest_params)
        return layers | rest, {"stacks": stacks, "rest": rest_state}

    return optax.GradientTransformation(init, update)


def _muon(axes, c) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the hidden matrices, Adam for the rest, whose updates are
    scaled by `muon_adam_ratio`.
    """
    dims = jax.tree.map(_matrix_dims, axes, is_leaf=_is_axes)
    labels = jax.tree.map(
        lambda names: "adam" if _matrix_dims(names) is None else "muon", axes, is_leaf=_is_axes
    )
    is_dims = lambda x: x is None or isinstance(x, MuonDimensionNumbers)

    def muon_dims(updates):  # what `partition` masks is masked here too
        return jax.tree.map(
            lambda d, u: optax.MaskedNode() if isinstance(u, optax.MaskedNode) else d,
            dims,
            updates,
            is_leaf=lambda x: is_dims(x) or isinstance(x, optax.MaskedNode),
        )

    def match_adam_rms(updates, state, params=None):
        # Scales the orthogonal update to Adam's usual RMS, 0.2 (Liu et al. 2025, arXiv 2502.16982,
        # eq. 4).
        del params

        def scale(u, d):
            if isinstance(u, optax.MaskedNode):
                return u
            size = lambda dims: math.prod(u.shape[i] for i in dims)
            return u * (0.2 * max(size(d.reduction_axis), size(d.output_axis)) ** 0.5)

        return jax.tree.map(
            scale, updates, muon_dims(updates), is_leaf=lambda x: isinstance(x, optax.MaskedNode)
        ), state

    muon = optax.chain(
        scale_by_muon(beta=c.momentum, weight_dimension_numbers=muon_dims),
        optax.GradientTransformation(lambda params: optax.EmptyState(), match_adam_rms),
    )
    adam = optax.chain(optax.scale_by_adam(c.b1, c.b2, c.eps), optax.scale(c.muon_adam_ratio))
    return optax.partition({"muon": muon, "adam": adam}, labels)


OPTIMIZERS = {
    "adamw": lambda axes, c: optax.scale_by_adam(c.b1, c.b2, c.eps),
    "lion": lambda axes, c: optax.scale_by_lion(c.b1, c.b2),
    # Shazeer and Stern 2018, arXiv 1804.04235: relative step sizes, factored second moment, update
    # clipping; each layer by itself.
    "adafactor": lambda axes, c: _per_layer(
        optax.chain(
            optax.scale_by_factored_rms(decay_rate=c.adafactor_decay),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        ),
        axes,
    ),
    "muon": _muon,
}


def stochastic_round(key: jax.Array, x: jax.Array) -> jax.Array:
    """f32 -> bf16, up or down with the probability that makes the expectation x (values must be
    finite).

    bf16 is the upper half of an f32: adding 16 random bits to the lower half carries into the upper
    half that often.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + (jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32))
    upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


def path_key(key: jax.Array, path) -> jax.Array:
    """A key of its own for the parameter at `path`, the same on every mesh and whatever other
    parameters there are.
    """
    return jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """optax's transform, the schedule, and how an f32 update reaches the stored parameters.

    Attributes:
      rounding: for bf16 parameters, "stochastic" rounding of the f32 sum, an f32 "master" copy in
        the optimizer state (the parameters are its rounding), or "nearest": plain rounding, which
        loses most small updates. f32 parameters ignore it.
      ema_decay: 0, or the decay of an f32 moving average of the weights, which evaluation then
        uses.
    """

    transform: optax.GradientTransformation
    schedule: Callable
    rounding: str
    ema_decay: float

    def init(self, params) -> dict:
        # `+ 0` everywhere: the state must not share buffers with the parameters, both are donated.
        f32 = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        copy = lambda tree: jax.tree.map(lambda p: p + 0.0, tree)
        state = {"transform": self.transform.init(f32)}
        if self.rounding == "master":
            state["master"] = copy(f32)
        if self.ema_decay:
            state["ema"] = copy(f32)
        return state

    def update(self, grads, state: dict, params, step: jax.Array, key: jax.Array):
        """One update.

        Args:
          grads: f32, the mean gradient.
          step: int32 scalar, the number of updates before this one; the schedule's argument.
          key: for stochastic rounding.

        Returns:
          The new parameters, the new state, and {name: scalar}. `updates_lost` is the share of
          nonzero f32 updates that leave
          no trace: the stored weight is unchanged and, where more than bf16 is kept (master) or
            reached in expectation
          (stochastic), the f32 sum is unchanged too.
        """
        old = (
            state["master"]
            if "master" in state
            else jax.tree.map(lambda p: p.astype(jnp.float32), params)
        )
        with jax.numpy_dtype_promotion("standard"):  # optax adds its integer counters to floats
            learning_rate = self.schedule(step)
            updates, transform = self.transform.update(grads, state["transform"], old)
        updates = jax.tree.map(lambda u: -learning_rate * u, updates)
        new = jax.tree.map(jnp.add, old, updates)
        new_state = {"transform": transform}

        def store(path, value, param):
            if param.dtype == jnp.bfloat16 and self.rounding == "stochastic":
                return stochastic_round(path_key(key, path), value)
            return value.astype(param.dtype)

        new_params = jax.tree_util.tree_map_with_path(store, new, params)
        if "master" in state:
            new_state["master"] = new
        if "ema" in state:
            new_state["ema"] = jax.tree.map(
                lambda e, p: self.ema_decay * e + (1 - self.ema_decay) * p, state["ema"], new
            )
        kept = (
            jax.tree.map(lambda p: p.astype(jnp.float32), new_params)
            if self.rounding == "nearest"
            else new
        )
        count = lambda tree: sum(jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(tree))
        nonzero = jax.tree.map(lambda u: u != 0, updates)
        lost = count(jax.tree.map(lambda n, k, o: n & (k == o), nonzero, kept, old))
        metrics = {
            "learning_rate": learning_rate,
            "update_norm": optax.global_norm(updates),
            "updates_lost": lost / jnp.maximum(count(nonzero), 1.0),
        }
        return new_params, new_state, metrics

    def eval_params(self, params, state: dict):
        """The parameters to evaluate: the moving average where there is one, in the parameters'
        dtypes.
        """
        if "ema" not in state:
            return params
        return jax.tree.map(lambda e, p: e.astype(p.dtype), state["ema"], params)


def make_optimizer(config, axes, total_steps: int) -> Optimizer:
    """The optimizer of `config` (the run's config.optimizer) for parameters with these logical
    axes.

    Raises:
      ValueError: an unknown optimizer, schedule or rounding; see `make_schedule`.
    """
    c = config
    if c.name not in OPTIMIZERS:
        raise ValueError(f"config.optimizer.name = {c.name!r}; valid: {sorted(OPTIMIZERS)}")
    if c.rounding not in ROUNDINGS:
        raise ValueError(f"config.optimizer.rounding = {c.rounding!r}; valid: {list(ROUNDINGS)}")
    transforms = [optax.clip_by_global_norm(c.clip_norm)] if c.clip_norm else []
    transforms.append(OPTIMIZERS[c.name](axes, c))
    if c.weight_decay:
        transforms.append(optax.add_decayed_weights(c.weight_decay, decay_mask(axes)))
    schedule = make_schedule(
        c.schedule,
        peak=c.learning_rate,
        total_steps=total_steps,
        warmup_steps=c.warmup_steps,
        decay_steps=c.decay_steps,
        final=c.final_learning_rate,
    )
    return Optimizer(optax.chain(*transforms), schedule, c.rounding, c.ema_decay)
