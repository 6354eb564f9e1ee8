"""Prompts with their continuations in one row: the same as each continuation by itself."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from lm import build, sharding
from lm import config as config_lib
from lm.evals import causal_answers
from lm.evals.predict import PredictFns, Prompt, Question
from lm.evals.tree import build_tree, merge_trees
from tests.helpers import model_config, random_model

CONTINUATIONS = [[5], [7, 8, 9], [7, 8], [7, 2], [5, 5, 5, 5], [7, 8, 9], [11, 3]]


def context_of(tree, query):
    """The tokens that a query's answer depends on: those that its parent attends to."""
    parent = tree.query_parents[query]
    # As in the model's mask (lm/nn/masks.py): `until` says how far a token is seen.
    is_seen = tree.until[: parent + 1] > parent
    return tree.tokens[: parent + 1][is_seen].tolist()


def assert_spells(tree, prompt, continuations):
    """Each continuation is asked for token by token, after the prompt and what precedes the token
    in the continuation.
    """
    for ids, queries in zip(continuations, tree.continuation_queries):
        assert tree.query_targets[queries].tolist() == ids
        for depth, query in enumerate(queries):
            context = prompt + ids[:depth]
            assert context_of(tree, query) == context
            assert tree.positions[tree.query_parents[query]] == len(context) - 1


def test_queries_spell_the_continuations():
    tree = build_tree([1, 2, 3], CONTINUATIONS)
    assert_spells(tree, [1, 2, 3], CONTINUATIONS)

    # What is last in a continuation, and in none before its end, is only predicted.
    beginnings = [(7,), (7, 8), (5,), (5, 5), (5, 5, 5), (11,)]
    assert len(tree.tokens) == 3 + len(beginnings)
    ends = [(7, 2), (7, 8, 9), (5, 5, 5, 5), (11, 3)]
    assert len(tree.query_targets) == len(beginnings) + len(ends)


def test_single_tokens_add_nothing_to_the_prompt():
    tree = build_tree([4], [[3], [2], [3]])

    assert tree.tokens.tolist() == [4]
    assert tree.query_parents.tolist() == [0, 0]
    assert tree.continuation_queries == [[1], [0], [1]]


@pytest.mark.parametrize("seed", range(5))
def test_random_trees(seed):
    """Their continuations begin alike so often that most branches are shared."""
    rng = np.random.default_rng(seed)
    continuations = [rng.integers(0, 3, rng.integers(1, 7)).tolist() for _ in range(30)]
    prompt = rng.integers(0, 9, rng.integers(1, 9)).tolist()

    tree = build_tree(prompt, continuations)

    assert_spells(tree, prompt, continuations)
    # Each beginning of a continuation is asked for once.
    beginnings = set()
    for ids in continuations:
        for end in range(1, len(ids) + 1):
            beginnings.add(tuple(ids[:end]))
    assert len(tree.query_targets) == len(beginnings)


def all_queries(tree, numbers):
    """What the answers to queries depend on, in their order."""
    queries = []
    for q in numbers:
        position = tree.positions[tree.query_parents[q]]
        queries.append((context_of(tree, q), position, tree.query_targets[q]))
    return queries


@pytest.mark.parametrize("max_tokens", [20, 60, 500])
def test_merged_trees_ask_the_same(max_tokens):
    """Some prompts share a beginning, some nothing; some are the same, or the beginning of another
    one.
    """
    rng = np.random.default_rng(0)
    beginnings = [rng.integers(0, 9, 12).tolist() for _ in range(3)]
    prompts = []
    for _ in range(20):
        prompts.append(
            beginnings[rng.integers(3)] + rng.integers(0, 9, rng.integers(0, 6)).tolist()
        )
    prompts += [beginnings[0], beginnings[0], [1], [1, 2]]
    trees = [build_tree(prompt, CONTINUATIONS[: rng.integers(1, 7)]) for prompt in prompts]

    rows = merge_trees(trees, max_tokens, min_shared=6)

    members = [number for row in rows for number, _ in row.members]
    assert sorted(members) == list(range(len(trees)))
    for row in rows:
        assert len(row.tree.tokens) <= max_tokens or len(row.members) == 1
        for number, queries in row.members:
            in_row = range(len(row.tree.query_targets))[queries]
            alone = range(len(trees[number].query_targets))
            assert all_queries(row.tree, in_row) == all_queries(trees[number], alone)

    merged_tokens = sum(len(row.tree.tokens) for row in rows)
    tokens = sum(len(tree.tokens) for tree in trees)
    if max_tokens == 500:
        assert merged_tokens < 0.6 * tokens
    else:
        assert merged_tokens <= tokens


