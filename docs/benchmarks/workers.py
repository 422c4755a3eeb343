"""Plot elements per second against workers: `python docs/benchmarks/workers.py`.

It draws what `workers.json` holds. With `--run` it measures first, which takes a minute on
a machine that should be quiet, and fills that file.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

import jpyfunc

HERE = Path(__file__).parent
RESULTS = HERE / "workers.json"
THREADS, PROCESSES, TEXT = "#3f7fd4", "#d4763f", "#808389"  # on white and on black
SERIES = [  # name, colour, the end of the line at which it is written
    ("sleeps 20 ms, threads", THREADS),
    ("computes 20 ms, processes", PROCESSES),
    ("computes 20 ms, threads", TEXT),
]


def sleeps(x: np.ndarray) -> np.ndarray:
    """A body that waits, for a subprocess or a server for example."""
    time.sleep(0.02)
    return x


def computes(x: np.ndarray) -> np.ndarray:
    """A body that computes in Python, for some 20 ms."""
    total = 0
    for i in range(1_000_000):
        total += i
    return x + np.float32(0 * total)


def spawned(workers: int) -> Executor:
    """A pool of processes that do not share the threads of JAX."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


def rate(
    body: Callable[[np.ndarray], np.ndarray],
    make_pool: Callable[[int], Executor],
    workers: int,
) -> float:
    """Elements per second of a batch with 5 elements for each worker: the best of 30."""
    with make_pool(workers) as pool:
        function = jpyfunc.numpy_func(body, Tout=lambda x: x, executor=pool)
        batch, xs = jax.jit(jax.vmap(function)), jnp.zeros(5 * workers)
        jax.block_until_ready(batch(xs))
        seconds = []
        for _ in range(30):
            begin = time.perf_counter()
            jax.block_until_ready(batch(xs))
            seconds.append(time.perf_counter() - begin)
    return len(xs) / min(seconds)


def measure() -> dict[str, Any]:
    """Measure all series; at most twice as many workers compute as there are cores."""
    cores = len(os.sched_getaffinity(0))
    some = [n for n in (1, 2, 4, 8, 16) if n <= 2 * cores]
    return {
        "cores": cores,
        "sleeps 20 ms, threads": [
            (n, rate(sleeps, ThreadPoolExecutor, n)) for n in (1, 2, 4, 8, 16)
        ],
        "computes 20 ms, processes": [(n, rate(computes, spawned, n)) for n in some],
        "computes 20 ms, threads": [
            (n, rate(computes, ThreadPoolExecutor, n)) for n in some
        ],
    }


def draw(results: dict[str, Any]) -> None:
    """Lines of elements per second, on logarithmic scales."""
    figure, axes = plt.subplots(figsize=(5.4, 3.2))
    for name, colour in SERIES:
        workers, rates = zip(*results[name], strict=True)
        axes.plot(workers, rates, "o-", color=colour, ms=4)
        axes.text(workers[-1] * 1.1, rates[-1], name, color=colour, va="center")
    axes.set(xscale="log", yscale="log", xlim=(0.9, 80), xlabel="workers")
    axes.set_ylabel(f"elements per second, on {results['cores']} cores")
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_yticks([50, 100, 200, 400, 800], ["50", "100", "200", "400", "800"])
    axes.minorticks_off()
    axes.spines[["right", "top"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(HERE / "workers.svg", metadata={"Date": None})


def main() -> None:
    """Measure if asked to, and draw."""
    if sys.argv[1:2] == ["--run"]:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    mpl.rcParams |= {
        "svg.hashsalt": "jpyfunc", "svg.fonttype": "none", "savefig.transparent": True,
        "font.size": 9, "text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT,
        "ytick.color": TEXT, "axes.edgecolor": TEXT,
    }  # fmt: skip
    draw(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
