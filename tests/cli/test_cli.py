"""What `motet` says on a terminal: settings, help, reports, answers, and one line for what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from motet.cli.main import app, main
from motet.cli.settings import Settings, parse_size, read_settings, split_adapter
from motet.errors import ConfigError
from tests.live import until
from tests.tiny import write_adapter, write_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter of it, and one of a wider model."""
    home = tmp_path_factory.mktemp("home")
    model = write_model(home / "model", "mixtral")
    wide = write_model(home / "wide", "mixtral", hidden_size=64)
    for base, name in ((model, "adapter"), (wide, "foreign")):
        write_adapter(home / name, base, "mixtral", 1, r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"])
    return home


def motet(*arguments: object, **environment: str) -> Result:
    """Run the command in this process."""
    return CliRunner(env={"COLUMNS": "300", **environment}).invoke(app, list(map(str, arguments)))


# Settings


def settings(toml: str | None, folder: Path, adapters: tuple[str, ...] = (), **options: Any) -> Settings:
    file = None
    if toml is not None:
        file = folder / "motet.toml"
        file.write_text(toml)
    engine = {"model": options.pop("model", None), "pool_bytes": options.pop("pool_bytes", None)}
    return read_settings(file, engine, {"host": None, "port": None, **options}, adapters)


FILE = """
[engine]
model = "/models/house"
pool_bytes = 4096
max_running = 7
[server]
port = 1234
served_model_name = "house"
[adapters]
red = "/adapters/red"
blue = "/adapters/blue"
"""


def test_without_anything_the_defaults_serve_the_embedded_model(tmp_path: Path) -> None:
    found = settings(None, tmp_path)
    assert found.engine.model == "embedded"
    assert (found.server.host, found.server.port, found.server.adapters) == ("127.0.0.1", 8000, {})


def test_the_file_is_read(tmp_path: Path) -> None:
    found = settings(FILE, tmp_path)
    assert (found.engine.model, found.engine.pool_bytes, found.engine.max_running) == (
        "/models/house",
        4096,
        7,
    )
    assert (found.server.port, found.server.served_model_name) == (1234, "house")
    assert found.server.adapters == {"red": "/adapters/red", "blue": "/adapters/blue"}


def test_options_win_over_the_file(tmp_path: Path) -> None:
    options = {"model": "/other", "pool_bytes": 8192, "port": 0}
    found = settings(FILE, tmp_path, ("blue=/elsewhere=1", "green=/adapters/green"), **options)
    assert (found.engine.model, found.engine.pool_bytes, found.engine.max_running) == ("/other", 8192, 7)
    assert (found.server.port, found.server.served_model_name) == (0, "house")
    assert found.server.adapters == {
        "red": "/adapters/red",
        "blue": "/elsewhere=1",
        "green": "/adapters/green",
    }


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[engine]\nmax_runing = 3", "unknown field `max_runing` - at `$.engine`"),
        ("[server]\ntls = true", "unknown field `tls` - at `$.server`"),
        ("[sever]\nport = 1", r"unknown table [sever]; there are [engine], [server], [adapters], [tenants]"),
        ("engine = 3", "engine must be a table"),
        ("adapters = ['a']", "adapters must be a table"),
        ("[server.adapters]\nred = '/red'", "adapters have a table of their own"),
        ("[tenants.acme]\nspeed = 3", "unknown field `speed` - at `$.server.tenants[...]`"),
        ("[tenants.acme]\nweight = -3", "weight must be positive"),
        ("[tenants]\nacme = 3", "at `$.server.tenants[...]`"),
        ("[server]\nadmin_port = -1", "admin_port must be between 0 and 65535"),
        ("[adapters]\nred = 3", "at `$.server.adapters[...]`"),
        ("[engine]\npool_bytes = '2GiB'", "Expected `int | null`, got `str` - at `$.engine.pool_bytes`"),
        ("[engine]\npool_bytes = 0", "pool_bytes must be positive"),
        ("[server]\nport = 70000", "port must be between 0 and 65535"),
        ("[engine\n", "is not valid TOML"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, toml: str | None, message: str) -> None:
    file = tmp_path / "motet.toml"
    if toml is not None:
        file.write_text(toml)
    with pytest.raises(ConfigError) as caught:
        read_settings(file, {}, {}, ())
    assert message in str(caught.value)


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "motet.toml"
    file.write_bytes("[adapters]\ncafé = '/x'".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read_settings(file, {}, {}, ())


def test_adapter_options() -> None:
    assert split_adapter("a/b@2=./x=y") == ("a/b@2", "./x=y")
    for wrong in ("", "name", "name=", "=path"):
        with pytest.raises(ConfigError, match="--adapter takes NAME=PATH"):
            split_adapter(wrong)
    with pytest.raises(ConfigError, match="--adapter names 'a' twice"):
        read_settings(None, {}, {}, ("a=/1", "b=/2", "a=/3"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("12345", 12345), ("64k", 65536), ("512MiB", 1 << 29), ("2GB", 2 << 30), (" 1.5g ", 3 << 29)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "x", "1.5.2g", "2 oranges", "nan", "inf", "1e999", "0", "-1g", "0.4"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)


# Help


def test_help_lists_the_commands() -> None:
    help_text = motet("--help").stdout
    assert all(f"\n  {command} " in help_text for command in ("serve", "demo", "complete", "adapters"))
    assert motet("serve", "--nonsense").exit_code == 2


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "serve",
            "--adapter --config --host --port --served-model-name --pool --max-model-len --max-running "
            "--max-step-tokens --threads --verify-adapters --demo-adapters --json-logs [engine] [adapters] "
            "--device --memory-fraction 127.0.0.1 8000] 1GiB",
        ),
        ("serve", "--database --admin-port --allow-open"),
        ("top", "--key --interval --once 127.0.0.1:8000]"),
        ("keys", "create list revoke"),
        ("tenants", "set list"),
        ("demo", "--max-tokens"),
        ("complete", "--model --adapter --max-tokens --temperature --seed --raw embedded]"),
        ("adapters", "inspect verify"),
        ("adapters verify", "--model --json embedded]"),
        ("adapters inspect", "--model --json"),
    ],
)
def test_help_lists_the_options_and_their_defaults(command: str, said: str) -> None:
    help_text = motet(*command.split(), "--help").stdout
    assert [word for word in said.split() if word not in help_text] == []


