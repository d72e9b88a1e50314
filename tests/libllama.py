"""llama.cpp itself as an oracle: the library in xllamacpp's wheel, called by ctypes.

Its parameter structs are treated as bytes: made by llama.cpp's own functions, with the few numbers at their beginning
set that a forward pass needs (llama.h, struct llama_context_params).
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np

# Places among the context's parameters, in words of 32 bits.
CONTEXT, BATCH, MICRO_BATCH, THREADS, BATCH_THREADS, FLASH, KEYS, VALUES = 0, 1, 2, 7, 8, 13, 26, 27
F32, F16 = 0, 1


class Parameters(ctypes.Structure):
    """At least as large as any of llama.cpp's parameter structs, which are passed by value on the stack."""

    _fields_ = [("words", ctypes.c_uint32 * 128)]


class Batch(ctypes.Structure):
    """struct llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


@cache
def library() -> ctypes.CDLL:
    """libllama with the types of the functions that are called here."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    assert spec.origin is not None
    lib = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    pointer, string, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
    for name, result, arguments in (
        ("llama_backend_init", None, []),
        ("llama_model_default_params", Parameters, []),
        ("llama_context_default_params", Parameters, []),
        ("llama_model_load_from_file", pointer, [string, Parameters]),
        ("llama_init_from_model", pointer, [pointer, Parameters]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", integer, [pointer]),
        (
            "llama_tokenize",
            integer,
            [pointer, string, integer, ctypes.POINTER(integer), integer, ctypes.c_bool, ctypes.c_bool],
        ),
        ("llama_batch_init", Batch, [integer] * 3),
        ("llama_batch_free", None, [Batch]),
        ("llama_decode", integer, [pointer, Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_backend_init()
    return lib


class Model:
    """A GGUF file as llama.cpp loads it; raises ValueError where llama.cpp refuses the file."""

    def __init__(self, path, context: int = 1024, threads: int = 2):
        self.lib, self.context = library(), context
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}")
        parameters = self.lib.llama_context_default_params()
        assert list(parameters.words[KEYS : VALUES + 1]) == [F16, F16]
        for place, value in (
            (FLASH, 0),  # which would round to 16 bits
            (KEYS, F32),
            (VALUES, F32),
            (CONTEXT, context),
            (BATCH, context),
            (MICRO_BATCH, min(context, 512)),
            (THREADS, threads),
            (BATCH_THREADS, threads),
        ):
            parameters.words[place] = value
        self.state = self.lib.llama_init_from_model(self.model, parameters)
        self.vocab = self.lib.llama_model_get_vocab(self.model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocab)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.lib.llama_free(self.state)
        self.lib.llama_model_free(self.model)

    def encode(self, text: str) -> np.ndarray:
        """Token ids; special tokens' names are read as these."""
        data = text.encode()
        out = (ctypes.c_int32 * (len(data) + 8))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), out, len(out), False, True)
        return np.array(out[:count], np.int32)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits after every token of a text, `[t, vocab]`."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
            batch.seq_id[i][0] = 0
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.state), True)
        code = self.lib.llama_decode(self.state, batch)
        assert code == 0, f"llama_decode returned {code}"
        logits = np.ctypeslib.as_array(self.lib.llama_get_logits(self.state), (len(tokens), self.size)).copy()
        self.lib.llama_batch_free(batch)
        return logits


def perplexity(path, windows: np.ndarray) -> float:
    """exp of the mean loss of every prediction within windows of token ids, `[n, context]`."""
    losses = []
    with Model(path, windows.shape[1]) as model:
        for window in windows:
            logits = model.logits(window)[:-1].astype(np.float64)
            peak = logits.max(-1)
            total = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
            losses.append(total - logits[np.arange(len(logits)), window[1:]])
    return float(np.exp(np.mean(losses)))
