"""Hugging Face checkpoints without their libraries: the format, and what is wrong with a directory.

(tests/parity/ checks them against transformers.)
"""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from lm import config as config_lib
from lm import sharding
from lm.hf import directory as hf
from lm.hf import families, safetensors
from lm.models.transformer import Config, Transformer

TOKEN_IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=None)
LLAMA = dict(
    vocab_size=40,
    context_length=16,
    num_layers=2,
    embed_dim=16,
    mlp_dim=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    tie_embeddings=False,
)
# A tensor of the second layer.
DOWN_PROJ = "model.layers.1.mlp.down_proj.weight"


# --- models and files ---


def make_params(fields, dtype="float32"):
    """(all fields, parameters drawn at random) of a Transformer."""
    fields = config_lib.default().model.to_dict() | fields
    fields |= dict(param_dtype=dtype, compute_dtype="float32")
    del fields["type"]
    config = Config(**fields)

    abstract = nnx.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    abstract_params = nnx.to_pure_dict(nnx.split(abstract, nnx.Param)[1])

    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jax.numpy.asarray(rng.normal(size=p.shape), p.dtype), abstract_params
    )
    return fields, params


@pytest.fixture
def directory(tmp_path):
    """A Llama of two layers in several files, with their index."""
    fields, params = make_params(LLAMA)
    hf.save(
        tmp_path, families.FAMILIES["llama"], fields, params, token_ids=TOKEN_IDS, shard_bytes=8_000
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def abstract_params_of(fields):
    """ShapeDtypeStructs of a model's parameters on one device."""
    _, params = make_params(fields)
    layout = sharding.replicated(sharding.make_mesh({}, jax.devices()[:1]))
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=layout), params)


def load(directory):
    source = hf.Checkpoint(directory)
    return source.load(abstract_params_of(source.fields))


def change_json(path, **changes):
    """Sets keys of a JSON file; None takes them out."""
    content = json.loads(path.read_text()) | changes
    content = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(content))


def read_tensors(path):
    """hf_name -> array, in memory, of a safetensors file."""
    return {name: np.array(entry.read()) for name, entry in safetensors.entries(path).items()}


def write_tensors(path, tensors):
    specs = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    safetensors.write(path, specs, tensors.values())


def change_tensors(path, **changes):
    """Changes tensors of a safetensors file; None takes one out."""
    tensors = read_tensors(path) | changes
    write_tensors(path, {name: array for name, array in tensors.items() if array is not None})


def assert_same_params(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_what_was_saved_is_loaded(directory):
    _, params = make_params(LLAMA)

    assert_same_params(load(directory), params)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("phi3", dict()),
        (
            "gpt_neox",
            dict(norm="layernorm", gated_mlp=False, num_kv_heads=2, residual="parallel")
            | dict(bias="qkv,out,mlp,norm", activation="gelu"),
        ),
        (
            "gpt_bigcode",
            dict(norm="layernorm", gated_mlp=False, bias="qkv,out,mlp,norm")
            | dict(positions="learned"),
        ),
        (
            "gpt_bigcode",
            dict(norm="layernorm", gated_mlp=False, bias="qkv,out,mlp,norm")
            | dict(positions="learned", num_kv_heads=2),
        ),
    ],
)
def test_fused_tensors_are_taken_apart(name, changes, tmp_path):
    """Also where their parts are of different sizes: there are twice as many heads as kv heads."""
    fields, params = make_params(LLAMA | changes)
    hf.save(tmp_path, families.FAMILIES[name], fields, params, token_ids=TOKEN_IDS)

    assert_same_params(load(tmp_path), params)


def test_progress_ends_with_all_bytes(directory):
    calls = []
    source = hf.Checkpoint(directory)

    params = source.load(
        abstract_params_of(source.fields), lambda done, total: calls.append((done, total))
    )

    num_bytes = sum(p.nbytes for p in jax.tree.leaves(params))
    assert calls == sorted(calls)
    assert calls[-1] == (num_bytes, num_bytes)


# --- the safetensors format ---


