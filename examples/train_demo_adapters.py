"""Train the three demo adapters (support, sql, legal) on the embedded MoE model, on a CPU, in minutes each.

    python examples/train_demo_adapters.py [--only support] [--out examples/adapters]

Each adapter has LoRA on attention and, in some layers, on the experts; ranks, targets and scaling differ on
purpose, so that the three together exercise what a server has to support. Scores on held-out prompts go to
`<out>/scores.json`. The seed is fixed: the same machine and library versions write the same files.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_data
import torch
import typer
from demo_data import Example
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from motet.cli.demo_prompts import DEMO_PROMPTS
from motet.models.embedded import ensure_embedded

BASE_NAME = "motet/smollm2-135m-moe"
SEED = 17
BATCH = 8
IGNORED = -100  # cross_entropy's default ignore_index
MAX_NEW_TOKENS = 80  # the longest reference answer has 75


@dataclass(frozen=True)
class Recipe:
    """What one adapter adapts, and for how long it trains.

    r, alpha: of each expert, in `expert_layers` only. attention: rank and alpha by module, in all layers.
    Scaling is alpha / r, or alpha / sqrt(r) where `use_rslora`.
    """

    r: int
    alpha: int
    expert_layers: tuple[int, ...]
    expert_parameters: tuple[str, ...]
    attention: dict[str, tuple[int, int]]
    use_rslora: bool = False
    examples: int = 1200
    steps: int = 240
    learning_rate: float = 1e-3


RECIPES = {
    "support": Recipe(
        r=4,
        alpha=8,
        expert_layers=(12, 15, 18, 21, 24, 27),
        expert_parameters=("gate_up_proj", "down_proj"),
        attention={"q_proj": (8, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (8, 16)},
    ),
    "sql": Recipe(
        r=4,
        alpha=8,
        expert_layers=(16, 17, 18, 19, 20, 21, 22, 23),
        expert_parameters=("gate_up_proj", "down_proj"),
        attention={"q_proj": (16, 32), "v_proj": (8, 16)},
        examples=900,
    ),
    "legal": Recipe(
        r=8,
        alpha=6,
        expert_layers=(11, 14, 17, 20, 23, 26),
        expert_parameters=("down_proj",),
        attention={"q_proj": (4, 4), "k_proj": (4, 4), "v_proj": (4, 4), "o_proj": (4, 4)},
        use_rslora=True,
    ),
}


class SharedExperts(nn.Module):
    """The forward pass of a MoE block whose experts are copies of one MLP, sharing the copies' products.

    What the experts e of a token x, with weights p_e, add up to is
        h_e = p_e act((W + s B_e A_e) x),    y = sum_e (V + t D_e C_e) h_e = V sum_e h_e + t sum_e D_e C_e h_e
    so that V is multiplied once per token, W too, and PEFT's sums W + s B_e A_e are never formed: a step takes
    a third of the time. Only for training: the scores come from PEFT's own arithmetic.
    """

    block: Any  # nn.Module would type its attributes as Tensor | Module
    experts: Any

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        self.lora: dict[str, Any] = {}  # PEFT's wrapper of each adapted parameter
        experts = block.experts
        while isinstance(experts, ParamWrapper):
            self.lora[experts.parameter_name] = experts
            experts = experts.base_layer
        self.experts = experts

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.flatten(0, 1)
        up = F.linear(x, self.experts.gate_up_proj[0])
        if not self.lora:
            return F.linear(self._act(up), self.experts.down_proj[0]).view_as(hidden)
        _, weights, chosen = self.block.gate(x)
        mixed, delta = torch.zeros_like(up[:, : up.shape[1] // 2]), torch.zeros_like(x)
        for weight, expert in zip(weights.unsqueeze(-1).unbind(1), chosen.unbind(1), strict=True):
            h = weight * self._act(up + self._delta("gate_up_proj", x, expert))
            mixed = mixed + h
            delta = delta + self._delta("down_proj", h, expert)
        return (F.linear(mixed, self.experts.down_proj[0]) + delta).view_as(hidden)

    def _act(self, up: Tensor) -> Tensor:
        gate, up = up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def _delta(self, parameter: str, x: Tensor, expert: Tensor) -> Tensor | float:
        """s B_e A_e x for each row's own expert. x: (tokens, in), expert: (tokens,) -> (tokens, out)."""
        if parameter not in self.lora:
            return 0.0
        wrapper = self.lora[parameter]
        count, scaling = int(wrapper.num_experts), float(wrapper.scaling["default"])
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight  # (E r, in), (out, r E)
        shrunk = F.linear(x, a).view(len(x), count, -1) * F.one_hot(expert, count).unsqueeze(-1)
        expand = b.view(b.shape[0], -1, count).transpose(1, 2).flatten(1)  # (out, E r)
        return scaling * F.linear(shrunk.flatten(1), expand)


