"""The table of named methods: each a point in format × range × rounding × transform.

A new method is a row here. `method("gptq", bits=3)` fills in what a row leaves open; anything else is written out:
`Method(Codebook(my_levels), rounding=GPTQ())` is GPTQ on one's own codebook.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field

from jquant.errors import InputError
from jquant.formats import NF4, Format, Group, Int
from jquant.ranges import MinMax, Range, Search
from jquant.rounding import GPTQ, Nearest, Rounding
from jquant.transforms import AWQ


@dataclass(frozen=True)
class Method:
    """One choice on each axis.

    Attributes:
      format: what a code means.
      range: how a group's scale is chosen.
      rounding: which code a weight gets.
      transform: exact rewrite before rounding, or None.
      token_weights: whether the Gram matrices of k and v weight each token by the attention it receives
        (`models/families.py` says which); without it an attention sink ruins v, see the README.
    """

    format: Format
    range: Range = field(default_factory=MinMax)
    rounding: Rounding = field(default_factory=Nearest)
    transform: AWQ | None = None
    token_weights: bool = True

    @property
    def needs_calibration(self) -> bool:
        """Whether any axis looks at activations."""
        return (
            self.transform is not None
            or not isinstance(self.rounding, Nearest)
            or (isinstance(self.range, Search) and self.range.metric != "mse")
        )


METHODS: dict[str, Callable[[int, Group, bool], Method]] = {
    "int8": lambda bits, group, symmetric: Method(Int(8, "channel", symmetric=True)),
    "nf4": lambda bits, group, symmetric: Method(NF4(64)),
    "rtn": lambda bits, group, symmetric: Method(Int(bits, group, symmetric)),
    "gptq": lambda bits, group, symmetric: Method(Int(bits, group, symmetric), Search("diagonal"), GPTQ()),
    "gptq_plain": lambda bits, group, symmetric: Method(
        Int(bits, group, symmetric), MinMax(), GPTQ(act_order=False), token_weights=False
    ),
    "awq": lambda bits, group, symmetric: Method(Int(bits, group, symmetric), Search("gram"), transform=AWQ()),
}


def method(name: str, bits: int = 4, group: Group = 64, symmetric: bool = False) -> Method:
    """The named method at the given width; rows that fix a width of their own (int8, nf4) ignore it.

    Raises:
      InputError: no such method, with the names there are.
    """
    if name not in METHODS:
        known = difflib.get_close_matches(name, METHODS, n=len(METHODS), cutoff=0.0)
        raise InputError(f"There is no method {name!r}; known: {', '.join(known)}.")
    return METHODS[name](bits, group, symmetric)
