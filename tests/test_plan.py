"""Planning for a pod: the report is of the very program, cards hold, and what can't be says how to
go on.
"""

import copy
import json
import runpy
from pathlib import Path

import jax
import pytest

from lm import config as config_lib
from lm.plan import __main__ as plan_main
from lm.plan import cards
from lm.plan import compile as plan_lib

ROOT = Path(__file__).parent.parent
PODS = runpy.run_path(str(ROOT / "configs/pods.py"))


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
    c.data.update(dict(length=512, batch_size=16))
    c.objective.chunk = 128
    c.train.update(dict(fsdp="by_hand", fsdp_gather="joint", length="1e9 tokens"))
    c.mesh.update(dict(fsdp=2, fsdp2=2))
    return c


def test_report(small):
    said = []
    report = plan_lib.plan(
        small.lock(), "v5e:2x2", programs=plan_lib.PROGRAMS, progress=said.append
    )
    assert len(said) == 4
    train = report["train"]
    # Each chip holds a quarter: parameters (bf16, norms f32), and two f32 moments.
    count = report["parameters"]
    assert report["parameters_gib"] * 2**30 == pytest.approx(count * 2 / 4, rel=0.01)
    assert report["optimizer_gib"] * 2**30 == pytest.approx(count * 8 / 4, rel=0.01)
    assert (
        train["memory_gib"]
        > train["arguments_gib"]
        > report["parameters_gib"] + report["optimizer_gib"] - 1e-3
    )
    tokens = 16 * 512
    # A layer's forward twice: matmuls 4/3 of the model's; attention kernels' blocks above the
    # diagonal are left out only by whole tiles.
    flops = lambda causal: (
        tokens * flops.model_flops_per_token(_model(small), 512, causal=causal) / 4 / 1e12
    )
    assert train["model_tflops"] == pytest.approx(flops(True)) and train[
        "model_tflops_full_attention"
    ] == pytest.approx(flops(False))
    assert 1.15 < train["executed_tflops"] / train["model_tflops"] < 1.6
    assert (
        train["kernels"]
        == {
            "splash_mha_dkv_segmented_no_residuals": 2,
            "splash_mha_fwd_segmented_no_residuals": 2,
            "splash_mha_fwd_segmented_residuals": 2,
        }
        or sum(train["kernels"].values()) >= 4
    )
    assert (
        train["step_ms"]["roofline"] < train["step_ms"]["calibrated"] < train["step_ms"]["compiler"]
    )
    assert train["mfu"]["calibrated"] == pytest.approx(
        train["model_tflops"] * 1e12 / 197e12 / (train["step_ms"]["calibrated"] / 1e3)
    )
    # Forward and backward gathers of every layer's weights, and their gradients scattered: bf16
    # there, f32 back.
    assert train["wire_gb"] == pytest.approx(
        sum(row["wire_gb"] for row in train["collectives"].values()), rel=0.02
    )
    assert any(name.startswith("reduce-scatter") for name in train["collectives"])
    assert report["tokens"] == pytest.approx(1e9, rel=1e-4)
    assert report["chip_hours"]["calibrated"] == pytest.approx(
        1e9 / report["tokens_per_second_per_chip"]["calibrated"] / 3600, rel=1e-3
    )
    assert (
        report["eval"]["executed_tflops"] < 0.5 * train["executed_tflops"]
        and report["prefill"]["memory_gib"] < train["memory_gib"]
    )
    assert (
        0 < report["decode"]["executed_tflops"] < report["prefill"]["executed_tflops"] / 256
        and report["decode"]["hbm_gb"] > 0
    )
    assert json.loads(json.dumps(report)) == report
    text = cards.table(report)
    assert all(
        word in text
        for word in (
            "fits",
            "MFU",
            "on the wire",
            "chip-hours",
            "reduce-scatter over fsdp",
            "not modelled",
            "Matmuls take",
        )
    )


_REPORTS = {}


def report_of(config, **kwargs):
    """`plan_lib.plan` on four v5e chips; each configuration is compiled once."""
    key = json.dumps([config.to_dict(), kwargs])
    if key not in _REPORTS:
        _REPORTS[key] = plan_lib.plan(config, "v5e:2x2", **kwargs)
    return _REPORTS[key]


def _model(config):
    import types

    return types.SimpleNamespace(**config.model.to_dict())


def test_remat_and_accumulation_show(small):
    """More kept is more memory and fewer FLOPs; microbatches take less memory for the same
    FLOPs.
    """
    small.data.batch_size = 32
    full = report_of(small)["train"]
    small.model.remat = "query,key,value,attention,out,up,down"
    kept = report_of(small)["train"]
    assert (
        kept["executed_tflops"] < 0.9 * full["executed_tflops"]
        and kept["temporaries_gib"] > full["temporaries_gib"]
    )
    small.train.accumulation = 4
    four = report_of(small)["train"]
    assert four["executed_tflops"] == pytest.approx(kept["executed_tflops"], rel=0.01)
    assert (
        four["temporaries_gib"] < kept["temporaries_gib"] and four["wire_gb"] > 2 * kept["wire_gb"]
    )


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
def test_topologies_that_are_not(topology, slices, message):
    with pytest.raises(ValueError, match=message):
        plan_lib.describe(topology, slices)


