"""Ed25519 signatures: who made a bundle, and whether this machine trusts them.

Hides where keys lie, how they are stored, and what exactly is signed. A private key is a PKCS #8 PEM file that only its owner may
read; a public key is a PEM file whose name ends in `.pub`. Trusted are the keys that ship with the package, those in the
machine's and the user's trust folders, and the user's own author key, with which `spinebox compile` signs.

    signature.json    {format, algorithm, key_id, public_key, signature}; the last two in base64
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from appliance.errors import BundleCorrupt, BundleUnsigned, KeyUnusable

FORMAT = "1"
ALGORITHM = "Ed25519"
MAX_KEY_BYTES = 16 << 10
MAX_SIGNATURE_BYTES = 16 << 10
MAX_TRUSTED = 1000  # keys of one folder
SHIPPED_TRUST = Path(__file__).resolve().parent / "trust"
MACHINE_TRUST = Path("/etc/spinebox/trusted")
# What is signed begins with words that no other message of these keys begins with.
_DOMAIN = b"spinebox bundle manifest, signature format 1\x00"
_FIELDS = ("format", "algorithm", "key_id", "public_key", "signature")
_log = logging.getLogger(__name__)

PrivateKey = Ed25519PrivateKey


@dataclass(frozen=True)
class PublicKey:
    """`raw` is the 32 bytes of the key; `name` the stem of its file, `origin` where that lies: for people only."""

    raw: bytes
    name: str = ""
    origin: str = ""

    @property
    def id(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the raw key."""
        return hashlib.sha256(self.raw).hexdigest()[:16]


def config_folder() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "spinebox"


def author_path() -> Path:
    return config_folder() / "keys" / "author.pem"


def trust_folders() -> tuple[Path, ...]:
    return SHIPPED_TRUST, MACHINE_TRUST, config_folder() / "trusted"


# -- keys ---------------------------------------------------------------------------------------------------------------


