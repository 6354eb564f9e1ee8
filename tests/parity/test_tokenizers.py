"""Tokenizers of checkpoints, in each form and with each companion file: ids, BOS, special tokens
and what ends a text are AutoTokenizer's.
"""

import itertools
import json
import random
import shlex
import shutil
import tempfile

import pytest
import sentencepiece
import tokenizers
import transformers
from etils import epath

from lm.data import chat, tokenizer_files
from lm.data import roles as roles_lib
from lm.data import tokenizer as lm_tokenizers
from lm.hf import families

# Letters of ten scripts, with what is hard about them: marks, joiners, compatibility forms.
SCRIPTS = dict(
    latin="abcdefgh éèñßﬁÅÅ",
    greek="αβγδεζηθ ἀάΩς",
    cyrillic="абвгдежз ёйЙ",
    arabic="ابتثجحخد \u064b\u0651لا",
    hebrew="אבגדהוזח \u05b8\u05bc",
    devanagari="कखगघचछजझ \u093f\u094d\u200d",
    thai="กขคงจฉชซ \u0e34\u0e48ำ",
    han="的一是不了人我在，。",
    japanese="あいうえおカキクケコ゛ｶﾞ",
    hangul="가나다라마바사아 \u1100\u1161",
)
ODD = [
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\u2581",
    "😀",
    "👩\u200d👩",
    "\u00a0",
    "\u3000",
    "\ufeff",
    "\x00",
    "'s",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_end|>", "<tool>", "[PAD]", "<0x0A>", "12"]


def hard_strings():
    rng = random.Random(0)
    strings = ["", " ", "  a", "a ", "\n", "<s>", " <s> a", "<tool> b", "a<tool>b", "\u2581a"]
    scripts = itertools.cycle(SCRIPTS.values())
    while len(strings) < 200:
        letters = next(scripts)
        parts = []
        for _ in range(rng.randint(1, 5)):
            parts.append("".join(rng.choices(letters, k=rng.randint(1, 8))))
            parts.append(rng.choice(rng.choice([ODD, SPECIAL, [" ", " ", ". "]])))
        strings.append("".join(parts))
    return strings


STRINGS = hard_strings()
CORPUS = ["".join(random.Random(i).choices("".join(SCRIPTS.values()), k=60)) for i in range(150)]
CORPUS += ["the cat and the hat, then the other one 12"] * 20


# --- vocabularies ---


def byte_level(directory, as_json):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<unk>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if as_json:
        tokenizer.save(str(directory / "tokenizer.json"))
    else:
        tokenizer.model.save(str(directory))


def openai_gpt(directory):
    """GPT-1's: lower case, words that end in </w>."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.model.save(str(directory))


def pieces(directory, **options):
    options = dict(model_type="bpe", byte_fallback=True, character_coverage=0.98) | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=500,
        control_symbols=["<|im_end|>"],
        user_defined_symbols=["<tool>", "\n"],
        minloglevel=2,
        **options,
    )
    (directory / "tokenizer.vocab").unlink()


def pieces_and_merges(directory):
    pieces(directory)
    byte_level(directory, False)


def llama_json(directory):
    """A Llama's tokenizer.json as transformers 4 wrote it."""
    pieces(directory)
    tokenizer = transformers.LlamaTokenizer.from_pretrained(directory)
    (directory / "tokenizer.model").unlink()
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    saved = json.loads((directory / "tokenizer.json").read_text())
    replace = dict(type="Replace", pattern=dict(String=" "), content="▁")
    prepend = dict(type="Prepend", prepend="▁")
    saved["normalizer"] = dict(type="Sequence", normalizers=[prepend, replace])
    saved["pre_tokenizer"] = None
    saved["post_processor"] = dict(
        type="TemplateProcessing",
        single=[
            {"SpecialToken": dict(id="<s>", type_id=0)},
            {"Sequence": dict(id="A", type_id=0)},
        ],
        pair=[{"Sequence": dict(id="A", type_id=0)}, {"Sequence": dict(id="B", type_id=0)}],
        special_tokens={"<s>": dict(id="<s>", ids=[1], tokens=["<s>"])},
    )
    (directory / "tokenizer.json").write_text(json.dumps(saved))


# --- what stands around them ---


def token(content, **flags):
    off = dict(lstrip=False, rstrip=False, single_word=False, normalized=False, special=True)
    return dict(content=content) | off | flags


ROLES = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
COMPANIONS = {
    "none": {},
    "config": {"tokenizer_config.json": ROLES | dict(add_bos_token=True, legacy=False)},
    "legacy": {"tokenizer_config.json": ROLES | dict(add_bos_token=True, legacy=True)},
    "no prefix": {"tokenizer_config.json": ROLES | dict(add_prefix_space=False)},
    "prefix": {"tokenizer_config.json": ROLES | dict(add_prefix_space=True, add_eos_token=True)},
    "objects": {
        "tokenizer_config.json": dict(
            bos_token={"__type": "AddedToken", **token("<s>", normalized=True)},
            eos_token={"__type": "AddedToken", **token("</s>", rstrip=True)},
            add_bos_token=True,
        )
    },
    "map": {
        "special_tokens_map.json": ROLES
        | dict(pad_token=token("[PAD]"), additional_special_tokens=["<|im_end|>"])
    },
    "added": {
        "tokenizer_config.json": ROLES,
        "added_tokens.json": {"<|im_end|>": 1001, "<tool>": 1000},
    },
    "map and added": {
        "tokenizer_config.json": dict(add_bos_token=True, additional_special_tokens=["<tool>"]),
        "special_tokens_map.json": ROLES | dict(eos_token="<|im_end|>"),
        "added_tokens.json": {"<|im_end|>": 1001, "<tool>": 1000},
    },
    "decoder": {
        "tokenizer_config.json": ROLES
        | dict(
            eos_token="<|im_end|>",
            image_token="<image>",
            added_tokens_decoder={
                "1000": token("<|im_end|>", lstrip=True),
                "1001": token("<tool>", special=False, normalized=True, single_word=True),
            },
        ),
        "special_tokens_map.json": dict(pad_token="[PAD]"),  # unread
    },
    "split": {"tokenizer_config.json": ROLES | dict(split_special_tokens=True)},
}

# name -> (what writes the vocabulary, model_type, class; "" for none)
FORMS = {
    "json": (lambda d: byte_level(d, True), "llama", ""),
    "json of Llama 3": (lambda d: byte_level(d, True), "llama", "LlamaTokenizerFast"),
    "json of GPT-2": (lambda d: byte_level(d, True), "gpt2", "GPT2Tokenizer"),
    "json of NeoX": (lambda d: byte_level(d, True), "gpt_neox", "GPTNeoXTokenizerFast"),
    "json of Qwen": (lambda d: byte_level(d, True), "qwen2", "Qwen2Tokenizer"),
    "json of Llama": (llama_json, "llama", "LlamaTokenizerFast"),
    "json of Mistral": (llama_json, "mistral", "LlamaTokenizer"),
    "pieces of Llama": (pieces, "llama", "LlamaTokenizer"),
    "pieces": (pieces, "llama", ""),
    "pieces of Mixtral": (
        lambda d: pieces(d, normalization_rule_name="nmt_nfkc"),
        "mixtral",
        "LlamaTokenizer",
    ),
    "pieces of Unigram": (lambda d: pieces(d, model_type="unigram"), "mistral", ""),
    "merges of GPT-2": (lambda d: byte_level(d, False), "gpt2", ""),
    "merges of OPT": (lambda d: byte_level(d, False), "opt", "GPT2Tokenizer"),
    "merges of NeoX": (lambda d: byte_level(d, False), "gpt_neox", ""),
    "merges of Qwen": (lambda d: byte_level(d, False), "qwen3", "Qwen2Tokenizer"),
    "merges of SmolLM": (lambda d: byte_level(d, False), "llama", "GPT2Tokenizer"),
    "merges of GPT-1": (openai_gpt, "openai-gpt", ""),
    "pieces and merges": (pieces_and_merges, "qwen3", ""),
}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """form -> a directory with its vocabulary."""
    directories = {}
    for form, (write, _, _) in FORMS.items():
        directories[form] = tmp_path_factory.mktemp("vocabulary")
        write(directories[form])
    return directories


def write_checkpoint(vocabulary, form, companions, directory):
    """Writes a checkpoint's directory, without weights."""
    shutil.copytree(vocabulary, directory)
    _, model_type, class_name = FORMS[form]
    contents = companions if isinstance(companions, dict) else COMPANIONS[companions]
    contents = dict(contents)
    if class_name:
        own = contents.get("tokenizer_config.json", {})
        contents["tokenizer_config.json"] = own | dict(tokenizer_class=class_name)
    # Those that name no EOS have it here.
    contents["config.json"] = dict(model_type=model_type, bos_token_id=1, eos_token_id=2)
    contents["generation_config.json"] = dict(eos_token_id=[2, 7])
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content))