# Adapters


def test_inspect_without_a_model(home: Path) -> None:
    result = motet("adapters", "inspect", home / "adapter")
    assert result.exit_code == 0
    for fact in ("4, alpha 8", "o_proj, q_proj", "0–2", "not checked: name a model with --model"):
        assert fact in result.stdout


def test_inspect_with_its_model(home: Path) -> None:
    result = motet("adapters", "inspect", home / "adapter", "--model", home / "model")
    assert result.exit_code == 0
    assert result.stdout.split("binds")[1].split()[0] == "yes"
    as_json = motet(
        "adapters", "inspect", home / "adapter", "--model", home / "model", "--json", COLUMNS="40"
    )
    report = json.loads(as_json.stdout)
    assert report["binds"] is True
    assert report["reason"] is None
    assert report["rank"] == 4
    assert {module["module"]: module["count"] for module in report["modules"]} == {"q": 3, "o": 3}
    assert report["digest"] in result.stdout


def test_inspect_an_adapter_of_another_model(home: Path) -> None:
    result = motet("adapters", "inspect", home / "foreign", "--model", home / "model")
    assert result.exit_code == 1
    assert "no, because" in result.stdout
    assert "layers.0" in result.stdout
    report = json.loads(
        motet("adapters", "inspect", home / "foreign", "--model", home / "model", "--json").stdout
    )
    assert report["binds"] is False
    assert "64" in report["reason"]


def test_verify_says_what_each_projection_changes(home: Path) -> None:
    result = motet("adapters", "verify", home / "adapter", "--model", home / "model")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["layer", "q", "o"] in lines
    for layer in "012":
        (cells,) = (line[1:] for line in lines if line[:1] == [layer])
        assert all(float(cell.rstrip("%")) > 0 for cell in cells)
    assert "untouched" in result.stdout
    as_json = motet("adapters", "verify", home / "adapter", "--model", home / "model", "--json")
    assert len(json.loads(as_json.stdout)["sites"]) == 6


