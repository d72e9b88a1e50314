"""Blocks from a source, quantized one by one, into a sink: the same for a model in memory and from disk to disk.

By default each block sees the inputs that the quantized blocks before it produce, so that later blocks make up for
earlier errors. Only one float block, its statistics and the calibration windows are in memory.
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
    """Where quantized blocks go. `report` holds the `SolveInfo` of their weights so far."""

    report: Report

    def finished(self) -> int:
        """How many blocks, counted from the first, it already holds."""
        ...

    def blocks(self) -> Iterator[Block]:
        """The blocks that it holds."""
        ...

    def take(self, layer: int, block: Block, infos: Mapping[str, SolveInfo]) -> None:
        """Keeps a block and the infos of its weights."""
        ...


def calibrate(
    source: Source,
    plans: Mapping[str, Plan],
    tokens: Int[np.ndarray, "n context"] | None,
    options: Options,
    spill: Spill | None = None,
) -> Calibration | None:
    """The calibration windows before the first block; None if no method looks at activations."""
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
    """Quantizes the blocks that the sinks lack; yields each layer's number once its block is kept.

    Args:
      sinks: one for each plan, by name; all hold the same number of blocks.
      source: of the float blocks.
      plans: by name.
      calibration: what `calibrate` returned.
      options: see `Options`.
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
    """Quantizes blocks as they come; the calibration windows advance when the next block is asked for.

    Args:
      source: float blocks; at most one is held at a time.
      plans: by name.
      calibration: with its windows before the first of the blocks; None if no method looks at activations.
      options: see `Options`.
      clips: factors on the scales that a `LossSearch` learned.
      first: layer of the first block.

    Yields:
      Each quantized block and the infos of its weights, by the plans' names.
    """
    together = joined(plans.values())
    needs, devices = together.observes, options.devices
    on_all = devices.place if devices else lambda tree: tree
    # With float inputs, one pass through a block gives its statistics and the next block's inputs.
    tuned = any(plan.tuning("block") for plan in plans.values())
    single_pass = calibration is not None and calibration.inputs == "float" and options.passes == 1 and not tuned
    for layer, block in enumerate(map(on_all, source), first):
        stats, advanced = {}, False
        if calibration and needs[layer]:
            advanced = single_pass and any(needs[layer + 1 :])
            stats = calibration.observe(block, block, together.layers[layer], layer, advance=advanced)
        observe = partial(calibration.observe, layer=layer) if calibration and options.passes > 1 else None
        results = {}
        for name, plan in plans.items():
            evidence = Evidence(stats, (clips or {}).get(name, {}).get(layer, {}), observe)
            results[name] = quantize_block(block, plan.layers[layer], evidence, options, layer)
        if calibration and any(needs[layer:]):
            calibration.advance_exact(block)
            for name, (quantized, infos) in results.items():
                results[name] = _tune(quantized, block, plans[name], calibration, layer), infos
        yield results
        if calibration and any(needs[layer + 1 :]) and not advanced:
            calibration.advance(block if calibration.inputs == "float" else on_all(next(iter(results.values()))[0]))


def _tune(block: Block, exact: Block, plan: Plan, calibration: Calibration, layer: int) -> Block:
    for stage in plan.tuning("block") if plan.layers[layer] else ():
        try:
            block = tune_block(block, *calibration.windows(), calibration.rotary, stage, exact)
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