NAMED = ("bos", "eos", "unk", "pad", "cls", "sep", "mask")  # roles that transformers has


def named_roles(ours):
    return {name: ours.role(name) for name in NAMED if name in ours.roles}


def their_roles(theirs):
    ids = {name: getattr(theirs, f"{name}_token_id") for name in NAMED}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


@pytest.mark.parametrize("companions", COMPANIONS)
@pytest.mark.parametrize("form", FORMS)
def test_ids_are_those_of_auto_tokenizer(form, companions, vocabularies, tmp_path):
    if form == "pieces of Unigram" and "added" in companions + str(COMPANIONS[companions]):
        pytest.skip("AutoTokenizer itself fails")
    source = tmp_path / "source"
    write_checkpoint(vocabularies[form], form, companions, source)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    ours = lm_tokenizers.load(source)

    plain = theirs(STRINGS, add_special_tokens=False)["input_ids"]
    for text, wanted in zip(STRINGS, plain):
        assert ours.encode(text) == wanted, text
    assert ours.encode_batch(STRINGS) == plain
    decoded = theirs.batch_decode(plain, skip_special_tokens=True)
    assert list(map(ours.decode, plain)) == decoded
    for text in STRINGS[1:]:
        if wanted := theirs(text)["input_ids"]:
            assert ours.prompt(text) == wanted, text

    assert chat.special_tokens(ours) == theirs.special_tokens_map
    assert named_roles(ours) == their_roles(theirs)
    # None of these is an encoder's.
    assert ours.around == ((ours.bos_id,), (ours.eos_id,))
    assert set(ours.stop_ids) == {2, 7} | ({theirs.eos_token_id} - {None})
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1

    # Saved by a run, where there is no config.json.
    (tmp_path / "run").mkdir()
    ours.save(epath.Path(tmp_path / "run"))
    again = lm_tokenizers.load(tmp_path / "run")
    assert again.fingerprint == ours.fingerprint
    assert again.encode_batch(STRINGS) == plain
    assert again.stop_ids == ours.stop_ids
    assert (again.roles, again.around) == (ours.roles, ours.around)
    assert chat.special_tokens(again) == theirs.special_tokens_map