@contextmanager
def shared_experts(causal: Any) -> Iterator[None]:
    """Run every layer's experts as `SharedExperts` for a while."""
    layers = causal.model.layers
    for layer in layers:
        layer.mlp = SharedExperts(layer.mlp)
    yield
    for layer in layers:
        layer.mlp = layer.mlp.block


def lora_config(recipe: Recipe) -> LoraConfig:
    # The patterns name the attention, because PEFT warns that patterns for parameters "were ignored" (they are not).
    names = recipe.expert_parameters
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.r,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.attention),
        target_parameters=[
            f"layers.{layer}.mlp.experts.{name}" for layer in recipe.expert_layers for name in names
        ],
        rank_pattern={module: rank for module, (rank, _) in recipe.attention.items()},
        alpha_pattern={module: alpha for module, (_, alpha) in recipe.attention.items()},
        use_rslora=recipe.use_rslora,
    )


Encoded = tuple[list[int], list[int]]


def _length(encoded: Encoded) -> int:
    return len(encoded[0])


def encode(tokenizer: Any, example: Example) -> Encoded:
    """Token ids of the conversation, and labels: those of the answer and its end, IGNORED elsewhere."""
    prompt = tokenizer(prompt_text(tokenizer, example)).input_ids
    answer = tokenizer(example.answer + tokenizer.eos_token).input_ids
    return prompt + answer, [IGNORED] * len(prompt) + answer


