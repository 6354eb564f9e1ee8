"""From examples to units: what is packed into rows, and stays together.

A conversation is a unit of one part. A pair has two, which become neighbouring segments of a row:
the chosen conversation and the rejected one. A judged one has two as well: itself, and its prompt
with the answer of another example, by which KTO knows how far the model has moved (Ethayarajh et
al. 2024, arXiv 2402.01306, section 4.1).
"""

import collections
import dataclasses
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from lm import files, progress
from lm.data import chat_ids
from lm.data.conversations import Example, LeftOut, Unusable
from lm.data.sources import Documents
from lm.data.tokenizer import Tokenizer


class Unit(NamedTuple):
    """An example as arrays of the same length.

    Attributes:
      arrays: tokens, targets, weights, positions as in a batch; part, 0 or 1; values, see
        `lm.data.conversations.Example`; stored_logprobs, those of the targets under a reference,
        where they were computed beforehand.
      name, source: see there.
    """

    arrays: dict[str, np.ndarray]
    name: str
    source: str


def encode(
    examples: Documents, tokenizer: Tokenizer, *, learnt: str, too_long: str, length: int, seed: int
) -> Documents:
    """Returns the units of examples; those that can't be one are left out, and counted in the log.

    Args:
      tokenizer: one with a chat template.
      learnt, too_long: see `lm.config.Chat`. Of pairs and judged examples the last answer is
        learnt.
      length: tokens of a row, which a unit has at most.
      seed: says whose answers stand in for others, see above.

    Raises:
      ValueError: nothing is left, or see `lm.data.chat_ids.ChatEncoder.encode`.
    """
    if examples.kind != "conversation":
        learnt = "last_answer"

    encoder = chat_ids.ChatEncoder(tokenizer, learnt)
    rows = _encode_all(examples, encoder)
    if examples.kind == "judged":
        rows = _with_others_answers(rows, seed)

    units, left_out = [], LeftOut()
    cut = _Cut(too_long, length, tokenizer.bos_id)
    for example, parts in rows:
        try:
            units.append(_unit(example, cut(parts)))
        except Unusable as reason:
            left_out.add(str(reason), example.name)

    left_out.log("examples as tokens")
    if not units:
        raise ValueError(f"no example is left: {dict(left_out.counts)}")

    contents = []
    for unit in units:
        contents += [array.tobytes() for array in unit.arrays.values()]
    return Documents(units, files.short_hash_of_parts(iter(contents)), kind=examples.kind)


def _encode_all(
    examples: Documents, encoder: chat_ids.ChatEncoder
) -> list[tuple[Example, list[chat_ids.Encoded]]]:
    """The parts of each example's units, in order."""
    # A tokenizer may have a template of its own for conversations with tools.
    by_template = collections.defaultdict(list)
    for number, example in enumerate(examples):
        by_template[bool(example.tools)].append(number)

    rows: list[list] = [[] for _ in range(len(examples))]
    with progress.activity("encoding conversations", len(by_template), "templates") as encoding:
        for numbers in encoding.each(list(by_template.values())):
            conversations, tools = [], []
            for number in numbers:
                conversations += examples[number].conversations
                tools += [examples[number].tools] * len(examples[number].conversations)
            encoded = iter(encoder.encode(conversations, tools if any(tools) else None))
            for number in numbers:
                rows[number] = [next(encoded) for _ in examples[number].conversations]

    parts = []
    for example, of_conversations in zip(examples, rows):
        if examples.kind == "conversation":
            # One row, or one for each answer.
            parts += [(example, [row]) for row in of_conversations[0]]
        else:
            parts.append((example, [rows[-1] for rows in of_conversations]))
    return parts


def _with_others_answers(rows: list, seed: int) -> list:
    """Each example's row, and its prompt with the answer of another example: that which follows it
    in a cycle through all of them.
    """
    if len(rows) < 2:
        raise ValueError("there is one judged example; wanted two at least, for KTO's comparison")
    order = np.random.default_rng(seed).permutation(len(rows))
    following = dict(zip(order, np.roll(order, -1)))

    with_answers = []
    for number, (example, (row,)) in enumerate(rows):
        _, (other,) = rows[following[number]]

        prompt, answer = _first_learnt(row), _first_learnt(other)
        ids = np.concatenate([row.ids[:prompt], other.ids[answer:]])
        is_learnt = np.concatenate([row.is_learnt[:prompt], other.is_learnt[answer:]])

        with_answers.append((example, [row, chat_ids.Encoded(ids, is_learnt)]))
    return with_answers


def _first_learnt(row: chat_ids.Encoded) -> int:
    """Where the answer begins: the number of the prompt's tokens."""
    return int(np.argmax(row.is_learnt)) if row.is_learnt.any() else len(row.ids)


