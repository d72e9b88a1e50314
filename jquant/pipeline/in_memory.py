"""Quantizes a decoder that is in memory, and a language model around it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from jquant.calibration.options import DEFAULTS, Options
from jquant.composition import Method
from jquant.data import check_tokens, check_whole, refuse_name, run_hashes, sample_windows
from jquant.errors import InputError
from jquant.formats import Group
from jquant.io.language_model import LanguageModel
from jquant.learning.clips import learn_clips
from jquant.learning.tuning import check_devices, tune
from jquant.methods import Rules, complete
from jquant.models.config import DecoderConfig
from jquant.models.decoder import Block, Decoder, blocks, with_blocks
from jquant.models.folding import rotate
from jquant.parallel.mesh import Devices
from jquant.parts import shown
from jquant.pipeline.driver import calibrate, quantize_into
from jquant.pipeline.outside import quantize_outside
from jquant.pipeline.plan import Plan, make_plan
from jquant.progress import Progress, showing
from jquant.report import Report
from jquant.rounding import SolveInfo


def quantize_decoder(
    decoder: Decoder,
    method: str | Method | Rules | Plan,
    tokens: Int[np.ndarray, "n context"] | None = None,
    options: Options = DEFAULTS,
) -> tuple[Decoder, Report]:
    """Quantizes the projections of the blocks; norms stay as they are, and embedding and head unless a rule names them.

    Args:
      decoder: float; left untouched.
      method: a `Method`, a name in `METHODS`, rules that give weights different methods (`methods.assign`), or a plan
        (`make_plan`).
      tokens: calibration windows; not needed by methods that look at weights alone.
      options: see `Options`.

    Returns:
      The quantized decoder, and a report: (layer, path) -> SolveInfo.

    Raises:
      InputError: what `make_plan` finds; a method needs calibration tokens, or held-out ones, and there are none;
        tokens that the model can't read.
    """
    return quantize_decoders(decoder, {"": method}, tokens, options)[""]


def quantize_decoders(
    decoder: Decoder,
    methods: Mapping[str, str | Method | Rules | Plan],
    tokens: Int[np.ndarray, "n context"] | None = None,
    options: Options = DEFAULTS,
) -> dict[str, tuple[Decoder, Report]]:
    """`quantize_decoder` for several methods in one pass through the blocks.

    Forward passes and shared statistics are computed once. Every block must therefore read the float blocks' outputs:
    Options(inputs="float"). Arguments and errors are those of `quantize_decoder`; results are keyed by the methods'
    names.
    """
    plans = {name: make_plan(decoder, method) for name, method in methods.items()}
    if len({plan.rotation for plan in plans.values()}) > 1:
        raise InputError("Methods can share a calibration pass only with the same rotation.")
    if rotation := next((plan.rotation for plan in plans.values()), None):
        decoder = rotate(decoder, **asdict(rotation))
    check_tokens_and_options(decoder.config, list(plans.values()), tokens, options)
    if len(plans) > 1 and options.inputs == "quantized" and any(any(plan.observes) for plan in plans.values()):
        raise InputError('Methods can share a calibration pass only with inputs="float".')
    calibration = calibrate(source := _InMemory(decoder), plans, tokens, options)
    fit = np.empty((0, 0), np.int32) if tokens is None else tokens[: len(tokens) - options.held_out]
    clips = {name: learn_clips(decoder, plan.layers, fit) for name, plan in plans.items()}
    sinks = {name: _Kept() for name in plans}
    results = {}
    with showing(options.progress) as tell:
        for _ in quantize_into(sinks, source, plans, calibration, replace(options, progress=tell), clips):
            pass
        for name, plan in plans.items():
            quantized = with_blocks(decoder, sinks[name].kept)
            for stage in plan.tuning("model"):
                quantized = tune(quantized, decoder, fit, stage, devices=options.devices, progress=tell)
            results[name] = quantize_outside(quantized, plan.outside), sinks[name].report
    return results


class _InMemory:
    """A decoder as a source of blocks (`driver.Source`)."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    def outside(self) -> Decoder:
        return self.decoder

    def blocks(self, first: int = 0) -> Iterator[Block]:
        return islice(blocks(self.decoder), first, None)


