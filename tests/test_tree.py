"""Prompts with their continuations in one row: the same as each by itself."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from lm import sharding, step
from lm.evals import predict
from lm.evals.predict import PredictFns
from lm.evals.tree import build_tree, merge_trees
from lm.objectives import causal
from tests.test_transformer import QUICK, config, drawn

CONTINUATIONS = [[5], [7, 8, 9], [7, 8], [7, 2], [5, 5, 5, 5], [7, 8, 9], [11, 3]]


def test_paths_spell_the_continuations():
    """Through the queries; and what a token sees is the prompt and what stands before it in a
    continuation.
    """
    tree = build_tree([1, 2, 3], CONTINUATIONS)
    for ids, path in zip(CONTINUATIONS, tree.paths):
        assert [tree.target[q] for q in path] == ids
        for depth, query in enumerate(path):
            at = tree.at[query]
            seen = [k for k in range(at + 1) if tree.until[k] > at]
            assert [tree.tokens[k] for k in seen] == [1, 2, 3] + ids[:depth] and tree.positions[
                at
            ] == len(seen) - 1
    # what is last is only predicted
    assert len(tree.tokens) == 3 + len([(7,), (7, 8), (5,), (5, 5), (5, 5, 5), (11,)])
    assert len(tree.at) == len(
        [(5,), (7,), (11,), (5, 5), (7, 8), (7, 2), (11, 3), (5, 5, 5), (7, 8, 9), (5, 5, 5, 5)]
    )
    single = build_tree([4], [[3], [2], [3]])
    assert (
        single.tokens.tolist() == [4]
        and single.at.tolist() == [0, 0]
        and single.paths == [[1], [0], [1]]
    )


@pytest.mark.parametrize("seed", range(5))
def test_random_trees(seed):
    rng = np.random.default_rng(seed)
    continuations = [rng.integers(0, 3, rng.integers(1, 7)).tolist() for _ in range(30)]
    prompt = rng.integers(0, 9, rng.integers(1, 9)).tolist()
    tree = build_tree(prompt, continuations)
    for ids, path in zip(continuations, tree.paths):
        for depth, query in enumerate(path):
            at = tree.at[query]
            assert [tree.tokens[k] for k in range(at + 1) if tree.until[k] > at] == prompt + ids[
                :depth
            ] and tree.target[query] == ids[depth]
    assert len(tree.at) == len(
        {tuple(ids[: n + 1]) for ids in continuations for n in range(len(ids))}
    )


def spelt(tree, query):
    """All that a query's answer depends on."""
    at = tree.at[query]
    return (
        [tree.tokens[k] for k in range(at + 1) if tree.until[k] > at],
        tree.positions[at],
        tree.target[query],
    )


@pytest.mark.parametrize("most", [20, 60, 500])
def test_joined_trees_ask_the_same(most):
    """Some share a beginning, some nothing; prompts that are the same, or the beginning of
    another.
    """
    rng = np.random.default_rng(0)
    stems = [rng.integers(0, 9, 12).tolist() for _ in range(3)]
    prompts = (
        [
            stems[rng.integers(3)] + rng.integers(0, 9, rng.integers(0, 6)).tolist()
            for _ in range(20)
        ]
        + [stems[0]] * 2
        + [[1], [1, 2]]
    )
    trees = [build_tree(prompt, CONTINUATIONS[: rng.integers(1, 7)]) for prompt in prompts]
    rows = merge_trees(trees, most, least=6)
    assert sorted(number for row in rows for number, _ in row.members) == list(range(len(trees)))
    for row in rows:
        for number, queries in row.members:
            ours = range(len(row.tree.at))[queries]
            assert [spelt(row.tree, q) for q in ours] == [
                spelt(trees[number], q) for q in range(len(trees[number].at))
            ]
        assert len(row.tree.tokens) <= most or len(row.members) == 1
    total, before = (
        sum(len(row.tree.tokens) for row in rows),
        sum(len(tree.tokens) for tree in trees),
    )
    assert total < 0.6 * before if most == 500 else total <= before


def fns(graphdef, sizes, batch_size):
    count = int(np.prod(list(sizes.values())))
    mesh = sharding.make_mesh(sizes, jax.devices()[:count])
    return PredictFns(
        mesh,
        batch_size=batch_size,
        length=48,
        token_logprobs=step.make_token_logprobs(graphdef, causal.token_logprobs),
        tree_logprobs=step.make_tree_logprobs(graphdef),
        make_generate=None,
        check_stop=lambda: None,
    )


def reference(graphdef, params):
    """(prompt, ids) -> (log-probability of each token, whether it is the best), by the plain
    forward pass.
    """

    @functools.partial(jax.jit, compiler_options=QUICK)
    def logprobs(tokens, segments):
        made = nnx.merge(graphdef, params)
        return jax.nn.log_softmax(
            made.logits(made(tokens, np.arange(16, dtype=np.int32)[None], segments).hidden)[0]
        )

    def call(prompt, ids):
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(prompt + ids)] = prompt + ids
        found = np.asarray(
            logprobs(tokens, (np.arange(16)[None] < len(prompt + ids)).astype(np.int32))
        )[len(prompt) - 1 : len(prompt + ids) - 1]
        return found[range(len(ids)), ids], found.argmax(-1) == ids

    return call


