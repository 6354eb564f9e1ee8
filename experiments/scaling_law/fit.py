"""Fits a scaling law to the runs of sweep.py, and holds it against runs that it hasn't seen.

    python experiments/scaling_law/fit.py --workdir=runs/scaling_law

It prints tables, and writes fit.png to the sweep's directory.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import app, flags
from etils import epath
from scipy import optimize, special

sys.path.insert(0, str(Path(__file__).parents[2]))  # for lm
from lm.reports import sweeps
from lm.reports.tables import align

METRIC = "eval/validation/loss"
HUBER = 1e-3
RESAMPLES = 400

# Starts of the minimisation: log A, log B, log E, alpha, beta (as in Hoffmann et al., appendix D.3,
# but closer to small models' losses).
STARTS = [
    (log_a, log_b, log_e, alpha, beta)
    for log_a in (2.0, 6.0)
    for log_b in (2.0, 6.0)
    for log_e in (-1.0, 0.5)
    for alpha in (0.3, 0.7)
    for beta in (0.3, 0.7)
]


def read_runs(workdir: Path) -> dict[str, np.ndarray]:
    """The finished runs of a sweep as columns.

    Returns:
      N parameters, D tokens, C model FLOPs, L validation loss, and budget: C to one digit.
    """
    rows = []
    for run in sweeps.finished_runs(epath.Path(workdir)):
        size = run.run.size
        steps = size["total_steps"]
        tokens, flops = steps * size["tokens_per_step"], steps * size["flops_per_step"]
        rows.append((size["parameters"], tokens, flops, run.run.last_values[METRIC]))

    columns = dict(zip("NDCL", np.array(rows, np.float64).T))
    return columns | {"budget": np.array([float(f"{c:.0e}") for c in columns["C"]])}


def select(runs: Mapping[str, np.ndarray], which) -> dict[str, np.ndarray]:
    """Some of the rows."""
    return {name: column[which] for name, column in runs.items()}


# --- the parametric form: L = E + A / N^alpha + B / D^beta ---


def log_loss(law, n, d):
    """log L(N, D), by a stable sum (Hoffmann et al. 2022, equation 10 and appendix D.3)."""
    log_a, log_b, log_e, alpha, beta = law
    terms = [log_a - alpha * np.log(n), log_b - beta * np.log(d), np.full(np.shape(n), log_e)]
    return special.logsumexp(np.stack(terms), axis=0)


def fit_law(runs: Mapping[str, np.ndarray], starts=STARTS) -> np.ndarray:
    """(log A, log B, log E, alpha, beta) of the smallest Huber loss of log L, from many starts."""

    def objective(law):
        error = log_loss(law, runs["N"], runs["D"]) - np.log(runs["L"])
        return special.huber(HUBER, error).sum()

    found = []
    for start in starts:
        result = optimize.minimize(objective, start, method="L-BFGS-B")
        # Once more from there: the loss is flat, and the first stop often early.
        result = optimize.minimize(objective, result.x, method="Nelder-Mead", options=SIMPLEX)
        found.append((result.fun, tuple(result.x)))
    return np.array(min(found)[1])


SIMPLEX = dict(maxiter=4000, maxfev=4000, xatol=1e-6, fatol=1e-12)


def bootstrap_laws(runs: Mapping[str, np.ndarray], law, seed: int = 0) -> np.ndarray:
    """[RESAMPLES, 5]: the law of runs drawn again with replacement, from the law as the start."""
    rng = np.random.default_rng(seed)
    laws = []
    for _ in range(RESAMPLES):
        which = rng.integers(len(runs["L"]), size=len(runs["L"]))
        laws.append(fit_law(select(runs, which), starts=[law]))
    return np.array(laws)


# --- isoFLOP: the best size of each budget ---


def best_sizes(runs: Mapping[str, np.ndarray]) -> dict[float, tuple[float, float]]:
    """Budget -> (N at which a parabola through L over log N is lowest, L there), for the budgets
    whose lowest point lies among the sizes.
    """
    best = {}
    for budget in np.unique(runs["budget"]):
        of_budget = select(runs, runs["budget"] == budget)
        log_n = np.log(of_budget["N"])
        if len(np.unique(log_n)) < 3:
            continue
        middle = log_n.mean()
        a, b, c = np.polyfit(log_n - middle, of_budget["L"], 2)
        lowest = -b / (2 * a)
        if a > 0 and log_n.min() < middle + lowest < log_n.max():
            best[float(budget)] = (float(np.exp(middle + lowest)), float(c - b * b / (4 * a)))
    return best


def size_law(runs: Mapping[str, np.ndarray]) -> tuple[float, float]:
    """(exponent a, log k) of N_best = k C^a; NaN where fewer than two budgets have a best size."""
    best = best_sizes(runs)
    if len(best) < 2:
        return np.nan, np.nan
    log_c = np.log(list(best))
    log_n = np.log([n for n, _ in best.values()])
    exponent, log_k = np.polyfit(log_c, log_n, 1)
    return float(exponent), float(log_k)


def bootstrap_size_laws(runs: Mapping[str, np.ndarray], seed: int = 0) -> np.ndarray:
    """[RESAMPLES, 2]: `size_law` of runs drawn again among those of the same size and budget."""
    rng = np.random.default_rng(seed)
    cells = {}
    for row, cell in enumerate(zip(runs["budget"], runs["N"])):
        cells.setdefault(cell, []).append(row)
    laws = []
    for _ in range(RESAMPLES):
        which = np.concatenate([rng.choice(rows, len(rows)) for rows in cells.values()])
        laws.append(size_law(select(runs, which)))
    return np.array(laws)


# --- what is printed ---


def interval(values: np.ndarray) -> str:
    """The 95% interval of bootstrap values."""
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return f"{low:.3g} to {high:.3g}"


def held_out_rows(seen, held_out, law, laws) -> list[tuple[str, ...]]:
    """A row for each size of the held-out budget: what was foreseen, and what came."""
    rows = [("parameters", "tokens", "predicted", "95% interval", "reached (mean)", "seeds")]
    for n in np.unique(held_out["N"]):
        of_size = select(held_out, held_out["N"] == n)
        d = of_size["D"][:1]
        predicted = float(np.exp(log_loss(law, np.array([n]), d))[0])
        many = np.array([np.exp(log_loss(one, np.array([n]), d))[0] for one in laws])
        losses = ", ".join(f"{loss:.4f}" for loss in of_size["L"])
        rows.append(
            (
                f"{n:,.0f}",
                f"{d[0]:,.0f}",
                f"{predicted:.4f}",
                interval(many),
                f"{of_size['L'].mean():.4f}",
                losses,
            )
        )
    return rows


def plot(runs, held_out, law, path: Path) -> None:
    """Draws the losses of each budget over the model's size, and what the law says of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axis = figure.subplots()
    everything = {name: np.concatenate([runs[name], held_out[name]]) for name in runs}
    for number, budget in enumerate(np.unique(everything["budget"])):
        of_budget = select(everything, everything["budget"] == budget)
        is_seen = budget in runs["budget"]
        label = f"{budget:.0e} FLOPs" + ("" if is_seen else " (held out)")
        marker = "o" if is_seen else "x"
        axis.plot(of_budget["N"], of_budget["L"], marker, color=f"C{number}", label=label)

        # Along a budget tokens follow from the size; between sizes they are interpolated.
        order = np.argsort(of_budget["N"])
        log_n, log_d = np.log(of_budget["N"][order]), np.log(of_budget["D"][order])
        grid = np.linspace(log_n[0], log_n[-1], 100)
        d = np.exp(np.interp(grid, log_n, log_d))
        # A dash is seen where there is one size only.
        style = dict(color=f"C{number}", marker="_", markevery=[0, -1], markersize=16)
        axis.plot(np.exp(grid), np.exp(log_loss(law, np.exp(grid), d)), **style)

    axis.set(xscale="log", xlabel="parameters", ylabel="validation loss (nats a token)")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=100)


