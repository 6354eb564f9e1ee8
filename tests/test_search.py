"""The search: what it tries is valid, what it returns is never worse than what it was given, and
what it knows it doesn't compile again.
"""

import math

import pytest

from lm import config as config_lib
from lm.models import presets
from lm.plan import search

CHIPS = 16


@pytest.fixture
def given():
    c = config_lib.default()
    c.model.update(presets.get("llama3_1b") | dict(remat="attention", context_length=8192))
    c.data.update(dict(batch_size=64, length=2048))
    c.objective.chunk = 512
    c.train.fsdp = "by_hand"
    c.mesh.update(dict(fsdp=-1))
    return c.lock()


def model(config):
    """A machine that likes square meshes, chunks of 1,024, one microbatch, joint gathers and much
    kept, and has 9 GiB.
    """
    settings = search.settings_of(config, CHIPS)
    kept, logits = search.kept_bytes(config, settings, CHIPS)
    split = settings["mesh.fsdp"] * settings["mesh.fsdp2"]
    memory = 12 / split + (kept + logits) / 2**30 + 1
    if memory > 9:
        raise MemoryError(f"{memory:.1f} GiB")
    ms = (
        500
        + 40 * abs(math.log2(settings["mesh.fsdp"] / settings["mesh.fsdp2"]))
        + 30 * abs(math.log2(settings["objective.chunk"] / 1024))
        + 20 * settings["train.accumulation"]
        + 10 * (settings["train.fsdp_gather"] == "staged")
        - 20 * len(settings["model.remat"].split(","))
        + 300 * (settings["mesh.data"] > 1)
    )
    return {
        "train": {
            "step_ms": {"calibrated": ms},
            "mfu": {"calibrated": 200 / ms},
            "memory_gib": memory,
            "arguments_gib": 12 / split,
        }
    }


def test_it_finds_the_best_and_is_never_worse(given):
    said = []
    tried = search.search(given, CHIPS, 9.0, model, minutes=1.0, say=said.append)
    base = search.settings_of(given, CHIPS)
    assert base["mesh.fsdp"] == 16 and any(one.settings == base for one in tried)
    assert [one.seconds for one in tried] == sorted(one.seconds for one in tried)
    best = tried[0].settings
    assert (
        best["mesh.fsdp"],
        best["mesh.fsdp2"],
        best["objective.chunk"],
        best["train.fsdp_gather"],
    ) == (4, 4, 1024, "joint")
    assert len(best["model.remat"].split(",")) >= 6 and tried[0].report["train"]["memory_gib"] <= 9
    assert tried[0].seconds < 0.8 * model(given)["train"]["step_ms"]["calibrated"] / 1e3
    assert len(said) > 5 and "as given" in said[0]
    found = search.apply(given, best)
    assert search.settings_of(found, CHIPS) == best and found.is_locked and given.mesh.fsdp == -1
    flags = search.overrides(best, base)
    assert (
        "--config.mesh.fsdp=4" in flags
        and all(flag.startswith("--config.") for flag in flags)
        and search.overrides(base, base) == []
    )
    text = search.table(tried, base).splitlines()
    assert (
        len(text) == len(tried) + 1
        and sum("(as given)" in line for line in text) == 1
        and "objective.chunk=1024" in text[1]
    )


def test_where_nothing_is_better_the_given_one_wins(given):
    flat = lambda config: (
        model(config) | {"train": model(config)["train"] | {"step_ms": {"calibrated": 500.0}}}
    )
    tried = search.search(given, CHIPS, 9.0, flat, minutes=1.0)
    assert tried[0].settings == search.settings_of(given, CHIPS) and len(tried) > 5


def test_time_is_kept(given, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(search.time, "monotonic", lambda: clock[0])

    def slow(config):
        clock[0] += 60.0
        return model(config)

    said = []
    tried = search.search(given, CHIPS, 9.0, slow, minutes=5.0, say=said.append)
    assert (
        clock[0] <= 300
        and sum(one.report is not None for one in tried) <= 5
        and "minutes" in said[-1]
    )


def test_what_cannot_fit_is_not_compiled(given):
    """The memory model is exact here, so that nothing that is too big is ever compiled, unlike with
    a limit that is not told.
    """

    def counted(limit):
        refused = []

        def evaluate(config):
            try:
                return model(config)
            except MemoryError:
                refused.append(config)
                raise

        tried = search.search(given, CHIPS, limit, evaluate, minutes=1.0)
        return len(refused), [one.why for one in tried if one.report is None]

    refused, why = counted(9.0)
    assert refused == 0 and any(line.startswith("not compiled: about") for line in why)
    refused, why = counted(1000.0)
    assert refused > 0 and any(line.endswith("GiB") and "not compiled" not in line for line in why)


@pytest.mark.parametrize("remat", search.LADDER)
def test_neighbours_are_valid(given, remat):
    settings = search.settings_of(given, CHIPS) | {
        "model.remat": remat,
        "mesh.fsdp": 4,
        "mesh.fsdp2": 4,
    }
    found = [settings | change for change in search.neighbours(given, settings, CHIPS)]
    assert len(found) > 8
    for one in found:
        assert one["mesh.data"] * one["mesh.fsdp"] * one["mesh.fsdp2"] == CHIPS and one != settings
        assert 2048 % one["objective.chunk"] == 0 and (64 // CHIPS) % one["train.accumulation"] == 0
    kept = sorted(
        {search.kept_bytes(given, one, CHIPS)[0] for one in found if one["train.accumulation"] == 1}
    )
    now = search.kept_bytes(given, settings, CHIPS)[0]
    assert kept[0] <= now <= kept[-1] and len(kept) >= 2


def test_results_are_remembered_for_the_same_configuration_only(given, tmp_path):
    calls = []

    def evaluate(config):
        calls.append(config.to_dict())
        return model(config)

    first = search.remembered(evaluate, tmp_path, "v5e:4x4", "1")
    again = search.remembered(evaluate, tmp_path, "v5e:4x4", "1")
    assert first(given) == again(given) == model(given) and len(calls) == 1
    search.remembered(evaluate, tmp_path, "v5e:4x8", "1")(given)
    big = search.apply(given, {"mesh.fsdp": 1, "mesh.data": 16})
    for _ in range(2):
        with pytest.raises(MemoryError, match="GiB"):
            first(big)
    assert len(calls) == 3

    def fails(config):
        calls.append(config)
        raise ValueError("the compiler fails")

    for _ in range(2):
        with pytest.raises(ValueError, match="the compiler fails"):
            search.remembered(fails, tmp_path, "v5e:8x8")(given)
    assert len(calls) == 4


def test_the_nearest_change_that_fits(given):
    big = search.apply(given, {"model.remat": "query,key,value,attention,out,up,gate"})
    with pytest.raises(MemoryError) as error:
        model(big)
    found = search.nearest_that_fits(
        big, CHIPS, model, needed_gib=float(str(error.value).split()[0]), limit_gib=9.0
    )
    changed = {k for k, v in found.settings.items() if v != search.settings_of(big, CHIPS)[k]}
    assert len(changed) == 1 and found.report["train"]["memory_gib"] <= 9

    def never(config):
        raise MemoryError

    assert search.nearest_that_fits(big, CHIPS, never, needed_gib=11.0, limit_gib=9.0) is None
