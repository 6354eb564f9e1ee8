"""From examples to units to rows: what fits, what is learnt in a row, streams of units, and that
packing changes no loss.

Requirement N is that of the list of faults of other systems.
"""

import json
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm import build, limited
from lm import config as config_lib
from lm.data import batch as batch_contract
from lm.data import chat, conversations, pack, templates, units
from lm.data.conversations import Example
from lm.data.tokenizer import ByteTokenizer
from lm.objectives import causal
from tests.helpers import assert_trees_close, model_config, random_model

TOKENIZER = chat.with_template(ByteTokenizer(), "plain")
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
LENGTH = 32
UNITS = batch_contract.ARRAYS | batch_contract.UNIT_ARRAYS


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Templates are rendered here, which is faster; tests/test_chat_ids.py has them elsewhere."""

    def call(function, **arguments):
        assert function == "lm.data.templates:render_all"
        return templates.render_all(**json.loads(json.dumps(arguments)))

    monkeypatch.setattr(limited, "call", call)


def messages(*texts):
    """Questions and answers in turn."""
    roles = ("user", "assistant")
    return [dict(role=roles[i % 2], content=text) for i, text in enumerate(texts)]


def conversation(*texts, name="n"):
    return Example((messages(*texts),), "conversation", 0.0, None, name, "web")


def pair(prompt, chosen, rejected, value=0.0, name="n"):
    both = (messages(*prompt, chosen), messages(*prompt, rejected))
    return Example(both, "pair", value, None, name, "")


def judged(prompt, answer, value, name="n"):
    return Example((messages(prompt, answer),), "judged", value, None, name, "")


def encode(*examples, learnt="answers", too_long="drop", length=LENGTH, seed=0, by=TOKENIZER):
    documents = conversations.as_documents(examples)
    return units.encode(documents, by, learnt=learnt, too_long=too_long, length=length, seed=seed)


def encode_one(example, **arguments):
    (unit,) = encode(example, **arguments).items
    return unit


def ids(*parts):
    """Ids of texts and special tokens."""
    found = []
    for part in parts:
        found += [part] if isinstance(part, int) else list(part.encode())
    return found


def values(unit, name):
    return unit.arrays[name].tolist()


def learnt_targets(arrays):
    return arrays["targets"][arrays["weights"] > 0].tolist()


# --- units ---


def test_a_conversation():
    """Requirement 3: all targets that count are the answers, each with its end."""
    unit = encode_one(conversation("ab", "cd", "e", "fg", name="f:1"))
    whole = ids(BOS, "abcd", EOS, "efg", EOS)
    assert values(unit, "tokens") == whole[:-1]
    assert values(unit, "targets") == whole[1:]
    assert values(unit, "weights") == [0, 0, 1, 1, 1, 0, 1, 1, 1]
    assert values(unit, "positions") == list(range(9))
    assert values(unit, "part") == [0] * 9 and values(unit, "values") == [0] * 9
    assert (unit.name, unit.source) == ("f:1", "web")
    assert learnt_targets(unit.arrays) == ids("cd", EOS, "fg", EOS)

    last = encode_one(conversation("ab", "cd", "e", "fg"), learnt="last_answer")
    assert learnt_targets(last.arrays) == ids("fg", EOS)
    for name, dtype in dict(tokens="int32", targets="int32", weights="float32").items():
        assert unit.arrays[name].dtype == dtype


@pytest.mark.parametrize("learnt", ["answers", "last_answer"])
def test_a_pair_is_two_parts(learnt):
    unit = encode_one(pair(("p", "q", "r"), "good", "bad", 1.5), learnt=learnt)
    # Both are whole: the last token is an input too, without a target.
    chosen, rejected = ids(BOS, "pq", EOS, "rgood", EOS), ids(BOS, "pq", EOS, "rbad", EOS)
    assert values(unit, "tokens") == chosen + rejected
    assert values(unit, "targets") == [*chosen[1:], 0, *rejected[1:], 0]
    assert values(unit, "part") == [0] * len(chosen) + [1] * len(rejected)
    assert values(unit, "positions") == [*range(len(chosen)), *range(len(rejected))]
    assert set(values(unit, "values")) == {1.5}
    # Only the last answers are compared.
    assert learnt_targets(unit.arrays) == ids("good", EOS, "bad", EOS)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_judged_answer_stands_beside_anothers(count, seed):
    """The others' answers are dealt without anyone getting its own."""
    letters = "abcdefg"[:count]
    examples = [
        judged(letter, letter.upper() * 2, 1.0 - 2 * (i % 2)) for i, letter in enumerate(letters)
    ]
    taken = []
    for i, unit in enumerate(encode(*examples, seed=seed).items):
        own = ids(BOS, letters[i], letters[i].upper() * 2, EOS)
        part = unit.arrays["part"]
        assert unit.arrays["tokens"][part == 0].tolist() == own
        other = unit.arrays["tokens"][part == 1].tolist()
        assert other[:2] == own[:2] and other[-1] == EOS
        assert other[2] == other[3] != own[2]
        assert unit.arrays["weights"][part == 1].tolist() == [0, 1, 1, 1, 0]
        assert set(values(unit, "values")) == {1.0 - 2 * (i % 2)}
        taken.append(chr(other[2]))
    assert sorted(taken) == sorted(letters.upper())