def main(unused_argv) -> None:
    workdir = Path(_WORKDIR.value).expanduser()
    runs = read_runs(workdir)
    largest = runs["budget"].max()
    seen = select(runs, runs["budget"] < largest)
    held_out = select(runs, runs["budget"] == largest)

    law = fit_law(seen)
    laws = bootstrap_laws(seen, law)
    rows = [("", "value", "95% interval")]
    for number, name in enumerate(("A", "B", "E", "alpha", "beta")):
        values = np.exp(laws[:, number]) if number < 3 else laws[:, number]
        value = np.exp(law[number]) if number < 3 else law[number]
        rows.append((name, f"{value:.4g}", interval(values)))
    error = np.abs(np.exp(log_loss(law, seen["N"], seen["D"])) / seen["L"] - 1)
    print(f"{len(seen['L'])} runs\n\n{align(rows)}\n")
    print(f"relative error on these runs: mean {error.mean():.2%}, largest {error.max():.2%}\n")

    exponent, _ = size_law(seen)
    by_form = law[4] / (law[3] + law[4])
    forms = laws[:, 4] / (laws[:, 3] + laws[:, 4])
    print(f"N_best grows as C^a: a = {exponent:.3f} by parabolas", end=" ")
    print(f"({interval(bootstrap_size_laws(seen)[:, 0])}),", end=" ")
    print(f"{by_form:.3f} by the form ({interval(forms)})\n")
    best = best_sizes(seen)
    for budget in np.unique(seen["budget"]):
        if budget in best:
            n, loss = best[budget]
            print(f"{budget:.0e} FLOPs: best at {n:,.0f} parameters, loss {loss:.4f}")
        else:
            print(f"{budget:.0e} FLOPs: the best is not among the sizes")
    print(f"\nheld out: {largest:.0e} FLOPs\n\n{align(held_out_rows(seen, held_out, law, laws))}")
    plot(seen, held_out, law, workdir / "fit.png")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep.", required=True)
    app.run(main)
