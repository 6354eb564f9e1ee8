"""Roles of tokens: what models and objectives ask a tokenizer for beside the ids of a text.

The files of a Hugging Face checkpoint name some of them (mask_token, cls_token, ...). The rest go
by how they are spelt. A tokenizer that is made here has those that config.tokenizer.reserve names.
"""

import itertools
import re
from collections.abc import Iterable, Mapping

# All roles there are -> what their tokens do.
ROLES = {
    "bos": "begins a text",
    "eos": "ends a text",
    "unk": "stands for what has no id",
    "pad": "fills up a row",
    "mask": "stands where a token is to be found",
    "cls": "stands for a text as a whole",
    "sep": "stands between two texts, or behind them",
    "sentinels": "stand for the spans that a text lost, in order (T5)",
    "start_of_piece": "begins what fills a blank (GLM)",
    "end_of_piece": "ends what fills a blank (GLM)",
    "turns": "begin and end a turn of a conversation",
}
# Those of several tokens.
PLURAL = ("sentinels", "turns")
# Those that a checkpoint has only where its files name them, as in transformers.
NAMED = ("bos", "eos", "unk", "pad", "cls", "sep")

# How the tokens of a role are spelt. A tokenizer that is made here takes the first way.
_SPELLINGS = {
    "pad": (("<pad>",),),
    "mask": (("<mask>",), ("[MASK]",)),
    "cls": (("<cls>",), ("[CLS]",)),
    "sep": (("<sep>",), ("[SEP]",)),
    "start_of_piece": (("<sop>",), ("<|startofpiece|>",)),
    "end_of_piece": (("<eop>",), ("<|endofpiece|>",)),
    "turns": (
        ("<|im_start|>", "<|im_end|>"),
        ("<|start_header_id|>", "<|eot_id|>", "<|end_header_id|>"),
        ("<start_of_turn>", "<end_of_turn>"),
    ),
}
# What ends a turn, in each of the ways.
ENDS_OF_TURNS = tuple(texts[1] for texts in _SPELLINGS["turns"])
_SENTINEL = "<extra_id_{}>"
_LLAMA3_TURNS = "turns:llama3"


class Roles:
    """What every tokenizer has: the ids of roles.

    Attributes:
      roles: name -> ids, of those of `ROLES` that it has.
      special: text -> id, of the tokens that no text is to have.
      fingerprint: names the tokenizer.
    """

    roles: Mapping[str, tuple[int, ...]]
    special: Mapping[str, int]
    fingerprint: str
    texts_as: str = ""  # see lm.data.tokenizer.Tokenizer

    def role(self, name: str) -> int:
        """Returns the id of a role of one token. Raises ValueError, see `role_ids`."""
        assert name not in PLURAL, name
        (role_id,) = self.role_ids(name)
        return role_id

    def role_ids(self, name: str) -> tuple[int, ...]:
        """Returns the ids of a role: of sentinels in order, of turns what begins and what ends one
        (and, in Llama 3's, what ends its header).

        Raises:
          ValueError: there is no such role, or this tokenizer has none.
        """
        if name not in ROLES:
            raise ValueError(f"there is no role {name!r}; valid: {list(ROLES)}")
        if name in self.roles:
            return self.roles[name]

        advice = ""
        if name in NAMED or name == "mask":
            advice = f"; a checkpoint's has it where tokenizer_config.json names its {name}_token"
        if name in (*_SPELLINGS, "sentinels"):
            entry = "sentinels:100" if name == "sentinels" else name
            advice += f"; one that is made here has it with config.tokenizer.reserve = {entry!r}"
        raise ValueError(
            f"the tokenizer {self.fingerprint} has no {name} ({ROLES[name]}), only "
            f"{sorted(self.roles)}{advice}"
        )


def parse(reserve: str) -> dict[str, tuple[str, ...]]:
    """Returns role -> the texts of its tokens, of config.tokenizer.reserve.

    Raises:
      ValueError: names that can't be reserved, or are there twice.
    """
    reserved: dict[str, tuple[str, ...]] = {}
    for entry in reserve.split(",") if reserve else []:
        count = re.fullmatch("sentinels:([1-9][0-9]{0,2})", entry)
        name = "sentinels" if count else "turns" if entry == _LLAMA3_TURNS else entry
        if not count and name not in _SPELLINGS:
            valid = [*_SPELLINGS, _LLAMA3_TURNS, "sentinels:N"]
            raise ValueError(
                f"config.tokenizer.reserve = {reserve!r}: {entry!r} can't be reserved; valid, with "
                f"commas between them: {valid}, N from 1 to 999"
            )
        if name in reserved:
            raise ValueError(f"config.tokenizer.reserve = {reserve!r} has {name} twice")

        if count:
            reserved[name] = tuple(_SENTINEL.format(i) for i in range(int(count[1])))
        else:
            reserved[name] = _SPELLINGS[name][1 if entry == _LLAMA3_TURNS else 0]
    return reserved


def count(reserve: str) -> int:
    """Returns how many ids config.tokenizer.reserve takes. Raises ValueError, see `parse`."""
    return sum(map(len, parse(reserve).values()))


def lacking(reserve: str, present: Mapping[str, tuple[int, ...]]) -> str:
    """Returns what of config.tokenizer.reserve a tokenizer lacks, written in the same way.

    Args:
      present: the roles that it has.

    Raises:
      ValueError: it has fewer sentinels than are wanted; or see `parse`.
    """
    entries = []
    for entry, (name, texts) in zip(reserve.split(","), parse(reserve).items()):
        if name not in present:
            entries.append(entry)
        elif len(present[name]) < len(texts):
            raise ValueError(
                f"config.tokenizer.reserve = {reserve!r}: the tokenizer has {len(present[name])} "
                f"{name} already, and more can't be added; wanted at most so many"
            )
    return ",".join(entries)


def by_spelling(names: Iterable[str], special: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns the ids of roles whose tokens are spelt as they use to be.

    Args:
      names: the roles looked for.
      special: text -> id, of tokens that are no text.
    """
    found = {}
    for name in names:
        spellings = _SPELLINGS.get(name, ())
        if name == "sentinels":
            texts = map(_SENTINEL.format, itertools.count())
            spellings = (tuple(itertools.takewhile(special.__contains__, texts)),)
        for texts in spellings:
            if texts and all(text in special for text in texts):
                found[name] = tuple(special[text] for text in texts)
                break
    return found
