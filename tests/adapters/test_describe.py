from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from motet.adapters.checkpoint import load_checkpoint
from motet.adapters.describe import AdapterReport, FileReport, ModuleReport, describe
from tests.adapters.peft_files import (
    CONFIG,
    EXPERTS,
    FUSED,
    HIDDEN,
    PREFIX,
    VOCAB,
    WEIGHTS,
    classic_expert,
    module_tensors,
    peft_adapter,
    q_tensors,
    spec_of,
    write_adapter,
)

LLAMA, MIXTRAL = spec_of("llama"), spec_of("mixtral")


def test_without_a_model(tmp_path: Path) -> None:
    tensors = q_tensors(0) | q_tensors(2, rank=9) | module_tensors("model.layers.2.mlp.up_proj", HIDDEN, 80)
    write_adapter(
        tmp_path,
        tensors,
        rank_pattern={"layers.2.self_attn.q_proj": 9},
        alpha_pattern={"up_proj": 2},
        base_model_name_or_path="some/base",
        peft_version="0.21.2",
        target_modules=["up_proj", "q_proj"],
    )
    report = describe(tmp_path, None)
    assert report == AdapterReport(
        path=str(tmp_path),
        files=(
            FileReport(CONFIG, (tmp_path / CONFIG).stat().st_size),
            FileReport(WEIGHTS, (tmp_path / WEIGHTS).stat().st_size),
        ),
        base_model="some/base",
        peft_version="0.21.2",
        rank=4,
        alpha=6.0,
        rank_pattern={"layers.2.self_attn.q_proj": 9},
        alpha_pattern={"up_proj": 2.0},
        targets=("q_proj", "up_proj"),
        modules=(
            ModuleReport("q_proj", 2, 4, 9, 6 / 9, 1.5, 2, 2),
            ModuleReport("up_proj", 1, 4, 4, 0.5, 0.5, 1, 1),
        ),
        layers=(0, 2),
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        bytes=4 * sum(tensor.numel() for tensor in tensors.values()),
        dtypes=("F32",),
    )


def test_with_a_model(tmp_path: Path) -> None:
    peft_adapter(
        "mixtral",
        tmp_path,
        torch.bfloat16,
        target_modules=["v_proj"],
        target_parameters=FUSED,
        layers_to_transform=None,
        r=4,
        lora_alpha=6,
        rank_pattern={"gate_up_proj": 3},
    )
    report = describe(tmp_path, MIXTRAL)
    assert report.binds is True
    assert report.reason is None
    assert report.digest == load_checkpoint(tmp_path, MIXTRAL).digest
    assert report.modules == (
        ModuleReport("v", 2, 4, 4, 1.5, 1.5, 2, 2),
        ModuleReport("gate", 8, 3, 3, 2.0, 2.0, 8, 8),
        ModuleReport("up", 8, 3, 3, 2.0, 2.0, 8, 8),
        ModuleReport("down", 8, 4, 4, 1.5, 1.5, 8, 8),
    )
    assert report.layers == (0, 1)
    assert report.experts == (0, 1, 2, 3)
    assert report.dtypes == ("BF16",)
    without = describe(tmp_path, None)
    assert without.binds is None
    assert {module.module: module.count for module in without.modules} == {"v_proj": 2, "experts": 4}
    assert next(module for module in without.modules if module.module == "experts").min_rank == 3


def test_experts_touched_and_no_effect(tmp_path: Path) -> None:
    tensors = classic_expert(0, 1, {"w1": 4}) | classic_expert(1, 3, {"w2": 4})
    tensors = {name: tensor * ("w2" not in name) for name, tensor in tensors.items()}
    write_adapter(tmp_path, tensors)
    report = describe(tmp_path, MIXTRAL)
    assert report.experts == describe(tmp_path, None).experts == (1, 3)
    assert report.no_effect == ("layers.1.experts.3.down",)


def test_maps_outside_the_experts_and_the_layers(tmp_path: Path) -> None:
    tensors = module_tensors("model.layers.1.mlp.gate", HIDDEN, EXPERTS) | module_tensors(
        "lm_head", HIDDEN, VOCAB
    )
    embed = f"{PREFIX}model.embed_tokens.lora_embedding_"
    tensors |= {f"{embed}A": torch.ones(4, VOCAB), f"{embed}B": torch.ones(HIDDEN, 4)}
    write_adapter(tmp_path, tensors)
    report = describe(tmp_path, MIXTRAL)
    assert report.reason is None
    assert [module.module for module in report.modules] == ["embed", "router", "head"]
    assert report.layers == describe(tmp_path, None).layers == (1,)
    assert {module.module for module in describe(tmp_path, None).modules} == {
        "embed_tokens",
        "gate",
        "lm_head",
    }


def test_why_not(tmp_path: Path) -> None:
    write_adapter(tmp_path, classic_expert(0, 1, {"w1": 4}))
    report = describe(tmp_path, LLAMA)
    assert report.binds is False
    assert "has no linear map" in (report.reason or "")
    assert [module.module for module in report.modules] == ["w1"]
    assert report.digest is None
    write_adapter(tmp_path, q_tensors(), use_dora=True)
    report = describe(tmp_path, None)
    assert report.binds is False
    assert "use_dora" in (report.reason or "")
    assert len(report.files) == 2
    (tmp_path / CONFIG).unlink()
    assert "adapter_config.json: missing" in (describe(tmp_path, LLAMA).reason or "")
    assert describe(tmp_path / "nothing", None).files == ()
    assert describe(Path("x\0"), None).binds is False


def test_report_is_json(tmp_path: Path) -> None:
    write_adapter(tmp_path, q_tensors(), rank_pattern={"q_proj": 4})
    report = describe(tmp_path, LLAMA)
    assert msgspec.json.decode(msgspec.json.encode(report), type=AdapterReport) == report
