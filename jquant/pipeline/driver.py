"""Blocks from a source, quantized one by one, into a sink: the same for a model in memory and from disk to disk.

By default each block sees the inputs that the quantized blocks before it produce, so that later blocks make up for
earlier errors. One float block, its statistics and the calibration windows are all that is alive.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Protocol, runtime_checkable

import numpy as np
from jax import Array
from jaxtyping import Int

from jquant.calibration.options import DEFAULTS, Options
from jquant.calibration.spill import Spill
from jquant.calibration.windows import Calibration
from jquant.errors import InputError
from jquant.learning.tuning import tune_block
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder
from jquant.pipeline.blocks import Evidence, quantize_block
from jquant.pipeline.plan import Plan, joined
from jquant.report import Report, relative_error
from jquant.rounding import SolveInfo

Rounded = tuple[Block, dict[str, SolveInfo]]
Clips = Mapping[str, Mapping[int, Mapping[str, Array]]]  # by plan, layer and path


@runtime_checkable
class Source(Protocol):
    """Where float blocks come from."""

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        ...

    def outside(self) -> Decoder:
        """The decoder, with its blocks or without."""
        ...

    def blocks(self, first: int = 0) -> Iterator[Block]:
        """Blocks from layer `first` on."""
        ...


@runtime_checkable
class Sink(Protocol):
    """Where quantized blocks go. `report` is what was done to each weight so far."""

    report: Report

    def finished(self) -> int:
        """How many blocks, from the first, are there already."""
        ...

    def blocks(self) -> Iterator[Block]:
        """The blocks that are there."""
        ...

    def take(self, layer: int, block: Block, infos: Mapping[str, SolveInfo]) -> None:
        """Keeps a block, and what was done to its weights."""
        ...


def calibrate(
    source: Source,
    plans: Mapping[str, Plan],
    tokens: Int[np.ndarray, "n context"] | None,
    options: Options,
    spill: Spill | None = None,
) -> Calibration | None:
    """The calibration windows before the first block; None where no method looks at activations."""
    together = joined(plans.values())
    if not any(together.observes):
        return None
    return Calibration(source.outside(), together.layers, tokens, options, spill)


def quantize_into(
    sinks: Mapping[str, Sink],
    source: Source,
    plans: Mapping[str, Plan],
    calibration: Calibration | None,
    options: Options,
    clips: Clips | None = None,
) -> Iterator[int]:
    """Quantizes the blocks that are missing in the sinks; yields each layer once its block is there.

    Args:
      sinks: one for each plan; those of several plans have the same blocks.
      source: of the float blocks.
      plans: by name.
      calibration: `calibrate`.
      options: see there.
      clips: factors on the scales that a `LossSearch` learned.
    """
    [first] = {sink.finished() for sink in sinks.values()}
    if calibration and first < source.config.layers:
        _catch_up(calibration, source, next(iter(sinks.values())), first)
    steps = quantize_blocks(source.blocks(first), plans, calibration, options, clips, first)
    for layer, results in enumerate(steps, first):
        for name, rounded in results.items():
            sinks[name].take(layer, *rounded)
        if callable(options.progress):
            error = relative_error(sink.report for sink in sinks.values())
            options.progress("quantize", layer + 1, source.config.layers, error=error)
        yield layer


def quantize_blocks(
    source: Iterable[Block],
    plans: Mapping[str, Plan],
    calibration: Calibration | None,
    options: Options = DEFAULTS,
    clips: Clips | None = None,
    first: int = 0,
) -> Iterator[dict[str, Rounded]]:
    """Quantizes blocks as they come; the calibration windows move on when the next one is asked for.

    Args:
      source: float blocks, of which no more than one is held.
      plans: by name.
      calibration: its windows at the first of the blocks; None where no method looks at activations.
      options: see there.
      clips: factors on the scales that a `LossSearch` learned.
      first: layer of the first block.

    Yields:
      Each block quantized, and what was done to its weights, by the plans' names.
    """
    together = joined(plans.values())
    needs, devices = together.observes, options.devices
    on_all = devices.place if devices else lambda tree: tree
    # Where blocks read what float ones produce, one pass through a block does for its statistics and for what follows.
    tuned = any(plan.tuning("block") for plan in plans.values())
    once = calibration is not None and calibration.inputs == "float" and options.passes == 1 and not tuned
    for layer, block in enumerate(map(on_all, source), first):
        stats, moved = {}, False
        if calibration and needs[layer]:
            moved = once and any(needs[layer + 1 :])
            stats = calibration.observe(block, block, together.layers[layer], layer, advance=moved)
        observe = partial(calibration.observe, layer=layer) if calibration and options.passes > 1 else None
        done = {}
        for name, plan in plans.items():
            evidence = Evidence(stats, (clips or {}).get(name, {}).get(layer, {}), observe)
            done[name] = quantize_block(block, plan.layers[layer], evidence, options, layer)
        if calibration and any(needs[layer:]):
            calibration.advance_exact(block)
            for name, (quantized, infos) in done.items():
                done[name] = _tune(quantized, plans[name], calibration, layer), infos
        yield done
        if calibration and any(needs[layer + 1 :]) and not moved:
            calibration.advance(block if calibration.inputs == "float" else on_all(next(iter(done.values()))[0]))


def _tune(block: Block, plan: Plan, calibration: Calibration, layer: int) -> Block:
    for stage in plan.tuning("block") if plan.layers[layer] else ():
        try:
            block = tune_block(block, *calibration.windows(), calibration.rotary, stage)
        except InputError as wrong:
            raise InputError(f"layers.{layer}: {wrong}") from None
    return block


def _catch_up(calibration: Calibration, source: Source, sink: Sink, count: int) -> None:
    """Leads the windows through the blocks that an earlier process finished."""
    on_all = calibration.devices.place if calibration.devices else lambda tree: tree
    if calibration.exact is not None:
        for block in islice(source.blocks(), count):
            calibration.advance_exact(on_all(block))
    readers = source.blocks() if calibration.inputs == "float" else sink.blocks()
    for block in islice(readers, count):
        calibration.advance(on_all(block))