class _Kept:
    """Quantized blocks in memory (`driver.Sink`)."""

    def __init__(self) -> None:
        self.kept: list[Block] = []
        self.report = Report()

    def finished(self) -> int:
        return len(self.kept)

    def blocks(self) -> Iterator[Block]:
        return iter(self.kept)

    def take(self, layer: int, block: Block, infos: Mapping[str, SolveInfo]) -> None:
        self.kept.append(block)
        self.report |= {(layer, path): info for path, info in infos.items()}


def check_tokens_and_options(config: DecoderConfig, plans: Sequence[Plan], tokens: Any, options: Options) -> None:
    """Raises InputError for calibration windows that the model can't read, or that leave nothing to learn from."""
    if tokens is not None:
        check_tokens(tokens, config, "Calibration windows")
    windows = 0 if tokens is None else len(tokens)
    if options.held_out >= windows and any(method.tuning for plan in plans for method in plan.methods):
        raise InputError(
            f"Tuning learns from text: held_out={options.held_out} of {windows} calibration windows leaves none."
        )
    for stage in (stage for plan in plans for stage in plan.tuning("model")):
        check_devices(stage, options.devices)


def quantize(
    model: LanguageModel,
    method: str | Method | Rules,
    *,
    bits: int | None = None,
    group: Group | None = None,
    symmetric: bool | None = None,
    calibration: str | None = None,
    samples: int = 128,
    context: int = 512,
    held_out: int = 0,
    inputs: Literal["quantized", "float"] = "quantized",
    passes: int = 1,
    devices: Devices | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
) -> LanguageModel:
    """Quantizes a model's projections by a named method, one of your own, or a plan.

    Args:
      model: float; left untouched.
      method: a name in `METHODS`, completed by `bits`, `group` and `symmetric`; a name with its width, "gptq-3"; a
        `Method`, which has its own format; or rules (regex, method) that give weights different methods, e.g.
        `[(r"layers\\.0\\.", None), ("", "gptq")]`.
      bits: 2 to 8; 4 by default.
      group: weights that share a scale: rows of a column, (rows, columns), "channel" or "tensor"; 64 by default.
      symmetric: without zero points; False by default.
      calibration: text whose activations the method looks at; RTN, NF4 and INT8 need none.
      samples: calibration windows, drawn from the text. 128 × 512 = 65,536 tokens: with 8,192 GPTQ's gain on wide
        layers vanishes on held-out text.
      context: tokens per calibration window.
      held_out: further windows that nothing is fitted to (`Options`).
      inputs: what each block is fitted to (`Options`).
      passes: how often each block is rounded (`Options`).
      devices: the mesh to compute on (`Options`).
      seed: of the windows' draw.
      progress: see `Options`.

    Returns:
      The model with QTensors as kernels, `report` and `calibrated_on` set.

    Raises:
      InputError: an unknown method; bits, group or symmetric where the method has its own; a rule that names no weight;
        a missing or too short calibration text; a number out of range; a context longer than the model's; a
        model that is quantized already.
    """
    rules = complete(method, bits, group, symmetric)
    check_whole(1, samples=samples, context=context)
    check_whole(0, seed=seed)
    options = Options(inputs, passes, held_out, devices=devices, progress=progress)
    plan = make_plan(model.decoder, rules)
    tokens, seen = None, model.calibrated_on
    if plan.needs:
        if calibration is None:
            raise InputError(f"{shown(method)} looks at activations: give it calibration=load_text('c4_utf8'), e.g.")
        ids = model.tokenizer.encode(calibration)
        try:
            tokens, runs = sample_windows(ids, context, samples + held_out, seed), run_hashes(ids)
        except InputError:
            refuse_name(calibration)
            raise
        seen = runs if seen is None else np.union1d(seen, runs)
    decoder, report = quantize_decoder(model.decoder, plan, tokens, options)
    return replace(model, decoder=decoder, report=report, calibrated_on=seen)
