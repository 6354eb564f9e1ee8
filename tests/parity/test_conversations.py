"""Conversations as ids, with the tokenizers of checkpoints: ids and masks are those of
`apply_chat_template` of transformers.

Requirement N is that of the list of faults of other systems.
"""

import json
import re
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
import trl
from etils import epath

from lm import limited
from lm.data import chat, chat_ids, templates
from lm.data import tokenizer as lm_tokenizers

TRL = Path(trl.__file__).parent / "chat_templates"
CORPUS = ["the cat and the hat, then the other one 12\nuser\nassistant\n\nHello there"] * 20
CORPUS += ["[INST] What? [/INST] Be brief.\n\n### Instruction:\n- a\n- b\nsystem éö"] * 20
TURNS = ["<|im_start|>", "<|im_end|>"]
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


# --- tokenizers ---


def byte_level(directory, pattern=None):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    by_byte = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    tokenizer.pre_tokenizer = by_byte
    if pattern:
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, by_byte])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<unk>", "<|endoftext|>", *TURNS, *HEADERS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))


def llama3(directory):
    byte_level(
        directory,
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )


def pieces(directory):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=[*TURNS, *HEADERS],
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()


LLAMA = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
END = "<|endoftext|>"
# name -> (what writes the vocabulary, tokenizer_config.json)
TOKENIZERS = {
    "Llama 2": (pieces, LLAMA | dict(legacy=False)),
    "Llama 2, legacy": (pieces, LLAMA | dict(legacy=True)),
    "Llama 3": (
        llama3,
        dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="<|eot_id|>"),
    ),
    "Qwen": (
        byte_level,
        dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token=END),
    ),
    "GPT-2": (
        byte_level,
        dict(tokenizer_class="GPT2Tokenizer", bos_token=END, eos_token=END, pad_token=END),
    ),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """name -> the directory of a checkpoint without weights."""
    found = {}
    for name, (write, config) in TOKENIZERS.items():
        found[name] = tmp_path_factory.mktemp("checkpoint")
        write(found[name])
        (found[name] / "tokenizer_config.json").write_text(json.dumps(config))
        model_type = "llama" if name.startswith("Llama") else "gpt2"
        (found[name] / "config.json").write_text(json.dumps(dict(model_type=model_type)))
    return found


