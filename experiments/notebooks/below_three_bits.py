# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Train below three bits
#
# At 2 bits rounding alone breaks a small model. Training with the quantizer in the loop (QAT) brings part of it
# back: each step rounds the weights, runs the rounded model, and moves the weights behind the codes. QLoRA leaves
# the codes alone and learns low-rank adapters beside them.
#
# The trainings here take a few steps on a little text, so that they end in minutes. They show that the loss
# falls, and how each is called. They do not show what the methods reach: `docs/training.md` and `docs/results.md`
# have longer runs.

# %%
import os
from dataclasses import replace

import matplotlib.pyplot as plt

import jquant
from jquant import LoRA, Tuning
from jquant.data import windows

MODEL = os.environ.get("NOTEBOOK_MODEL", "smollm2_135m")
SMALL = "NOTEBOOK_MODEL" in os.environ

model = jquant.load_model(MODEL)
learned_text = jquant.load_text("c4_utf8")[:40_000]
text = jquant.load_text("wiki_utf8")[: 20_000 if SMALL else None]
STEPS, CONTEXT = (2, 32) if SMALL else (24, 128)
tokens = windows(model.tokenizer.encode(learned_text), context=CONTEXT)
tokens.shape

# %% [markdown]
# ## Rounding to 2 bits
#
# Round-to-nearest, with scales that have the least squared error. No calibration text is needed.

# %%
two = jquant.quantize(model, "rtn_mse", bits=2)
two

# %% [markdown]
# ## QAT
#
# `tune` learns from the float model's predictions, here from all of them in each step. A function as `progress`
# is told the loss before each step, the KL divergence from the float model in nats a token.

# %%
losses = {"QAT": [], "QLoRA": []}


def noted(run):
    """A progress function that keeps the losses of a training."""

    def note(stage, done, total, **figures):
        if "loss" in figures:
            losses[run].append(figures["loss"])

    return note


stage = Tuning(steps=STEPS, windows=4, rate=2**-7, weight_rate=0.02)
trained = replace(two, decoder=jquant.tune(two.decoder, model.decoder, tokens, stage, progress=noted("QAT")))

# %% [markdown]
# ## QLoRA
#
# Adapters of rank 8 beside the frozen 2-bit weights, learned from the same windows and the same teacher.

# %%
adapted = jquant.add_adapters(two, LoRA(8, alpha=16))
adapted = jquant.train_adapters(
    adapted, tokens, Tuning(steps=STEPS, windows=4, rate=2e-3), teacher=model, progress=noted("QLoRA")
)
adapted

# %%
_, axes = plt.subplots(figsize=(5, 3), layout="constrained")
for run, values in losses.items():
    axes.plot(range(1, len(values) + 1), values, "o-", markersize=3, label=run)
axes.set(xlabel="step", ylabel="KL to the float model, nats")
axes.legend()
for run, values in losses.items():
    print(f"{run}: {values[0]:.2f} before the first step, {values[-1]:.2f} before the last")

# %% [markdown]
# ## On another text
#
# What counts is a text that nothing was trained on.

# %%
jquant.compare(
    model,
    {"2 bits": two, "2 bits, QAT": trained, "2 bits, QLoRA": adapted},
    text,
    context=CONTEXT,
    windows=8,
)

# %% [markdown]
# Both trainings bring the predictions nearer to the float model's, on a text they have not seen. After so few
# steps both are still far from usable. Which of the two is better can't be read from this: their rates were not
# searched, the order may change with more steps, and the adapters take bits of their own.
#
# A training that is to be kept has a journal, which resumes after a kill: `jquant.tune(…,
# journal=jquant.Journal("qat-2"))`; on the command line, `python -m experiments.qat bits=2`.