@pytest.mark.parametrize("dtype", safetensors.DTYPES.values())
def test_arrays_of_every_dtype_are_read_as_written(tmp_path, dtype):
    arrays = {
        "matrix": np.arange(6).reshape(2, 3).astype(dtype),
        "scalar": np.zeros((), dtype),
        "empty": np.zeros((0, 4), dtype),
    }

    write_tensors(tmp_path / "x", arrays)

    entries = safetensors.entries(tmp_path / "x")
    assert entries.keys() == arrays.keys()
    for name, entry in entries.items():
        assert entry.dtype == arrays[name].dtype
        np.testing.assert_array_equal(entry.read(), arrays[name])
    assert not (tmp_path / "x.partial").exists()


def description(dtype="F32", shape=(2,), offsets=(0, 8)):
    """A tensor's entry in a header; by default a right one of eight bytes."""
    return dict(dtype=dtype, shape=list(shape), data_offsets=list(offsets))


@pytest.mark.parametrize(
    "header, data, message",
    [
        (dict(a=description()), b"1234567", "a ends at byte"),  # truncated
        (dict(a=description()), b"123456789", "its tensors fill 8 bytes, and it holds 9"),
        (
            dict(a=description(shape=(3,))),
            b"12345678",
            r"a is F32\[3\], 12 bytes, but its place has 8",
        ),
        (
            dict(a=description(), b=description(offsets=(4, 12))),
            b"x" * 12,
            "b begins at byte 4 of the data, where byte 8 is next",
        ),
        (
            dict(a=description(), b=description(offsets=(12, 20))),
            b"x" * 20,
            "b begins at byte 12 of the data, where byte 8 is next",
        ),
        (
            dict(a=description(dtype="F8_E4M3")),
            b"12345678",
            "a is of dtype F8_E4M3, which can't be read; there are",
        ),
        (dict(a=description(shape=(-2,))), b"12345678", "its entry for 'a'"),
        (dict(a=description(shape=(1 << 62, 1 << 62))), b"12345678", "but its place has 8"),
        (dict(a=[1, 2]), b"12345678", "its entry for 'a'"),
        (dict(a=dict(dtype="F32")), b"", "its entry for 'a'"),
    ],
)
def test_headers_that_lie(tmp_path, header, data, message):
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + data)

    with pytest.raises(ValueError, match=message):
        safetensors.entries(tmp_path / "x")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "its header should be 0 bytes long, and the file is 0"),
        (struct.pack("<Q", 1 << 40) + b"{}", "its header should be 1099511627776 bytes long"),
        (struct.pack("<Q", 5) + b"[1,2]", "its header is a list; wanted an object"),
        (struct.pack("<Q", 4) + b"\xff{}!", "its header is not JSON"),
        (struct.pack("<Q", 23) + b'{"a": {}, "a": {}     }', r"\['a'\] twice"),
        (struct.pack("<Q", 1 << 18) + b'{"a":' * (1 << 18), "nested too deeply"),
    ],
)
def test_no_header(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)

    with pytest.raises(ValueError, match=message):
        safetensors.entries(tmp_path / "x")


def test_every_flipped_bit_of_a_header_is_noticed(directory):
    """Or it changes nothing: names, dtypes, shapes and offsets all have to be those that
    config.json and the file's length ask for.
    """
    path = sorted(directory.glob("*.safetensors"))[0]
    intact = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", intact[:8])[0]
    params = load(directory)

    # Some of the bits: each costs a whole load.
    for bit in np.random.default_rng(0).choice(header_end * 8, 150, replace=False):
        flipped = bytearray(intact)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)

        # A flip in the metadata changes nothing.
        try:
            loaded = load(directory)
        except ValueError:
            continue
        assert_same_params(loaded, params)


# --- tensors that are not those of the model ---


@pytest.fixture
def file_of_down_proj(directory):
    weight_map = json.loads((directory / hf.INDEX).read_text())["weight_map"]
    return directory / weight_map[DOWN_PROJ]


def assert_load_fails(directory, message):
    with pytest.raises(ValueError, match=message):
        load(directory)


