"""Cards: the reports of the configurations of configs/pods.py, configs/sft_pods.py and
configs/rl_pods.py, how they are checked and shown.
"""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from lm import files
from lm.plan import search
from lm.plan.compile import PROGRAMS, plan

CARDS = Path(__file__).parent.parent.parent / "configs" / "cards"

# What --check compares, and the share by which it may differ from the card.
TOLERANCES = {"memory_gib": 0.02, "executed_tflops": 0.005, "model_tflops": 1e-6, "wire_gb": 0.02}
# A kind of collective that sends less than this may come and go.
NOTICED_GB = 0.05


# Showing


def table(report: dict) -> str:
    """The report for people."""
    slices = f" x {report['slices']} slices" if report["slices"] > 1 else ""
    lines = [
        f"{report['parameters'] / 1e9:.2f}B parameters on {report['chips']} chips "
        f"({report['topology']}{slices}), mesh {report['mesh'] or 'one device'}, batch "
        f"{report['batch'][0]} x {report['batch'][1]}; jax {report['versions']['jax']}, libtpu "
        f"{report['versions']['libtpu']}",
        f"parameters {report['parameters_gib']:.2f} GiB, optimizer {report['optimizer_gib']:.2f} "
        "GiB a chip",
    ]

    for name in PROGRAMS:
        if name in report:
            lines += _program_lines(name, report[name])

    if "tokens_per_second_per_chip" in report:
        speeds = _by_model(report["tokens_per_second_per_chip"], "{:,.0f}")
        lines.append(f"\ntokens/s a chip: {speeds}")
    if "days" in report:
        days = _by_model(report["days"], "{:,.1f} days")
        chip_hours = _by_model(report["chip_hours"], "{:,.0f}")
        lines.append(f"{report['tokens']:.3g} tokens: {days}; chip-hours: {chip_hours}")
    if "rollout_to_update" in report:
        lines.append(f"\na rollout: {_by_model(report['rollout_ms'], '{:,.0f} ms')}")
        lines.append(f"  to its updates: {_by_model(report['rollout_to_update'], '{:.2f}')}")
    lines.append(report.get("in_words", ""))
    return "\n".join(lines)


def _by_model(values: dict[str, float], form: str) -> str:
    """Modelled values side by side, from the most hopeful to the most pessimistic model."""
    models = ("roofline", "calibrated", "compiler")
    return " | ".join(f"{form.format(values[model])} ({model})" for model in models)


def _program_lines(name: str, report: dict) -> list[str]:
    """What one program takes on a chip."""
    # Parts of less than 0.05 ms would be shown as 0.0.
    breakdown = [f"{k} {ms:,.1f} ms" for k, ms in report["breakdown_ms"].items() if ms >= 0.05]
    kernels = [f"{kernel} x{count}" for kernel, count in report["kernels"].items()]
    lines = [
        f"\n{name}: memory {report['memory_gib']:.2f} of {report['limit_gib']:.1f} GiB: fits "
        f"(arguments {report['arguments_gib']:.2f}, temporaries {report['temporaries_gib']:.2f}; "
        f"in the host's memory {report['host_gib']:.2f}); compiled in "
        f"{report['compile_seconds']:.0f} s",
        "  largest: " + "; ".join(report["largest_buffers"][:4]),
        f"  TFLOP a chip: model {report['model_tflops']:.1f} (full attention "
        f"{report['model_tflops_full_attention']:.1f}), executed {report['executed_tflops']:.1f}; "
        f"HBM {report['hbm_gb']:.1f} GB; on the wire {report['wire_gb']:.2f} GB",
        "  time, modelled: " + _by_model(report["step_ms"], "{:,.1f} ms"),
        "  MFU, modelled: " + _by_model(report["mfu"], "{:.1%}"),
        "  of it: " + ", ".join(breakdown),
        "  kernels: " + (", ".join(kernels) or "none"),
    ]

    for collective, row in report["collectives"].items():
        lines.append(
            f"  {collective}: {row['count']} x, {row['wire_gb']:.2f} GB, {row['ms']:.1f} ms, "
            f"exposed {row['exposed_ms']:.1f} ms"
        )
    not_modelled = ["contention for memory", "stalls of the input", *report["not_timed"]]
    lines.append("  not modelled: " + ", ".join(not_modelled))
    return lines


# Keeping and checking


def save(name: str, config_path: str, size: str, report: dict) -> None:
    """Writes a report to configs/cards/, with what `load_config` needs to compile it again."""
    card = {"config": [config_path, size]} | report
    files.write_whole(CARDS / f"{name}.json", json.dumps(card, indent=1) + "\n")


def load_config(path: str, size: str) -> ConfigDict:
    """The configuration of a file, at its default size for ""."""
    get_config = runpy.run_path(path)["get_config"]
    config = get_config(size) if size else get_config()
    return config.lock()


def differences(card: dict, report: dict) -> list[str]:
    """What of a train step's report differs from the card by more than `TOLERANCES`, or in kind."""
    lines = []
    old = card["train"]
    new = report["train"]
    for key, tolerance in TOLERANCES.items():
        if abs(new[key] - old[key]) > tolerance * abs(old[key]):
            lines.append(f"{key}: {old[key]:.4g} on the card, {new[key]:.4g} now")

    if old["kernels"] != new["kernels"]:
        lines.append(f"kernels: {old['kernels']} on the card, {new['kernels']} now")

    old_collectives = _noticed_collectives(old)
    new_collectives = _noticed_collectives(new)
    if old_collectives != new_collectives:
        lines.append(
            f"collectives: gone {sorted(old_collectives - new_collectives)}, new "
            f"{sorted(new_collectives - old_collectives)}"
        )
    return lines


def _noticed_collectives(train: dict) -> set[str]:
    """Opcodes with their axes; the compiler may make the same one synchronous or asynchronous."""
    names = set()
    for name, row in train["collectives"].items():
        if row["wire_gb"] > NOTICED_GB:
            names.add(name.split(",")[0])
    return names


def check(names: list[str], progress: Callable[[str], None] = search.show_nothing) -> list[str]:
    """Compiles the cards' configurations again.

    Args:
      names: of cards, without .json; [] for all.

    Returns:
      The failures, a line each.

    Raises:
      ValueError: no such card.
    """
    paths = {path.stem: path for path in sorted(CARDS.glob("*.json"))}
    if unknown := sorted(set(names) - set(paths)):
        raise ValueError(f"no cards {unknown} in {CARDS}; there are {sorted(paths)}")

    failures = []
    names = names or list(paths)
    for number, name in enumerate(names, 1):
        card = json.loads(paths[name].read_text())
        config = load_config(*card["config"])
        report = plan(config, card["topology"], card["slices"])
        lines = differences(card, report)
        failures += [f"{name}: {line}" for line in lines]
        progress(
            f"{number}/{len(names)} {name}: {'; '.join(lines) or 'as on the card'} "
            f"({report['train']['compile_seconds']:.0f} s)"
        )
    return failures