def get_mesh(sizes):
    return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def make_fns(graphdef, sizes, batch_size):
    objective = build.make_objective(config_lib.default())
    eval_fns = build.make_eval_fns(graphdef, objective, get_mesh(sizes))
    return PredictFns(eval_fns, batch_size=batch_size, length=48)


def make_reference(graphdef, params):
    """Returns a function (prompt, ids) -> (log-probability of each token, whether it is the best),
    by the plain forward pass.
    """

    @jax.jit
    def logprobs(tokens, segments):
        model = nnx.merge(graphdef, params)
        positions = np.arange(16, dtype=np.int32)[None]
        hidden = model(tokens, positions, segments).hidden
        return jax.nn.log_softmax(model.logits(hidden)[0])

    def score(prompt, ids):
        whole = prompt + ids
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(whole)] = whole
        segments = (np.arange(16)[None] < len(whole)).astype(np.int32)

        before_ids = slice(len(prompt) - 1, len(whole) - 1)
        rows = np.asarray(logprobs(tokens, segments))[before_ids]
        return rows[range(len(ids)), ids], rows.argmax(-1) == ids

    return score


MODELS = {
    "rope": {},
    "learned": dict(positions="learned"),
    "window": dict(window=5),
    "post-norm": dict(residual="post_norm", table_dim=24),
    "experts": dict(num_experts=4),
    "splash": dict(attention="splash_interpreted"),
}
CASES = [
    *(pytest.param(changes, dict(data=1), 3, id=name) for name, changes in MODELS.items()),
    pytest.param({}, dict(data=2, fsdp=2, tensor=2), 4, id="tensor mesh"),
    pytest.param({}, dict(fsdp=2, sequence=4), 8, id="sequence mesh"),
    pytest.param(MODELS["experts"], dict(expert=4, fsdp=2), 8, id="experts on a mesh"),
    pytest.param({}, dict(data=1), 1, id="one by one"),
]


@pytest.mark.parametrize("changes, sizes, batch_size", CASES)
def test_a_tree_is_each_continuation_alone(changes, sizes, batch_size, monkeypatch):
    """With prompts of many lengths, in batches of many sizes, on any mesh; also where what prompts
    share is in one row.
    """
    graphdef, params = random_model(model_config(**changes))
    monkeypatch.setattr(causal_answers, "merge_trees", functools.partial(merge_trees, min_shared=2))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 40, n).tolist() for n in (1, 2, 3, 8, 11, 9, 12, 5, 2)]
    # Some that begin alike, and one twice.
    prompts += [prompts[3][:6] + [1], prompts[3][:6] + [2, 3], prompts[3][:6], prompts[3]]
    questions = [Question(Prompt(prompt), CONTINUATIONS) for prompt in prompts]
    # Trees of other shapes beside them.
    many = [rng.integers(0, 40, 5).tolist() for _ in range(9)]
    questions += [
        Question(Prompt(np.array(prompts[0])), [[1], [2]]),
        Question(Prompt(np.array(prompts[4])), many),
    ]

    fns = make_fns(graphdef, sizes, batch_size)
    with jax.set_mesh(get_mesh(sizes)):
        all_answers = fns.logprobs(params, questions)

    plain_graphdef, _ = random_model(model_config(**changes | dict(attention="xla")))
    reference = make_reference(plain_graphdef, params)
    assert len(all_answers) == len(questions)
    num_best = 0
    for question, answers in zip(questions, all_answers):
        assert len(answers) == len(question.continuations)
        for ids, answer in zip(question.continuations, answers):
            wanted_logprobs, wanted_is_best = reference(list(question.prompt.ids), ids)
            assert answer.logprobs.dtype == np.float32
            np.testing.assert_allclose(answer.logprobs, wanted_logprobs, atol=1e-4)
            np.testing.assert_array_equal(answer.is_best, wanted_is_best)
            num_best += answer.is_best.sum()
    assert num_best


