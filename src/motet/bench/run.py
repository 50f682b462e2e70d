"""`motet bench`: an engine in this process, adapters beside it, and the cases in turn."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event

from motet.adapters.image import open_image, write_image
from motet.adapters.store import ImageStore
from motet.bench.closed_loop import Case, ClosedLoop, Result, cases
from motet.config import EngineConfig
from motet.engine.device import has_gpu, resolve
from motet.engine.loop import Engine
from motet.errors import ConfigError
from motet.observe.metrics import memory_line
from motet.registry.prepare import prepare


def run_cases(
    config: EngineConfig,
    adapters: Sequence[Path],
    images: Path,
    names: Sequence[str],
    in_flight: int,
    prompt: int,
    output: int,
    say: Callable[[str], None],
) -> Iterator[Result]:
    """Yield each case's result. `adapters` are PEFT directories; numbers beyond them are copies of these."""
    chosen = _chosen(cases(in_flight, max(len(adapters), 1), output), names, bool(adapters))
    config = resolve(config, has_gpu())
    began = time.perf_counter()
    loaded = Event()
    engine = Engine(config, lambda stage, fraction: say(f"{stage} {fraction:.0%}"), loaded.set)
    say(f"ready after {time.perf_counter() - began:.1f} s; {memory_line(engine.stats())}")
    page, rounded = engine.runner.pool.page_bytes, config.device == "cuda"
    store = ImageStore(images, config.image_bytes)
    prepared = [prepare(path, engine.spec, page, store, rounded) for path in adapters]
    known: set[str] = set()

    def digest_of(number: int) -> str:
        found = prepared[number % len(prepared)]
        digest, path = found.digest, Path(found.image)
        if number >= len(prepared):
            digest = hashlib.sha256(f"{digest} {number}".encode()).hexdigest()
            path = path.with_name(f"{digest}.image")
        if digest not in known:
            if not path.exists():
                write_image(replace(open_image(Path(found.image)), digest=digest), path)
            engine.register_adapter(digest, path, found.num_pages)
            known.add(digest)
        return digest

    loop = ClosedLoop(engine, loaded, digest_of, engine.spec.vocab_size, prompt)
    count = max(len(prepared), 1)
    if prepared:
        loop.run("warm-up", Case(in_flight, in_flight, lambda i: i % count, output=20))
    else:
        loop.run("warm-up", Case(in_flight, in_flight, lambda _: None, output=20))
    for name, case in chosen.items():
        yield loop.run(name, case)
    engine.close()


def _chosen(known: dict[str, Case], names: Sequence[str], adapters: bool) -> dict[str, Case]:
    """The cases of these names. ConfigError for an unknown one, or one that needs adapters where there are none."""
    for name in names:
        if name not in known:
            raise ConfigError(f"no case {name!r}; there are {', '.join(known)}")
        if not adapters and name != "base":
            raise ConfigError(f"the case {name!r} needs adapters; without any there is only base")
    return {name: known[name] for name in names}