def test_a_tensor_that_its_file_does_not_have(directory, file_of_down_proj):
    change_tensors(file_of_down_proj, **{DOWN_PROJ: None})

    assert_load_fails(directory, f"names tensors that their files don't have: {DOWN_PROJ}")


def test_a_tensor_that_is_missing_in_the_index_too(directory, file_of_down_proj):
    change_tensors(file_of_down_proj, **{DOWN_PROJ: None})
    weight_map = json.loads((directory / hf.INDEX).read_text())["weight_map"]
    del weight_map[DOWN_PROJ]
    change_json(directory / hf.INDEX, weight_map=weight_map)

    assert_load_fails(directory, rf"needs 1 tensor\(s\) that are not there: {DOWN_PROJ}; there are")


def test_a_tensor_of_another_shape(directory, file_of_down_proj):
    # As many numbers as before: only the shape tells.
    transposed = read_tensors(file_of_down_proj)[DOWN_PROJ].T
    change_tensors(file_of_down_proj, **{DOWN_PROJ: transposed})

    assert_load_fails(directory, rf"{DOWN_PROJ} \[24, 16\], wanted \[16, 24\]")


def test_a_tensor_that_the_model_does_not_have(directory, file_of_down_proj):
    name = "model.layers.1.mlp.experts.weight"
    change_tensors(file_of_down_proj, **{name: np.zeros((16, 24), np.float32)})

    assert_load_fails(directory, rf"has no tensor\(s\) {name}: what they are for would be lost")


def test_a_buffer_of_older_checkpoints_is_ignored(directory, file_of_down_proj):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    change_tensors(file_of_down_proj, **{name: np.zeros(24, np.float32)})

    load(directory)


def test_a_tensor_in_two_files(directory, file_of_down_proj):
    weight_map = json.loads((directory / hf.INDEX).read_text())["weight_map"]
    other_file = directory / weight_map["model.embed_tokens.weight"]
    assert other_file != file_of_down_proj
    change_tensors(other_file, **{DOWN_PROJ: read_tensors(file_of_down_proj)[DOWN_PROJ]})

    assert_load_fails(directory, f"tensor {DOWN_PROJ} is in .* and in")


def test_a_file_that_is_missing(directory, file_of_down_proj):
    file_of_down_proj.unlink()

    assert_load_fails(directory, f"lacks {file_of_down_proj.name}, which {hf.INDEX} names")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"weight_map": [1]}',
        '{"weight_map": {"a": "../../x.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ],
)
def test_an_index_that_is_none(directory, text):
    (directory / hf.INDEX).write_text(text)

    assert_load_fails(directory, f"{hf.INDEX} (can't be read|names|is not JSON|is a list)")


def test_several_files_without_an_index(directory):
    (directory / hf.INDEX).unlink()

    assert_load_fails(directory, f"but no {hf.INDEX} that says what belongs together")


def test_pickled_weights_are_refused(directory):
    for path in (*directory.glob("*.safetensors"), directory / hf.INDEX):
        path.unlink()
    assert_load_fails(directory, "has no safetensors$")

    (directory / "model-q4.gguf").write_bytes(b"GGUF")
    assert_load_fails(directory, "has no safetensors, but model-q4.gguf of llama.cpp")

    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    assert_load_fails(
        directory,
        r"pickled weights \(pytorch_model.bin\), which can run any code.*save_pretrained",
    )


# --- config.json ---


