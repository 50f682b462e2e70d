"""`motet policy`: check a file before a server reads it, and say why something is served or not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from motet.cli.registry import Ref, RegistryUrl, opened

policy_app = typer.Typer(help="What may be served to whom.", no_args_is_help=True, rich_markup_mode=None)


@policy_app.command()
def check(file: Annotated[Path, typer.Argument(help="The policy, TOML.")]) -> None:
    """Read a policy as a server would, its signers' keys too, and say what it holds."""
    from motet.registry.policy import read_policy
    from motet.registry.signing import check_key

    policy = read_policy(file)
    for key in policy.signers.values():
        check_key(key)
    print(f"{len(policy.bases)} bases, {len(policy.signers)} signers, {len(policy.allow)} rules")


@policy_app.command()
def explain(
    ref: Ref,
    policy: Annotated[Path, typer.Option(envvar="MOTET_POLICY", help="The policy, TOML.")],
    tenant: Annotated[str | None, typer.Option(help="For whom. [default: for anybody]")] = None,
    registry: RegistryUrl = None,
) -> None:
    """Say whether a version may be served to a tenant, and why. Exits with 1 if it may not."""
    from motet.registry.policy import Decision, decide, read_policy
    from motet.registry.signing import SignatureRefused, signers

    read = read_policy(policy)
    with opened(registry) as store:
        version = store.version(ref)
        try:
            signed_by = signers(store.artifacts.path(version.artifact), read.signers)
            decision = decide(read, version, signed_by, tenant, time.time())
        except SignatureRefused as refusal:
            decision = Decision(False, (str(refusal),))
    print(f"{version.ref}: {'allowed' if decision.allowed else 'denied'}")
    for reason in decision.reasons:
        print(f"  {reason}")
    if not decision.allowed:
        raise typer.Exit(1)