@pytest.fixture(scope="module")
def both(directories):
    """name -> (our tokenizer, transformers')."""
    found = {}
    for name, path in directories.items():
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        found[name] = (lm_tokenizers.load(path), theirs)
    return found


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Templates are rendered here, which is faster; test_chat.py has them elsewhere."""

    def call(function, **arguments):
        assert function == "lm.data.templates:render_all"
        return templates.render_all(**json.loads(json.dumps(arguments)))

    monkeypatch.setattr(limited, "call", call)


# --- templates and conversations ---


def user(content):
    return dict(role="user", content=content)


def answer(content):
    return dict(role="assistant", content=content)


def system(content):
    return dict(role="system", content=content)


# Answers begin with letters, since transformers merges others with the end of their prompts; and
# end with a token each character, since its masks end with the first of a character's.
CONVERSATIONS = [
    [user("What?"), answer("The cat & the hat.")],
    [system("Be brief."), user("  What?\n\n"), answer("hello\n\n- é\n  - b")],
    [user("What?"), answer("The cat."), user("then <12>?"), answer("a b")],
    [system("x"), user("a"), answer("b"), user("c"), answer("d"), user("\u2581e"), answer("f")],
]
# With the token that ends each answer, for trl's.
MARKED = {name: (chat.TEMPLATES_FOLDER / f"{name}.jinja").read_text() for name in chat.SHIPPED}
for name in ("qwen2_5", "qwen3", "llama3", "lfm2", "deepseekv3"):
    MARKED[f"trl {name}"] = (TRL / f"{name}_training.jinja").read_text()
# The content alone, and what stands between turns too.
MARKED["content"] = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
    "{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def encode(ours, source, conversations, learnt="answers"):
    encoder = chat_ids.ChatEncoder(ours.with_chat_template(source), learnt)
    return encoder.encode(conversations)


def render(ours, source, conversations, asks=False):
    return chat.render_all(
        source,
        conversations,
        tokens=chat.special_tokens(ours),
        add_generation_prompt=asks,
    )


def answers_alone(mask, ids, ours):
    """A mask whose runs begin and end with their answers: without the line's end that trl's
    templates enclose before them, up to the token that ends a turn, which may stand right behind.
    """
    wanted, start = [False] * len(mask), 0
    while 1 in mask[start:]:
        start = mask.index(1, start)
        end = mask.index(0, start) if 0 in mask[start:] else len(mask)
        first = start
        for i in range(start, end):
            if ours.spell(ids[start : i + 1]).strip(" ") == "\n":
                first = i + 1
        stops = [i for i in range(first, end) if ids[i] in ours.stop_ids]
        if stops:
            last = stops[-1]
        else:
            last = end if end < len(ids) and ids[end] in ours.stop_ids else end - 1
        wanted[first : last + 1] = [True] * (last + 1 - first)
        start = end
    return wanted


# In plain nothing stands between a prompt and its answer: transformers merges them.
@pytest.mark.parametrize("template", [name for name in MARKED if name != "plain"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_masks_are_those_of_transformers(name, template, both):
    """Requirements 1 and 4."""
    ours, theirs = both[name]
    source = MARKED[template]
    ours = ours.with_chat_template(source)
    for messages, rows in zip(CONVERSATIONS, encode(ours, source, CONVERSATIONS)):
        (row,) = rows
        wanted = theirs.apply_chat_template(
            messages,
            chat_template=source,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert row.ids.tolist() == wanted["input_ids"]
        mask = answers_alone(wanted["assistant_masks"], wanted["input_ids"], ours)
        assert any(mask) and row.is_learnt.tolist() == mask
        # One BOS for a text, and of Llama 2's for each question.
        begins = wanted["input_ids"].count(theirs.bos_token_id)
        assert name == "GPT-2" or begins <= (3 if template == "llama2" else 1)


@pytest.mark.parametrize("template", ["chatml", "llama3", "qwen2_5", "llama3_1", "gemma", "phi3"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_without_generation_are_those_of_transformers(name, template, both):
    """Requirement 1: the learnt tokens are what the answers add, up to the end of their turns."""
    ours, theirs = both[name]
    if template in MARKED:
        source = re.sub(r"\{%-? (end)?generation -?%\}", "", MARKED[template])
        marked = encode(ours, MARKED[template], CONVERSATIONS)
    else:
        source, marked = (TRL / f"{template}.jinja").read_text(), None
    conversations = CONVERSATIONS
    if template == "gemma":
        conversations = [CONVERSATIONS[0], CONVERSATIONS[2]]  # it refuses system turns

    encoded = encode(ours, source, conversations)
    for number, (messages, rows) in enumerate(zip(conversations, encoded)):
        wanted = theirs.apply_chat_template(
            messages, chat_template=source, tokenize=True, return_dict=True
        )
        assert rows[-1].ids.tolist() == wanted["input_ids"]
        assert 0 < rows[-1].is_learnt.mean() < 0.8
        if marked:
            assert rows[-1].is_learnt.tolist() == marked[number][0].is_learnt.tolist()


@pytest.mark.parametrize("template", ["qwen2_5", "llama3"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_trls_templates_for_training_give_the_same(name, template, both):
    """Requirement 1: trl adds {% generation %} to templates of models."""
    ours, theirs = both[name]
    if template == "llama3" and not theirs.bos_token:
        return  # the template wants a BOS
    plain = encode(ours, (TRL / f"{template}.jinja").read_text(), CONVERSATIONS)
    marked = encode(ours, MARKED[f"trl {template}"], CONVERSATIONS)
    for (row,), (wanted,) in zip(plain, marked):
        assert row.ids.tolist() == wanted.ids.tolist()
        assert row.is_learnt.tolist() == wanted.is_learnt.tolist()


# --- prompts ---

BEGINNINGS = ["x", "\nx", "\n\nx", " x", "  x", "\n x", "\n\n", "\u2581x", "éx", "<x", "0", "\tx"]


@pytest.mark.parametrize("template", ["plain", "alpaca", "chatml", "llama3", "content", "qwen3"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_have_the_same_ids_whatever_follows(name, template, both):
    """Requirement 7: and as when the model is asked, also where transformers would merge."""
    ours, theirs = both[name]
    source = MARKED.get(template) or (TRL / f"{template}.jinja").read_text()
    prompt = [system("S"), user("b"), answer("the cat"), user("What?\n")]
    (asked,) = render(ours, source, [prompt], asks=True)
    asked_ids = ours.encode(asked)
    assert asked_ids == theirs(asked, add_special_tokens=False)["input_ids"]

    # Shorter ones, too: their first characters are merged with others.
    conversations = [[*prompt, answer(start + "y")] for start in BEGINNINGS]
    texts = render(ours, source, conversations)
    encoded = encode(ours, source, conversations, learnt="last_answer")
    for text, rows in zip(texts, encoded):
        (row,) = rows
        assert row.ids[: len(asked_ids)].tolist() == asked_ids
        assert row.is_learnt.tolist().index(True) == len(asked_ids)
        # Nothing is added in between, such as a space.
        if name == "Llama 2, legacy":
            assert spaceless(ours.spell(row.ids)) == spaceless(text)
        else:
            assert ours.spell(row.ids) == text.replace("\u2581", spaces(name))


def spaces(name):
    """What becomes of SentencePiece's sign for the space."""
    return " " if name.startswith("Llama 2") else "\u2581"


