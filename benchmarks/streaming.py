"""Memory and time of quantizing a model from disk to disk that is larger than memory.

    python -m benchmarks.streaming --folder /scratch          # Llama-3-8B's shape: 16 GB there, and 5 GB written
    python -m benchmarks.streaming --folder /tmp --layers 2

A checkpoint of random bfloat16 weights is written shard by shard; then RTN-4 runs over all of it, and GPTQ-4 over its
first 2 blocks with 16 × 512 random tokens, each in a process of its own. Peak resident memory is the
operating system's figure for that process. The last line is JSON; the folder is emptied again.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import tokenizers
from rich.console import Console
from safetensors.numpy import save_file
from tokenizers import models

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}
TOKENS, BLOCKS = (16, 512), 2


def main() -> None:
    """Writes the checkpoint, measures both methods, prints the table and the JSON line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--folder", type=Path, required=True, help="where the checkpoint is written and removed")
    options.add_argument("--layers", type=int, default=LLAMA_3_8B["num_hidden_layers"])
    arguments = options.parse_args()
    from experiments.provenance import versions

    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="streaming-") as temporary:
        source = Path(temporary) / "float"
        begin = time.perf_counter()
        write_checkpoint(source, LLAMA_3_8B | {"num_hidden_layers": arguments.layers})
        size = sum(path.stat().st_size for path in source.iterdir())
        Console().print(f"{size / 1e9:.1f} GB written in {time.perf_counter() - begin:.0f} s")
        parts = {}
        for name, blocks in (("gptq", min(BLOCKS, arguments.layers)), ("rtn", arguments.layers)):
            command = [
                sys.executable,
                "-m",
                "benchmarks.streaming",
                "part",
                source,
                Path(temporary) / name,
                name,
                blocks,
            ]
            finished = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
            parts[name] = json.loads(finished.stdout.splitlines()[-1])
            Console().print(f"{name}: {parts[name]}")
    peak = max(part["peak_rss_mb"] for part in parts.values())
    print(
        json.dumps(
            {"peak_rss_mb": peak, "checkpoint_gb": size / 1e9, **parts, "layers": arguments.layers, **versions()}
        )
    )


def write_checkpoint(folder: Path, shape: dict, seed: int = 0) -> None:
    """A Hugging Face folder of random weights, one shard a layer; the norms' gains are 1."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    hidden, ffn, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    narrow = hidden // heads * shape["num_key_value_heads"]
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "hidden_act": "silu"}
    config |= {"torch_dtype": "bfloat16", "tie_word_embeddings": False, "head_dim": hidden // heads}
    (folder / "config.json").write_text(json.dumps(config | shape))
    vocabulary = {f"t{i}": i for i in range(shape["vocab_size"])}
    tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="t0")).save(str(folder / "tokenizer.json"))
    ones = np.ones(hidden, ml_dtypes.bfloat16)

    def random(out: int, features: int) -> np.ndarray:
        values = np.empty((out, features), ml_dtypes.bfloat16)
        for rows in np.array_split(np.arange(out), -(-out // 1024)):  # float32 copies of a few rows at a time
            values[rows] = 0.02 * rng.standard_normal((len(rows), features), np.float32)
        return values

    shards = {}
    shards["outside.safetensors"] = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    save_file(
        dict(
            zip(
                shards["outside.safetensors"], (*(random(shape["vocab_size"], hidden) for _ in "ab"), ones), strict=True
            )
        ),
        folder / "outside.safetensors",
    )
    for layer in range(shape["num_hidden_layers"]):
        tensors = {
            "self_attn.q_proj": random(hidden, hidden),
            "self_attn.k_proj": random(narrow, hidden),
            "self_attn.v_proj": random(narrow, hidden),
            "self_attn.o_proj": random(hidden, hidden),
            "mlp.gate_proj": random(ffn, hidden),
            "mlp.up_proj": random(ffn, hidden),
            "mlp.down_proj": random(hidden, ffn),
            "input_layernorm": ones,
            "post_attention_layernorm": ones,
        }
        named = {f"model.layers.{layer}.{name}.weight": values for name, values in tensors.items()}
        shards[f"layer-{layer:03}.safetensors"] = list(named)
        save_file(named, folder / f"layer-{layer:03}.safetensors")
    index = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def measure(source: Path, target: Path, name: str, blocks: int) -> dict:
    """Seconds of each block and peak resident memory of this process."""
    from jquant import Options, method, open_model
    from jquant.pipeline.to_disk import quantize_stream

    model = open_model(source, dtype="bfloat16")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, TOKENS, np.int32)
    seconds, begin = [], time.perf_counter()
    steps = quantize_stream(model, target, method(name), tokens if name != "rtn" else None, Options(batch=2))
    for _ in zip(range(blocks), steps, strict=False):
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "peak_rss_mb": peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6,
        "first_block_s": seconds[0],
        "seconds_per_block": [round(value, 2) for value in seconds[1:]],
        "written_mb": sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) / 1e6,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["part"]:
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))))
    else:
        main()
