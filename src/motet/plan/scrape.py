"""Traffic from a saved scrape of Motet's or vLLM's metrics.

Motet counts requests and tokens by served name. vLLM counts them by `model_name`, which is one fine-tune where each has
a replica of its own: the scrapes of several are read one by one. Counters do not say since when they count; a scrape of
Motet has the time at which each of them began and the time of the scrape, otherwise the hours must be told.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from motet.errors import ConfigError

_MOTET = {"requests": "motet_requests_total", "prompt": "motet_prompt_tokens_total",
          "output": "motet_generation_tokens_total", "began": "motet_requests_created"}  # fmt: skip
_VLLM = {"requests": "vllm:request_success_total", "prompt": "vllm:prompt_tokens_total",
         "output": "vllm:generation_tokens_total", "began": "vllm:request_success_created"}  # fmt: skip
_SCRAPED = "vllm:lora_requests_info"
"""Its value is the time of the scrape, in Motet and in vLLM."""


class Use(msgspec.Struct, frozen=True):
    """What a scrape says of a model: requests per second and mean lengths."""

    name: str
    rate: float
    prompt: int
    output: int


def read_scrape(text: str, file: Path, hours: float | None) -> list[Use]:
    """What was served of each model that had requests. ConfigError if there is none, or no time to divide by."""
    values, scraped = _samples(text, file)
    names, label = (_MOTET, "model") if _MOTET["requests"] in values else (_VLLM, "model_name")
    counts = values.get(names["requests"], {})
    found = []
    for key, count in counts.items():
        if count > 0:
            began = values.get(names["began"], {}).get(key)
            seconds = _seconds(file, key, hours, began, scraped)
            prompt, output = (values.get(names[kind], {}).get(key, 0.0) for kind in ("prompt", "output"))
            found.append(
                Use(key, count / seconds, max(round(prompt / count), 1), max(round(output / count), 1))
            )
    if not found:
        raise ConfigError(
            f"{file} counts no requests: neither {_MOTET['requests']} nor {_VLLM['requests']} by {label}"
        )
    return found


def _seconds(file: Path, name: str, hours: float | None, began: float | None, scraped: float | None) -> float:
    if hours is not None:
        return hours * 3600
    if began is None or scraped is None or scraped <= began:
        raise ConfigError(f"{file} does not say how long the requests of {name!r} were counted: give --hours")
    return scraped - began


def _samples(text: str, file: Path) -> tuple[dict[str, dict[str, float]], float | None]:
    """Sample name → model → the sum of its series (of creation times the earliest), and when it was scraped."""
    values: dict[str, dict[str, float]] = defaultdict(dict)
    scraped = None
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == _SCRAPED:
                    scraped = max(sample.value, scraped or 0.0)
                model = sample.labels.get("model", sample.labels.get("model_name"))
                if model is None:
                    continue
                known = values[sample.name].get(model)
                if known is None:
                    values[sample.name][model] = sample.value
                elif sample.name.endswith("_created"):
                    values[sample.name][model] = min(known, sample.value)
                else:
                    values[sample.name][model] = known + sample.value
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{file} is not in Prometheus' text format: {error}") from error
    return values, scraped