def test_no_config_json(tmp_path, directory):
    assert_load_fails(
        tmp_path / "nowhere",
        "has no config.json; wanted the directory of a Hugging Face checkpoint",
    )

    (directory / "config.json").write_text("{")
    assert_load_fails(directory, "config.json is not JSON")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(model_type="bloom"),
            r"model_type = 'bloom' is none of the families that can be read: "
            r"\['arcee', 'bart', 'bert', 'ernie4_5', 'glm', 'gpt2'",
        ),
        (
            dict(hidden_act="tanh"),
            r"hidden_act = 'tanh' is not supported for llama; this reads \['silu'",
        ),
        (dict(hidden_size=None), "hidden_size is missing; a llama can't do without"),
        (
            dict(quantization_config=dict(bits=4, quant_method="gptq")),
            r"quantization_config: these weights are quantized \(quant_method = 'gptq'\)",
        ),
        (
            dict(logit_scale=0.5, attention_softcap=20),
            "attention_softcap = 20, logit_scale = 0.5: not known",
        ),
        (dict(sliding_window=7), "sliding_window = 7: not known for llama"),
        (
            dict(rope_scaling=dict(type="yarn")),
            r"rope_scaling = .*'yarn'.* is not supported for llama; this reads a yarn with "
            r"\['factor'\] and perhaps",
        ),
        (
            dict(rope_scaling=dict(type="ntk", factor=4.0)),
            r"'ntk'.* is not supported for llama; this reads rope_type of \['default'",
        ),
        (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "is not supported for llama"),
        (dict(vocab_size=41), r"model.embed_tokens.weight \[40, 16\], wanted \[41, 16\]"),
        (dict(num_hidden_layers=3), r"needs 9 tensor\(s\) that are not there: model.layers.2"),
        (
            dict(num_hidden_layers=1),
            r"has no tensor\(s\) model.layers.1.*and 3 more: what they are for would be lost",
        ),
        (dict(attention_bias=True), r"needs 8 tensor\(s\) that are not there: .*q_proj.bias"),
        (dict(model_type="gpt_neox"), "rms_norm_eps = 1e-05.*not known for gpt_neox"),
    ],
)
def test_configurations_that_are_not_the_model(directory, changes, message):
    change_json(directory / "config.json", **changes)

    assert_load_fails(directory, message)


# The keys that have no default.
SIZES = dict(
    vocab_size=40,
    num_hidden_layers=3,
    hidden_size=256,
    num_attention_heads=32,  # which all families' default numbers of kv heads divide
    intermediate_size=24,
    max_position_embeddings=16,
)
GPT_SIZES = dict(vocab_size=40, n_layer=2, n_embd=16, n_head=2, n_positions=16)
MISTRAL = SIZES | dict(model_type="mistral")
MIXTRAL = SIZES | dict(model_type="mixtral")
QWEN2 = SIZES | dict(model_type="qwen2")
QWEN3 = SIZES | dict(model_type="qwen3")
QWEN2_MOE = SIZES | dict(model_type="qwen2_moe", moe_intermediate_size=8)
QWEN3_MOE = SIZES | dict(model_type="qwen3_moe", moe_intermediate_size=8)
ALL_SLIDING = dict(layer_types=["sliding_attention"] * 3)