@pytest.mark.parametrize(
    "dtype, tolerance, tensor_tolerance", [("float32", 1e-5, 1e-5), ("bfloat16", 1e-4, 5e-2)]
)
def test_neither_batches_nor_meshes_matter(dtype, tolerance, tensor_tolerance):
    """But for the order of sums where the tensor axis splits them: a rounding to bf16 can turn a
    difference in the last bit of f32 into one of bf16.
    """
    graphdef, params = random_model(model_config(param_dtype=dtype, compute_dtype=dtype))

    def to_dtype(p):
        return p if p.dtype == np.float32 else p.astype(dtype)  # norms keep f32 parameters

    params = jax.tree.map(to_dtype, params)
    rng = np.random.default_rng(0)
    questions = []
    for length in (1, 5, 9, 14, 3, 3, 7):
        questions.append(Question(Prompt(rng.integers(0, 40, length)), CONTINUATIONS))

    def logprobs(sizes, batch_size):
        fns = make_fns(graphdef, sizes, batch_size)
        with jax.set_mesh(get_mesh(sizes)):
            all_answers = fns.logprobs(params, questions)
        values = []
        for answers in all_answers:
            values += [answer.logprobs for answer in answers]
        return np.concatenate(values)

    first = logprobs(dict(data=1), 3)
    for sizes, batch_size, allowed in (
        (dict(data=1), 1, tolerance),
        (dict(data=2, fsdp=2), 4, tolerance),
        (dict(data=2, sequence=4), 4, tolerance),
        (dict(fsdp=2, tensor=2), 4, tensor_tolerance),
    ):
        np.testing.assert_allclose(logprobs(sizes, batch_size), first, rtol=0, atol=allowed)
    assert first.min() < -3 < first.max()  # the model has opinions


def test_states_and_the_heads_rows():
    """The head's rows times the states are the logits that the plain forward pass ends in."""
    graphdef, params = random_model(model_config())
    fns = make_fns(graphdef, {}, 3)
    prompts = [np.random.default_rng(n).integers(0, 40, n).tolist() for n in (1, 4, 9, 9, 2)]
    table_size = nnx.merge(graphdef, params).head_table.shape[0]

    with jax.set_mesh(get_mesh({})):
        states = fns.states(params, list(map(Prompt, prompts)))
        some_logits = states @ fns.head_rows(params, np.arange(40)).T
        logits = states @ fns.head_rows(params, np.arange(table_size)).T

    # Rows of the head can be asked for one by one.
    assert logits.shape[0] == 5
    assert (logits[:, :40] == some_logits).all()
    # They are logits up to a constant at most: the log-probabilities agree.
    reference = make_reference(graphdef, params)
    for prompt, row in zip(prompts, logits):
        logprobs = row - np.log(np.exp(row).sum())
        for target in (0, 7, 39):
            (wanted,), _ = reference(prompt, [target])
            assert logprobs[target] == pytest.approx(wanted, abs=1e-4)


def test_a_causal_model_reads_only_ids():
    fns = make_fns(random_model(model_config())[0], {}, 3)
    prompt = Prompt([1, 2], {"image": np.zeros((4, 4)), "token_types": np.zeros(2)})

    with pytest.raises(ValueError, match=r"arrays \['image', 'token_types'\]; a causal model"):
        fns.logprobs(None, [Question(prompt, [[3]])])
    with pytest.raises(ValueError, match="a causal model reads only ids"):
        fns.states(None, [prompt])
