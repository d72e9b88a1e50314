"""A jquant model behind lm-evaluation-harness, which asks it for log-likelihoods and texts.

    import lm_eval
    from jquant.evaluation.harness import JquantLM

    lm_eval.simple_evaluate(JquantLM(q), tasks=["hellaswag"])

Needs the extra `harness`, so no other module of jquant imports this one.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Bool, Float, Int

from jquant.data import check_tokens, check_whole
from jquant.errors import InputError
from jquant.evaluation.generation import generate_batch
from jquant.io.language_model import LanguageModel
from jquant.learning.objectives import map_rows
from jquant.models.decoder import Decoder
from jquant.progress import Progress
from jquant.qtensor import prepared

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError:
    raise InputError(
        "lm-evaluation-harness is not installed: pip install 'jquant[harness]', or in a checkout "
        "pip install -c constraints.txt -e '.[harness]'."
    ) from None

STEP = 16  # tokens by which the lengths of padded texts differ at least
GENERATED = 256  # tokens, where a task doesn't say how many; as the harness's `hf` backend
OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k"}  # of generation

Request = tuple[Any, list[int], list[int]]  # a key, the context's ids, the continuation's ids


class JquantLM(TemplateLM):
    """A language model, float or quantized, as the harness's `LM`.

    Token boundaries, truncation and windows are those of the harness's `hf` backend: context and continuation are
    tokenized together, a text longer than the model's context loses its beginning, an empty context is BOS (EOS if
    there is none), and BOS begins a text where the tokenizer expects it.

    Texts go through the model longest first, `batch` at a time, padded on the right to few lengths: one program each.
    """

    def __init__(self, model: LanguageModel, *, batch: int = 8, progress: Progress | None = None):
        """`progress` is called with ("answer", texts done, texts in all).

        Raises:
          InputError: no whole batch.
        """
        super().__init__()
        check_whole(1, batch=batch)
        self.model, self.batch, self.progress = model, batch, progress
        self._decoder = prepared(model.decoder)

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self.model.config.context_length

    @property
    def eot_token_id(self) -> int:
        """EOS; InputError if the tokenizer has none."""
        if not self.model.tokenizer.eos_ids:
            raise InputError(f"The tokenizer of {self.model.name} has no EOS token, which the harness asks for.")
        return self.model.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids, after BOS where the tokenizer expects it, unless the text has it already or `add_special_tokens=False`.

        Other arguments are not used.
        """
        tokenizer = self.model.tokenizer
        ids = tokenizer.encode(string).tolist()
        if not tokenizer.add_bos or tokenizer.bos_id is None or add_special_tokens is False:
            return ids
        return ids if string.startswith(tokenizer.decode([tokenizer.bos_id])) else [tokenizer.bos_id, *ids]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """For each (context, continuation) log p of the continuation, and whether each token is the most likely one.

        Raises:
          InputError: an empty continuation, or one longer than the context; ids that the model doesn't have;
            likelihoods that are not finite.
        """
        if empty := [request.args for request in requests if not request.args[1]]:
            raise InputError(f"The continuation of {empty[0][0][-40:]!r} is empty.")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """For each (text,) its log p; a text longer than the model's context is cut as the harness says."""
        windows: list[list[Request]] = []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows.append([(None, *make_disjoint_window(pair)) for pair in cut])
        answers = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        return [sum(next(answers)[0] for _ in text) for text in windows]

    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        longest = max((len(continuation) for _, _, continuation in requests), default=1)
        if longest > self.max_length:
            raise InputError(f"A continuation has {longest} tokens; the model's context is {self.max_length}.")
        # The last token is only predicted, so one more than the context fits.
        texts = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        answers: dict[int, tuple[float, bool]] = {}
        for begin in range(0, len(order), self.batch):
            rows = order[begin : begin + self.batch]
            read = padded(len(texts[rows[0]]) - 1, self.max_length)
            tokens = filled([texts[row] for row in rows], (self.batch, read + 1))
            check_tokens(tokens.reshape(-1, 1), self.model.config, "The items' tokens")
            likelihoods, greedy = map(np.asarray, _predictions(self._decoder, tokens))
            for place, row in enumerate(rows):
                end = len(texts[row]) - 1
                scored = slice(end - len(requests[row][2]), end)
                total = likelihoods[place, scored].sum(dtype=np.float64)
                answers[row] = float(total), bool(greedy[place, scored].all())
            if not np.isfinite([answers[row][0] for row in rows]).all():
                raise InputError(
                    "A log-likelihood is NaN or infinite: the model's weights are broken, or its activations overflow "
                    "their dtype."
                )
            if self.progress:
                self.progress("answer", len(answers), len(texts))
        return [answers[row] for row in range(len(texts))]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """For each (context, options) the text that goes on, up to the first of the stop sequences `until`, or EOS.

        Greedy unless `do_sample` with a temperature. A context that leaves no room for `max_gen_toks` loses its
        beginning. Contexts of every length have a program of their own (`generate_batch`).

        Raises:
          InputError: an option that jquant doesn't have; an empty context; no room for the new tokens.
        """
        by_options: dict[str, list[int]] = {}
        for row, request in enumerate(requests):
            by_options.setdefault(repr(sorted(request.args[1].items())), []).append(row)
        texts: dict[int, str] = {}
        for rows in by_options.values():
            options: dict[str, Any] = dict(normalize_gen_kwargs(requests[rows[0]].args[1], GENERATED))
            if unknown := options.keys() - OPTIONS:
                raise InputError(
                    f"jquant generates without {unknown.pop()!r}; its options are {', '.join(sorted(OPTIONS))}."
                )
            room = self.max_length - options["max_gen_toks"]
            if room < 1:
                raise InputError(
                    f"max_gen_toks={options['max_gen_toks']} leaves no room in the context of {self.max_length}."
                )
            prompts = {row: self.tok_encode(requests[row].args[0])[-room:] for row in rows}
            rows = sorted(rows, key=lambda row: -len(prompts[row]))
            for begin in range(0, len(rows), self.batch):
                together = rows[begin : begin + self.batch]
                texts |= self._generated({row: prompts[row] for row in together}, options)
        return [texts[row] for row in range(len(requests))]

    def _generated(self, prompts: dict[int, list[int]], options: dict[str, Any]) -> dict[int, str]:
        """The texts that continue prompts of ids, by the requests' numbers, which their random keys depend on."""
        tokenizer = self.model.tokenizer
        until = handle_stop_sequences(options["until"], eos=tokenizer.decode([self.eot_token_id]))
        ids = generate_batch(
            self.model.decoder,
            [np.array(prompt, np.int32) for prompt in prompts.values()],
            jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.array([*prompts])),
            tokens=options["max_gen_toks"],
            temperature=options.get("temperature", 0.0) if options["do_sample"] else 0.0,
            top_k=options.get("top_k"),
        )
        texts = {}
        for row, new in zip(prompts, ids.tolist(), strict=True):
            end = next((place for place, token in enumerate(new) if token in tokenizer.eos_ids), len(new))
            text = tokenizer.backend.decode(new[:end], skip_special_tokens=True)
            texts[row] = postprocess_generated_text(text, until, None)
        return texts


def padded(length: int, longest: int) -> int:
    """The length rounded up to a multiple of STEP, or of an eighth of the next power of two; at most `longest`.

    All lengths up to 2,048 share 24 programs, and past STEP tokens at most a fifth of a text is padding.
    """
    step = max(STEP, 1 << max((length - 1).bit_length() - 3, 0))
    return min(-(-length // step) * step, longest)


def filled(texts: Sequence[Sequence[int]], shape: tuple[int, int]) -> Int[np.ndarray, "b t"]:
    """Texts of any lengths as rows of an array, zeros after them."""
    tokens = np.zeros(shape, np.int32)
    for row, text in zip(tokens, texts, strict=False):
        row[: len(text)] = text
    return tokens


@jax.jit
def _predictions(
    decoder: Decoder, tokens: Int[Array, "b t"]
) -> tuple[Float[Array, "b scored"], Bool[Array, "b scored"]]:
    """log p of each token but the first, and whether it is the most likely one."""

    def rows(states: Array, targets: Array) -> tuple[Array, Array]:
        logits = decoder.logits(states).astype(jnp.float32)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return -nll, jnp.argmax(logits, -1) == targets

    return map_rows(rows, decoder.hidden(tokens[:, :-1]), tokens[:, 1:])
