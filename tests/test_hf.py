"""Hugging Face checkpoints without their libraries: the format, and what is wrong with a directory.
(tests/parity/ has them against transformers.)
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


def parameters(fields, dtype="float32"):
    """(all fields, parameters drawn at random)."""
    model = (
        config_lib.default().model.to_dict()
        | fields
        | dict(param_dtype=dtype, compute_dtype="float32")
    )
    del model["type"]
    abstract = nnx.split(
        nnx.eval_shape(lambda: Transformer(Config(**model), jax.random.key(0))), nnx.Param
    )[1]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: jax.numpy.asarray(rng.normal(size=p.shape), p.dtype), nnx.to_pure_dict(abstract)
    )
    return model, params, sharding.logical_axes(abstract)


@pytest.fixture
def directory(tmp_path):
    """A Llama of several files; config.json, the index, and two layers."""
    fields, params, _ = parameters(LLAMA)
    hf.save(
        tmp_path, families.FAMILIES["llama"], fields, params, token_ids=TOKEN_IDS, shard_bytes=8_000
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def load(directory):
    source = hf.Source(directory)
    _, params, _ = parameters(source.fields)
    layout = sharding.replicated(sharding.make_mesh({}, jax.devices()[:1]))
    return source.load(
        jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=layout), params)
    )


def change(path, **changes):
    """Sets attributes of a JSON file; None takes them out."""
    about = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in about.items() if value is not None}))


def rewrite(path, **changes):
    """A safetensors file with some tensors changed; None takes one out."""
    entries = {
        name: np.array(entry.read()) for name, entry in safetensors.entries(path).items()
    } | changes
    entries = {name: array for name, array in entries.items() if array is not None}
    safetensors.write(
        path,
        {name: (array.dtype, array.shape) for name, array in entries.items()},
        entries.values(),
    )


def test_there_and_back(directory):
    _, params, _ = parameters(LLAMA)
    jax.tree.map(np.testing.assert_array_equal, load(directory), params)


def test_progress_ends_with_everything(directory):
    seen = []
    source = hf.Source(directory)
    _, params, _ = parameters(source.fields)
    layout = sharding.replicated(sharding.make_mesh({}, jax.devices()[:1]))
    source.load(
        jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=layout), params),
        lambda *at: seen.append(at),
    )
    assert (
        seen == sorted(seen) and seen[-1] == (sum(p.nbytes for p in jax.tree.leaves(params)),) * 2
    )


@pytest.mark.parametrize("dtype", safetensors.DTYPES.values())
def test_format(tmp_path, dtype):
    arrays = {
        "a": np.arange(6).reshape(2, 3).astype(dtype),
        "b": np.zeros((), dtype),
        "none": np.zeros((0, 4), dtype),
    }
    safetensors.write(
        tmp_path / "x", {name: (a.dtype, a.shape) for name, a in arrays.items()}, arrays.values()
    )
    for name, entry in safetensors.entries(tmp_path / "x").items():
        assert entry.dtype == arrays[name].dtype
        np.testing.assert_array_equal(entry.read(), arrays[name])
    assert not (tmp_path / "x.partial").exists()


def header(tmp_path, text, data=b""):
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return tmp_path / "x"


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return dict(dtype=dtype, shape=list(shape), data_offsets=list(offsets))


@pytest.mark.parametrize(
    "tensors, data, message",
    [
        (dict(a=entry()), b"1234567", "a ends at byte"),  # cut short
        (dict(a=entry()), b"123456789", "its tensors fill 8 bytes, and it holds 9"),
        (dict(a=entry(shape=(3,))), b"12345678", r"a is F32\[3\], 12 bytes, but its place has 8"),
        (
            dict(a=entry(), b=entry(offsets=(4, 12))),
            b"x" * 12,
            "b begins at byte 4 of the data, where byte 8 is next",
        ),
        (
            dict(a=entry(), b=entry(offsets=(12, 20))),
            b"x" * 20,
            "b begins at byte 12 of the data, where byte 8 is next",
        ),
        (
            dict(a=entry(dtype="F8_E4M3")),
            b"12345678",
            "a is of dtype F8_E4M3, which can't be read; there are",
        ),
        (dict(a=entry(shape=(-2,))), b"12345678", "its entry for 'a'"),
        (dict(a=entry(shape=(1 << 62, 1 << 62))), b"12345678", "but its place has 8"),
        (dict(a=[1, 2]), b"12345678", "its entry for 'a'"),
        (dict(a=dict(dtype="F32")), b"", "its entry for 'a'"),
    ],
)
def test_headers_that_lie(tmp_path, tensors, data, message):
    with pytest.raises(ValueError, match=message):
        safetensors.entries(header(tmp_path, json.dumps(tensors).encode(), data))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "its header should be 0 bytes long, and the file is 0"),
        (struct.pack("<Q", 1 << 40) + b"{}", "its header should be 1099511627776 bytes long"),
        (struct.pack("<Q", 5) + b"[1,2]", "its header is no JSON object"),
        (struct.pack("<Q", 4) + b"\xff{}!", "its header can't be read"),
        (struct.pack("<Q", 23) + b'{"a": {}, "a": {}     }', r"\['a'\] twice"),
    ],
)
def test_no_header(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        safetensors.entries(tmp_path / "x")


def test_every_flipped_bit_of_a_header_is_seen(directory):
    """Or changes nothing: names, dtypes, shapes and places all have to be those that config.json
    and the file's length ask for.
    """
    path = sorted(directory.glob("*.safetensors"))[0]
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    wanted = load(directory)
    for bit in np.random.default_rng(0).choice((8 + length) * 8, 150, replace=False):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = load(directory)
        except ValueError:
            continue
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_tensors_that_are_not_as_they_should_be(directory):
    index = directory / hf.INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    name = "model.layers.1.mlp.down_proj.weight"
    path, other = directory / weight_map[name], directory / weight_map["model.embed_tokens.weight"]
    whole = path.read_bytes()
    array = np.array(safetensors.entries(path)[name].read())

    rewrite(path, **{name: None})
    with pytest.raises(
        ValueError,
        match="names tensors that their files don't have: model.layers.1.mlp.down_proj.weight",
    ):
        load(directory)
    index.write_text(
        json.dumps({"weight_map": {key: file for key, file in weight_map.items() if key != name}})
    )
    with pytest.raises(
        ValueError,
        match=r"needs 1 tensor\(s\) that are not there: model.layers.1.mlp.down_proj.weight; there are",  # noqa: E501
    ):
        load(directory)
    index.write_text(json.dumps({"weight_map": weight_map}))
    rewrite(path, **{name: array.T})
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.down_proj.weight \[24, 16\], wanted \[16, 24\]"
    ):
        load(directory)
    path.write_bytes(whole)
    rewrite(path, **{"model.layers.1.mlp.experts.weight": array})
    with pytest.raises(
        ValueError,
        match=r"has no tensor\(s\) model.layers.1.mlp.experts.weight: what they are for would be lost",  # noqa: E501
    ):
        load(directory)
    rewrite(
        path,
        **{
            "model.layers.1.mlp.experts.weight": None,
            "model.layers.1.self_attn.rotary_emb.inv_freq": array[0],
        },
    )
    load(directory)  # a buffer that older checkpoints have
    path.write_bytes(whole)
    rewrite(other, **{name: array})
    with pytest.raises(ValueError, match=f"tensor {name} is in .* and in"):
        load(directory)
    path.unlink()
    with pytest.raises(ValueError, match=f"lacks {path.name}, which {hf.INDEX} names"):
        load(directory)
    for text in (
        "{",
        "[]",
        '{"weight_map": [1]}',
        '{"weight_map": {"a": "../../x.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=f"{hf.INDEX} (can't be read|names)"):
            load(directory)
    index.unlink()
    with pytest.raises(ValueError, match=f"but no {hf.INDEX} that says what belongs together"):
        load(directory)


def test_pickled_weights_are_refused(directory):
    for path in (*directory.glob("*.safetensors"), directory / hf.INDEX):
        path.unlink()
    with pytest.raises(ValueError, match="has no safetensors$"):
        load(directory)
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(
        ValueError,
        match=r"pickled weights \(pytorch_model.bin\), which can run any code.*save_pretrained",
    ):
        load(directory)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(model_type="bert"),
            r"model_type = 'bert' is none of the families that can be read: \['arcee', 'glm', 'gpt2'",  # noqa: E501
        ),
        (
            dict(hidden_act="tanh"),
            r"hidden_act = 'tanh' is not supported for llama; this reads \['silu'",
        ),
        (dict(hidden_size=None), "hidden_size is missing; a llama can't do without"),
        (
            dict(quantization_config=dict(bits=4)),
            r"quantization_config = \{'bits': 4\}: not known for llama",
        ),
        (
            dict(logit_scale=0.5, attention_softcap=20),
            "attention_softcap = 20, logit_scale = 0.5: not known",
        ),
        (dict(sliding_window=7), "sliding_window = 7: not known for llama"),
        (
            dict(rope_scaling=dict(type="yarn", factor=4.0)),
            "rope_parameters = .*'yarn'.* is not supported for llama; this reads",
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
def test_configurations_that_are_not_as_they_should_be(directory, changes, message):
    change(directory / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load(directory)


BARE = dict(
    vocab_size=40,
    num_hidden_layers=3,
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
)
MOE = BARE | dict(moe_intermediate_size=8)


@pytest.mark.parametrize(
    "config, window",
    [
        (BARE | dict(model_type="mistral"), 4096),
        (BARE | dict(model_type="mistral", sliding_window=None), 0),
        (BARE | dict(model_type="mistral", sliding_window=9), 9),
        (BARE | dict(model_type="mixtral"), 0),
        (BARE | dict(model_type="qwen2", sliding_window=9), 0),
        (BARE | dict(model_type="qwen2", use_sliding_window=True, max_window_layers=0), 4096),
        (BARE | dict(model_type="qwen2", use_sliding_window=True), 0),
        (
            BARE
            | dict(
                model_type="qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=9
            ),
            "layers that are all",
        ),
        (
            BARE | dict(model_type="qwen3", layer_types=["sliding_attention"] * 3),
            "with use_sliding_window",
        ),
        (
            BARE
            | dict(
                model_type="qwen3",
                layer_types=["sliding_attention"] * 3,
                use_sliding_window=True,
                sliding_window=9,
            ),
            9,
        ),
        (MOE | dict(model_type="qwen3_moe", sliding_window=9), 0),
        (
            MOE | dict(model_type="qwen2_moe", use_sliding_window=True),
            "use_sliding_window = True is not supported",
        ),
    ],
)
def test_windows(config, window):
    """What is not there is the family's own default, what is null is none, and Qwen's windows wait
    for a switch.
    """
    if isinstance(window, int):
        assert families.read_config(config)["window"] == window
    else:
        with pytest.raises(ValueError, match=window):
            families.read_config(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(mlp_only_layers=[0]),
            r"mlp_only_layers = \[0\] is not supported for qwen3_moe; this reads \[\[\]\]",
        ),
        (dict(decoder_sparse_step=2), "decoder_sparse_step = 2 is not supported"),
        (dict(num_shared_experts=2), "num_shared_experts = 2: not known for qwen3_moe"),
    ],
)
def test_experts_that_are_not_known(changes, message):
    with pytest.raises(ValueError, match=message):
        families.read_config(MOE | dict(model_type="qwen3_moe") | changes)


def test_no_family_of_experts_is_without():
    fields, _, _ = parameters(LLAMA)
    for name in ("mixtral", "qwen2_moe", "qwen3_moe"):
        with pytest.raises(ValueError, match=f"no {name} has num_experts = 0"):
            families.write_config(families.FAMILIES[name], fields)
    with pytest.raises(
        ValueError,
        match="num_local_experts = 0 is not supported for mixtral; this reads 1 and more",
    ):
        families.read_config(BARE | dict(model_type="mixtral", num_local_experts=0))


def test_defaults_of_experts():
    # as transformers 5 writes it
    fields = families.read_config(MOE | dict(model_type="qwen3_moe", num_local_experts=4))
    assert (
        fields["num_experts"],
        fields["mlp_dim"],
        fields["experts_per_token"],
        fields["normalize_router"],
    ) == (4, 8, 8, False)
    assert families.read_config(BARE | dict(model_type="mixtral"))["rope_theta"] == 1e6


def test_no_configuration(tmp_path, directory):
    with pytest.raises(
        ValueError, match="has no config.json; wanted the directory of a Hugging Face checkpoint"
    ):
        load(tmp_path / "nowhere")
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load(directory)


def test_attributes_of_no_consequence(directory):
    change(
        directory / "config.json",
        attention_dropout=0.1,
        use_cache=False,
        transformers_version="4.30.0",
        id2label={"0": "a"},
        rope_scaling=None,
    )
    load(directory)


def test_a_tied_head_that_differs(tmp_path):
    fields, params, _ = parameters(LLAMA | dict(tie_embeddings=True))
    hf.save(tmp_path, families.FAMILIES["llama"], fields, params, token_ids=TOKEN_IDS)
    path = tmp_path / "model.safetensors"
    table = np.array(safetensors.entries(path)["model.embed_tokens.weight"].read())
    rewrite(path, **{"lm_head.weight": table})
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), params)
    hf.save_as(tmp_path / "back", hf.Source(tmp_path).record(), fields, params)
    # the head again too
    assert set(safetensors.entries(tmp_path / "back/model.safetensors")) == set(
        safetensors.entries(path)
    )
    rewrite(path, **{"lm_head.weight": table + 1})
    with pytest.raises(
        ValueError,
        match="tie_word_embeddings is set, but lm_head.weight is not model.embed_tokens.weight",
    ):
        load(tmp_path)


def test_names_without_their_prefix(tmp_path):
    """GPT-2's own checkpoints are of the body alone, with masks among the tensors."""
    fields, params, _ = parameters(
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
    old = {name: np.array(e.read()) for name, e in safetensors.entries(path).items()}
    new = {name.removeprefix("transformer."): array for name, array in old.items()} | {
        "h.0.attn.bias": np.ones((1, 1, 4, 4), bool)
    }
    safetensors.write(path, {name: (a.dtype, a.shape) for name, a in new.items()}, new.values())
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), params)
    hf.save_as(tmp_path / "back", hf.Source(tmp_path).record(), fields, params)
    assert set(safetensors.entries(tmp_path / "back/model.safetensors")) == set(new) - {
        "h.0.attn.bias"
    }


