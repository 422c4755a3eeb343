"""Make the plots and the table of the page on speed: `python docs/benchmarks/plot.py`.

It shows what `results.json` holds, also in the numbers of the README. With `--run` it runs
the benchmarks first, which takes minutes on a machine that should be quiet, and fills that
file; what follows goes to them, such as `--peers tensorflow=PYTHON`.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
README = HERE.parents[1] / "README.md"
OURS, PEER, TEXT = "#3f7fd4", "#a0a4ab", "#808389"  # legible on white and on black
PEERS = {"pure_callback": PEER, "tf.py_function": "#c98a3c"}
CALLS = [  # rows against these, and what the plot calls them
    ("identity on a scalar", "the identity"),
    ("log_huber, forward", "log_huber"),
    ("log_huber, value_and_grad", "its value and gradient"),
    ("log_huber, vmap of 1000", "1,000 of them, vmap"),
    ("log_huber, vmap of value_and_grad", "1,000 gradients, vmap"),
]


def duration(us: float) -> str:
    """Microseconds as text, with two digits."""
    for unit, scale in (("s", 1e6), ("ms", 1e3), ("µs", 1)):
        if us >= scale or scale == 1:
            value = us / scale
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    raise AssertionError


def calls(rows: list[dict[str, Any]]) -> None:
    """Bars of the time of a call, ours and those of the peers."""
    figure, axes = plt.subplots(figsize=(5.4, 3.4))
    names = {"py_func": OURS}
    for place, (work, label) in enumerate(CALLS):
        bars = []
        for peer, colour in PEERS.items():
            for row in rows:
                if row["work"] == work and row["peer"].startswith(peer):
                    bars = [*(bars or [(row["ours_us"], OURS)]), (row["peer_us"], colour)]
                    names[peer] = colour
        for number, (us, colour) in enumerate(bars):
            height = place + 0.29 * (number - (len(bars) - 1) / 2)
            axes.barh(height, us, 0.25, color=colour)
            axes.text(us * 1.15, height, duration(us), va="center")
        axes.text(9, place, label, ha="right", va="center")
    axes.set(xscale="log", xlim=(10, 1e8), yticks=[], ylim=(len(CALLS) - 0.4, -1.1))
    for x, (name, colour) in zip((10, 400, 120_000), names.items(), strict=False):
        axes.text(x, -0.8, f"■ {name}", color=colour, va="center", weight="bold")
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    figure.subplots_adjust(left=0.31, right=0.98, top=0.99, bottom=0.01)
    figure.savefig(HERE / "calls.svg", metadata={"Date": None})


def ratios(rows: list[dict[str, Any]]) -> None:
    """Dots of each row's time as a share of its peer's, on a logarithmic scale."""
    rows = sorted((r for r in rows if r["ratio"]), key=lambda r: r["ratio"])
    figure, axes = plt.subplots(figsize=(5.4, 0.38 * len(rows) + 0.7))
    for place, row in enumerate(rows):
        axes.plot([1, row["ratio"]], [place, place], color=PEER, lw=1.5, zorder=1)
        axes.scatter(row["ratio"], place, color=OURS, zorder=2)
        for key, above, size in (("work", -0.2, 8), ("peer", 0.22, 7)):
            text = row[key] if key == "work" else f"against {row[key]}"
            axes.text(4e-4, place + above, text, ha="right", va="center", size=size)
    axes.axvline(1, color=PEER, lw=0.8, zorder=0)
    axes.set(xscale="log", xlim=(6e-4, 100), yticks=[], ylim=(len(rows) - 0.4, -0.6))
    axes.set_xticks([0.001, 0.01, 0.1, 1, 10], ["1/1000", "", "1/10", "1", "10"])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.set_xlabel("time of jpyfunc / time of the other")
    figure.subplots_adjust(
        left=0.51, right=0.98, top=0.99, bottom=0.55 / figure.get_figheight()
    )
    figure.savefig(HERE / "ratios.svg", metadata={"Date": None})


def table(about: str, rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| work | against | ours | theirs | ratio |", "|---|---|---:|---:|---:|"]
    for row in rows:
        if row["ratio"] is None:
            # The text is "2 s; pure_callback: hangs (stopped after 60 s)".
            ours, theirs = row["limit"].split("; pure_callback: ")
            cells = [ours, theirs.split(" (")[0], ""]
        else:
            cells = [*(duration(row[key]) for key in ("ours_us", "peer_us"))]
            cells.append(f"{row['ratio']:.2g}")
        lines.append("| " + " | ".join([row["work"], row["peer"], *cells]) + " |")
    return "\n".join([*lines, "", f"{about}.", ""])


CLAIMS = [
    (
        *("log_huber, value_and_grad", "pure_callback + custom_vjp", "Value and gradient"),
        "`pure_callback` with a `custom_vjp` written by hand",
    ),
    (
        *("log_huber, vmap of 1000", "pure_callback, sequential", "A batch of 1,000"),
        "`pure_callback`",
    ),
    (
        *("log_huber staged, value_and_grad", "lax.cond by hand"),
        *("With `staged=True`, value and gradient", "`lax.cond` written by hand"),
    ),
]


def claims(rows: list[dict[str, Any]]) -> str:
    """The ratios of the README, in Markdown."""
    ratio = {(row["work"], row["peer"]): row["ratio"] for row in rows}
    return "\n".join(
        f"- {what}: {ratio[work, peer]:#.2g} of the time of {than}"
        for work, peer, what, than in CLAIMS
    )


def measure(arguments: list[str]) -> None:
    """Run the benchmarks; `results.json` stays as it is unless they come to their end."""
    run = HERE.parents[1] / "tests" / "benchmarks" / "run.py"
    fresh = RESULTS.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    # It exits with 1, too, if a row is slower than it must be.
    subprocess.run([sys.executable, run, "--json", fresh, *arguments], check=False)
    if not fresh.exists():
        sys.exit("The benchmarks failed, so nothing is drawn.")
    fresh.replace(RESULTS)


def main() -> None:
    """Run the benchmarks if asked to, and draw."""
    if sys.argv[1:2] == ["--run"]:
        measure(sys.argv[2:])
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    mpl.rcParams |= {
        "svg.hashsalt": "jpyfunc", "svg.fonttype": "none", "savefig.transparent": True,
        "font.size": 9, "text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT,
        "axes.edgecolor": TEXT,
    }  # fmt: skip
    calls(results["rows"])
    ratios(results["rows"])
    text = table(results["about"], results["rows"])
    (HERE / "table.md").write_text(text, encoding="utf-8")
    readme = re.sub(
        r"(?<=calls\.svg\)\n\n).*?(?=\n\n\[Speed\])",
        claims(results["rows"]),
        README.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    README.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