def spaceless(text):
    return re.sub("[ \u2581]", "", text)


# --- special tokens that are spelt out ---

SPELT = "a<|im_end|></s> <s>b<|eot_id|> </s"


@pytest.mark.parametrize("template", ["plain", "alpaca", "chatml", "llama2", "llama3", "content"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_special_tokens_that_texts_spell_out_are_text(name, template, both):
    """Requirement 10."""
    ours, _ = both[name]
    source = MARKED[template]
    plain = [system("S"), user("Q"), answer("A"), user("R"), answer("B")]
    variants = [plain]
    for spelling in ({"system"}, {"user"}, {"assistant"}, {"system", "user", "assistant"}):
        messages = []
        for message in plain:
            text = SPELT if message["role"] in spelling else message["content"]
            messages.append(dict(message, content=text))
        variants.append(messages)

    texts = render(ours, source, variants)
    encoded = encode(ours, source, variants)
    special = set(ours.special.values())
    wanted = [i for i in encoded[0][0].ids if i in special]
    for text, rows in zip(texts, encoded):
        (row,) = rows
        assert [i for i in row.ids if i in special] == wanted
        if name == "Llama 2, legacy":
            assert spaceless(ours.spell(row.ids)) == spaceless(text)
        else:
            assert ours.spell(row.ids) == text
    assert spaceless(ours.decode(row.ids[row.is_learnt])) == spaceless(SPELT * 2)


# --- ends ---


def test_an_end_that_is_padding_too_is_learnt(both):
    """Requirement 2: padding has no weight by its place, whatever its id is."""
    ours, _ = both["GPT-2"]
    assert ours.role("pad") == ours.eos_id == ours.bos_id
    ((row,),) = encode(ours, MARKED["plain"], CONVERSATIONS[:1])
    assert (row.ids[0], row.ids[-1]) == (ours.bos_id, ours.eos_id)
    assert not row.is_learnt[0] and row.is_learnt[-1]
    # Requirement 3.
    assert ours.spell(row.ids[row.is_learnt]) == "The cat & the hat." + END


def test_what_stops_an_answer(directories, tmp_path):
    """Requirement 5: what the tokenizer, generation_config.json and the chat template say."""
    source = directories["GPT-2"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    ids = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[7, 1])))
    (tmp_path / "config.json").write_text(json.dumps(dict(eos_token_id=9)))
    loaded = lm_tokenizers.load(tmp_path)
    assert loaded.stop_ids[0] == loaded.eos_id == ids[END]
    assert set(loaded.stop_ids) == {ids[END], 7, 1, 9}

    with_turns = chat.with_template(loaded, "chatml")
    assert set(with_turns.stop_ids) == {*loaded.stop_ids, ids["<|im_end|>"]}
    assert with_turns.eos_id == loaded.eos_id
    # This tokenizer has the tokens of two ways to write turns.
    of_headers = chat.with_template(loaded, "llama3")
    assert set(of_headers.stop_ids) == {*loaded.stop_ids, ids["<|eot_id|>"]}
    # A run keeps them, and the template.
    (tmp_path / "run").mkdir()
    with_turns.save(epath.Path(tmp_path / "run"))
    again = lm_tokenizers.load(tmp_path / "run")
    assert set(again.stop_ids) == set(with_turns.stop_ids)
    assert chat.template(again) == MARKED["chatml"]