def test_the_others_answers_are_a_matter_of_the_seed():
    examples = [judged(letter, letter, 1.0) for letter in "abcdefgh"]
    prints = [encode(*examples, seed=seed).fingerprint for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    with pytest.raises(ValueError, match="one judged example; wanted two at least"):
        encode(judged("a", "b", 1.0))


def test_names_and_order_are_kept_whatever_the_tools(monkeypatch):
    """All sets of tools go to few processes: sets of function calls have others in each example."""
    calls, render_here = [], limited.call
    monkeypatch.setattr(limited, "call", lambda *a, **b: calls.append(1) or render_here(*a, **b))
    source = (
        "{{ tools | length if tools }}{{ messages[0].content }}{% generation %}a{{ eos_token }}"
    )
    tokenizer = TOKENIZER.with_chat_template(source + "{% endgeneration %}")
    examples = []
    for i in range(6):
        example = conversation(f"{i}", "a", name=f"n{i}")
        examples.append(example._replace(tools=[None, [{}], [{}, {}]][i % 3]))
    encoded = encode(*examples, by=tokenizer)
    assert [unit.name for unit in encoded.items] == [f"n{i}" for i in range(6)]
    texts = [tokenizer.decode(unit.arrays["tokens"]) for unit in encoded.items]
    assert texts == ["0a", "11a", "22a", "3a", "14a", "25a"]
    assert encoded.kind == "conversation" and len(calls) <= 4


def test_a_row_for_each_answer_is_a_unit_for_each():
    """Requirement 9."""
    source = (
        "{% for m in messages %}{{ m.content[-1:] if m.role == 'assistant' and not loop.last "
        "else m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    tokenizer = TOKENIZER.with_chat_template(source)
    thoughts = conversation("1", "x2", "3", "y4")
    encoded = encode(thoughts, by=tokenizer)
    assert [learnt_targets(unit.arrays) for unit in encoded.items] == [
        ids("x2", EOS),
        ids("y4", EOS),
    ]
    # The last one alone, where that is asked for, and in pairs.
    last = encode_one(thoughts, by=tokenizer, learnt="last_answer")
    assert learnt_targets(last.arrays) == ids("y4", EOS)
    both = encode_one(pair(("1", "x2", "3"), "y4", "z5"), by=tokenizer)
    assert values(both, "tokens") == ids("12", EOS, "3y4", EOS, "12", EOS, "3z5", EOS)


# --- what doesn't fit, and what teaches nothing ---


def left_out(caplog):
    return [line for line in caplog.messages if "left out" in line]


def test_a_row_holds_as_many_inputs(caplog):
    """Requirement 6: of a conversation all tokens but the last are inputs, of a pair all."""
    fits, longer = conversation("a" * 20, "b" * 11), conversation("a" * 20, "b" * 12, name="f:2")
    assert len(values(encode_one(fits), "tokens")) == LENGTH
    assert len(encode(fits, longer, fits)) == 2
    (line,) = left_out(caplog)
    assert "1 left out: longer than config.data.length" in line and line.endswith("(first: f:2)")

    fits, longer = pair(("a" * 10,), "b" * 4, "c" * 4), pair(("a" * 10,), "b" * 4, "c" * 5)
    assert len(values(encode_one(fits), "tokens")) == LENGTH
    with pytest.raises(ValueError, match="no example is left: .*longer than config.data.length"):
        encode(longer)


def test_cut_prompt():
    """Requirement 6: the beginning goes, but for BOS."""
    prompt = "".join(map(chr, range(65, 95)))  # 30 characters
    unit = encode_one(conversation(prompt, "xyz"), too_long="cut_prompt")
    assert values(unit, "tokens") == ids(BOS, prompt[-28:], "xyz")
    assert learnt_targets(unit.arrays) == ids("xyz", EOS)
    # One that fits stays whole.
    assert len(values(encode_one(conversation("a", "b"), too_long="cut_prompt"), "tokens")) == 3

    both = encode_one(pair((prompt,), "good", "bad"), too_long="cut_prompt")
    tokens, part = both.arrays["tokens"], both.arrays["part"]
    assert len(tokens) in (LENGTH, LENGTH - 1)
    for number, answer in enumerate(("good", "bad")):
        own = tokens[part == number].tolist()
        kept = len(own) - len(answer) - 2
        assert own == ids(BOS, prompt[-kept:], answer, EOS)
    assert learnt_targets(both.arrays) == ids("good", EOS, "bad", EOS)


def test_cut_prompt_without_bos():
    tokenizer = TOKENIZER.with_chat_template(
        "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    unit = encode_one(conversation("p" * 40 + "q", "xyz"), too_long="cut_prompt", by=tokenizer)
    assert values(unit, "tokens") == ids("p" * 28, "q", "xyz")


def test_cut_prompt_never_learns_the_end_of_an_answer_without_its_beginning(caplog):
    """Requirement 6."""
    # Of two answers the first loses its beginning, and isn't learnt.
    unit = encode_one(conversation("a", "b" * 20, "c", "d" * 20), too_long="cut_prompt")
    assert values(unit, "tokens") == ids(BOS, "b" * 9, EOS, "c", "d" * 20)
    assert learnt_targets(unit.arrays) == ids("d" * 20, EOS)
    # One that loses no more than its prompt is learnt whole, also at the edge.
    unit = encode_one(conversation("a", "b" * 9, "c", "d" * 20), too_long="cut_prompt")
    assert values(unit, "tokens") == ids(BOS, "b" * 9, EOS, "c", "d" * 20)
    assert learnt_targets(unit.arrays) == ids("b" * 9, EOS, "d" * 20, EOS)
    # Cut behind an answer, the next one is whole.
    unit = encode_one(conversation("a", "b", "c" * 11, "d" * 20), too_long="cut_prompt")
    assert values(unit, "tokens") == ids(BOS, "c" * 11, "d" * 20)
    assert learnt_targets(unit.arrays) == ids("d" * 20, EOS)

    good, bad = conversation("a", "b"), conversation("a", "b" * 40, name="f:9")
    assert len(encode(bad, good, too_long="cut_prompt")) == 1
    (line,) = left_out(caplog)
    assert "1 left out: nothing that is learnt is left" in line and "f:9" in line


def test_cut_answer(caplog):
    """Requirement 6: the end goes, and never all of the answer."""
    unit = encode_one(conversation("a" * 30, "bcdef"), too_long="cut_answer")
    assert values(unit, "tokens") == ids(BOS, "a" * 30, "b")
    assert learnt_targets(unit.arrays) == ids("bc")
    both = encode_one(pair(("a" * 10,), "b" * 20, "c" * 20), too_long="cut_answer")
    assert values(both, "tokens") == ids(BOS, "a" * 10, "b" * 5, BOS, "a" * 10, "c" * 5)
    assert learnt_targets(both.arrays) == ids("b" * 5, "c" * 5)

    good, bad = conversation("a", "b"), conversation("a" * 33, "b", name="f:9")
    assert len(encode(good, bad, too_long="cut_answer")) == 1
    # Answers that differ behind the cut only.
    same = pair(("a" * 10,), "b" * 20 + "c", "b" * 20 + "d", name="f:7")
    assert len(encode(pair(("a",), "b", "c"), same, too_long="cut_answer")) == 1
    nothing, equal = left_out(caplog)
    assert "nothing that is learnt is left" in nothing and "f:9" in nothing
    assert "the chosen answer has the rejected one's tokens" in equal and "f:7" in equal


MASKS = {
    "all ones": (
        "{% generation %}{{ messages | length }}{{ messages[-1].content }}{% endgeneration %}",
        "all of it is learnt",
    ),
    "all ones by prefixes": (
        "{{ '' if add_generation_prompt else messages[1].content }}",
        "all of it is learnt",
    ),
    "none": (
        "{{ messages[0].content }}{% if false %}{% generation %}{% endgeneration %}{% endif %}",
        "nothing that is learnt is left in it",
    ),
    "empty": ("{% if messages | length > 9 %}a{% endif %}", "nothing that is learnt is left in it"),
}


@pytest.mark.parametrize("too_long", ["drop", "cut_prompt", "cut_answer"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_that_teach_nothing_or_all_are_refused(name, too_long, caplog):
    """Requirement 1."""
    source, reason = MASKS[name]
    tokenizer = TOKENIZER.with_chat_template(source)
    with pytest.raises(ValueError, match=f"no example is left: .*{reason}"):
        encode(conversation("a", "b"), conversation("c", "d" * 40), by=tokenizer, too_long=too_long)
    assert any(f"2 left out: {reason}" in line for line in caplog.messages)


def test_pairs_whose_prompts_have_other_ids_are_left_out(caplog):
    """Requirement 7: a template that writes the prompt by its answer."""
    source = (
        "{{ messages[0].content }}{{ messages[-1].content[:1] }}"
        "{% generation %}{{ messages[-1].content }}{{ eos_token }}{% endgeneration %}"
    )
    tokenizer = TOKENIZER.with_chat_template(source)
    good = pair(("a",), "xb", "xc")
    assert len(encode(good, pair(("a",), "xb", "yb", name="f:3"), good, by=tokenizer)) == 2
    (line,) = left_out(caplog)
    assert "1 left out: the prompts" in line and "have other tokens (first: f:3)" in line


# --- rows ---


def random_examples(kind, count=23, seed=0):
    """Examples of random sizes, whose first characters tell them apart."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        prompt, *answers = [chr(40 + i) * int(size) for size in rng.integers(1, 5, 3)]
        if kind == "conversation":
            examples.append(conversation(prompt, answers[0] + "~", *["u", answers[1]] * (i % 2)))
        elif kind == "pair":
            examples.append(pair((prompt,), answers[0] + "+", answers[1] + "-", float(i)))
        else:
            examples.append(judged(prompt, answers[0], 1.0 - 2 * (i % 2)))
    return examples


KINDS = conversations.KINDS
ENCODER = pack.Encoder(TOKENIZER, "")


def stream(documents, number=0, num_streams=1, bins=3, epochs=None):
    return pack.stream(
        documents,
        ENCODER,
        pack.Packing("first_fit", LENGTH, bins),
        number=number,
        num_streams=num_streams,
        seed=0,
        epochs=epochs,
    )


def take(rows, count):
    return [next(rows) for _ in range(count)]


def of_unit(unit):
    """The parts of a unit: (tokens, targets, weights, values) each, which can be counted."""
    found = []
    for number in range(unit.arrays["part"].max() + 1):
        inside = unit.arrays["part"] == number
        arrays = [unit.arrays[name][inside] for name in ("tokens", "targets", "weights", "values")]
        found.append(tuple(tuple(array.tolist()) for array in arrays))
    return tuple(found)


def units_of_row(row, parts):
    """What `of_unit` says, of a row's segments; checks their positions and places."""
    count = row["segments"].max()
    assert count % parts == 0
    segments = []
    for number in range(1, count + 1):
        (inside,) = np.nonzero(row["segments"] == number)
        # Whole, in order, and beside each other.
        assert inside.tolist() == list(range(inside[0], inside[-1] + 1))
        assert row["positions"][inside].tolist() == list(range(len(inside)))
        arrays = [row[name][inside] for name in ("tokens", "targets", "weights", "values")]
        segments.append(tuple(tuple(array.tolist()) for array in arrays))
    assert (np.diff(row["segments"][row["segments"] > 0]) >= 0).all()
    return [tuple(segments[i : i + parts]) for i in range(0, count, parts)]


@pytest.mark.parametrize("bins", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_hold_whole_units_once_an_epoch(kind, bins):
    """Requirement 2 too: what fills a row up has no weight, and the last EOS of each answer has,
    although both may be the same id.
    """
    documents = encode(*random_examples(kind))
    parts = 1 if kind == "conversation" else 2
    wanted = Counter(map(of_unit, documents.items))
    rows, epochs = stream(documents, bins=bins), [Counter(), Counter(), Counter()]
    while True:
        row = next(rows)
        epoch = rows.get_state()["epoch"]
        if epoch == 3:
            break
        batch_contract.check(row, UNITS)
        assert set(row) == set(UNITS)
        padding = row["segments"] == 0
        assert not row["weights"][padding].any() and not row["values"][padding].any()
        assert not padding[: (~padding).sum()].any()
        epochs[epoch].update(units_of_row(row, parts))
        ends = (row["targets"] == EOS) & ~padding
        assert (row["weights"][ends] == 1).all()
    assert epochs == [wanted] * 3
    rows.close()


@pytest.mark.parametrize("epochs", ["2", "1.5"])
@pytest.mark.parametrize("kind", ["conversation", "pair"])
def test_rows_of_epochs_are_counted(kind, epochs):
    documents, epochs = encode(*random_examples(kind)), Fraction(epochs)
    packing = pack.Packing("first_fit", LENGTH, 3)
    counts = pack.count_rows(documents, ENCODER, packing, num_streams=3, seed=0, epochs=epochs)
    seen = Counter()
    for number, count in enumerate(counts):
        rows = stream(documents, number, 3, epochs=epochs)
        for row in take(rows, count):
            assert row["segments"].any()
            seen.update(units_of_row(row, 1 if kind == "conversation" else 2))
        assert rows.has_ended()
        own = documents.items[number::3]
        assert rows.epochs_begun() == pytest.approx(
            int(epochs) + float(np.ceil(epochs % 1 * len(own)) / len(own))
        )
        for row in take(rows, 2):
            batch_contract.check(row, UNITS)
            assert not row["segments"].any() and set(row) == set(UNITS)
        rows.close()
    if epochs.denominator == 1:
        assert set(seen.values()) == {int(epochs)} and len(seen) == len(documents)


@pytest.mark.parametrize("kind", ["conversation", "pair"])
def test_a_state_restores_exactly(kind):
    documents = encode(*random_examples(kind))
    rows = stream(documents)
    for skipped in (0, 1, 7):
        take(rows, skipped)
        state = json.loads(json.dumps(rows.get_state()))
        wanted = take(rows, 9)
        again = stream(documents)
        take(again, skipped)
        again.set_state(state)
        for row, other in zip(take(again, 9), wanted, strict=True):
            assert row.keys() == other.keys()
            for name in row:
                assert row[name].tolist() == other[name].tolist(), name
        assert again.epochs_begun() == rows.epochs_begun()
        again.close()
    rows.close()


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_rows(kind):
    documents = encode(*random_examples(kind))
    layout = pack.layout_of(kind, ENCODER)
    windows = [unit.arrays for unit in documents.items]
    found = Counter()
    for row in pack.evaluation_rows(windows, LENGTH, layout):
        batch_contract.check(row, layout.arrays)
        found.update(units_of_row(row, layout.parts))
    assert found == Counter(map(of_unit, documents.items))


# --- packed as unpacked ---

CONFIG = model_config(vocab_size=TOKENIZER.vocab_size, context_length=LENGTH, num_layers=1)
LOSS = causal.make_loss(z_loss=0.0, chunk=0)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def losses_and_gradient(model):
    """Rows -> the loss of each target [B, T], and the gradient of the loss's sum."""
    graphdef, params = model

    def loss(params, batch):
        merged = nnx.merge(graphdef, params)
        total, count, _ = LOSS(merged, batch, None)
        logprobs_BT, _ = causal.token_logprobs(merged, batch)
        return total, (count, -logprobs_BT * batch["weights"])

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def of_rows(rows):
        # One shape, so that it is compiled once.
        filled = [*rows, *[batch_contract.empty_row(LENGTH)] * (46 - len(rows))]
        batch = {}
        for name in batch_contract.ARRAYS:
            batch[name] = jnp.asarray(np.stack([row[name] for row in filled]))
        (total, (count, losses)), gradient = compiled(params, batch)
        return float(total), float(count), np.asarray(losses), gradient

    return of_rows


def alone(documents):
    """Each part of each unit in a row of its own."""
    rows = []
    for unit in documents.items:
        for number in range(unit.arrays["part"].max() + 1):
            inside = unit.arrays["part"] == number
            size, row = inside.sum(), batch_contract.empty_row(LENGTH)
            for name in ("tokens", "targets", "weights", "positions"):
                row[name][:size] = unit.arrays[name][inside]
            row["segments"][:size] = 1
            rows.append(row)
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_packed_as_unpacked(kind, losses_and_gradient):
    """Requirement 8: loss and gradient are those of each conversation alone."""
    documents = encode(*random_examples(kind))
    layout = pack.layout_of(kind, ENCODER)
    packed = pack.evaluation_rows([unit.arrays for unit in documents.items], LENGTH, layout)
    rows = alone(documents)
    assert len(packed) < len(rows) / 2
    total, count, losses, gradient = losses_and_gradient(packed)
    wanted, wanted_count, wanted_losses, wanted_gradient = losses_and_gradient(rows)
    assert count == wanted_count > 40
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    assert_trees_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-4)

    # Target by target.
    def targets(rows, losses):
        by_target = []
        for row, losses_T in zip(rows, losses):
            by_target += losses_T[row["weights"] > 0].tolist()
        return sorted(by_target)

    np.testing.assert_allclose(
        targets(packed, losses), targets(rows, wanted_losses), rtol=1e-4, atol=1e-5
    )


# --- what a run takes ---


def program(kinds=("text", "conversation"), **data):
    config = config_lib.default()
    config.data.update(dict(length=LENGTH, streams=2, packing="first_fit") | data)
    config.chat.template = "plain"
    objective = SimpleNamespace(examples=kinds, arrays={})
    return SimpleNamespace(config=config, objective=objective)


def test_a_run_takes_examples_of_its_objectives_kind():
    examples = conversations.as_documents(random_examples("conversation"))
    plain = ByteTokenizer()
    packed = build._train_documents(program(), examples, plain)
    assert [unit.name for unit in packed.items] == [example.name for example in examples.items]

    with pytest.raises(ValueError, match="takes pair, and .* has examples of the kind 'convers"):
        build._train_documents(program(("pair",)), examples, plain)
    with pytest.raises(
        ValueError, match="concat_then_split' cuts conversations, .*; wanted 'first_"
    ):
        build._train_documents(program(packing="concat_then_split"), examples, plain)
    with pytest.raises(ValueError, match="streams = 24, but split 'train' has only 23 documents"):
        build._train_documents(program(streams=24), examples, plain)
    without = program()
    without.config.chat.template = ""
    with pytest.raises(ValueError, match="config.chat.template is empty"):
        build._train_documents(without, examples, plain)


def test_the_configuration_says_how_conversations_become_units():
    config = program().config
    examples = conversations.as_documents([conversation("a", "b", "c", "d" * 40)])
    with pytest.raises(ValueError, match="no example is left"):
        build.encoded(config, examples, ByteTokenizer())
    config.chat.update(dict(too_long="cut_answer", learnt="last_answer"))
    (unit,) = build.encoded(config, examples, ByteTokenizer()).items
    assert learnt_targets(unit.arrays) == ids("d" * 28)
