"""What evals found, to be read."""

INTERVAL = ("_low", "_high")


def cell(value: float | int) -> str:
    """A figure in few characters."""
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:.4g}"
        if abs(value) >= 1e5
        else f"{value:.4f}"
    )


def markdown(about: dict, values: dict[str, float]) -> str:
    """The results of a checkpoint: a table for each eval, intervals beside their figures.

    Args:
      about: step, from, versions, tokenizer, and evals: name -> what the evaluator says of its
        data.
      values: eval/NAME/METRIC -> value.
    """
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    lines = [
        f"# Step {about['step']} of {about['from']}",
        "",
        f"{versions}; tokenizer {about['tokenizer']}",
    ]
    for name, data in about["evals"].items():
        found = {
            key.removeprefix(f"eval/{name}/"): value
            for key, value in values.items()
            if key.startswith(f"eval/{name}/")
        }
        if not found:
            continue
        lines += ["", f"## {name}", ""]
        if data:
            lines += [
                "; ".join(
                    f"{key} {value}"
                    for key, value in data.items()
                    if isinstance(value, (str, int)) and value
                ),
                "",
            ]
        for words in data.get("words", ()):
            lines += [
                "words and their tokens: "
                + "; ".join(
                    f"{label}: {', '.join(map(repr, split.values()))}"
                    for label, split in words.items()
                ),
                "",
            ]
        lines += ["| | | 95% interval |", "|---|---|---|"]
        for key, value in found.items():
            if key.endswith(INTERVAL) and key.rpartition("_")[0] in found:
                continue
            low, high = (found.get(key + end) for end in INTERVAL)
            lines.append(
                f"| {key} | {cell(value)} | "
                f"{'' if low is None or high is None else f'{cell(low)} to {cell(high)}'} |"
            )
    return "\n".join(lines) + "\n"
