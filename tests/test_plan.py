"""Planning for a pod: the report is of the very program, cards hold, and errors say what to
change.
"""

import copy
import json
import math
import runpy
import types

import jax
import pytest
from ml_collections import ConfigDict

from lm import config as config_lib
from lm.models.transformer import flops_per_token
from lm.plan import __main__ as plan_main
from lm.plan import cards
from lm.plan import compile as plan_lib
from tests.helpers import ROOT

PODS = (
    "configs/pods.py",
    "configs/sft_pods.py",
    "configs/rl_pods.py",
)  # files whose sizes have cards
V5E_FLOPS = 197e12  # of a chip, a second


@pytest.fixture
def small():
    """Two wide layers for four v5e chips."""
    c = config_lib.default()
    c.model.update(
        dict(
            vocab_size=1024,
            context_length=512,
            num_layers=2,
            embed_dim=512,
            mlp_dim=2048,
            num_heads=4,
            num_kv_heads=2,
            head_dim=128,
            compute_dtype="bfloat16",
            attention="splash",
            remat="full",
        )
    )
    # Rows enough that the sum of gradients, which microbatches need, is small beside activations.
    c.data.update(dict(length=512, batch_size=32))
    c.objective.chunk = 128
    c.train.update(dict(fsdp="by_hand", fsdp_gather="joint", length="1e9 tokens"))
    c.mesh.update(dict(fsdp=2, fsdp2=2))
    return c


@pytest.fixture
def card():
    """A report that was kept."""
    return json.loads((cards.CARDS / "llama3_1b-v4-2x2x4.json").read_text())


def test_an_unknown_program_is_refused(small):
    with pytest.raises(ValueError, match=r"no programs \['test'\]; valid: \['train', 'eval'"):
        plan_lib.plan(small, "v5e:2x2", programs=("train", "test"))


@pytest.mark.slow
def test_rollouts(small):
    """The weights are gathered once, and texts are decoded without any transfer."""
    with pytest.raises(ValueError, match="'reshard' is one of rollouts: wanted config.data.loader"):
        plan_lib.plan(small, "v5e:2x2", programs=("reshard",))

    small.data.loader = plan_lib.ROLLOUT_LOADER
    small.objective = ConfigDict(dict(type="lm.objectives.policy", reference="model", chunk=128))
    small.models.reference = ConfigDict(dict(init_from="nowhere", model={}))
    small.rollout.update(slots=64, samples=8, max_new_tokens=256, steps=2, epochs=3)
    small.train.length = "100 steps"
    small.model.update(attention="xla", num_layers=1)
    names = ("train", "scores", "reshard", "prefill", "decode")
    report = plan_lib.plan(small, "v5e:2x2", programs=names)

    gathered = report["parameters_gib"] * 2**30 * 3  # three quarters of each weight
    assert report["reshard"]["wire_gb"] == pytest.approx(gathered / 1e9, rel=0.05)
    assert report["decode"]["wire_gb"] < 1e-3 < report["scores"]["executed_tflops"]
    for model, ratio in report["rollout_to_update"].items():
        ms = {name: report[name]["step_ms"][model] for name in names}
        # 64 texts of 8 prompts, two a chip.
        rollout = ms["reshard"] + 2 * ms["scores"] + 2 * ms["prefill"] + 256 * ms["decode"]
        assert ratio == pytest.approx(rollout / 6 / ms["train"])


def check_memory(report):
    """Each chip holds a quarter: parameters (bf16, norms f32), and two f32 moments."""
    train = report["train"]
    count = report["parameters"]
    parameters_gib = report["parameters_gib"]
    optimizer_gib = report["optimizer_gib"]

    assert parameters_gib * 2**30 == pytest.approx(count * 2 / 4, rel=0.01)
    assert optimizer_gib * 2**30 == pytest.approx(count * 8 / 4, rel=0.01)
    assert train["memory_gib"] > train["arguments_gib"]
    assert train["arguments_gib"] > parameters_gib + optimizer_gib - 1e-3


def check_flops(report, model):
    train = report["train"]
    model_config = types.SimpleNamespace(**model.to_dict())
    tokens = 32 * 512

    def tflops_per_chip(causal):
        per_token = flops_per_token(model_config, 512, causal=causal)
        return tokens * per_token / 4 / 1e12

    assert train["model_tflops"] == pytest.approx(tflops_per_chip(causal=True))
    assert train["model_tflops_full_attention"] == pytest.approx(tflops_per_chip(causal=False))
    # remat = "full" runs a layer's forward pass twice: matmuls are 4/3 of the model's. Attention
    # kernels leave out what is above the diagonal by whole tiles only.
    assert 1.15 < train["executed_tflops"] / train["model_tflops"] < 1.6
    expected_kernels = {
        "splash_mha_dkv_segmented_no_residuals": 2,
        "splash_mha_fwd_segmented_no_residuals": 2,
        "splash_mha_fwd_segmented_residuals": 2,
    }
    assert train["kernels"] == expected_kernels or sum(train["kernels"].values()) >= 4


