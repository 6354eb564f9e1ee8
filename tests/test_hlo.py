"""What is read off compiled TPU programs agrees with what is known of them otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.plan import compile as plan_lib
from lm.plan import hlo

REPLICATED = PartitionSpec()


def analyse(topology, function, shapes, mesh=None, specs=None):
    """Compiles a function for one chip, or for a mesh of all of a topology's.

    Returns:
      (the executable, its hlo.HloModule).
    """
    devices = plan_lib.describe(topology)
    if mesh is None:
        mesh = {"data": 1}
        devices = devices[:1]
    grid = Mesh(np.asarray(devices).reshape(tuple(mesh.values())), tuple(mesh))

    specs = specs or [REPLICATED] * len(shapes)
    arguments = []
    for (shape, dtype), spec in zip(shapes, specs):
        layout = NamedSharding(grid, spec)
        arguments.append(jax.ShapeDtypeStruct(shape, dtype, sharding=layout))
    with jax.set_mesh(grid):
        compiled = plan_lib.compile_program(jax.jit(function), *arguments)
    assert compiled.largest_buffers

    chip = hlo.CHIPS[devices[0].device_kind]
    coordinates = [(0, *device.coords) for device in grid.devices.flat]
    module = hlo.HloModule(compiled.hlo_text, chip, coordinates, mesh)
    return compiled.executable, module


# (topology, sizes of the matmul, share of the peak by a simulation of the chip's instruction
# bundles). The modelled range must hold the share.
BUNDLES = [
    ("v5e:2x2", (4096, 4096, 4096), 0.971),
    ("v5e:2x2", (8192, 8192, 8192), 0.962),
    ("v6e:2x2", (4096, 4096, 4096), 0.939),
    ("v6e:2x2", (8192, 8192, 8192), 0.904),
    ("v5e:2x2", (2048, 2048, 2048), 0.949),
    ("v6e:2x2", (2048, 2048, 2048), 0.671),
]


@pytest.mark.parametrize("topology, sizes, share", BUNDLES)
def test_plain_matmuls_lie_in_the_range(topology, sizes, share):
    m, k, n = sizes

    def matmul(a, b):
        return jnp.einsum("mk,kn->mn", a, b, preferred_element_type=jnp.bfloat16)

    _, module = analyse(topology, matmul, [((m, k), jnp.bfloat16), ((k, n), jnp.bfloat16)])
    seconds = {model: module.cost(model).time["matmuls"] for model in hlo.MODELS}

    flops = module.cost("roofline").flops
    assert flops == 2.0 * m * k * n
    assert seconds["roofline"] <= seconds["calibrated"] <= seconds["compiler"]
    simulated = flops / module.chip.peak_flops / share
    assert seconds["roofline"] * 0.99 <= simulated <= seconds["compiler"] * 1.01


def layer(x, weights):
    """Two matmuls with weights, and an attention without a mask."""
    for name in ("q", "k"):
        x = x + jnp.einsum("btd,df->btf", jax.nn.relu(x), weights[name])
    scores = jnp.einsum("btd,bsd->bts", x, x).astype(jnp.float32)
    probs = jax.nn.softmax(scores).astype(x.dtype)
    return x + jnp.einsum("bts,bsd->btd", probs, x)


def gradient_of_layers(unroll):
    """The gradient of a scan over layers, `unroll` of them in an iteration."""

    def body(x, weights):
        q, k = weights
        return layer(x, dict(q=q, k=k)), None

    def loss(x, q, k):
        x, _ = jax.lax.scan(body, x, (q, k), unroll=unroll)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2))


@pytest.mark.slow
def test_flops_are_those_that_xla_counts_and_loops_count_by_their_trips():
    shapes = [
        ((2, 256, 2048), jnp.bfloat16),
        ((4, 2048, 2048), jnp.bfloat16),
        ((4, 2048, 2048), jnp.bfloat16),
    ]
    executable, unrolled = analyse("v5e:2x2", gradient_of_layers(unroll=4), shapes)
    _, scanned = analyse("v5e:2x2", gradient_of_layers(unroll=1), shapes)

    # libtpu makes a kernel of the softmax, whose FLOPs are counted apart.
    unrolled_cost = unrolled.cost("roofline")
    unrolled_flops = unrolled_cost.flops + unrolled_cost.kernel_flops
    scanned_cost = scanned.cost("roofline")
    scanned_flops = scanned_cost.flops + scanned_cost.kernel_flops

    # XLA's count has elementwise ones in it.
    assert unrolled_flops == pytest.approx(executable.cost_analysis()["flops"], rel=0.005)
    assert scanned_flops == pytest.approx(unrolled_flops, rel=0.005)
    assert scanned_cost.hbm_bytes > 0.8 * unrolled_cost.hbm_bytes
    assert not scanned.notes


def exchange(x):
    """A gather over a, a scatter over b, and a sum over both."""

    def local(x):
        y = jax.lax.all_gather(x, "a", axis=0, tiled=True)
        z = jax.lax.psum_scatter(jnp.sin(y), "b", scatter_dimension=0, tiled=True)
        return z, jax.lax.psum(jnp.sum(z * z), ("a", "b"))

    return jax.shard_map(
        local,
        in_specs=PartitionSpec("a"),
        out_specs=(PartitionSpec(("b",)), REPLICATED),
        check_vma=False,
    )(x)


def test_collectives_have_their_axes_and_bytes():
    shape = (4096, 1024)
    _, module = analyse(
        "v5e:2x2", exchange, [(shape, jnp.float32)], dict(a=2, b=2), [PartitionSpec("a")]
    )
    collectives = module.cost("calibrated").collectives
    large = {(c.opcode, c.axes): c for c in collectives if c.interconnect_bytes > 1e5}

    # In a ring of two each device sends half.
    half = 4096 * 1024 * 4 / 2
    assert large["all-gather", ("a",)].interconnect_bytes == pytest.approx(half)
    assert large["reduce-scatter", ("b",)].interconnect_bytes == pytest.approx(half)
    for collective in large.values():
        # One link: a side of 2 is no ring.
        seconds = collective.interconnect_bytes / module.chip.link_bandwidth
        assert collective.seconds == pytest.approx(seconds)
    assert any(c.opcode == "all-reduce" and set(c.axes) == {"a", "b"} for c in collectives)


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,2]<=[4]", [0, 1]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("no groups", [0, 1, 2, 3]),
    ],
)
def test_groups(text, group):
    assert hlo.first_group(text, 4) == group


def test_arrays_in_vmem_are_marked():
    on_chip, in_hbm = hlo.arrays("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0:T(128)})")
    assert on_chip.on_chip
    assert on_chip.nbytes == 2048
    assert not in_hbm.on_chip
    assert in_hbm.nbytes == 16
