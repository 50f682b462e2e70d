"""Motet through the cases that peers are measured with, one JSON line each.

    python benchmarks/gpu/closed_loop.py CHECKPOINT [--cases steady,together,base,alone,cold,crowd,many,zipf]
        [--adapters 8] [--pool-bytes N]

Adapters are the directories CHECKPOINT-lora0, CHECKPOINT-lora1, … beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from motet.bench.run import run_cases
from motet.config import EngineConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--cases", default="steady,together,base,alone,cold,crowd")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=1600)
    parser.add_argument("--images", type=Path, default=None, help="where packed adapters go")
    parser.add_argument(
        "--pool-bytes", type=int, default=None, help="for crowd and zipf: less than all adapters take"
    )
    arguments = parser.parse_args()
    began = time.perf_counter()
    model = arguments.checkpoint
    adapters = [model.with_name(f"{model.name}-lora{i}") for i in range(arguments.adapters)]
    config = EngineConfig(
        model=str(model),
        max_model_len=2304,
        max_running=arguments.in_flight,
        max_step_tokens=2048,
        pool_bytes=arguments.pool_bytes,
        prefix_caching=False,
    )

    def say(what: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {what}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as name:
        images = arguments.images or Path(name)
        names = arguments.cases.split(",")
        for result in run_cases(
            config, adapters, images, names, arguments.in_flight, arguments.prompt, 600, say
        ):
            print(msgspec.json.encode(result).decode(), flush=True)


if __name__ == "__main__":
    main()