# As the files of published checkpoints have them.
HARMLESS = (
    dict(attention_dropout=0.1, use_cache=False, transformers_version="4.30.0"),
    dict(id2label={"0": "a"}, _num_labels=2),  # DistilGPT-2
    {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
    dict(_attn_implementation_autoset=True, neftune_noise_alpha=5.0),
    dict(use_mrope=False, some_list=[], some_text="", some_object={}),
    dict(layer_types=["full_attention"] * 2),
    dict(rope_scaling=dict(type="linear", factor=1.0)),
    dict(rope_scaling={}, rope_parameters=dict(rope_type="default")),
    dict(max_sequence_length=2048, custom_pipelines={"text-generation": {}}),  # Vicuna, Dolly
)


@pytest.mark.parametrize("keys", HARMLESS)
def test_keys_that_do_not_change_logits_are_ignored(directory, keys):
    fields = hf.Checkpoint(directory).fields
    change_json(directory / "config.json", **keys)

    assert hf.Checkpoint(directory).fields == fields


@pytest.mark.parametrize(
    "name, keys",
    [
        ("phi3", dict(full_attn_mod=1, interpolate_factor=1, lm_head_bias=False)),  # Phi-4-mini
        (
            "starcoder2",
            dict(activation_function="gelu", mlp_type="default", norm_type="layer_norm")
            | dict(attention_softmax_in_fp32=True, scale_attention_softmax_in_fp32=True)
            | dict(layer_norm_epsilon=1e-5, scale_attn_weights=True),
        ),
    ],
)
def test_keys_of_a_family_that_do_not_change_logits_are_ignored(name, keys):
    config = SIZES | dict(model_type=name)
    assert families.read_config(config | keys) == families.read_config(config)


def test_null_is_not_missing():
    assert families.read_config(MISTRAL)["num_kv_heads"] == 8
    assert families.read_config(MISTRAL | dict(num_key_value_heads=None))["num_kv_heads"] == 32
    with pytest.raises(ValueError, match="config.json: rms_norm_eps is null"):
        families.read_config(MISTRAL | dict(rms_norm_eps=None))


# Of a missing key or of two that say different things, by what transformers makes of it.
ROPE = dict(rope_type="default", rope_theta=500.0)


@pytest.mark.parametrize(
    "config, wanted",
    [
        (dict(model_type="gpt2"), dict(activation="gelu_tanh")),
        (dict(model_type="openai-gpt"), dict(activation="gelu_tanh", mlp_dim=64)),
        (dict(model_type="gpt2", hidden_size=32, n_embd=16), dict(embed_dim=32)),
        (dict(model_type="llama", rope_theta=7.0, rope_parameters=ROPE), dict(rope_theta=500.0)),
        (
            dict(model_type="llama", rope_scaling=dict(type="default"), rope_parameters=ROPE),
            dict(rope_theta=10000.0),
        ),
        (dict(model_type="llama", partial_rotary_factor=0.5), dict(rope_fraction=1.0)),
        (dict(model_type="stablelm", partial_rotary_factor=0.5), dict(rope_fraction=0.5)),
        (
            dict(model_type="gpt_neox", partial_rotary_factor=0.5, rope_theta=7.0),
            dict(rope_fraction=0.25, rope_theta=10000.0),
        ),
        (
            dict(model_type="gpt_neox", rotary_pct=0.5, rotary_emb_base=7.0),
            dict(rope_fraction=0.5, rope_theta=7.0),
        ),
    ],
)
def test_which_key_counts(config, wanted):
    sizes = GPT_SIZES if config["model_type"] in ("gpt2", "openai-gpt") else SIZES
    fields = families.read_config(sizes | config)

    assert {name: fields[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    "changes, name",
    [
        (dict(sliding_window=0), "sliding_window"),
        (dict(is_causal=False), "is_causal"),
        (dict(hidden_size="16"), "hidden_size"),
        (dict(hidden_act=["silu"]), "hidden_act"),
        (dict(rope_scaling="linear"), "rope_scaling"),
        (dict(rope_theta=None), "rope_theta"),
        (dict(rope_theta=10**400), "rope_theta"),
        (dict(rope_scaling=dict(type="yarn", factor=10**400)), "rope_scaling"),
        (dict(rope_scaling=dict(type="longrope", short_factor=[1], long_factor=[1])), "pairs"),
        (dict(num_key_value_heads=5), "num_key_value_heads"),
    ],
)
def test_values_that_no_model_has_are_refused_by_name(changes, name):
    with pytest.raises(ValueError, match=rf"config.json: .*\b{name}\b"):
        families.read_config(MISTRAL | changes)


def test_a_key_is_ignored_where_the_user_says_so(directory):
    _, params = make_params(LLAMA)
    change_json(directory / "config.json", logit_scale=0.5)
    assert_load_fails(directory, "logit_scale = 0.5: not known for llama.*--ignore=NAME")

    source = hf.Checkpoint(directory, ignored=["logit_scale"])
    fields = make_params(source.fields)[0]
    assert_same_params(source.load(abstract_params_of(source.fields)), params)

    # It is exported as it was, key and all.
    hf.save_as(directory / "back", source.record(), fields, params)
    assert json.loads((directory / "back/config.json").read_text())["logit_scale"] == 0.5
    with pytest.raises(ValueError, match="config.json has no logit_scal to ignore"):
        hf.Checkpoint(directory, ignored=["logit_scal"])


def test_what_is_no_language_model_says_what_it_is(directory, file_of_down_proj):
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    assert hf.is_checkpoint(directory)
    assert_load_fails(directory, "has an adapter .* weights of 'base': .*lm.convert import")
    (directory / "adapter_config.json").unlink()

    change_json(directory / "config.json", architectures=["LlamaForSequenceClassification"])
    load(directory)
    change_tensors(file_of_down_proj, **{"score.weight": np.zeros((2, 16), np.float32)})
    assert_load_fails(
        directory, r"no tensor\(s\) score.weight.*architectures = .*SequenceClassification"
    )


def test_the_one_file_comes_before_the_index(directory):
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= read_tensors(path)
    write_tensors(directory / "model.safetensors", tensors)
    write_tensors(directory / "consolidated.safetensors", {"a": np.zeros(2)})

    assert {entry.path.name for entry in hf.Checkpoint(directory).entries.values()} == {
        "model.safetensors"
    }


@pytest.mark.parametrize(
    "config, window",
    [
        (MISTRAL, 4096),
        (MISTRAL | dict(sliding_window=None), 0),
        (MISTRAL | dict(sliding_window=9), 9),
        (MIXTRAL, 0),
        (QWEN2 | dict(sliding_window=9), 0),
        (QWEN2 | dict(use_sliding_window=True, max_window_layers=0), 4096),
        (QWEN2 | dict(use_sliding_window=True), 0),
        (QWEN3 | ALL_SLIDING | dict(use_sliding_window=True, sliding_window=9), 9),
        (QWEN3_MOE | dict(sliding_window=9), 0),
        (QWEN2_MOE | dict(sliding_window=0), 0),  # as transformers writes it
    ],
)
def test_windows(config, window):
    """A missing key is the family's own default, null is no window, and Qwen's windows wait for a
    switch.
    """
    assert families.read_config(config)["window"] == window


@pytest.mark.parametrize(
    "config, message",
    [
        (
            QWEN2 | dict(use_sliding_window=True, max_window_layers=1, sliding_window=9),
            "max_window_layers = 1 with use_sliding_window .* layers that are all alike",
        ),
        (QWEN3 | ALL_SLIDING, "layer_types = .* as its other keys say"),
        (QWEN2_MOE | dict(use_sliding_window=True), "use_sliding_window = True is not supported"),
    ],
)
def test_windows_of_some_layers_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        families.read_config(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(mlp_only_layers=[0]),
            r"mlp_only_layers = \[0\] is not supported for qwen3_moe; this reads \[\[\], None\]",
        ),
        (dict(decoder_sparse_step=2), "decoder_sparse_step = 2 is not supported"),
        (dict(num_shared_experts=2), "num_shared_experts = 2: not known for qwen3_moe"),
    ],
)
def test_experts_that_are_not_known(changes, message):
    with pytest.raises(ValueError, match=message):
        families.read_config(QWEN3_MOE | changes)