class _Cut(NamedTuple):
    """Cuts parts that are longer than a row together."""

    too_long: str
    length: int
    bos_id: int

    def __call__(self, parts: Sequence[chat_ids.Encoded]) -> list[chat_ids.Encoded]:
        """Returns parts that fit into a row.

        Raises:
          Unusable: they don't, or nothing is learnt of one of them.
        """
        if any(len(part.ids) and part.is_learnt.all() for part in parts):
            raise Unusable("all of it is learnt: its template writes no prompt")
        # The last token of a conversation is nobody's input; of a pair it is scored.
        spare = 1 if len(parts) == 1 else 0
        excess = sum(len(part.ids) for part in parts) - spare - self.length
        if excess > 0 and self.too_long == "drop":
            raise Unusable("longer than config.data.length (config.chat.too_long = 'drop')")
        if excess > 0 and self.too_long == "cut_prompt":
            parts = [self._without_beginning(part, -(-excess // len(parts))) for part in parts]
        elif excess > 0:
            most = (self.length + spare) // len(parts)
            parts = [chat_ids.Encoded(part.ids[:most], part.is_learnt[:most]) for part in parts]

        for part in parts:
            if not part.is_learnt[1:].any():
                raise Unusable("nothing that is learnt is left in it")
        return list(parts)

    def _without_beginning(self, part: chat_ids.Encoded, count: int) -> chat_ids.Encoded:
        """All but `count` tokens behind BOS. An answer that loses its beginning isn't learnt."""
        kept = int(part.ids[0] == self.bos_id)
        end = kept + count
        is_learnt = part.is_learnt.copy()
        if end < len(is_learnt) and is_learnt[end - 1]:
            rest = is_learnt[end:]
            rest[: len(rest) if rest.all() else int(np.argmin(rest))] = False

        ids = np.concatenate([part.ids[:kept], part.ids[end:]])
        return chat_ids.Encoded(ids, np.concatenate([is_learnt[:kept], is_learnt[end:]]))


def _unit(example: Example, parts: Sequence[chat_ids.Encoded]) -> Unit:
    """The arrays of an example's parts, one behind the other.

    Raises:
      Unusable: the prompts of a pair differ.
    """
    if example.kind == "pair":
        chosen, rejected = parts
        prompt = chosen.ids[: _first_learnt(chosen)]
        if not np.array_equal(prompt, rejected.ids[: _first_learnt(rejected)]):
            raise Unusable("the prompts of the chosen and the rejected answer have other tokens")
        if np.array_equal(chosen.ids, rejected.ids):
            raise Unusable("the chosen answer has the rejected one's tokens")

    arrays = []
    for number, part in enumerate(parts):
        arrays.append(_arrays(part, number, keep_last=len(parts) > 1))

    joined = {}
    for name in arrays[0]:
        joined[name] = np.concatenate([of_part[name] for of_part in arrays])

    size = len(joined["tokens"])
    joined["values"] = np.full(size, example.value, np.float32)
    joined["stored_logprobs"] = np.zeros(size, np.float32)
    return Unit(joined, example.name, example.source)


def _arrays(row: chat_ids.Encoded, number: int, *, keep_last: bool) -> dict[str, np.ndarray]:
    """The arrays of a part. Its last token has no target, and is an input where it is scored."""
    targets = np.append(row.ids[1:], 0)
    weights = np.append(row.is_learnt[1:], False)
    end = len(row.ids) if keep_last else len(row.ids) - 1
    return dict(
        tokens=row.ids[:end],
        targets=targets[:end].astype(np.int32),
        weights=weights[:end].astype(np.float32),
        positions=np.arange(end, dtype=np.int32),
        part=np.full(end, number, np.int32),
    )


# --- what a reference says of them, computed beforehand (lm.reference) ---


def key_of(unit: Unit) -> str:
    """Returns what a unit is known by: its tokens, and which of them are learnt."""
    arrays = (unit.arrays[name].tobytes() for name in ("tokens", "weights", "part"))
    return files.short_hash_of_parts(arrays)


def pack_stored(by_key: Mapping[str, np.ndarray], fingerprint: str) -> bytes:
    """Returns a file of log-probabilities.

    Args:
      by_key: key of a unit -> f32 [its places].
      fingerprint: of the reference's parameters.
    """
    content = io.BytesIO()
    np.savez(
        content,
        fingerprint=np.array(fingerprint),
        keys=np.array(list(by_key)),
        sizes=np.array([len(values) for values in by_key.values()]),
        values=np.concatenate(list(by_key.values())).astype(np.float32),
    )
    return content.getvalue()


def with_stored(documents: Documents, path: str) -> Documents:
    """Returns units with the log-probabilities of a file that `lm.reference` wrote.

    Raises:
      ValueError: no such file, or it lacks an example.
    """
    where = f"config.chat.reference_logprobs = {path!r}"
    try:
        content = io.BytesIO(epath.Path(files.expand(path)).read_bytes())
        stored = np.load(content, allow_pickle=False)
        ends = np.cumsum(stored["sizes"])[:-1]
        values = np.split(stored["values"], ends)
        by_key = dict(zip(stored["keys"].tolist(), values, strict=True))
        fingerprint = str(stored["fingerprint"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{where} can't be read ({error}); --mode=reference writes one") from None

    for unit in documents:
        logprobs = by_key.get(key_of(unit))
        if logprobs is None or len(logprobs) != len(unit.arrays["tokens"]):
            raise ValueError(
                f"{where} lacks {unit.name}: the data, the tokenizer or config.chat changed since "
                "--mode=reference wrote it"
            )
        unit.arrays["stored_logprobs"] = logprobs

    facts = [documents.fingerprint, fingerprint]
    return dataclasses.replace(documents, fingerprint=files.short_hash(json.dumps(facts).encode()))