def random_token(rng, typed):
    """A special token as a text or, more rarely, as an object."""
    content = rng.choice([*SPECIAL, "ab", "the", " a"])
    if rng.random() < 0.6:
        return content
    flags = {key: rng.random() < 0.3 for key in ("lstrip", "rstrip", "single_word", "normalized")}
    if typed:
        return {"__type": "AddedToken"} | token(content, **flags)
    return token(content, **flags)


def random_companions(rng):
    config = {}
    for role in ("bos", "eos", "unk", "pad", "cls", "image"):
        if rng.random() < 0.4:
            config[f"{role}_token"] = random_token(rng, True)
    for key in ("add_bos_token", "add_prefix_space", "legacy", "split_special_tokens"):
        if rng.random() < 0.3:
            config[key] = rng.random() < 0.6
    if rng.random() < 0.2:
        config["additional_special_tokens"] = rng.sample(SPECIAL, rng.randrange(3))
    if rng.random() < 0.3:
        flags = dict(lstrip=rng.random() < 0.5, special=rng.random() < 0.5)
        ids = zip(["0", "2", "1000", "1001"], rng.sample(SPECIAL, 4))
        config["added_tokens_decoder"] = {i: token(text, **flags) for i, text in ids}

    contents = {"tokenizer_config.json": config}
    if rng.random() < 0.4:
        roles = rng.sample(["bos_token", "eos_token", "pad_token"], 2)
        contents["special_tokens_map.json"] = {role: random_token(rng, False) for role in roles}
    if rng.random() < 0.3:
        texts = rng.sample(SPECIAL, 3)
        contents["added_tokens.json"] = {text: 1000 + i for i, text in enumerate(texts)}
    return contents


