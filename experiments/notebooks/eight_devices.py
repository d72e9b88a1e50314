# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Eight devices on a laptop
#
# JAX splits a CPU into virtual devices. They are no faster, but programs for them are compiled as for eight
# chips: the same meshes, the same collectives. This notebook quantizes on a mesh, shows where arrays lie, counts
# what devices send each other, and reads what a TPU's compiler says.
#
# The number of devices must be set before JAX is used.

# %%
import json
import os
from pathlib import Path

import jax

if jax.config.jax_num_cpu_devices != 8:
    jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp

import jquant
from benchmarks.scaling import SHAPES, collectives, count
from jquant.models.config import DecoderConfig
from jquant.parallel.mesh import Devices

MODEL = os.environ.get("NOTEBOOK_MODEL", "smollm2_135m")
SMALL = "NOTEBOOK_MODEL" in os.environ
jax.devices()

# %% [markdown]
# ## A mesh
#
# A mesh has two axes. Calibration windows are split over all devices. `model` splits the columns of the weights
# that are rounded.

# %%
devices = Devices(data=4, model=2)
devices.mesh

# %% [markdown]
# ## Quantize on it
#
# `quantize` takes the mesh. Only the first two layers are rounded here, by GPTQ, once on eight devices and once
# on one.

# %%
model = jquant.load_model(MODEL)
calibration = jquant.load_text("c4_utf8")[: 40_000 if SMALL else None]
how = {"calibration": calibration, "samples": 8, "context": 32 if SMALL else 256}
plan = [(r"layers\.[01]\.", "gptq-4")]
on_eight = jquant.quantize(model, plan, devices=devices, **how)
on_one = jquant.quantize(model, plan, **how)

name = "layers.0.mlp.down.kernel"
same = jnp.mean(on_eight.weight(name).codes == on_one.weight(name).codes)
print(f"{name}: {float(same):.3%} of the packed bytes are the same on eight devices and on one")

# %% [markdown]
# Sums over tokens are added in another order on eight devices, so a weight that lies between two codes could fall
# to the other one. None of this weight did.
#
# ## Where arrays lie
#
# `load_model(…, devices=devices)` cuts a model for evaluation; so does `devices.spread`. Each device holds an
# eighth of every weight, and joins one layer's weights at a time.

# %%
spread = devices.spread(on_eight.decoder)
codes = spread.segments[0].mlp.down.kernel.get_value().codes
print("stacked codes of the down-projections", codes.shape, "on each device", codes.sharding.shard_shape(codes.shape))

# %% [markdown]
# ## What devices send each other
#
# Collectives stand in a compiled program's text. This one is a product whose inputs are split over all devices
# and whose sum is wanted on each, as Gram matrices are.

# %%
x = devices.place(jnp.ones((64, 128)), ("data", "model"))
gram = jax.jit(lambda x: x.T @ x, out_shardings=devices.place(jnp.ones(())).sharding)
for line, size in collectives(gram.lower(x).compile().as_text()).items():
    print(f"{line.split(' = ')[1].split('(')[0]}: {size:,} bytes out")

# %% [markdown]
# `benchmarks/scaling.py` counts those of jquant's own programs, at full size, without running them: a block of
# Llama-3 8B, 256 windows of 2,048 tokens. Seconds are the counts at assumed rates of a chip, not measurements.

# %%
hidden, ffn, layers, heads, kv = (64, 128, 2, 4, 2) if SMALL else SHAPES["8B"]
config = DecoderConfig(128256, hidden, ffn, layers, heads, kv, hidden // heads, 1e-5, 5e5, None, False, 8192)
print("mesh  observing   joining  rounding  moved GB   seconds a block")
for data, parts in [(4, 2)] if SMALL else [(1, 1), (8, 1), (4, 2)]:
    found = count(config, Devices(data, parts), context=64 if SMALL else 2048)
    seconds = sum(value for key, value in found.items() if key.endswith("_s"))
    numbers = [f"{found[f'collectives_{stage}']:>9}" for stage in ("observing", "joining", "rounding")]
    print(f"{data} × {parts}", *numbers, f"{found['moved_gb']:9.1f} {seconds:17.2f}")

# %% [markdown]
# Eight devices take about a seventh of one device's time, although they send each other gigabytes. Windows are
# split over all of them in both meshes; columns of weights are split over `model` alone, so with 8 × 1 every
# device rounds all of them.
#
# ## What a pod would do
#
# `make pods` compiles the same programs with the TPU's own compiler, which needs no TPU. Its kept results say
# whether a program fits and what it moves. Nothing of it has run on a TPU.

# %%
results = Path(jquant.__file__).parents[1] / "benchmarks" / "results" / "pods.jsonl"
rows = [json.loads(line) for line in results.read_text().splitlines()]
for row in rows:
    if row["program"] in ("round", "train"):
        fits = "fits" if row["fits"] == "yes" else f"does not fit: {row['fits'].removeprefix('no: ')}"
        print(f"{row['topology']:12} {row['mesh']:6} {row['model']:4} {row['program']:6} {fits}")

# %% [markdown]
# `docs/pods.md` has all programs, and the commands that start them on real machines.
