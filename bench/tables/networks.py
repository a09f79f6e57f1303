"""Tables of comparisons with trained networks."""

from __future__ import annotations

import json

from els.bench.tables.results import FIGURES, RESULTS, Result, median_and_quartiles, table


def networks_table() -> str:
    """How well the machines predict each trained network."""
    rows = []
    for path in sorted((RESULTS / "networks").glob("*.json")):
        result: Result = json.loads(path.read_text())
        for machine, figures in result["summary"].items():
            share = result["share_above_IS"].get(machine)
            rows.append(
                [
                    path.stem,
                    machine,
                    *(median_and_quartiles(figures[key]) for key in FIGURES),
                    "" if share is None else f"{100 * share:.0f} %",
                    str(result["n"]),
                ]
            )
    return table(["network", "machine", "r", "r^2", "R^2", "above IS", "n"], rows)


def networks_settings_table() -> str:
    """What each network is, what it was trained on and for how long, and its patch sizes."""
    rows = []
    for path in sorted((RESULTS / "networks").glob("*.json")):
        result: Result = json.loads(path.read_text())
        settings = result["settings"]
        network, sizes = settings["network"], settings["sizes"]
        config, training = network["network"], network["training"]
        depth = f"{config['layers']} layer{'s' * (config['layers'] > 1)}"
        if config["levels"] > 1:
            depth = f"{config['levels']} levels of {depth}"
        steps = int(network["trained"]["step"])
        minutes = float(network["trained"]["processor_seconds"]) / 60
        rows.append(
            [
                path.stem,
                f"{result['data']}, {settings['database']['images']:,}",
                f"{config['channels']} channels, {depth}, {config['padding']}, "
                f"{config['prediction']}",
                f"{steps:,} x {training['batch_size']}",
                f"{minutes:.0f}",
                " ".join(map(str, sizes["sizes"])),
                str(sizes["seeds"]),
                f"{sum(result['seconds'].values()) / 60:.0f}",
                f"{result['made']['date']}, {result['commit'][:10]}",
            ]
        )
    header = ["network", "images", "architecture", "steps x batch", "minutes", "sizes", "seeds"]
    return table([*header, "evaluation, minutes", "made"], rows)