def test_families_of_experts_have_no_model_without():
    fields, _ = make_params(LLAMA)
    for name in ("mixtral", "qwen2_moe", "qwen3_moe"):
        with pytest.raises(ValueError, match=f"no {name} has num_experts = 0"):
            families.write_config(families.FAMILIES[name], fields)

    with pytest.raises(
        ValueError,
        match="num_local_experts or num_experts = 0 is not supported for mixtral; this reads 1 and",
    ):
        families.read_config(MIXTRAL | dict(num_local_experts=0))


def test_defaults_of_experts():
    # num_local_experts is transformers 5's name for num_experts.
    fields = families.read_config(QWEN3_MOE | dict(num_local_experts=9))

    assert fields["num_experts"] == 9
    assert fields["mlp_dim"] == 8
    assert fields["experts_per_token"] == 8
    assert fields["normalize_router"] is False
    assert families.read_config(MIXTRAL)["rope_theta"] == 1e6


# --- checkpoints as others write them ---


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path):
    fields, params = make_params(LLAMA | dict(tie_embeddings=True))
    hf.save(tmp_path, families.FAMILIES["llama"], fields, params, token_ids=TOKEN_IDS)
    path = tmp_path / "model.safetensors"
    table = read_tensors(path)["model.embed_tokens.weight"]

    change_tensors(path, **{"lm_head.weight": table})
    assert_same_params(load(tmp_path), params)

    # It is written back too.
    hf.save_as(tmp_path / "back", hf.Checkpoint(tmp_path).record(), fields, params)
    back = tmp_path / "back/model.safetensors"
    assert safetensors.entries(back).keys() == safetensors.entries(path).keys()

    # A head of its own would be lost in a model that ties it.
    change_tensors(path, **{"lm_head.weight": table + 1})
    assert_load_fails(
        tmp_path,
        "tie_word_embeddings is set, but lm_head.weight is not model.embed_tokens.weight",
    )