def test_a_tokenizer_that_splits_special_tokens(directories, tmp_path):
    """Requirement 10: it takes them for text everywhere; those of a template are special."""
    source = directories["Qwen"]
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config = TOKENIZERS["Qwen"][1] | dict(split_special_tokens=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text("{}")
    splitting, plain = lm_tokenizers.load(tmp_path), lm_tokenizers.load(source)
    assert splitting.encode("<|im_end|>") != plain.encode("<|im_end|>")
    both = [encode(ours, MARKED["chatml"], CONVERSATIONS) for ours in (splitting, plain)]
    for (row,), (wanted,) in zip(*both):
        assert row.ids.tolist() == wanted.ids.tolist()
        assert row.is_learnt.tolist() == wanted.is_learnt.tolist()


def test_special_tokens_that_take_white_space_with_them(directories, tmp_path):
    """As Phi-3's do: the ids of a text depend on the special tokens around it."""
    saved = json.loads((directories["Qwen"] / "tokenizer.json").read_text())
    for token in saved["added_tokens"]:
        if token["content"] in TURNS:
            token.update(lstrip=True, rstrip=True)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text("{}")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [user(" What? "), answer("The cat. \n"), user("then\n\n"), answer("a ")]
    for source in (MARKED["chatml"], MARKED["content"]):
        (row,) = encode(lm_tokenizers.load(tmp_path), source, [messages])[0]
        wanted = theirs.apply_chat_template(
            messages, chat_template=source, tokenize=True, return_dict=True
        )
        assert row.ids.tolist() == wanted["input_ids"]


def test_a_template_and_its_tokens_are_added_as_transformers_adds_them(tmp_path):
    """A base model without them is given ChatML."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=[END])
    tokenizer.train_from_iterator(CORPUS, trainer)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END
    )
    theirs.save_pretrained(tmp_path)
    ours = lm_tokenizers.load(tmp_path)
    with pytest.raises(ValueError, match="needs the tokens"):
        chat.with_template(ours, "chatml")

    theirs.add_special_tokens({"extra_special_tokens": TURNS})
    ours = chat.with_template(ours.reserving("turns"), "chatml")
    for messages, rows in zip(CONVERSATIONS, encode(ours, MARKED["chatml"], CONVERSATIONS)):
        (row,) = rows
        wanted = theirs.apply_chat_template(
            messages, chat_template=MARKED["chatml"], tokenize=True, return_dict=True
        )
        assert row.ids.tolist() == wanted["input_ids"]
        assert row.ids[row.is_learnt][-1] == theirs.convert_tokens_to_ids("<|im_end|>")