def test_slices():
    devices = plan_lib.describe("v5e:2x2", 2)
    assert len(devices) == 8 and {d.slice_index for d in devices} == {0, 1}
    assert len(plan_lib.describe("v4:2x2x2")) == 8  # a device is a chip


def test_what_cannot_run_there(small):
    for changes, message in (
        (dict(mesh=dict(fsdp=3)), "config.mesh asks for .*there are 4"),
        (dict(data=dict(batch_size=10)), "can't be divided by 4"),
        (dict(model=dict(vocab_size=0)), "config.model.vocab_size = 0"),
        (dict(data=dict(length=192)), "splash"),
        (dict(model=dict(attention="cudnn")), "is for gpu, and this runs on tpu"),
    ):
        c = copy.deepcopy(small)
        for section, values in changes.items():
            c[section].update(values)
        with pytest.raises(ValueError, match=message):
            plan_lib.plan(c, "v5e:2x2")


def test_what_does_not_fit_says_what_to_change(small):
    small.data.batch_size = 65536
    small.objective.chunk = 0
    with pytest.raises(
        MemoryError,
        match=r"train program does not fit: .*Largest: .*What helps: .*config.objective.chunk=128.*accumulation=2",  # noqa: E501
    ):
        plan_lib.plan(small, "v5e:2x2")


def test_what_does_not_fit_is_told_a_change_that_does(small, monkeypatch):
    """How much is needed is read off the compiler's words; the changes that it tries then are as if
    they fitted (test_search.py has the rest).
    """
    small.data.batch_size = 8192
    small.model.remat = "query,key,value,attention,out,up"
    with pytest.raises(plan_lib.DoesNotFit) as error:
        plan_lib.plan(small, "v5e:2x2")
    assert error.value.needed_gib > 15.75
    monkeypatch.setattr(
        plan_main, "plan", lambda config, topology, slices: {"train": {"memory_gib": 12.0}}
    )
    text = plan_main._nearest(small.lock(), "v5e:2x2", 1, error.value, lambda text: None)
    assert "The nearest change that fits: --config." in text and "12.0 GiB" in text


def test_a_mesh_that_the_torus_does_not_hold(small):
    small.mesh.update(dict(fsdp=2, fsdp2=8))
    with pytest.raises(
        ValueError, match="can't be laid on a torus of 4 x 4 chips.*such as {'fsdp': 4, 'fsdp2': 4}"
    ):
        plan_lib.plan(small, "v5e:4x4")
    small.mesh.update(dict(slice=2))
    small.data.batch_size = 32
    with pytest.raises(
        ValueError,
        match="'slice': 2, 'fsdp': 2, 'fsdp2': 8.*can't be laid on a torus of 4 x 4 chips",
    ):
        plan_lib.plan(small, "v5e:4x4", 2)


def test_a_compiler_that_fails_is_told_as_such(small, monkeypatch):
    def fail(*unused, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(
        ValueError,
        match="libtpu .*'s compiler fails on this program: INTERNAL: RET_CHECK.*Another mesh",
    ):
        plan_lib.plan(small, "v5e:2x2")


def test_a_card_notices(small):
    report = report_of(small)
    card = json.loads(json.dumps(report))
    assert cards.differences(card, report) == []
    for key in cards.TOLERANCES:
        moved = copy.deepcopy(card)
        moved["train"][key] *= 1 + 1.5 * cards.TOLERANCES[key]
        assert [line.split(":")[0] for line in cards.differences(moved, report)] == [key]
    moved = copy.deepcopy(card)
    moved["train"]["kernels"]["another"] = 1
    moved["train"]["collectives"]["all-reduce over fsdp+fsdp2, synchronous"] = dict(
        count=1, wire_gb=9.0, ms=1.0, exposed_ms=1.0
    )
    assert [line.split(":")[0] for line in cards.differences(moved, report)] == [
        "kernels",
        "collectives",
    ]


def test_every_pod_configuration_has_its_card():
    held = {path.stem: json.loads(path.read_text()) for path in cards.CARDS.glob("*.json")}
    assert held.keys() == PODS["SIZES"].keys()
    for name, card in held.items():
        assert card["config"] == ["configs/pods.py", name]
        assert (
            name.split("-")[1:3] == card["topology"].split(":")
            and card["train"]["memory_gib"] < card["train"]["limit_gib"]
        )
        assert (
            card["versions"]["libtpu"]
            == [
                line.split("==")[1]
                for line in (ROOT / "constraints.txt").read_text().split()
                if line.startswith("libtpu==")
            ][0]
        )


@pytest.mark.skipif(
    jax.__version__ != "0.10.2", reason="cards are of the versions in constraints.txt"
)
def test_quick_cards_hold(monkeypatch):
    """The one that compiles fastest; `python -m lm.plan --check` does all."""
    monkeypatch.chdir(ROOT)
    assert (
        cards.check(["gpt3_small-v6e-2x4"], plan_main.load_config, progress=lambda text: None) == []
    )
    with pytest.raises(ValueError, match="no cards .*'nothing'"):
        cards.check(["nothing"], plan_main.load_config)
