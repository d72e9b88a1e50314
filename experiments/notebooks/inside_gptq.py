# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Look inside GPTQ
#
# GPTQ rounds a weight $W$ so that the layer's output changes little: it lowers trace$(E^T H E)$, where
# $E = W - \hat W$ and $H$ is the mean of $x x^T$ over the layer's inputs. This notebook looks at $H$, at the error of
# each output column, at the damping, and at what the first token of a window does to $H$.

# %%
import os

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jquant
from jquant import GPTQ, Grid, Int, Method, Nearest, Search

MODEL = os.environ.get("NOTEBOOK_MODEL", "smollm2_135m")
SMALL = "NOTEBOOK_MODEL" in os.environ

model = jquant.load_model(MODEL)
calibration = jquant.load_text("c4_utf8")[: 40_000 if SMALL else None]
text = jquant.load_text("wiki_utf8")[: 20_000 if SMALL else None]
layer = model.config.layers // 3 + 1
how = {"samples": 2 if SMALL else 16, "context": 64 if SMALL else 512}

# %% [markdown]
# ## The spectrum of H
#
# `jquant.gram` gives $H$ of one weight's inputs. The next figure shows the eigenvalues of three of them, each
# divided by the largest.

# %%
paths = ["attention.q.kernel", "mlp.up.kernel", "mlp.down.kernel"]
grams = {path: jquant.gram(model, f"layers.{layer}.{path}", calibration, **how) for path in paths}
spectra = {path: np.linalg.eigvalsh(np.asarray(gram, np.float64))[::-1] for path, gram in grams.items()}
_, axes = plt.subplots(figsize=(5, 3), layout="constrained")
for path, eigenvalues in spectra.items():
    axes.semilogy(np.maximum(eigenvalues / eigenvalues[0], 1e-12), label=f"{path}, {len(eigenvalues)} inputs")
axes.set(xlabel="eigenvalue", ylabel="share of the largest", title=f"layer {layer}")
axes.legend()
for path, eigenvalues in spectra.items():
    print(f"{path}: the largest eigenvalue has {eigenvalues[0] / eigenvalues.sum():.1%} of the trace")

# %% [markdown]
# A steep spectrum is what GPTQ lives on: errors can hide in the many directions that inputs hardly have. The
# down-projection's inputs have nearly one direction; the section on the attention sink says where it comes from.
#
# ## The error of each column
#
# Both roundings below use the same grid. The error of output column $j$ is $e_j^T H e_j$, shown as a share of
# $w_j^T H w_j$.

# %%
name = f"layers.{layer}.mlp.up.kernel"
w, gram, format = model.weight(name), grams["mlp.up.kernel"], Int(3, 64)
grid = Grid.of(*Search("diagonal")(w, format, gram=gram), format, w.shape)


def by_column(delta):
    """The energy that a change of the weight gives each output."""
    return np.asarray(jnp.sum(delta * (gram @ delta), 0))


rounded = {"nearest": Nearest()(w, grid).codes, "GPTQ": GPTQ()(w, grid, gram=gram).codes}
shares = {called: by_column(w - grid.decode(codes)) / by_column(w) for called, codes in rounded.items()}
_, axes = plt.subplots(figsize=(5, 3), layout="constrained")
for called, share in shares.items():
    axes.semilogy(np.sort(share), label=called)
axes.set(xlabel="output columns, sorted", ylabel="share of energy lost", title=f"{name}, 3 bits")
axes.legend()
for called, share in shares.items():
    print(f"{called}: median {np.median(share):.2%}, worst column {share.max():.2%}")

# %% [markdown]
# GPTQ's own changes of the weights are larger than those of the nearest codes. It moves errors to where $H$ is
# small:

# %%
for called, codes in rounded.items():
    error = w - grid.decode(codes)
    print(f"{called}: squared change of the weights {float(jnp.sum(error**2) / jnp.sum(w**2)):.2%}, ", end="")
    print(f"of the outputs {by_column(error).sum() / by_column(w).sum():.2%}")

# %% [markdown]
# ## Damping
#
# GPTQ adds a multiple of the mean diagonal to $H$. This keeps the factorisation stable, and GPTQ from fitting the
# calibration text too closely. The next cell rounds the same weight with several dampings, and measures the error
# with $H$ of the calibration text and with that of another text.

# %%
other = jquant.gram(model, name, text, **how)
dampings = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
errors = [w - grid.decode(GPTQ(damping=damping)(w, grid, gram=gram).codes) for damping in dampings]
energy = lambda delta, measure: float(jnp.sum(delta * (measure @ delta)))  # noqa: E731
measures = {"calibration text": gram, "another text": other}
lost = {
    called: [energy(error, measure) / energy(w, measure) for error in errors] for called, measure in measures.items()
}
_, axes = plt.subplots(figsize=(5, 3), layout="constrained")
for called, shares in lost.items():
    axes.semilogx(dampings, [100 * share for share in shares], "o-", label=called)
axes.set(xlabel="damping", ylabel="% of energy lost")
axes.legend()
for called, shares in lost.items():
    print(f"{called:17}", *(f"{damping:g}: {share:.2%} " for damping, share in zip(dampings, shares, strict=True)))

# %% [markdown]
# On the calibration text, damping above 0.01 only costs. On the other text a little more of it helps: the best is
# 0.1 for this weight and so few calibration tokens. With too much, GPTQ is near to rounding to nearest.
#
# ## The attention sink
#
# The first token of a window receives much of the attention, whatever it says. So its value vector enters nearly
# every output, but it is one token in hundreds in $H$. And in some layers its activations are so large that they
# are nearly all of $H$. `jquant.outliers` measures both.

# %%
outliers = jquant.outliers(model, text, context=how["context"], windows=4, group=32)
axes = jquant.plot.outliers(outliers.rows(), ax=plt.subplots(figsize=(5, 3), layout="constrained")[1])
print(f"attention that first tokens receive, largest over the layers: {outliers.sink_attention.max():.0%}")

# %% [markdown]
# In the ringed layer the first tokens have nearly all of the energy of the down-projection's inputs: they are the
# one direction of the spectrum above.
#
# ## What token weights do
#
# For k and v, jquant counts each token by the attention that it receives. `token_weights="uniform"` counts all
# alike, as in the paper. The next cell rounds only v, in all layers, to 3 bits, with both.

# %%
quantized = {
    token_weights: jquant.quantize(
        model,
        [(r"attention\.v", Method(Int(3, 64), rounding=GPTQ(), token_weights=token_weights))],
        calibration=calibration,
        **how,
    )
    for token_weights in ("uniform", "attention")
}
comparison = jquant.compare(model, quantized, text, context=how["context"], windows=4)
comparison

# %% [markdown]
# The bits are the same, and the KL differs several times over: the errors that hide in the first token's
# direction enter nearly every output. `docs/results.md` has the same comparison for all weights, on more text.