def prompt_text(tokenizer: Any, example: Example) -> str:
    messages = [{"role": "user", "content": example.prompt}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def batches(encoded: list[Encoded], steps: int, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` shuffled batches of (input ids, labels), both (BATCH, longest), with rows of like length."""
    pool_size = 16 * BATCH  # sorting all would repeat the same batches; sorting pools saves most padding
    rng = random.Random(SEED)
    done = 0
    while True:
        order = rng.sample(encoded, len(encoded))
        pools = [sorted(order[i : i + pool_size], key=_length) for i in range(0, len(order), pool_size)]
        groups = [pool[i : i + BATCH] for pool in pools for i in range(0, len(pool), BATCH)]
        for group in rng.sample(groups, len(groups)):
            if done == steps:
                return
            done += 1
            longest = max(len(ids) for ids, _ in group)
            ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in group])
            labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in group])
            yield ids, labels


def train(model: Any, tokenizer: Any, name: str, recipe: Recipe, progress: Progress) -> None:
    encoded = [encode(tokenizer, example) for example in demo_data.training(name, recipe.examples)]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    warm_up = recipe.steps // 20

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (recipe.steps - warm_up)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    causal = model.get_base_model()
    bar = progress.add_task(f"{name}: loss", total=recipe.steps)
    model.train()
    for step, (ids, labels) in enumerate(batches(encoded, recipe.steps, tokenizer.pad_token_id)):
        # Padding is on the right, so causal attention keeps it from the tokens that count: no mask needed.
        hidden = causal.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        answered = wanted != IGNORED  # only these rows need the vocabulary's logits
        loss = F.cross_entropy(causal.lm_head(hidden[answered]), wanted[answered])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        progress.update(bar, advance=1, description=f"{name}: loss {loss.item():.3f}")
        if step % 50 == 0:  # for a log file, where there is no bar
            progress.console.print(f"{name}: step {step}, loss {loss.item():.3f}")
    model.eval()


def round_to_bfloat16(model: PeftModel) -> None:
    """Give the adapter the values that its file will hold, so that they are what is scored."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16).to(parameter.dtype)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, examples: list[Example], progress: Progress, title: str) -> list[str]:
    """Greedy answers, in order."""
    answers: list[str] = []
    for start in progress.track(range(0, len(examples), 16), description=title):
        texts = [prompt_text(tokenizer, example) for example in examples[start : start + 16]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return answers


def save(model: PeftModel, target: Path) -> None:
    """The directory that PEFT writes, in bfloat16, naming the base by its public name."""
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(str(target), save_embedding_layers=False)
    (target / "README.md").unlink(missing_ok=True)
    weights = target / "adapter_model.safetensors"
    rounded = {key: value.to(torch.bfloat16) for key, value in load_file(weights).items()}
    save_file(rounded, weights, {"format": "pt"})
    weights.chmod(0o644)  # safetensors makes it 0600
    path = target / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = BASE_NAME
    for key in ("target_modules", "target_parameters"):  # sets in PEFT, with another order in every run
        config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def score(name: str, examples: list[Example], answers: list[str]) -> float:
    passed = [demo_data.check(name, example, text) for example, text in zip(examples, answers, strict=True)]
    return sum(passed) / len(passed)


def train_one(name: str, base: Path, out: Path, progress: Progress) -> dict[str, Any]:
    recipe = RECIPES[name]
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = demo_data.held_out(name)
    causal: Any = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, experts_implementation="eager"
    )
    with shared_experts(causal):
        base_answers = answer(causal, tokenizer, examples, progress, f"{name}: base on held-out prompts")
    torch.manual_seed(SEED)  # LoRA's A starts random
    model = get_peft_model(causal, lora_config(recipe))
    started = time.monotonic()
    with shared_experts(causal):
        train(model, tokenizer, name, recipe, progress)
    seconds = time.monotonic() - started
    round_to_bfloat16(model)
    save(model, out / name)
    model.merge_adapter()  # PEFT's own arithmetic, and faster than forming every delta anew for each token
    answers = answer(model, tokenizer, examples, progress, f"{name}: adapter on held-out prompts")
    demo = [Example(DEMO_PROMPTS[name], "")]
    demo_answer = answer(model, tokenizer, demo, progress, f"{name}: demo prompt")[0]
    return {
        "held_out_prompts": len(examples),
        "base_score": round(score(name, examples, base_answers), 3),
        "adapter_score": round(score(name, examples, answers), 3),
        "steps": recipe.steps,
        "training_seconds": round(seconds),
        "bytes": (out / name / "adapter_model.safetensors").stat().st_size,
        "demo_prompt": DEMO_PROMPTS[name],
        "demo_answer": demo_answer,
        "failed": [
            {"prompt": example.prompt, "answer": text}
            for example, text in zip(examples, answers, strict=True)
            if not demo_data.check(name, example, text)
        ],
    }


def main(only: str | None = None, out: Path = Path(__file__).parent / "adapters", threads: int = 1) -> None:
    """Train all demo adapters, or the one named by --only, and write them below --out.

    One thread is the default: the matrices are small, and on two cores that other work shares, two threads
    waiting for each other were six times slower than one.
    """
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    summary_file = out / "scores.json"
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        base = ensure_embedded()
        for name in [only] if only else demo_data.NAMES:
            result = train_one(name, base, out, progress)
            summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
            summary[name] = result
            summary_file.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
            console.print(
                f"{name}: base {result['base_score']:.0%}, adapter {result['adapter_score']:.0%} of "
                f"{result['held_out_prompts']} held-out prompts; {result['bytes'] / 1e6:.1f} MB in "
                f"{result['training_seconds']} s"
            )


if __name__ == "__main__":
    typer.run(main)