def test_names_without_their_prefix(tmp_path):
    """GPT-2's own checkpoints are of the body alone, with masks among the tensors."""
    fields, params = make_params(
        LLAMA
        | dict(
            num_kv_heads=2,
            norm="layernorm",
            gated_mlp=False,
            positions="learned",
            bias="qkv,out,mlp,norm",
            tie_embeddings=True,
            activation="gelu_tanh",
        )
    )
    hf.save(tmp_path, families.FAMILIES["gpt2"], fields, params, token_ids=TOKEN_IDS)
    path = tmp_path / "model.safetensors"

    # Write it again as GPT-2's authors did.
    body = {}
    for name, array in read_tensors(path).items():
        body[name.removeprefix("transformer.")] = array
    mask = {"h.0.attn.bias": np.ones((1, 1, 4, 4), bool)}
    write_tensors(path, body | mask)
    assert_same_params(load(tmp_path), params)

    # It is written back without prefixes too, but without the masks.
    hf.save_as(tmp_path / "back", hf.Checkpoint(tmp_path).record(), fields, params)
    assert safetensors.entries(tmp_path / "back/model.safetensors").keys() == body.keys()


@pytest.mark.parametrize("name", ["llama", "mistral", "arcee", "phi3"])
def test_names_without_their_prefix_in_any_family(name, tmp_path):
    """As in Qwen3-Embedding: a body that ties its head."""
    gated_mlp = name != "arcee"
    fields, params = make_params(LLAMA | dict(tie_embeddings=True, gated_mlp=gated_mlp))
    hf.save(tmp_path, families.FAMILIES[name], fields, params, token_ids=TOKEN_IDS)
    path = tmp_path / "model.safetensors"
    body = {key.removeprefix("model."): array for key, array in read_tensors(path).items()}
    write_tensors(path, body)

    assert_same_params(load(tmp_path), params)


def test_a_model_that_was_changed_is_not_written_as_it_was(directory):
    fields, params = make_params(LLAMA | dict(rope_theta=77.0))

    with pytest.raises(
        ValueError,
        match="the model was changed since it was imported: rope_theta = 77.0, was 10000.0",
    ):
        hf.save_as(directory / "back", hf.Checkpoint(directory).record(), fields, params)


def test_the_dtype_is_bfloat16_if_all_weights_are(tmp_path):
    """Norms are in f32 in checkpoints of ours, and in bf16 in those of others."""
    fields, params = make_params(LLAMA, "bfloat16")
    path = tmp_path / "model.safetensors"

    hf.save(tmp_path, families.FAMILIES["llama"], fields, params, token_ids=TOKEN_IDS)
    ours = hf.Checkpoint(tmp_path)
    dtypes = {entry.dtype for entry in ours.entries.values()}
    assert dtypes == {np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)}
    assert ours.dtype() == "float32"

    all_bfloat16 = {
        name: array.astype(ml_dtypes.bfloat16) for name, array in read_tensors(path).items()
    }
    write_tensors(path, all_bfloat16)
    assert hf.Checkpoint(tmp_path).dtype() == "bfloat16"

    # A buffer is no weight.
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    write_tensors(path, all_bfloat16 | buffer)
    assert hf.Checkpoint(tmp_path).dtype() == "bfloat16"


# --- rotary scaling ---