def check_times(report):
    train = report["train"]
    step_ms = train["step_ms"]
    assert step_ms["roofline"] < step_ms["calibrated"] < step_ms["compiler"]
    flops_per_second = train["model_tflops"] * 1e12 / (step_ms["calibrated"] / 1e3)
    assert train["mfu"]["calibrated"] == pytest.approx(flops_per_second / V5E_FLOPS)

    assert report["tokens"] == pytest.approx(1e9, rel=1e-4)
    tokens_per_second = report["tokens_per_second_per_chip"]["calibrated"]
    chip_hours = report["chip_hours"]["calibrated"]
    assert chip_hours == pytest.approx(1e9 / tokens_per_second / 3600, rel=1e-3)


def check_collectives(report):
    """Every layer's weights are gathered in the forward and in the backward pass, and their
    gradients are scattered: bf16 there, f32 back.
    """
    train = report["train"]
    sent_gb = sum(row["wire_gb"] for row in train["collectives"].values())
    assert train["wire_gb"] == pytest.approx(sent_gb, rel=0.02)
    assert any(name.startswith("reduce-scatter") for name in train["collectives"])


def check_programs_without_gradients(report):
    train = report["train"]
    prefill = report["prefill"]
    decode = report["decode"]
    assert report["eval"]["executed_tflops"] < 0.5 * train["executed_tflops"]
    assert prefill["memory_gib"] < train["memory_gib"]
    assert 0 < decode["executed_tflops"] < prefill["executed_tflops"] / 256
    assert decode["hbm_gb"] > 0


@pytest.mark.slow
def test_the_report_of_its_programs(small):
    """What compiling takes most of a minute for is looked at from all sides."""
    progress = []
    names = ("train", "eval", "prefill", "decode")
    report = plan_lib.plan(small.lock(), "v5e:2x2", programs=names, progress=progress.append)
    assert len(progress) == 4
    assert json.loads(json.dumps(report)) == report
    check_memory(report)
    check_flops(report, small.model)
    check_times(report)
    check_collectives(report)
    check_programs_without_gradients(report)

    # Microbatches take less memory for the same FLOPs, and gather weights once each.
    small.unlock()
    small.train.accumulation = 4
    whole = report["train"]
    accumulated = plan_lib.plan(small, "v5e:2x2", programs=("train",))["train"]
    assert accumulated["executed_tflops"] == pytest.approx(whole["executed_tflops"], rel=0.01)
    assert accumulated["temporaries_gib"] < whole["temporaries_gib"]
    assert accumulated["wire_gb"] > 2 * whole["wire_gb"]


def test_what_adapters_save():
    """By the cards of Llama 3.1 8B: state of little more than 2 bytes a parameter in place of 10,
    and two thirds of the model's FLOPs.
    """

    def of_card(name):
        report = json.loads((cards.CARDS / f"{name}.json").read_text())
        state_gib = (report["parameters_gib"] + report["optimizer_gib"]) * report["chips"]
        flops = report["train"]["model_tflops"] * 1e12 * report["chips"]
        return state_gib * 2**30 / report["parameters"], flops / math.prod(report["batch"])

    state_bytes, flops = of_card("llama3_8b-v5p-2x2x4")
    adapted_bytes, adapted_flops = of_card("llama3_8b-v5e-2x4-lora")
    assert state_bytes == pytest.approx(10, rel=0.01)
    # Each chip has all of B, in f32 with two moments.
    assert 2 < adapted_bytes < 2.4
    assert 0.6 < adapted_flops / flops <= 0.72


@pytest.mark.parametrize(
    "words",
    [
        "fits",
        "MFU",
        "on the wire",
        "chip-hours",
        "reduce-scatter over fsdp",
        "not modelled",
        "Matmuls take",
    ],
)
def test_table_of_the_report(card, words):
    assert words in cards.table(card)


def test_remat_shows():
    """More saved is more memory and fewer FLOPs: on each card that has a leaner one beside it."""
    lean_cards = sorted(cards.CARDS.glob("*-lean.json"))
    assert len(lean_cards) >= 4
    for path in lean_cards:
        lean = json.loads(path.read_text())["train"]
        usual = json.loads(path.with_name(path.name.replace("-lean", "")).read_text())["train"]
        assert usual["temporaries_gib"] > lean["temporaries_gib"], path.stem
        assert usual["executed_tflops"] < lean["executed_tflops"], path.stem


@pytest.mark.parametrize(
    "topology, slices, message",
    [
        ("v5e:2x3x4", 1, "wanted v4:XxYxZ"),
        ("v7x:2x2x2", 1, "wanted v4:XxYxZ"),
        ("v5p:4x4", 1, "such as v5p:4x4x8"),
        ("", 1, "wanted v4"),
        ("v5e:3x3", 1, "v5e:3x3 .*can't be described"),
        ("v5p:999x4x4", 1, "can't be described"),
    ],
)
def test_topologies_that_do_not_exist(topology, slices, message):
    with pytest.raises(ValueError, match=message):
        plan_lib.describe(topology, slices)


