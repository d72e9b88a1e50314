# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own rounding in forty lines
#
# A rounding chooses the code of each weight. This notebook writes one, compares it with jquant's own, puts it on
# another format, and gives it GPTQ's statistics. The library is not touched. `docs/extending.md` has the
# contracts of all parts.

# %%
import os
from dataclasses import dataclass

import jax
import jax.numpy as jnp

import jquant
from jquant import GPTQ, NF4, Int, Method, Rounded

MODEL = os.environ.get("NOTEBOOK_MODEL", "smollm2_135m")
SMALL = "NOTEBOOK_MODEL" in os.environ

model = jquant.load_model(MODEL)
calibration = jquant.load_text("c4_utf8")[: 40_000 if SMALL else None]
text = jquant.load_text("wiki_utf8")[: 20_000 if SMALL else None]

# %% [markdown]
# ## The rounding
#
# Let $E = W - \hat W$ be the error of a weight and $H$ the mean of $x x^T$ over its inputs. The mean squared
# change of the layer's output is trace$(E^T H E)$. With all other rows fixed, the best value of row $i$ is
#
# $$ w_i + \sum_{k \ne i} \frac{H_{ik}}{H_{ii}} e_k . $$
#
# Coordinate descent rounds one row after another to the grid value nearest to that, and goes over all rows
# several times (QuantEase, [arXiv 2309.01885](https://arxiv.org/abs/2309.01885)). `grid` holds the values that
# codes stand for; `needs` asks for the Gram matrix $H$.


# %%
@dataclass(frozen=True)
class Descent:
    """Coordinate descent on trace(Eᵀ H E) from the nearest codes, `sweeps` times over all rows."""

    sweeps: int = 2
    needs = frozenset({"gram"})

    def __call__(self, w, grid, gram):
        rows = jax.tree.map(lambda v: jnp.broadcast_to(v, w.shape), grid.per_weight)  # scale and zero of each weight
        live = jnp.maximum(jnp.diagonal(gram), 1e-9 * jnp.mean(jnp.diagonal(gram)))

        def round_row(step, state):
            codes, error = state
            i = step % len(w)
            target = w[i] + (gram[i] @ error - gram[i, i] * error[i]) / live[i]
            at = jax.tree.map(lambda v: v[i], rows)
            code = grid.format.encode(target, *at)
            return codes.at[i].set(code), error.at[i].set(w[i] - grid.format.decode(code, *at))

        nearest = grid.encode(w)
        start = (nearest, w - grid.decode(nearest))
        codes, _ = jax.lax.fori_loop(0, self.sweeps * len(w), round_row, start)
        return Rounded(codes)


Method(Int(3, 64), rounding=Descent())

# %% [markdown]
# ## One weight by hand
#
# `jquant.gram` gives the Gram matrix of a weight's inputs. A range chooses the scales, `Grid.of` makes the grid,
# and a rounding is a function. The next cell prints which share of the output's energy each rounding loses.

# %%
name = "layers.1.attention.q.kernel"
w = model.weight(name)
how = {"samples": 2 if SMALL else 16, "context": 64 if SMALL else 512}
gram = jquant.gram(model, name, calibration, **how)


def lost(rounding, format, gram=gram):
    """Share of the output's energy that rounding loses."""
    grid = jquant.Grid.of(*jquant.MinMax()(w, format), format, w.shape)
    given = {"gram": gram} if rounding.needs else {}
    error = w - grid.decode(rounding(w, grid, **given).codes)
    energy = lambda delta: jnp.sum(delta * (gram @ delta))  # noqa: E731
    return float(energy(error) / energy(w))


roundings = {"nearest": jquant.Nearest(), "descent": Descent(), "descent, 8 sweeps": Descent(8), "GPTQ": GPTQ()}
for called, rounding in roundings.items():
    print(f"{called:18} {lost(rounding, Int(3, 64)):.5f}")

# %% [markdown]
# ## In the table
#
# Inside a `Method` the rounding works like jquant's own: `quantize` packs the codes, measures the error and
# checks the codes. To be quick, only the first four layers are quantized, to 3 bits; the others stay float.

# %%
FIRST = r"layers\.[0-3]\."


def first_layers(rounding, format):
    """The model with its first layers rounded."""
    return jquant.quantize(model, [(FIRST, Method(format, rounding=rounding))], calibration=calibration, **how)


three = {called: first_layers(rounding, Int(3, 64)) for called, rounding in roundings.items() if "8" not in called}
jquant.compare(model, three, text, context=64 if SMALL else 512, windows=4)

# %% [markdown]
# By KL, descent is nearer to the float model than the nearest codes are, and GPTQ is nearer still. Four windows
# are too few to tell their perplexities apart: see the intervals.
#
# ## On another format
#
# A rounding never asks which format it has: the grid knows. The same rounding on the 16 levels of NF4:

# %%
sixteen = {called: first_layers(rounding, NF4(64)) for called, rounding in roundings.items() if "8" not in called}
jquant.compare(model, sixteen, text, context=64 if SMALL else 512, windows=4)

# %% [markdown]
# Both are again nearer than the nearest codes, and about equal to each other.
#
# ## Under GPTQ's statistics
#
# The Gram matrix that the rounding gets is the one that GPTQ gets: for k and v, tokens count by the attention
# that they receive. `token_weights` of the `Method` changes that for every rounding. v of the first layers, with
# both:

# %%
for token_weights in ("attention", "uniform"):
    method = Method(Int(3, 64), rounding=Descent(), token_weights=token_weights)
    q = jquant.quantize(model, [(r"layers\.[0-3]\.attention\.v", method)], calibration=calibration, **how)
    print(f"{token_weights:10}", jquant.perplexity(q, text, context=64 if SMALL else 512, windows=4))

# %% [markdown]
# The two are alike here. The first token draws most of its attention in later layers; `inside_gptq` rounds v of
# all layers, where the choice matters.
#
# ## From the command line
#
# In a file `my_rounding.py` the class is a method of the table by its import path, and its code is part of the
# rows' fingerprints: `make table ARGS="methods=[fp32,rtn-3,gptq-3,my_rounding.Descent-3]"`.
