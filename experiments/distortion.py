"""Squared error of formats on normal weights, beside the least that any code of so many bits can have.

    python -m experiments.distortion
    python -m experiments.distortion methods=[nf4,trellis-4] rows=4096

A matrix of independent standard normal weights is rounded to nearest on each method's format and range; nothing else of
the method counts. Shannon's bound on the mean squared error with R bits a weight is 4^−R. Bits count scales and zeros.
All settings: configs/distortion.yaml. Results land in results/<name>/: distortion.jsonl, distortion.md and the figure.
"""

from typing import Any

import hydra
import jax
import jax.numpy as jnp
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.table import Table

from experiments import provenance, tables
from experiments.command_line import console, one_sentence, run, show
from experiments.overrides import CONFIGS
from experiments.settings import check, check_methods
from jquant import InputError
from jquant.cache_folder import cache_dir
from jquant.io.files import write_text
from jquant.methods import Method
from jquant.parts import brief
from jquant.qtensor import Grid, bits_per_weight, dequantize
from paper_figures import distortion

FILE = "distortion.jsonl"


@hydra.main(version_base=None, config_path=str(CONFIGS), config_name="distortion")
def main(config: DictConfig) -> None:
    """Hydra's entry point."""
    with one_sentence():
        measure(OmegaConf.to_container(config, resolve=True))  # pyright: ignore[reportArgumentType]


def measure(settings: dict[str, Any]) -> None:
    """Measures every method's format, writes the rows, and prints the table."""
    check(settings)
    chosen = {name: rounded_alone(name, method) for name, method in check_methods(settings).items()}
    folder, shape = tables.results_folder(settings), (settings["rows"], settings["columns"])
    w = jax.random.normal(jax.random.key(settings["seed"], impl="threefry2x32"), shape)
    rows = []
    for name, method in chosen.items():
        scale, zero = method.range(w, method.format)
        grid = Grid.of(scale, zero, method.format, shape)
        q = grid.pack(grid.encode(w))
        error = float(jnp.mean((dequantize(q) - w) ** 2))
        origin = {
            "method": name,
            "composition": brief(method),
            "protocol": {"weights": "standard normal", "shape": list(shape)},
            "config": {key: settings[key] for key in ("bits", "group", "symmetric", "seed")},
        }
        identified = provenance.identified(origin, {name: method}, "experiments.distortion")
        rows.append(identified | {"bits_per_weight": bits_per_weight(q), "squared_error": error})
        console.print(f"{name}: {error:.5f}", highlight=False)
    tables.add_rows(folder, rows, FILE)
    write_text(folder / "distortion.md", f"{tables.as_markdown(table(rows))}\n")
    show(table(rows))
    figures = ", ".join(map(str, distortion.draw(rows, folder)))
    console.print(f"Results: {folder}/{FILE}, distortion.md. Figure: {figures}.", soft_wrap=True)


def rounded_alone(name: str, method: Any) -> Method:
    """The method, if its range looks at the weights alone.

    Raises:
      InputError: it does not, or has rules, or is the float model.
    """
    if not isinstance(method, Method) or method.range.needs:
        raise InputError(f"{name} has no one range that looks at weights alone: take one such as rtn_mse, nf4 or e8p.")
    return method


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each row."""
    shown = Table(box=box.SIMPLE_HEAD)
    for heading in ("method", "bits/weight", "squared error", "bound", "error over bound"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        bits, error = row["bits_per_weight"], row["squared_error"]
        figures = f"{bits:.3f}", f"{error:.5f}", f"{4**-bits:.5f}", f"{error * 4**bits:.2f}"
        shown.add_row(tables.label(row), *figures)
    return shown


if __name__ == "__main__":
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "compiled"))
    run(main)