@pytest.mark.parametrize("case", range(40))
def test_random_companions(case, vocabularies, tmp_path):
    rng = random.Random(case)
    form = rng.choice([form for form in FORMS if form != "pieces of Unigram"])
    source = tmp_path / "source"
    contents = random_companions(rng)
    write_checkpoint(vocabularies[form], form, contents, source)
    ours = lm_tokenizers.load(source)
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(source)
        plain = theirs(STRINGS, add_special_tokens=False)["input_ids"]
    except Exception as error:  # the library raises no other
        pytest.skip(f"AutoTokenizer itself fails: {error}")
    assert ours.encode_batch(STRINGS) == plain, contents
    assert chat.special_tokens(ours) == theirs.special_tokens_map, contents
    assert named_roles(ours) == their_roles(theirs), contents


@pytest.mark.parametrize("class_name", ["CodeLlamaTokenizer", "OfSomebodysTokenizer"])
def test_other_classes_are_refused_with_what_mends_them(class_name, vocabularies, tmp_path):
    directory = tmp_path / "it's $a"
    write_checkpoint(vocabularies["json of Llama"], "json of Llama", "config", directory)
    config = directory / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(tokenizer_class=class_name)))
    with pytest.raises(ValueError, match=f"class {class_name} has rules") as error:
        lm_tokenizers.load(directory)

    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    command = shlex.split(str(error.value).split("lm reads: ")[1])
    assert command[:2] == ["python", "-c"]
    exec(command[2])
    ours = lm_tokenizers.load(directory)
    assert ours.encode_batch(STRINGS) == theirs(STRINGS, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("form", FORMS)
def test_what_transformers_saves_is_read_as_it_is(form, vocabularies, tmp_path):
    source = tmp_path / "source"
    write_checkpoint(vocabularies[form], form, "map", source)
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    theirs.save_pretrained(source)
    ours = lm_tokenizers.load(source)
    assert ours.encode_batch(STRINGS) == theirs(STRINGS, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["spiece.model", "spm.model"])
def test_forms_of_encoders_are_refused_by_name(name, tmp_path):
    (tmp_path / name).write_text("a")
    with pytest.raises(ValueError, match=f"{name} is .*; this command writes a tokenizer.json"):
        lm_tokenizers.load(tmp_path)


# --- roles ---


def bert():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "a"]
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def big_bird():
    """An encoder's that names BOS and EOS too, which it puts nowhere."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "a", "<s>", "</s>"]
    vocab = {word: i for i, word in enumerate(words)}
    return transformers.BertTokenizer(vocab=vocab, bos_token="<s>", eos_token="</s>")


def roberta():
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "c", "t", "h", "e", "\u0120"]
    vocab = {word: i for i, word in enumerate(words)}
    return transformers.RobertaTokenizer(vocab=vocab, merges=[])


def t5():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -2.0) for piece in ("\u2581", "\u2581the", "\u2581a", "s", "c", "t")]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=12)


def of_tokens(**special):
    """Of bytes, with tokens that only their spelling tells apart."""
    with tempfile.TemporaryDirectory() as directory:
        lm_tokenizers.ByteTokenizer().save(epath.Path(directory))
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    theirs.add_special_tokens(special)
    return theirs


def glm():
    tokens = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|user|>"]
    return of_tokens(extra_special_tokens=tokens, pad_token="</s>")


def chatml():
    return of_tokens(extra_special_tokens=["<|im_start|>", "<|im_end|>"])


def llama3():
    tokens = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return of_tokens(extra_special_tokens=tokens)


@pytest.mark.parametrize(
    "make, by_spelling",
    [
        (bert, {}),
        (big_bird, {}),
        (roberta, {}),
        (t5, {"sentinels": [f"<extra_id_{i}>" for i in range(12)]}),
        (glm, {"mask": ["[MASK]"], "start_of_piece": ["<sop>"], "end_of_piece": ["<eop>"]}),
        (chatml, {"turns": ["<|im_start|>", "<|im_end|>"]}),
        (llama3, {"turns": ["<|start_header_id|>", "<|eot_id|>", "<|end_header_id|>"]}),
    ],
)
def test_roles_of_a_checkpoint(make, by_spelling, tmp_path):
    theirs = make()
    theirs.save_pretrained(tmp_path)
    ours = lm_tokenizers.load(tmp_path)
    wanted = {name: (token_id,) for name, token_id in their_roles(theirs).items()}
    for name, tokens in by_spelling.items():
        wanted[name] = tuple(theirs.convert_tokens_to_ids(tokens))
    assert ours.roles == wanted
    for name in roles_lib.ROLES.keys() - wanted.keys():
        with pytest.raises(ValueError, match=f"has no {name} "):
            ours.role_ids(name)

    # A text with what stands around it.
    for text in ("the cats", "a"):
        assert ours.prompt(text) == theirs(text)["input_ids"]
        if "cls" in wanted:
            before, after = ours.around
            assert [*before, *ours.encode(text), *after] == theirs(text)["input_ids"]
            assert ours.around == ((theirs.cls_token_id,), (theirs.sep_token_id,))
    if "cls" not in wanted:
        assert ours.around == ((ours.bos_id,), (theirs.eos_token_id,))

    # What ends a text: BERT's has no other.
    assert ours.eos_id == (theirs.sep_token_id if make is bert else theirs.eos_token_id)

    # A run keeps it; nothing is added to it.
    (tmp_path / "run").mkdir()
    ours.save(epath.Path(tmp_path / "run"))
    again = lm_tokenizers.load(tmp_path / "run")
    assert (again.roles, again.around, again.fingerprint) == (
        ours.roles,
        ours.around,
        ours.fingerprint,
    )
    assert ours.reserving("mask" if "mask" in wanted else "") is ours
    if make is t5:
        with pytest.raises(ValueError, match="has 12 sentinels already"):
            ours.reserving("sentinels:20")


@pytest.mark.parametrize("make", [bert, t5, glm])
def test_tokens_are_added_as_transformers_adds_them(make, tmp_path):
    theirs = make()
    theirs.save_pretrained(tmp_path)
    ours = lm_tokenizers.load(tmp_path).reserving("turns")
    theirs.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert ours.vocab_size == len(theirs)
    assert ours.role_ids("turns") == (len(theirs) - 2, len(theirs) - 1)
    text = "the <|im_start|> cats<|im_end|>"
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.role_ids("turns")[0] not in ours.encode_literally(text)
    assert ours.decode(ours.encode_literally("the cats")) == ours.decode(ours.encode("the cats"))

    # A run keeps them, and transformers reads them again.
    (tmp_path / "run").mkdir()
    ours.save(epath.Path(tmp_path / "run"))
    again = lm_tokenizers.load(tmp_path / "run")
    assert (again.fingerprint, again.encode(text)) == (ours.fingerprint, ours.encode(text))


RESERVE = "mask,pad,cls,sep,sentinels:12,start_of_piece,end_of_piece,turns"


def own_tokenizer(kind, directory):
    if kind == "bytes":
        return lm_tokenizers.ByteTokenizer()
    return lm_tokenizers.train_sentencepiece(CORPUS, 450, epath.Path(directory / "cache"))


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_reserved_roles_in_transformers(kind, tmp_path):
    ours = own_tokenizer(kind, tmp_path).reserving(RESERVE)
    ours.save(epath.Path(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)

    assert named_roles(ours) == their_roles(theirs)
    assert len(theirs) == ours.vocab_size
    for texts in roles_lib.parse(RESERVE).values():
        for text in texts:
            token_id = theirs.convert_tokens_to_ids(text)
            assert ours.spell([token_id]) == text
            assert token_id in theirs.all_special_ids
    ids = itertools.chain.from_iterable(ours.roles.values())
    assert set(ids) <= set(theirs.all_special_ids)


@pytest.mark.parametrize("reserve", ["", RESERVE])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_runs_own_tokenizer_as_any_family(kind, reserve, tmp_path):
    by_class = transformers.PreTrainedTokenizerFast
    if kind == "sentencepiece":
        by_class = transformers.LlamaTokenizer
    ours = own_tokenizer(kind, tmp_path).reserving(reserve)
    ours.save(epath.Path(tmp_path))

    # They take special tokens in a text for text, and U+2581 for itself.
    reserved = itertools.chain.from_iterable(roles_lib.parse(reserve).values())
    odd = ("<s>", "</s>", "<unk>", "\u2581", *reserved)
    texts = [text for text in STRINGS if not any(part in text for part in odd)]
    assert len(texts) > 100
    for family in families.FAMILIES:
        (tmp_path / "config.json").write_text(json.dumps(dict(model_type=family)))
        is_misread = family in tokenizer_files.MISNAMED
        theirs = (by_class if is_misread else transformers.AutoTokenizer).from_pretrained(tmp_path)
        assert theirs(texts, add_special_tokens=False)["input_ids"] == ours.encode_batch(texts)
        # A model of ours saw BOS before each text: so does who loads it elsewhere.
        assert theirs(texts[:9])["input_ids"] == [ours.prompt(text) for text in texts[:9]]
        assert lm_tokenizers.load(tmp_path).fingerprint == ours.fingerprint
