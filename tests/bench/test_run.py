from __future__ import annotations

from pathlib import Path

import pytest

from motet.bench.run import run_cases
from motet.config import EngineConfig
from motet.errors import ConfigError
from tests.tiny import write_adapter, write_model


def test_every_case_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "llama")
    adapters = [
        write_adapter(
            tmp_path / f"adapter-{i}", model, "llama", i, r=3, lora_alpha=6, target_modules=["q_proj"]
        )
        for i in range(2)
    ]
    config = EngineConfig(
        model=str(model), device="cpu", pool_bytes=8 << 20, max_running=8, max_step_tokens=64
    )
    names = ["steady", "together", "base", "alone", "cold", "crowd", "many"]
    results = list(run_cases(config, adapters, tmp_path / "images", names, 3, 11, 180, lambda _: None))
    assert [result.case for result in results] == names
    for result in results:
        assert result.otps > 0
        assert result.tokens_per_s > 0
        assert result.gap_max_ms >= result.gap_p99_ms
    by_name = {result.case: result for result in results}
    assert len(by_name["cold"].cold_ttft_ms) > 0
    assert by_name["alone"].in_flight == 1


@pytest.mark.parametrize(("name", "said"), [("stedy", "no case 'stedy'"), ("alone", "needs adapters")])
def test_a_case_that_cannot_run_is_named_before_anything_starts(name: str, said: str) -> None:
    config = EngineConfig(model="/nowhere", device="cpu")
    with pytest.raises(ConfigError, match=said):
        list(run_cases(config, [], Path("/nowhere"), [name], 3, 11, 30, lambda _: None))
