"""What is read off compiled TPU programs agrees with what is known of them otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.plan import compile as plan_lib
from lm.plan import hlo

KINDS = {"v5e:2x2": "TPU v5 lite", "v5p:2x2x1": "TPU v5", "v6e:2x2": "TPU v6 lite"}


def compiled(topology, function, shapes, mesh=None, specs=None):
    """(its cost analysis by XLA, hlo.HloModule) of a function compiled for one chip, or a mesh of
    4.
    """
    devices = plan_lib.describe(topology)
    mesh = mesh or {"data": 1}
    grid = Mesh(
        np.asarray(devices[: len(devices) if len(mesh) > 1 else 1]).reshape(tuple(mesh.values())),
        tuple(mesh),
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(grid, spec))
        for (shape, dtype), spec in zip(shapes, specs or [PartitionSpec()] * len(shapes))
    ]
    with jax.set_mesh(grid):
        executable, text, largest, _ = plan_lib.compile_text(jax.jit(function), *arguments)
    assert largest
    return executable, hlo.HloModule(
        text, hlo.CHIPS[devices[0].device_kind], [(0, *d.coords) for d in grid.devices.flat], mesh
    )


# Share of peak by a simulation of the chip's instruction bundles, which the modelled range must
# hold.
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
    _, program = compiled(
        topology,
        lambda a, b: jnp.einsum("mk,kn->mn", a, b, preferred_element_type=jnp.bfloat16),
        [((m, k), jnp.bfloat16), ((k, n), jnp.bfloat16)],
    )
    least, middle, most = (
        program.cost(model).time["matmuls"] for model in ("roofline", "calibrated", "compiler")
    )
    flops = program.cost("roofline").flops
    assert flops == 2.0 * m * k * n
    assert least <= middle <= most
    assert least * 0.99 <= flops / program.chip.peak / share <= most * 1.01


def layer(x, w):
    for name in ("q", "k"):
        x = x + jnp.einsum("btd,df->btf", jax.nn.relu(x), w[name])
    scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x).astype(jnp.float32)).astype(x.dtype)
    return x + jnp.einsum("bts,bsd->btd", scores, x)


def stack(unroll):
    def loss(x, q, k):
        x, _ = jax.lax.scan(
            lambda x, w: (layer(x, dict(q=w[0], k=w[1])), None), x, (q, k), unroll=unroll
        )
        return jnp.sum(x.astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2))


def test_flops_are_those_that_xla_counts_and_loops_count_by_their_trips():
    shapes = [
        ((2, 256, 2048), jnp.bfloat16),
        ((4, 2048, 2048), jnp.bfloat16),
        ((4, 2048, 2048), jnp.bfloat16),
    ]
    executable, unrolled = compiled("v5e:2x2", stack(4), shapes)
    # libtpu makes a kernel of the softmax
    whole = lambda program: program.cost("roofline").flops + program.cost("roofline").kernel_flops
    # XLA's count has elementwise ones in it
    assert whole(unrolled) == pytest.approx(executable.cost_analysis()["flops"], rel=0.005)
    _, scanned = compiled("v5e:2x2", stack(1), shapes)
    assert whole(scanned) == pytest.approx(whole(unrolled), rel=0.005)
    assert scanned.cost("roofline").hbm > 0.8 * unrolled.cost("roofline").hbm and not scanned.notes


def test_collectives_have_their_axes_and_bytes():
    def exchange(x):
        def local(x):
            y = jax.lax.all_gather(x, "a", axis=0, tiled=True)
            z = jax.lax.psum_scatter(jnp.sin(y), "b", scatter_dimension=0, tiled=True)
            return z, jax.lax.psum(jnp.sum(z * z), ("a", "b"))

        return jax.shard_map(
            local,
            in_specs=PartitionSpec("a"),
            out_specs=(PartitionSpec(("b",)), PartitionSpec()),
            check_vma=False,
        )(x)

    _, program = compiled(
        "v5e:2x2", exchange, [((4096, 1024), jnp.float32)], dict(a=2, b=2), [PartitionSpec("a")]
    )
    found = {(c.kind, c.axes): c for c in program.cost("calibrated").collectives if c.wire > 1e5}
    size = 4096 * 1024 * 4
    assert found[("all-gather", ("a",))].wire == pytest.approx(size / 2)
    assert found[("reduce-scatter", ("b",))].wire == pytest.approx(size / 2)
    for c in found.values():
        # one link: a side of 2 is no ring
        assert c.seconds == pytest.approx(c.wire / program.chip.link)
    assert any(
        c.kind == "all-reduce" and set(c.axes) == {"a", "b"}
        for c in program.cost("calibrated").collectives
    )


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


def test_what_is_not_in_hbm_costs_no_bandwidth():
    on_chip, in_hbm = hlo.arrays("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[4]{0:T(128)})")
    assert on_chip.on_chip and not in_hbm.on_chip and (on_chip.bytes, in_hbm.bytes) == (2048, 16)