@pytest.mark.parametrize(
    "scaling",
    [
        ("linear", 2.0),
        ("dynamic", 2.0, 16.0),
        (8.0, 1.0, 4.0, 8.0),
        ("yarn", 4.0, 8.0, 1.1, 20.0, 2.0, 0.0),
        ("longrope", 8.0, 1.1, *range(1, 9)),
    ],
)
def test_scalings_are_written_and_read(scaling):
    fields = make_params(LLAMA)[0] | dict(rope_scaling=scaling)

    read = families.read_config(families.write_config(families.FAMILIES["llama"], fields))

    assert read["rope_scaling"] == scaling


@pytest.mark.parametrize(
    "keys, wanted",
    [
        # The length before scaling, on its own, comes before the parameter, and that before
        # max_position_embeddings.
        (dict(), 16.0),
        (dict(rope_scaling=dict(original_max_position_embeddings=12)), 12.0),
        (
            dict(
                rope_scaling=dict(original_max_position_embeddings=12),
                original_max_position_embeddings=10,
            ),
            10.0,
        ),
    ],
)
def test_the_length_before_scaling(keys, wanted):
    keys = dict(keys)
    scaling = dict(type="yarn", factor=4.0) | keys.pop("rope_scaling", {})

    fields = families.read_config(MISTRAL | keys | dict(rope_scaling=scaling))

    name, factor, length, *_ = fields["rope_scaling"]
    assert (name, factor, length) == ("yarn", 4.0, wanted)
    # That is what it reaches.
    assert fields["context_length"] == 4 * wanted


# --- the family of a model ---


GPT = dict(
    norm="layernorm",
    bias="qkv,out,mlp,norm",
    positions="learned",
    gated_mlp=False,
    num_kv_heads=2,
)
GPT_NEOX = GPT | dict(positions="rope", rope_fraction=0.25, residual="parallel")
OPT = GPT | dict(bias="norm", position_offset=2, table_dim=8)


@pytest.mark.parametrize(
    "changes, name",
    [
        (dict(), "llama"),
        (dict(window=8), "mistral"),
        (dict(bias="qkv", window=0), "qwen2"),
        (dict(qk_norm=True), "qwen3"),
        (dict(gated_mlp=False, activation="relu_squared"), "arcee"),
        (dict(rope_interleaved=True, rope_fraction=0.5), "glm"),
        (dict(norm="layernorm", bias="norm", rope_fraction=0.25), "stablelm"),
        (dict(rope_fraction=0.5), "phi3"),
        (dict(norm="layernorm", bias="norm", gated_mlp=False), "starcoder2"),
        (dict(rope_interleaved=True, bias="qkv,out,mlp"), "ernie4_5"),
        (dict(rope_interleaved=True, bias="mlp"), "helium"),
        (dict(bias="out"), "seed_oss"),
        (GPT_NEOX, "gpt_neox"),
        (GPT, "gpt2"),
        (GPT | dict(residual="post_norm", mlp_dim=64), "openai-gpt"),
        (OPT, "opt"),
        (dict(num_experts=4), "mixtral"),
        (dict(num_experts=4, bias="qkv", shared_mlp_dim=8, normalize_router=False), "qwen2_moe"),
        (dict(num_experts=4, qk_norm=True), "qwen3_moe"),
        # Without experts their other fields don't matter.
        (dict(experts_per_token=7, normalize_router=False), "llama"),
    ],
)
def test_the_family_of_a_model(changes, name):
    fields, _ = make_params(LLAMA | changes)

    family = families.family_of_fields(fields)

    assert family.name == name
    # Its config.json says the same model.
    read = families.read_config(families.write_config(family, fields))
    if not fields["num_experts"]:
        del read["experts_per_token"], read["normalize_router"]
    assert read == {field: fields[field] for field in read}


def test_a_model_of_no_family():
    fields, _ = make_params(LLAMA | dict(residual="parallel", qk_norm=True))

    with pytest.raises(
        ValueError,
        match=r"(?s)no family .* has this model:.*"
        r"no llama has residual = 'parallel', qk_norm = True",
    ):
        families.family_of_fields(fields)
