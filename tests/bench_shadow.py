"""What a challenger in shadow costs: latency and processor time with it and without it, in turns: `make bench-shadow`

Two services of the same champion run at once, one of them with a challenger beside it, each with its decision log.
They get the same requests at a constant rate in many short turns, first the one, then the other, so that a machine that
is busy elsewhere is busy for both. Latency counts from the moment a request was due.
"""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from bench_serve import conditions, out
from explained import KINDS, applications, bundle, scorer
from rich.table import Table
from serving import PREDICT, running

from finure.core import FinureError, generator
from finure.pipeline import as_applications
from finure.serve.load import Report, drawn, load

PAIRS = ",".join(f"{champion}+{challenger}" for champion in KINDS for challenger in KINDS)
BODIES, WARM = 200, 2  # distinct requests; seconds that are not measured


class Served:
    "A service, and what was measured of it."

    def __init__(self, name: str, port: int, process: psutil.Process):
        self.name, self.process = name, process
        self.url = f"http://127.0.0.1:{port}{PREDICT}"
        self.rounds: list[np.ndarray] = []  # milliseconds of each request
        self.cpu: list[float] = []  # milliseconds of processor time a request

    def ask(self, bodies: list[bytes], rate: float, seconds: float, seed: int) -> Report:
        "One round."
        told = load(self.url, drawn(bodies, seed), rate, seconds, connections=32)
        if told.statuses != {200: told.planned}:
            raise FinureError(f"{self.name}: {told.statuses}, {told.errors} of {told.planned} requests.")
        return told

    def measure(self, bodies: list[bytes], rate: float, seconds: float, seed: int) -> bool:
        "One round that counts; whether the client kept its timetable."
        before = sum(self.process.cpu_times()[:2])
        told = self.ask(bodies, rate, seconds, seed)
        self.cpu.append(1000 * (sum(self.process.cpu_times()[:2]) - before) / told.planned)
        self.rounds.append(told.milliseconds)
        return not told.late


def compare(alone: Served, both: Served, bodies: list[bytes], rate: float, plan: dict) -> tuple[list[list[str]], int]:
    "The lines of the table of one pair and rate (figure, alone, with, more), and how often the client was late."
    late = 0
    for each in (alone, both):
        each.rounds, each.cpu = [], []
        each.ask(bodies, rate, WARM, plan["seed"])
    for number in range(plan["rounds"]):
        turns = (alone, both) if number % 2 == 0 else (both, alone)
        late += sum(not each.measure(bodies, rate, plan["seconds"], plan["seed"] + number) for each in turns)
    took, cpu = ([np.array(getattr(each, what)) for each in (alone, both)] for what in ("rounds", "cpu"))
    return [
        line("p50", lambda rounds: np.percentile(rounds, 50), *took, plan["seed"]),
        line("p95", lambda rounds: np.percentile(rounds, 95), *took, plan["seed"]),
        line("processor time of a request", np.mean, *cpu, plan["seed"]),
    ], late


def line(name: str, figure: Callable, old: np.ndarray, new: np.ndarray, seed: int) -> list[str]:
    "A figure of both, and how much more it is, with the 95 % interval of rounds that are drawn again."
    draws = generator(seed, name).integers(len(old), size=(500, len(old)))
    low, high = np.percentile([figure(new[drawn]) / figure(old[drawn]) - 1 for drawn in draws], [2.5, 97.5])
    more = figure(new) / figure(old) - 1
    return [name, f"{figure(old):.3f}", f"{figure(new):.3f}", f"{more:+.0%} ({low:+.0%} to {high:+.0%})"]


def main(
    rates: Annotated[str, typer.Option(help="Requests a second.")] = "100,300",
    seconds: Annotated[float, typer.Option(help="Of each round.")] = 1,
    rounds: Annotated[int, typer.Option(help="Of each service, for each pair and rate.")] = 20,
    pairs: Annotated[str, typer.Option(help="Champion+challenger.")] = PAIRS,
    seed: int = 0,
) -> None:
    "Latency and processor time of a champion alone and with a challenger in shadow."
    out.print(facts := conditions("credit, simulated bank", seed))
    plan = {"seconds": seconds, "rounds": rounds, "seed": seed}
    rows = as_applications(applications()[0].sample(BODIES, random_state=seed), scorer("scorecard").contract)
    bodies = [json.dumps(row).encode() for row in rows]
    columns = ["champion + challenger", "rate", "milliseconds", "alone", "with", "more"]
    table, late = Table(*columns, title="All rounds; in brackets the 95 % interval, drawn by rounds"), 0
    for pair in pairs.split(","):
        champion, _, challenger = pair.partition("+")
        with ExitStack() as stack:
            served = []
            for more in ({}, {"challenger": bundle(challenger)}):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                port, process = stack.enter_context(running(folder, bundle(champion), **more))
                served.append(Served("with" if more else "alone", port, psutil.Process(process.pid)))
            for rate in map(float, rates.split(",")):
                out.print(f"{pair}, {rate:g}/s", style="dim")
                lines, behind = compare(*served, bodies, rate, plan)
                late += behind
                for cells in lines:
                    table.add_row(pair, f"{rate:g}/s", *cells)
    out.print(table)
    out.print(f"turns in which the client was late for more than one request in a hundred: {late}")
    out.print(f"load before {facts['load_before'][0]:.1f}, after {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    typer.run(main)
