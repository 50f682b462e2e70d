"""Signatures hold for the very bytes that were signed, by the very key."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from motet.errors import ConfigError
from motet.registry.artifacts import SIGNATURE
from motet.registry.signing import SignatureRefused, check_key, sign, signers

from .house import adapter_at


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    pem = serialization.Encoding.PEM
    private.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def signed(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A signed adapter, and the public keys of the one who signed it and of another."""
    folder = adapter_at(tmp_path / "adapter", "weights")
    (folder / "README.md").write_text("not signed")
    private, public = key_pair(tmp_path, "release")
    _, other = key_pair(tmp_path, "other")
    (folder / SIGNATURE).write_bytes(sign(folder, private))
    return folder, {"other": other, "release": public}


def test_the_signer_is_recognised(signed: tuple[Path, dict[str, Path]]) -> None:
    folder, keys = signed
    assert signers(folder, keys) == {"release"}
    (folder / "README.md").write_text("changed")
    (folder / "more").write_text("more")
    assert signers(folder, keys) == {"release"}, "only the config and the weights count"


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", SIGNATURE])
def test_one_flipped_bit_is_one_too_many(signed: tuple[Path, dict[str, Path]], name: str) -> None:
    folder, keys = signed
    changed = bytearray((folder / name).read_bytes())
    changed[len(changed) // 2] ^= 1
    (folder / name).write_bytes(changed)
    with pytest.raises(SignatureRefused, match="the signature is none of other, release's"):
        signers(folder, keys)


def test_somebody_elses_and_nobodys_signature(signed: tuple[Path, dict[str, Path]]) -> None:
    folder, keys = signed
    for known in ({"other": keys["other"]}, {}):
        with pytest.raises(SignatureRefused):
            signers(folder, known)
    (folder / SIGNATURE).unlink()
    assert signers(folder, keys) == frozenset()


def test_another_adapters_signature(signed: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, keys = signed
    other = adapter_at(tmp_path / "second", "other weights")
    (other / SIGNATURE).write_bytes((folder / SIGNATURE).read_bytes())
    with pytest.raises(SignatureRefused):
        signers(other, keys)


def test_keys_that_are_none(signed: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, keys = signed
    (tmp_path / "text.pem").write_text("not a key")
    pem = serialization.Encoding.PEM
    public = rsa.generate_private_key(65537, 2048).public_key()
    (tmp_path / "rsa.pub").write_bytes(
        public.public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    check_key(keys["release"])
    for bad in (tmp_path / "text.pem", tmp_path / "nothing", tmp_path / "rsa.pub"):
        with pytest.raises(ConfigError, match="cannot be used"):
            check_key(bad)
    for bad in (tmp_path / "text.pem", tmp_path / "nothing", keys["release"]):
        with pytest.raises(ConfigError, match="cannot be used"):
            sign(folder, bad)


def issued(folder: Path, authority: str, name: str) -> tuple[Path, Path, Path]:
    """An authority's certificate, and a key and certificate for signing that it issued."""
    root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())
    files = folder / f"{authority}.pem", folder / f"{name}.key", folder / f"{name}.pem"
    issuer, subject = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (authority, name)
    )
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    for file, key, whose, is_root in ((files[0], root, issuer, True), (files[2], leaf, subject, False)):
        now = datetime.datetime.now(datetime.UTC)
        made = x509.CertificateBuilder().subject_name(whose).issuer_name(issuer).public_key(key.public_key())
        made = made.serial_number(x509.random_serial_number()).not_valid_before(
            now - datetime.timedelta(minutes=1)
        )
        made = made.not_valid_after(now + datetime.timedelta(1))
        made = made.add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
        uses = x509.KeyUsage(digital_signature=not is_root, key_cert_sign=is_root, crl_sign=is_root, **usage)
        file.write_bytes(
            made.add_extension(uses, True)
            .sign(root, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )
    files[1].write_bytes(
        leaf.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return files


def test_signers_known_by_their_authority(tmp_path: Path) -> None:
    folder = adapter_at(tmp_path / "adapter", "weights")
    authority, key, certificate = issued(tmp_path, "authority", "leaf")
    other, other_key, _ = issued(tmp_path, "other", "other-leaf")
    _, plain = key_pair(tmp_path, "plain")
    (folder / SIGNATURE).write_bytes(sign(folder, key, certificate))
    check_key(authority)
    assert signers(folder, {"plain": plain, "other": other, "authority": authority}) == {"authority"}
    with pytest.raises(SignatureRefused):
        signers(folder, {"other": other})
    (folder / "adapter_model.safetensors").write_text("Weights")
    with pytest.raises(SignatureRefused):
        signers(folder, {"authority": authority})
    with pytest.raises(ConfigError, match="cannot be used"):
        sign(folder, other_key, certificate)
