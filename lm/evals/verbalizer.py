"""Label words as tokens after a prompt, and checks that a model can tell them apart.

Scores out of their log-probabilities are in lm/evals/scores/label_scores.py.
"""

from collections.abc import Callable, Sequence

from lm.evals.scores.label_scores import LabelWord
from lm.evals.tree import common_length

BOUNDARIES = ("strict", "common_prefix", "lm_eval")


def tokenize_words_after(
    encode_batch: Callable[[Sequence[str]], list[list[int]]],
    prompt: str,
    words: Sequence[str],
    boundary: str,
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt, and of each word after it.

    The words are tokenized as a reader of prompt + word would see them. Where the tokenizer merges
    the end of the prompt with the beginning of a word, `boundary` says what happens:

    strict: an error.
    common_prefix: the prompt is what it and all joined texts have in common. The rest belongs to
      the words, so that all of them are scored from the same point.
    lm_eval: as lm-evaluation-harness 0.4 does, for comparisons with it. White space at the end of
      the prompt goes to the word. Then as many ids as the prompt has are cut off the joined text,
      whether they are the prompt's or not.

    Args:
      encode_batch: gives the ids of texts without special ones. The caller puts BOS before them.

    Returns:
      (ids of the prompt, ids of each word)

    Raises:
      ValueError: an unknown boundary; a word that is left without tokens; with "strict" a prompt
        whose ids change when a word follows.
    """
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary = {boundary!r}; valid: {list(BOUNDARIES)}")

    if boundary == "lm_eval":
        stripped = prompt.rstrip()
        white_space = prompt[len(stripped) :]
        words = [white_space + word for word in words]
        prompt = stripped

    # One call, because tokenizers encode a batch in parallel.
    prompt_ids, *joined_ids = encode_batch([prompt, *(prompt + word for word in words)])
    length = len(prompt_ids)

    if boundary == "strict":
        for word, joined in zip(words, joined_ids):
            if joined[:length] != prompt_ids:
                raise ValueError(
                    f"{word!r} after {prompt[-20:]!r} is not tokenized as the prompt and "
                    f"something more ({joined[max(length - 3, 0) :]}, the prompt ends "
                    f"{prompt_ids[-3:]}): begin the word, or end the prompt, elsewhere, or take "
                    "boundary = 'common_prefix'"
                )
    elif boundary == "common_prefix":
        length = min(common_length(prompt_ids, joined) for joined in joined_ids)
        prompt_ids = prompt_ids[:length]

    # Nothing is left of a word that the tokenizer merges with the prompt.
    for word, joined in zip(words, joined_ids):
        if len(joined) <= length:
            advice = ""
            if boundary == "lm_eval":
                advice = ", and boundary = 'lm_eval' cuts it off; take 'common_prefix'"
            raise ValueError(
                f"{word!r} after {prompt[-20:]!r} has no tokens of its own: the tokenizer merges "
                f"it with the prompt{advice}"
            )
    return prompt_ids, [joined[length:] for joined in joined_ids]


def check_words(
    labels: Sequence[str], words: Sequence[LabelWord], word_ids: Sequence[list[int]]
) -> None:
    """Checks that each label has words, and that their tokens tell all words apart.

    Args:
      word_ids: the token ids of each word.

    Raises:
      ValueError: a label twice, or without words; a word without tokens; two words with the same
        tokens; a word whose tokens another word begins with: the longer one could never score above
        it.
    """
    if len(labels) != len(set(labels)):
        raise ValueError(f"the verbalizer has a label twice: {list(labels)}")

    labels_with_words = {word.label for word in words}
    for k, label in enumerate(labels):
        if k not in labels_with_words:
            raise ValueError(f"the verbalizer has no word for the label {label!r}")

    # Each word against each other one, of all labels.
    for i, (word, ids) in enumerate(zip(words, word_ids)):
        if not ids:
            raise ValueError(
                f"the verbalizer's word {word.text!r} of {labels[word.label]!r} has no tokens"
            )
        for j, (other, other_ids) in enumerate(zip(words, word_ids)):
            if i != j and other_ids[: len(ids)] == ids:
                how = "are" if ids == other_ids else "begin with"
                raise ValueError(
                    f"the verbalizer's words {word.text!r} of {labels[word.label]!r} and "
                    f"{other.text!r} of {labels[other.label]!r} {how} the same tokens ({ids} and "
                    f"{other_ids}): the model can't tell them apart. Change a word, or take a "
                    "tokenizer that splits them otherwise."
                )


def check_spaces(prompt_end: str, words: Sequence[str], boundary: str) -> None:
    """Checks the space between the prompts and the words.

    Two spaces, or none between two words of a text, make other tokens than those that a model has
    learnt for the word. But a word may go on with the prompt's last one ("un", "happy"), where the
    boundary scores both as one.

    Args:
      prompt_end: the text with which all prompts end; "" if their ends differ.
      boundary: see `tokenize_words_after`.

    Raises:
      ValueError: two spaces would meet, or no space stands between two words.
    """
    # Only ASCII is checked: many other scripts write no space between words.
    ends_in_word = prompt_end.isascii() and prompt_end[-1:].isalnum()
    ends_in_mark = prompt_end.isascii() and prompt_end.endswith(tuple(".,:;!?)"))
    wants_space = ends_in_mark or (ends_in_word and boundary != "common_prefix")
    for word in words:
        if prompt_end.endswith(" ") and word.startswith(" "):
            raise ValueError(
                f"the prompt ends {prompt_end[-20:]!r} and the word is {word!r}: two spaces would "
                "meet; end the prompt without one"
            )
        if wants_space and word[:1].isascii() and word[:1].isalnum():
            advice = "begin the word with a space"
            if ends_in_word:
                advice += (
                    ", or take boundary = 'common_prefix' if it goes on with the prompt's word"
                )
            raise ValueError(
                f"the prompt ends {prompt_end[-20:]!r} and the word is {word!r}, with nothing "
                f"between them: {advice}"
            )


def check_round_trip(
    decode: Callable[[list[int]], str],
    prompt_ids: Sequence[int],
    words: Sequence[str],
    word_ids: Sequence[Sequence[int]],
) -> None:
    """Checks that the tokenizer decodes each word, after the prompt, as it was written.

    Raises:
      ValueError: it decodes a word otherwise, because it lacks a character or normalises the text:
        another text would be scored.
    """
    for word, ids in zip(words, word_ids):
        decoded = decode([*prompt_ids, *ids])
        if not decoded.rstrip().endswith(word.strip()):
            raise ValueError(
                f"the word {word!r} comes back from the tokenizer as "
                f"{decoded[-len(word) - 10 :]!r}: write it as the tokenizer does, or take another"
            )
