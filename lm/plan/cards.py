"""Cards: the reports of the configurations of configs/pods.py, how they are checked and shown."""

import json
from pathlib import Path

from lm.plan.compile import PROGRAMS, plan

CARDS = Path(__file__).parent.parent.parent / "configs" / "cards"


# What a card holds still, and how far it may move (a share) before --check fails.
TOLERANCES = {"memory_gib": 0.02, "executed_tflops": 0.005, "model_tflops": 1e-6, "wire_gb": 0.02}


def table(report: dict) -> str:
    """The report for people."""
    lines = [
        f"{report['parameters'] / 1e9:.2f}B parameters on {report['chips']} chips "
        f"({report['topology']}"
        f"{' x ' + str(report['slices']) + ' slices' if report['slices'] > 1 else ''}), mesh "
        f"{report['mesh'] or 'one device'}, batch {report['batch'][0]} x {report['batch'][1]}; "
        f"jax {report['versions']['jax']}, libtpu {report['versions']['libtpu']}",
        f"parameters {report['parameters_gib']:.2f} GiB, optimizer {report['optimizer_gib']:.2f} "
        "GiB a chip",
    ]
    spread = lambda values, form: " | ".join(
        f"{form.format(values[m])} ({m})" for m in ("roofline", "calibrated", "compiler")
    )
    for name in PROGRAMS:
        if name not in report:
            continue
        r = report[name]
        lines += [
            f"\n{name}: memory {r['memory_gib']:.2f} of {r['limit_gib']:.1f} GiB: fits (arguments "
            f"{r['arguments_gib']:.2f}, temporaries {r['temporaries_gib']:.2f}; in the host's "
            f"memory {r['host_gib']:.2f}); compiled in {r['compile_seconds']:.0f} s",
            "  largest: " + "; ".join(r["largest_buffers"][:4]),
            f"  TFLOP a chip: model {r['model_tflops']:.1f} (full attention "
            f"{r['model_tflops_full_attention']:.1f}), executed {r['executed_tflops']:.1f}; HBM "
            f"{r['hbm_gb']:.1f} GB; on the wire {r['wire_gb']:.2f} GB",
            "  time, modelled: " + spread(r["step_ms"], "{:,.1f} ms"),
            "  MFU, modelled: " + spread(r["mfu"], "{:.1%}"),
            "  of it: "
            + ", ".join(f"{k} {v:,.1f} ms" for k, v in r["breakdown_ms"].items() if v >= 0.05),
            "  kernels: " + (", ".join(f"{k} x{n}" for k, n in r["kernels"].items()) or "none"),
        ]
        lines += [
            f"  {k}: {v['count']} x, {v['wire_gb']:.2f} GB, {v['ms']:.1f} ms, exposed "
            f"{v['exposed_ms']:.1f} ms"
            for k, v in r["collectives"].items()
        ]
        lines += [
            "  not modelled: contention for memory, stalls of the "
            f"input{''.join(', ' + note for note in r['not_timed'])}"
        ]
    if "tokens_per_second_per_chip" in report:
        lines.append(
            "\ntokens/s a chip: " + spread(report["tokens_per_second_per_chip"], "{:,.0f}")
        )
    if "days" in report:
        lines.append(
            f"{report['tokens']:.3g} tokens: "
            + spread(report["days"], "{:,.1f} days")
            + "; chip-hours: "
            + spread(report["chip_hours"], "{:,.0f}")
        )
    return "\n".join([*lines, report.get("in_words", "")])


def differences(card: dict, report: dict) -> list[str]:
    """What of a card's figures moved beyond `TOLERANCES`, or in kind."""
    found = []
    old, new = card["train"], report["train"]
    for key, tolerance in TOLERANCES.items():
        if abs(new[key] - old[key]) > tolerance * abs(old[key]):
            found.append(f"{key}: {old[key]:.4g} on the card, {new[key]:.4g} now")
    if old["kernels"] != new["kernels"]:
        found.append(f"kernels: {old['kernels']} on the card, {new['kernels']} now")
    kinds = lambda r: {
        name.split(",")[0] for name, row in r["collectives"].items() if row["wire_gb"] > 0.05
    }
    if kinds(old) != kinds(new):
        found.append(
            f"collectives: gone {sorted(kinds(old) - kinds(new))}, new "
            f"{sorted(kinds(new) - kinds(old))}"
        )
    return found


def check(names: list[str], load, progress=print) -> list[str]:
    """Compiles the cards' configurations again. Returns the failures.

    Args:
      names: of cards, without .json; [] for all.
      load: (config file, size) -> config.

    Raises:
      ValueError: no such card.
    """
    cards = {path.stem: path for path in sorted(CARDS.glob("*.json"))}
    if unknown := sorted(set(names) - set(cards)):
        raise ValueError(f"no cards {unknown} in {CARDS}; there are {sorted(cards)}")
    failures = []
    for number, name in enumerate(names or cards):
        card = json.loads(cards[name].read_text())
        report = plan(load(*card["config"]), card["topology"], card["slices"])
        moved = differences(card, report)
        failures += [f"{name}: {line}" for line in moved]
        progress(
            f"{number + 1}/{len(names or cards)} {name}: {'; '.join(moved) or 'as on the card'} "
            f"({report['train']['compile_seconds']:.0f} s)"
        )
    return failures
