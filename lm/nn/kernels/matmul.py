"""The matmul, and the one of its gradients that XLA's CPU compiler needs help with."""

import jax
import jax.numpy as jnp


def matmul(spec: str, a: jax.Array, b: jax.Array, dtype) -> jax.Array:
    """einsum(spec, a, b), summed in f32, in `dtype`."""
    # Accelerators would round f32 operands to bf16 or TF32: a router's choice is meant to be f32's.
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32, precision=precision).astype(
        dtype
    )


def weight_grad(spec: str, x: jax.Array, grad: jax.Array) -> jax.Array:
    """The gradient of einsum(spec, x, weight) with respect to the weight, in f32.

    Args:
      spec: "x's dims,the weight's dims->the output's dims".
      grad: of the output.
    """
    inputs, out = spec.split("->")
    x_dims, weight_dims = inputs.split(",")

    def plain(x, grad):
        return matmul(f"{x_dims},{out}->{weight_dims}", x, grad, jnp.float32)

    # XLA's CPU compiler transposes the first operand, and computes it again with all that led to
    # it. The smaller operand is to be the first one. The barrier keeps it from swapping them back.
    def transposed(x, grad):
        turned = matmul(f"{out},{x_dims}->{weight_dims[::-1]}", grad, x, jnp.float32)
        return jax.lax.optimization_barrier(turned).T

    if len(weight_dims) == 2 and x.size > grad.size:
        return jax.lax.platform_dependent(x, grad, cpu=transposed, default=plain)
    return plain(x, grad)