def test_a_model_that_was_changed_is_not_written_as_it_was(directory):
    fields, params, _ = parameters(LLAMA | dict(rope_theta=77.0))
    with pytest.raises(
        ValueError,
        match="the model was changed since it was imported: rope_theta = 77.0, was 10000.0",
    ):
        hf.save_as(directory / "back", hf.Source(directory).record(), fields, params)


@pytest.mark.parametrize(
    "changes, family",
    [
        (dict(), "llama"),
        (dict(window=8), "mistral"),
        (dict(bias="qkv", window=0), "qwen2"),
        (dict(qk_norm=True), "qwen3"),
        (dict(gated_mlp=False, activation="relu_squared"), "arcee"),
        (dict(rope_interleaved=True, rope_fraction=0.5), "glm"),
        (dict(norm="layernorm", bias="norm", rope_fraction=0.25), "stablelm"),
        (
            dict(
                norm="layernorm",
                bias="qkv,out,mlp,norm",
                rope_fraction=0.25,
                residual="parallel",
                gated_mlp=False,
                num_kv_heads=2,
            ),
            "gpt_neox",
        ),
        (
            dict(
                norm="layernorm",
                bias="qkv,out,mlp,norm",
                positions="learned",
                gated_mlp=False,
                num_kv_heads=2,
            ),
            "gpt2",
        ),
        (
            dict(
                norm="layernorm",
                bias="qkv,out,mlp,norm",
                positions="learned",
                gated_mlp=False,
                num_kv_heads=2,
                residual="post_norm",
            ),
            "openai-gpt",
        ),
        (
            dict(
                norm="layernorm",
                bias="norm",
                positions="learned",
                gated_mlp=False,
                num_kv_heads=2,
                position_offset=2,
                table_dim=8,
            ),
            "opt",
        ),
        (dict(num_experts=4), "mixtral"),
        (dict(num_experts=4, bias="qkv", shared_mlp_dim=8, normalize_router=False), "qwen2_moe"),
        (dict(num_experts=4, qk_norm=True), "qwen3_moe"),
        (dict(experts_per_token=7, normalize_router=False), "llama"),
    ],
)
def test_families_that_fit(changes, family):
    fields, _, _ = parameters(LLAMA | changes)
    assert families.fitting(fields).name == family
    config = families.write_config(families.FAMILIES[family], fields)
    found = families.read_config(config)
    assert all(
        fields[name] == value
        for name, value in found.items()
        if fields["num_experts"] or name not in ("experts_per_token", "normalize_router")
    )


def test_no_family_fits():
    fields, _, _ = parameters(LLAMA | dict(residual="parallel", qk_norm=True))
    with pytest.raises(
        ValueError,
        match=r"(?s)no family .* has this model:.*no llama has residual = 'parallel', qk_norm = True",  # noqa: E501
    ):
        families.fitting(fields)


def test_dtypes(tmp_path):
    """bf16 weights with norms in f32, as ours are, and all in bf16, as theirs are."""
    fields, params, _ = parameters(LLAMA, "bfloat16")
    hf.save(tmp_path, families.FAMILIES["llama"], fields, params, token_ids=TOKEN_IDS)
    source = hf.Source(tmp_path)
    assert {e.dtype for e in source.entries.values()} == {
        np.dtype(ml_dtypes.bfloat16),
        np.dtype(np.float32),
    } and source.dtype() == "float32"
    rewrite(
        tmp_path / "model.safetensors",
        **{n: np.array(e.read()).astype(ml_dtypes.bfloat16) for n, e in source.entries.items()},
    )
    assert hf.Source(tmp_path).dtype() == "bfloat16"
    # no weight
    rewrite(
        tmp_path / "model.safetensors",
        **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)},
    )
    assert hf.Source(tmp_path).dtype() == "bfloat16"
