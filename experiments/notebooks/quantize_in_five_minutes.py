# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quantize a model in five minutes
#
# Load a model, quantize it by four methods, compare them on a text, generate, and draw a figure.
#
# The first cell chooses the model. `make test` runs these notebooks with a tiny random one.

# %%
import os

import jquant

MODEL = os.environ.get("NOTEBOOK_MODEL", "smollm2_135m")  # a name, a folder or a .gguf file
SMALL = "NOTEBOOK_MODEL" in os.environ

# %% [markdown]
# ## Load
#
# The default model and the texts are downloaded once. A model says in a few lines what it is.

# %%
model = jquant.load_model(MODEL)
calibration = jquant.load_text("c4_utf8")[: 40_000 if SMALL else None]
text = jquant.load_text("wiki_utf8")[: 20_000 if SMALL else None]
model

# %% [markdown]
# ## Quantize
#
# `int8`, `nf4` and round-to-nearest (`rtn`) look at the weights alone. GPTQ also looks at the inputs that the
# weights see, so it takes a calibration text. It gets 16 windows of 512 tokens here, to be quick; the default is
# 128.

# %%
names = ["int8", "nf4", "rtn-4", "gptq-4"]
how = {"calibration": calibration, "samples": 2 if SMALL else 16, "context": 64 if SMALL else 512}
quantized = {name: jquant.quantize(model, name, **how) for name in names}
quantized["gptq-4"]

# %% [markdown]
# The model is of the same type as before, and its projections are packed. One of them:

# %%
quantized["gptq-4"].weight("layers.1.mlp.down.kernel")

# %% [markdown]
# The name `gptq-4` stands for one choice on each axis. What a notebook shows leaves out what has its default:

# %%
jquant.method("gptq-4")

# %% [markdown]
# ## Compare
#
# `compare` scores the same windows with each model. KL is the distance of the predictions from the float model's,
# top-1 the share of tokens where both have the same most likely token. Four windows are few: the intervals are
# wide. The table of the README has 32.

# %%
comparison = jquant.compare(model, quantized, text, context=64 if SMALL else 512, windows=4)
comparison

# %% [markdown]
# INT8 is nearly the float model. Of the others, GPTQ is the nearest to it by KL and top-1, although
# round-to-nearest has the same bits and NF4 more.
#
# ## Draw
#
# The rows of the comparison are what figures are made from. The grey line is the Pareto front.

# %%
axes = jquant.plot.perplexity_bits(comparison.rows())

# %% [markdown]
# `jquant.plot.save(axes, "figure")` writes `figure.png` and `figure.pdf`, in the width of a paper's column.
#
# ## Generate
#
# A quantized model generates like any other.

# %%
prompt = "The history of science is"
for name, chosen in {"float": model, "gptq-4": quantized["gptq-4"], "rtn-4": quantized["rtn-4"]}.items():
    print(f"{name}: {prompt}{''.join(jquant.generate(chosen, prompt, tokens=4 if SMALL else 24))}")

# %% [markdown]
# ## Save
#
# `quantized["gptq-4"].save("my-gptq-4")` writes a folder that `jquant.load_model` reads, with the same logits bit
# for bit.
