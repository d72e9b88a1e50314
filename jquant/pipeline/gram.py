"""The Gram matrix of one weight's inputs, as calibration gives it to roundings: to look at, and to round by hand."""

from typing import Literal

from jax import Array
from jaxtyping import Float

from jquant.calibration.options import Options
from jquant.calibration.windows import Calibration
from jquant.composition import Method
from jquant.data import check_tokens, check_whole, sample_windows
from jquant.formats import Int
from jquant.io.language_model import LanguageModel
from jquant.models.decoder import blocks
from jquant.pipeline.blocks import seen_by
from jquant.pipeline.plan import make_plan
from jquant.progress import showing
from jquant.rounding import GPTQ


def gram(
    model: LanguageModel,
    weight: str,
    text: str,
    *,
    samples: int = 128,
    context: int = 512,
    token_weights: Literal["attention", "loss", "norm", "uniform"] = "attention",
) -> Float[Array, "in in"]:
    """Mean x xᵀ over the inputs x of a weight, GPTQ's H: what `quantize` finds with `inputs="float"`.

    Args:
      model: float.
      weight: its name, e.g. "layers.11.mlp.down.kernel" (`LanguageModel.weight`).
      text: calibration text.
      samples: windows drawn from the text.
      context: tokens per window.
      token_weights: how tokens count (`Method`).

    Raises:
      InputError: no such weight; what `quantize` finds of model and text.
    """
    check_whole(1, samples=samples, context=context)
    layer, path = model.place_of(weight)
    chosen = Method(Int(8, "channel"), rounding=GPTQ(), token_weights=token_weights)
    plan = make_plan(model.decoder, [(rf"^layers\.{layer}\.{path}$", chosen)])
    tokens = sample_windows(model.tokenizer.encode(text), context, samples, seed=0)
    check_tokens(tokens, model.config, "Calibration windows")
    calibration = Calibration(model.decoder, plan.layers, tokens, Options(inputs="float"))
    with showing(True) as tell:
        for number, block in enumerate(blocks(model.decoder)):
            tell("observe", number + 1, layer + 1)
            if number == layer:
                stats = calibration.observe(block, block, plan.layers[layer], layer)
                return seen_by(path, chosen, stats, model.config)["gram"].value
            calibration.advance(block)
    raise AssertionError("place_of found the layer")