def test_verify_fails_if_a_tensor_changes_nothing(home: Path, tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    shutil.copytree(home / "adapter", silent)
    tensors = load_file(silent / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "layers.1.self_attn.o_proj.lora_B" in name:
            tensor.zero_()
    save_file(tensors, silent / "adapter_model.safetensors")
    result = motet("adapters", "verify", silent, "--model", home / "model")
    assert result.exit_code == 1
    assert "layers.1.o" in str(result.exception)


def test_inspect_a_pickle(home: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(home / "adapter", pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    result = motet("adapters", "inspect", pickled)
    assert result.exit_code == 1
    assert "adapter_model.bin is a pickle" in result.stdout


def test_inspect_takes_no_name_for_a_style(home: Path, tmp_path: Path) -> None:
    """The terminal's markup in somebody else's adapter is text."""
    odd = tmp_path / "[red]odd[/b]"
    shutil.copytree(home / "adapter", odd)
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "[link=x]y[/]"})
    )
    result = motet("adapters", "inspect", odd)
    assert result.exit_code == 0, result.exception
    assert str(odd) in result.stdout
    assert "[link=x]y[/]" in result.stdout


# Answers


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices as tiny as these lose by being shared, a hundredfold where other tests want the cores as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_complete(home: Path) -> None:
    def answer(*options: object) -> str:
        common = ("complete", "Say something.", "--model", home / "model", "--max-tokens", 24, *options)
        result = motet(*common, MOTET_CACHE=str(home / "cache"))
        assert result.exit_code == 0, result.exception
        return result.stdout

    greedy = answer()
    assert len({greedy, answer("--raw"), answer("--adapter", home / "adapter")}) == 3
    drawn = [answer("--temperature", 1.0, "--seed", 1) for _ in range(2)]
    assert drawn[0] == drawn[1] != greedy


# What goes wrong


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error of a command that exits with 1."""
    monkeypatch.setattr(sys, "argv", ["motet", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("motet: ")
    assert said.err.index("\n") == len(said.err) - 1
    return said.err


def test_errors_are_one_line(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bad = tmp_path / "motet.toml"
    bad.write_text("[engine\n")
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("no config.json", ("complete", "hi", "--model", tmp_path)),
        ("no config.json", ("adapters", "inspect", home / "adapter", "--model", tmp_path / "nowhere")),
        ("neither a model directory nor a model", ("complete", "hi", "--model", "nobody/no-such-model")),
        ("is not valid TOML", ("serve", home / "model", "--config", bad)),
        ("is not a size", ("serve", home / "model", "--pool", "lots")),
        ("takes NAME=PATH", ("serve", home / "model", "--adapter", "nameless")),
        ("port must be", ("serve", home / "model", "--port", "70000")),
    ]
    for message, arguments in cases:
        assert message in refused(monkeypatch, capsys, *arguments)


@contextmanager
def serve(home: Path, *options: object) -> Iterator[subprocess.Popen[str]]:
    """A server in a process group of its own, of which nothing is left afterwards. It takes Ctrl-C as one at a terminal
    does, also where tests run in the background, whose processes inherit that it is ignored."""
    command = [sys.executable, "-m", "motet.cli.main", "serve", home / "model", "--threads", 1, *options]
    environment = {**os.environ, "MOTET_CACHE": str(home / "cache")}
    with subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def engine_of(process: subprocess.Popen[str]) -> int | None:
    """The engine's pid, once it is in a session of its own; there may be other children before."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in map(int, children):
        with suppress(OSError):  # gone since
            if b"motet.engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child if os.getsid(child) == child else None
    return None


def test_serve_does_not_start_without_an_adapter_that_it_was_to_serve(home: Path) -> None:
    with serve(home, "--port", 0, "--adapter", f"tuned={home / 'foreign'}") as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith("motet: ")
    assert "_proj" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_serve_on_a_port_that_is_taken(home: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with serve(home, "--port", port) as process:
            _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert said.splitlines()[-1] == f"motet: cannot listen on 127.0.0.1:{port}"
    assert "address already in use" in said
    assert "Traceback" not in said


def test_ctrl_c_while_the_engine_starts(home: Path) -> None:
    with serve(home, "--port", 0) as process:
        until(lambda: engine_of(process) is not None, 120)
        engine = engine_of(process)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode in (0, 130), "130 is the shell's word for it, before the server listens"
    assert "Traceback" not in said
    assert not Path(f"/proc/{engine}").exists()


def test_a_sagemaker_container_has_its_own_defaults(tmp_path: Path) -> None:
    found = settings("", tmp_path, sagemaker=True)
    assert found.engine.model == "/opt/ml/model"
    server = found.server
    assert (server.host, server.port, server.allow_open, server.adapter_roots) == (
        "0.0.0.0",
        8080,
        True,
        ("/opt/ml",),
    )
    found = settings("[server]\nsagemaker = true\nport = 8081\nadapter_roots = ['/a']", tmp_path, model="/m")
    assert (found.engine.model, found.server.port, found.server.adapter_roots) == ("/m", 8081, ("/a",))
    assert (settings("", tmp_path).server.port, settings("", tmp_path).server.allow_open) == (8000, False)