def test_slices():
    devices = plan_lib.describe("v5e:2x2", 2)
    assert len(devices) == 8
    assert {device.slice_index for device in devices} == {0, 1}
    assert len(plan_lib.describe("v4:2x2x2")) == 8  # a device is a chip


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(mesh=dict(fsdp=3)), "config.mesh.fsdp = 3.*this asks for .*there are 4"),
        (dict(data=dict(batch_size=10, streams=2)), "can't be divided by 4"),
        (dict(model=dict(vocab_size=0)), "config.model.vocab_size = 0"),
        (dict(data=dict(length=192), objective=dict(chunk=0)), "splash"),
        (dict(model=dict(attention="cudnn")), "is for gpu, and this runs on tpu"),
    ],
)
def test_what_cannot_run_there(small, changes, message):
    for section, values in changes.items():
        small[section].update(values)
    with pytest.raises(ValueError, match=message):
        plan_lib.plan(small, "v5e:2x2")


def test_what_does_not_fit_says_what_to_change(small):
    small.data.batch_size = 65536
    small.objective.chunk = 0
    message = (
        "train program does not fit: .*Largest: .*What helps: .*config.objective.chunk=128"
        ".*accumulation=2"
    )
    with pytest.raises(MemoryError, match=message):
        plan_lib.plan(small, "v5e:2x2")


def test_what_does_not_fit_suggests_a_change_that_does(small, monkeypatch):
    """How much is needed is read off the compiler's message. The changes that are tried then are
    taken to fit (test_search.py has the rest).
    """
    small.data.batch_size = 8192
    small.model.remat = "query,key,value,attention,out,up"
    with pytest.raises(plan_lib.DoesNotFit) as error:
        plan_lib.plan(small, "v5e:2x2")
    assert error.value.needed_gib > 15.75

    def fits(config, topology, slices):
        return {"train": {"memory_gib": 12.0}}

    monkeypatch.setattr(plan_main, "plan", fits)
    suggestion = plan_main.suggest_change(small.lock(), "v5e:2x2", 1, error.value)
    assert "The nearest change that fits: --config." in suggestion
    assert "12.0 GiB" in suggestion


def test_a_mesh_that_the_torus_does_not_hold(small):
    small.mesh.update(dict(fsdp=2, fsdp2=8))
    message = "can't be laid on a torus of 4 x 4 chips.*such as {'fsdp': 4, 'fsdp2': 4}"
    with pytest.raises(ValueError, match=message):
        plan_lib.plan(small, "v5e:4x4")

    small.mesh.update(dict(slice=2))
    small.data.batch_size = 32
    message = "slice = 2, .*fsdp = 2, .*fsdp2 = 8 can't be laid on a torus of 4 x 4 chips"
    with pytest.raises(ValueError, match=message):
        plan_lib.plan(small, "v5e:4x4", 2)


def test_a_compiler_that_fails_is_named(small, monkeypatch):
    def fail(*unused, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    message = "libtpu .*'s compiler fails on this program: INTERNAL: RET_CHECK.*Another mesh"
    with pytest.raises(ValueError, match=message):
        plan_lib.plan(small, "v5e:2x2")


def changed_keys(card, report):
    return [line.split(":")[0] for line in cards.differences(card, report)]


def test_a_card_notices(card):
    report = copy.deepcopy(card)
    assert changed_keys(card, report) == []

    for key in cards.TOLERANCES:
        changed = copy.deepcopy(card)
        changed["train"][key] *= 1 + 1.5 * cards.TOLERANCES[key]
        assert changed_keys(changed, report) == [key]

    changed = copy.deepcopy(card)
    changed["train"]["kernels"]["another"] = 1
    changed["train"]["collectives"]["all-reduce over fsdp+fsdp2, synchronous"] = dict(
        count=1, wire_gb=9.0, ms=1.0, exposed_ms=1.0
    )
    assert changed_keys(changed, report) == ["kernels", "collectives"]


def test_every_pod_configuration_has_its_card():
    pins = (ROOT / "constraints.txt").read_text().split()
    libtpu = next(pin.split("==")[1] for pin in pins if pin.startswith("libtpu=="))
    card_of = {path.stem: json.loads(path.read_text()) for path in cards.CARDS.glob("*.json")}

    sizes = {}
    for file in PODS:
        sizes |= {name: file for name in runpy.run_path(str(ROOT / file))["SIZES"]}
    assert card_of.keys() == sizes.keys()
    for name, card in card_of.items():
        assert card["config"] == [sizes[name], name]
        assert name.split("-")[1:3] == card["topology"].split(":")
        assert card["train"]["memory_gib"] < card["train"]["limit_gib"]
        assert card["versions"]["libtpu"] == libtpu


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version__ != "0.10.2", reason="cards are of the versions in constraints.txt"
)
def test_quick_cards_hold(monkeypatch):
    """The one that compiles fastest; `python -m lm.plan --check` does all."""
    monkeypatch.chdir(ROOT)
    assert cards.check(["gpt3_small-v6e-2x4"]) == []
    with pytest.raises(ValueError, match="no cards .*'nothing'"):
        cards.check(["nothing"])
