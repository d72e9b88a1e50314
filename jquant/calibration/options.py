"""Options of calibration and rounding."""

from dataclasses import dataclass
from typing import Literal

import jax

from jquant.data import check_whole
from jquant.errors import InputError
from jquant.parallel.mesh import Devices
from jquant.progress import Progress


@dataclass(frozen=True)
class Options:
    """What `quantize_decoder` and `quantize_to_folder` take beside method and tokens.

    Attributes:
      inputs: whether a block is fitted to the outputs of the quantized blocks before it, or of the float ones.
      passes: how often a block is rounded. From the second time on, its projections are fitted to the inputs that its
        own quantized projections produce.
      held_out: windows at the end of the tokens that nothing is fitted to: `SolveInfo` has the error on them, and GPTQ
        may choose its damping by it.
      batch: windows per forward pass and device; None for `usual_batch()`.
      devices: the mesh to compute on: windows are split over one axis, weights' columns over the other; None computes
        where the decoder is.
      progress: whether to show progress; or a function. It is called with ("quantize", blocks done, blocks in all) and
        the error so far, which is the mean share of their outputs' energy that projections lose; and with ("tune",
        steps done, steps in all) and the loss.

    Raises:
      InputError: an option out of range.
    """

    inputs: Literal["quantized", "float"] = "quantized"
    passes: int = 1
    held_out: int = 0
    batch: int | None = None
    devices: Devices | None = None
    progress: Progress | bool = True

    def __post_init__(self) -> None:
        if self.inputs not in ("quantized", "float"):
            raise InputError(f'Blocks take inputs="quantized" or "float", not {self.inputs!r}.')
        check_whole(1, passes=self.passes, batch=1 if self.batch is None else self.batch)
        check_whole(0, held_out=self.held_out)

    @property
    def windows_per_pass(self) -> int:
        """Windows in one forward pass, on all devices together."""
        return (self.batch or usual_batch()) * (self.devices.count if self.devices else 1)


def usual_batch() -> int:
    """Windows per forward pass and device: 8 on accelerators, 1 on CPUs.

    On a CPU one window's activations stay in cache, and its buffers are small enough for the C library to keep. Larger
    buffers go back to the system after every pass; the fresh pages then take a tenth of the time.
    """
    return 1 if jax.default_backend() == "cpu" else 8


DEFAULTS = Options()