def generate(path: Path, passphrase: bytes | None = None) -> PublicKey:
    """Write a new private key at `path` (mode 0600) and its public key beside it as `.pub`. Raises KeyUnusable where there is one."""
    private = Ed25519PrivateKey.generate()
    protection: KeySerializationEncryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    public_path = path.with_suffix(".pub")
    if public_path == path:
        raise KeyUnusable("a private key is not named like a public one", value=path, remedy="Choose a name that does not end in .pub.")
    if public_path.exists():
        raise KeyUnusable("there is a public key here already, and it is not overwritten", value=public_path, remedy="Choose another name.")
    _write_new(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection), 0o600)
    _write_new(public_path, private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
    return public_of(private, path)


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Whole or not at all, and never over another file, even where two processes try at once."""
    part = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.link(part, path)
        finally:
            part.unlink()
    except FileExistsError as error:
        raise KeyUnusable("there is a key here already, and it is not overwritten", value=path, remedy="Choose another name.") from error
    except OSError as error:
        raise KeyUnusable(f"the key cannot be written: {error.strerror}", value=path, remedy="Choose a folder that you own.") from error


def load_private(path: Path, passphrase: bytes | None = None) -> PrivateKey:
    """Raises KeyUnusable: no file, readable by others, a passphrase missing or wrong, no Ed25519 key."""
    data = _read_key(path)
    if path.stat().st_mode & 0o077:
        raise KeyUnusable("other users may read this private key", value=path, remedy=f"Run `chmod 600 {path}`, or make a new key.")
    try:
        key = load_pem_private_key(data, passphrase)
    except TypeError as error:
        what = "the key has a passphrase" if passphrase is None else "the key has no passphrase, but one was given"
        raise KeyUnusable(what, value=path, remedy="Set SPINEBOX_PASSPHRASE, or unset it.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyUnusable("this is no private key, or its passphrase is another", value=path) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyUnusable("bundles are signed with Ed25519 keys only", value=path)
    return key


def load_public(path: Path) -> PublicKey:
    """Raises KeyUnusable."""
    try:
        key = load_pem_public_key(_read_key(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyUnusable("this is no public key", value=path) from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyUnusable("bundles are signed with Ed25519 keys only", value=path)
    return PublicKey(key.public_bytes(Encoding.Raw, PublicFormat.Raw), path.stem, str(path))


def _read_key(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_KEY_BYTES:
            raise KeyUnusable(f"a key file has at most {MAX_KEY_BYTES} bytes", value=path)
        return path.read_bytes()
    except OSError as error:
        raise KeyUnusable(f"the key cannot be read: {error.strerror}", value=path) from error


def public_of(private: PrivateKey, path: Path | None = None) -> PublicKey:
    raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return PublicKey(raw, path.stem if path else "", str(path) if path else "")


def environment_passphrase() -> bytes | None:
    """The passphrase of the user's key, from SPINEBOX_PASSPHRASE; None where that is not set."""
    return os.environb.get(b"SPINEBOX_PASSPHRASE") or None


def author_key(passphrase: bytes | None = None) -> PrivateKey:
    """The user's own key, made on first use; its passphrase is the environment's where none is given. Raises KeyUnusable."""
    path = author_path()
    passphrase = passphrase or environment_passphrase()
    if not path.exists():
        try:
            generate(path, passphrase)
        except KeyUnusable:
            if not path.exists():  # another process may have been first, which is as good
                raise
    return load_private(path, passphrase)


def trusted_keys(folders: Iterable[Path] | None = None) -> dict[str, PublicKey]:
    """Every trusted key by its id. A file that is no key is skipped and logged: one bad file must not stop an appliance."""
    paths = [author_path().with_suffix(".pub")] if folders is None else []
    for folder in trust_folders() if folders is None else folders:
        paths += sorted(folder.glob("*.pub"))[:MAX_TRUSTED]
    out: dict[str, PublicKey] = {}
    for path in paths:
        if not path.exists():
            continue
        try:
            key = load_public(path)
        except KeyUnusable as error:
            _log.warning("a trusted key is skipped: %s", error)
            continue
        out.setdefault(key.id, key)
    return out


# -- signatures -----------------------------------------------------------------------------------------------------------


def sign(manifest: bytes, private: PrivateKey) -> dict[str, str]:
    """The signature document of a manifest's bytes. Ed25519 is deterministic: the same key and bytes give the same document."""
    public = public_of(private)
    return {
        "format": FORMAT,
        "algorithm": ALGORITHM,
        "key_id": public.id,
        "public_key": base64.b64encode(public.raw).decode(),
        "signature": base64.b64encode(private.sign(_DOMAIN + manifest)).decode(),
    }


def check_signature(document: Any, manifest: bytes) -> PublicKey:
    """Who signed, whether trusted here or not. Raises BundleCorrupt where the document is malformed or the signature does not fit."""
    if not isinstance(document, dict) or sorted(document) != sorted(_FIELDS) or not all(isinstance(document[k], str) for k in _FIELDS):
        raise BundleCorrupt(f"a signature has the fields {', '.join(_FIELDS)}")
    if document["format"] != FORMAT or document["algorithm"] != ALGORITHM:
        raise BundleCorrupt("the signature is of an unknown kind", value=f"{document['algorithm']} {document['format']}")
    raw, signature = _decode(document["public_key"], 32), _decode(document["signature"], 64)
    key = PublicKey(raw)
    if document["key_id"] != key.id:
        raise BundleCorrupt("the signature names another key than it holds", value=document["key_id"])
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(signature, _DOMAIN + manifest)
    except (InvalidSignature, ValueError) as error:
        raise BundleCorrupt("the signature does not fit the manifest", value=key.id) from error
    return key


def _decode(text: str, size: int) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BundleCorrupt("the signature is not base64", value=text) from error
    if len(data) != size or base64.b64encode(data).decode() != text:
        raise BundleCorrupt(f"a part of the signature must have {size} bytes", value=len(data))
    return data


def verify(document: Any | None, manifest: bytes, trusted: Mapping[str, PublicKey]) -> PublicKey:
    """The trusted key that signed `manifest`. Raises BundleUnsigned (none, or a stranger's), BundleCorrupt (it does not fit)."""
    if document is None:
        raise BundleUnsigned("nobody signed this bundle")
    key = check_signature(document, manifest)
    known = trusted.get(key.id)
    if known is None or known.raw != key.raw:
        raise BundleUnsigned("this bundle was signed with a key that is not trusted here", value=f"key {key.id}")
    return known
