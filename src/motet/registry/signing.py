"""OpenSSF model signatures over an adapter's two files: made with a private key, checked with the public one or with
the certificate of who issued the signer's.

A signature is a Sigstore bundle, model.sig, beside the files; the `model_signing` tool reads it too. Needs the extra
`signing`. Keys are elliptic-curve keys in PEM (P-256, P-384, P-521). Whose key is an authority's certificate stands for
every certificate for digital signatures that it issued, even after that has expired: when it signed, nobody can tell.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from motet.errors import ConfigError, MotetError
from motet.registry.artifacts import CONFIG, SIGNATURE, WEIGHTS

if TYPE_CHECKING:
    from model_signing import hashing, verifying


class SignatureRefused(MotetError):
    """A signature is there, and none of the known keys has made it over these files."""

    status = 403
    code = "signature_refused"


def sign(folder: Path, private_key: Path, certificate: Path | None = None) -> bytes:
    """The signature of the adapter in `folder`, with the signer's certificate (and those above it) if it is given.

    Raises ConfigError for a key that cannot be used.
    """
    _installed()
    from model_signing import signing

    config = signing.Config()
    try:
        if certificate is None:
            config.use_elliptic_key_signer(private_key=private_key)
        else:
            config.use_certificate_signer(
                private_key=private_key, signing_certificate=certificate, certificate_chain=[certificate]
            )
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"private key {private_key} cannot be used: {error}") from error
    with tempfile.TemporaryDirectory() as name:
        bundle = Path(name) / SIGNATURE
        config.set_hashing_config(_two_files(folder)).sign(folder, bundle)
        return bundle.read_bytes()


def signers(folder: Path, keys: Mapping[str, Path]) -> frozenset[str]:
    """Whose keys have signed the adapter in `folder`; nobody's if there is no signature.

    Raises SignatureRefused if there is one that no key of `keys` has made over these very files.
    """
    if not (folder / SIGNATURE).exists():
        return frozenset()
    _installed()
    found, reasons = set(), []
    for name, key in keys.items():
        try:
            verifier = _verifier(key)
            verifier.set_hashing_config(_two_files(folder)).verify(folder, folder / SIGNATURE)
        except Exception as error:  # noqa: BLE001 - the library raises whatever its parts do; all of it means "no"
            reasons.append(f"{name}: {str(error).strip() or type(error).__name__}")
        else:
            found.add(name)
    if not found:
        raise SignatureRefused(
            f"the signature is none of {', '.join(keys) or 'nobody'}'s ({'; '.join(reasons)})"
        )
    return frozenset(found)


def check_key(public_key: Path) -> None:
    """Raise ConfigError unless this public key or certificate can be used."""
    _installed()
    try:
        _verifier(public_key)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"public key {public_key} cannot be used: {error}") from error


def _verifier(public: Path) -> verifying.Config:
    """What checks signatures with a public key or with an authority's certificate."""
    from model_signing import verifying

    if b"BEGIN CERTIFICATE" in public.read_bytes():
        return verifying.Config().use_certificate_verifier(certificate_chain=[public])
    return verifying.Config().use_elliptic_key_verifier(public_key=public)


def _two_files(folder: Path) -> hashing.Config:
    """What is hashed: the config and the weights, whatever lies beside them."""
    from model_signing import hashing

    beside = [entry.name for entry in folder.iterdir() if entry.name not in (CONFIG, WEIGHTS)]
    return hashing.Config().set_ignored_paths(paths=beside, ignore_git_paths=False)


def _installed() -> None:
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"signatures need the extra: pip install 'motet[signing]' ({error})") from error