CASES = {
    "rope": {},
    "learned": dict(positions="learned"),
    "window": dict(window=5),
    "post-norm": dict(residual="post_norm", table_dim=24),
    "experts": dict(num_experts=4),
    "splash": dict(attention="splash_interpreted"),
}


@pytest.mark.parametrize(
    "changes, sizes, batch_size",
    [
        *(pytest.param(changes, dict(data=1), 3, id=name) for name, changes in CASES.items()),
        *(
            pytest.param({}, sizes, size, id=str(sizes))
            for sizes, size in ((dict(data=2, fsdp=2, tensor=2), 4), (dict(fsdp=2, sequence=4), 8))
        ),
        pytest.param(CASES["experts"], dict(expert=4, fsdp=2), 8, id="experts on a mesh"),
        pytest.param({}, dict(data=1), 1, id="one by one"),
    ],
)
def test_a_tree_is_each_continuation_alone(changes, sizes, batch_size, monkeypatch):
    """Prompts of many lengths, in batches of many sizes, on any mesh; with what prompts share in
    rows of its own, too.
    """
    graphdef, params = drawn(config(**changes))
    monkeypatch.setattr(predict, "merge_trees", functools.partial(merge_trees, least=2))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 40, n).tolist() for n in (1, 2, 3, 8, 11, 9, 12, 5, 2)]
    prompts += [prompts[3][:6] + [1], prompts[3][:6] + [2, 3], prompts[3][:6], prompts[3]]
    trees = [build_tree(prompt, CONTINUATIONS) for prompt in prompts]
    trees += [
        build_tree(prompts[0], [[1], [2]]),
        build_tree(prompts[4], [rng.integers(0, 40, 5).tolist() for _ in range(9)]),
    ]
    mesh_fns = fns(graphdef, sizes, batch_size)
    with jax.set_mesh(mesh_fns._mesh):
        found = mesh_fns.tree_logprobs(params, trees)
    alone = reference(drawn(config(**changes | dict(attention="xla")))[0], params)
    for tree, prompt, (logprobs, best) in zip(trees, prompts, found):
        for ids, path in zip(CONTINUATIONS, tree.paths):
            wanted, greedy = alone(prompt, ids)
            np.testing.assert_allclose(logprobs[path], wanted, atol=1e-4)
            np.testing.assert_array_equal(best[path], greedy)
    assert any(best.any() for _, best in found)


@pytest.mark.parametrize(
    "dtype, most, most_split", [("float32", 1e-5, 1e-5), ("bfloat16", 1e-4, 5e-2)]
)
def test_neither_batches_nor_meshes_matter(dtype, most, most_split):
    """But for the order of sums where the tensor axis splits them, which a rounding to bf16 can
    turn into its unit.
    """
    graphdef, params = drawn(config(param_dtype=dtype, compute_dtype=dtype))
    params = jax.tree.map(lambda p: p.astype(dtype) if p.dtype != np.float32 else p, params)
    rng = np.random.default_rng(0)
    trees = [
        build_tree(rng.integers(0, 40, n).tolist(), CONTINUATIONS) for n in (1, 5, 9, 14, 3, 3, 7)
    ]
    found = {}
    for sizes, batch_size in (
        (dict(data=1), 3),
        (dict(data=1), 1),
        (dict(data=2, fsdp=2), 4),
        (dict(data=2, sequence=4), 4),
        (dict(fsdp=2, tensor=2), 4),
    ):
        mesh_fns = fns(graphdef, sizes, batch_size)
        with jax.set_mesh(mesh_fns._mesh):
            found[str(sizes), batch_size] = np.concatenate(
                [logprobs for logprobs, _ in mesh_fns.tree_logprobs(params, trees)]
            )
    first, *others = found.values()
    for other, allowed in zip(others, (most, most, most, most_split)):
        np.testing.assert_allclose(other, first, rtol=0, atol=allowed)
    assert first.min() < -3 and first.max() > -3


def test_states_and_the_heads_rows():
    """The head's rows times the states are the logits that the plain forward pass ends in."""
    graphdef, params = drawn(config())
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    made = PredictFns(
        mesh,
        batch_size=3,
        length=48,
        token_logprobs=len,
        tree_logprobs=len,
        make_generate=None,
        check_stop=lambda: None,
        tree_states=step.make_tree_states(graphdef),
        head_rows=step.make_head_rows(graphdef),
    )
    prompts = [np.random.default_rng(n).integers(0, 40, n).tolist() for n in (1, 4, 9, 9, 2)]
    with jax.set_mesh(mesh):
        logits = made.states(params, prompts) @ made.head_rows(params, np.arange(40)).T
        whole = (
            made.states(params, prompts)
            @ made.head_rows(params, np.arange(nnx.merge(graphdef, params).head_table.shape[0])).T
        )
    assert whole.shape[0] == 5 and (whole[:, :40] == logits).all()
    alone = reference(graphdef, params)
    for prompt, row in zip(prompts, whole):
        logprobs = row - np.log(np.exp(row).sum())
        for target in (0, 7, 39):
            assert logprobs[target] == pytest.approx(alone(prompt, [target])[0][0], abs=1e-4)
