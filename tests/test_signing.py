"""Keys are made once and kept private; a signature fits one manifest and one key, or it is refused."""

from __future__ import annotations

import base64
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from small_bundles import refused

from appliance import signing
from appliance.errors import BundleCorrupt, BundleUnsigned, KeyUnusable
from appliance.signing import Ed25519PrivateKey

MANIFEST = b'{"name":"tiny"}'


@pytest.fixture
def key(tmp_path: Path) -> Path:
    signing.generate(tmp_path / "k.pem")
    return tmp_path / "k.pem"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user of their own, without keys."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("SPINEBOX_PASSPHRASE", raising=False)
    return tmp_path / "config/spinebox"


def trust(key: signing.PublicKey) -> dict[str, signing.PublicKey]:
    return {key.id: key}


# -- keys ---------------------------------------------------------------------------------------------------------------


def test_a_key_pair_is_private_and_fits(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    public = signing.load_public(key.with_suffix(".pub"))
    assert public.raw == signing.public_of(signing.load_private(key)).raw
    assert len(public.raw) == 32
    assert len(public.id) == 16
    assert b"PRIVATE" not in key.with_suffix(".pub").read_bytes()
    assert sorted(p.name for p in key.parent.iterdir()) == ["k.pem", "k.pub"]


def test_no_key_is_overwritten(key: Path) -> None:
    before = key.read_bytes()
    with refused(KeyUnusable, "not overwritten"):
        signing.generate(key)
    key.with_suffix(".pub").unlink()
    with refused(KeyUnusable, "not overwritten"):
        signing.generate(key)
    assert key.read_bytes() == before
    key.with_name("other.pub").write_text("mine")
    with refused(KeyUnusable, "not overwritten"):
        signing.generate(key.with_name("other.pem"))
    with refused(KeyUnusable, "named like a public"):
        signing.generate(key.with_name("x.pub"))
    assert sorted(p.name for p in key.parent.iterdir()) == ["k.pem", "other.pub"]


def test_a_passphrase_is_needed_where_there_is_one_and_only_there(tmp_path: Path, key: Path) -> None:
    locked = tmp_path / "locked.pem"
    signing.generate(locked, b"correct horse")
    assert b"ENCRYPTED" in locked.read_bytes()
    signing.load_private(locked, b"correct horse")
    for path, words in ((locked, None), (locked, b"wrong"), (key, b"none needed")):
        with pytest.raises(KeyUnusable):
            signing.load_private(path, words)


def test_a_private_key_that_others_may_read_is_not_used(key: Path) -> None:
    for mode in (0o640, 0o604, 0o644):
        key.chmod(mode)
        with refused(KeyUnusable, "other users"):
            signing.load_private(key)


def test_what_is_no_ed25519_key(tmp_path: Path) -> None:
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    path = tmp_path / "x"
    contents = {
        "rsa": other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "rsa public": other.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "empty": b"",
        "noise": bytes(range(256)),
        "large": b"-----BEGIN PRIVATE KEY-----\n" * 10_000,
    }
    for content in contents.values():
        path.write_bytes(content)
        path.chmod(0o600)
        for load in (signing.load_private, signing.load_public):
            with pytest.raises(KeyUnusable):
                load(path)
    with refused(KeyUnusable, "cannot be read"):
        signing.load_public(tmp_path / "absent")
    with refused(KeyUnusable, "cannot be read"):
        signing.load_private(tmp_path)


def test_the_authors_key_is_made_on_first_use_and_kept(own: Path) -> None:
    first = signing.author_key()
    assert signing.public_of(signing.author_key()).raw == signing.public_of(first).raw
    assert stat.S_IMODE((own / "keys/author.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((own / "keys").stat().st_mode) == 0o700


def test_two_processes_that_make_the_authors_key_at_once_get_one(own: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: signing.public_of(signing.author_key()).raw, range(8)))
    assert len(set(keys)) == 1
    assert signing.load_public(own / "keys/author.pub").raw == keys[0]


def test_the_authors_key_may_have_a_passphrase_from_the_environment(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPINEBOX_PASSPHRASE", "über")
    signing.author_key()
    monkeypatch.delenv("SPINEBOX_PASSPHRASE")
    with refused(KeyUnusable, "has a passphrase") as caught:
        signing.author_key()
    assert "SPINEBOX_PASSPHRASE" in caught.value.remedy


def test_trust_comes_from_the_package_the_folders_and_the_author(own: Path, key: Path, caplog: pytest.LogCaptureFixture) -> None:
    shipped = signing.load_public(signing.SHIPPED_TRUST / "release.pub")
    assert set(signing.trusted_keys()) == {shipped.id}
    author = signing.public_of(signing.author_key())
    (own / "trusted").mkdir()
    (own / "trusted/clinic.pub").write_bytes(key.with_suffix(".pub").read_bytes())
    (own / "trusted/broken.pub").write_bytes(b"noise")
    (own / "trusted/private.pem").write_bytes(key.read_bytes())
    clinic = signing.load_public(key.with_suffix(".pub"))
    found = signing.trusted_keys()
    assert set(found) == {shipped.id, author.id, clinic.id}
    assert found[clinic.id].name == "clinic"
    assert "broken.pub" in caplog.text


# -- signatures -----------------------------------------------------------------------------------------------------------


def test_a_signature_fits_one_manifest_and_one_key(key: Path) -> None:
    private = signing.load_private(key)
    public = signing.public_of(private)
    document = signing.sign(MANIFEST, private)
    assert document == signing.sign(MANIFEST, private)
    assert signing.verify(document, MANIFEST, trust(public)) == public
    with refused(BundleCorrupt, "does not fit"):
        signing.verify(document, MANIFEST + b" ", trust(public))
    with refused(BundleUnsigned, "not trusted"):
        signing.verify(document, MANIFEST, {})
    with refused(BundleUnsigned, "nobody"):
        signing.verify(None, MANIFEST, trust(public))


def test_a_key_of_the_same_id_is_not_the_same_key(key: Path) -> None:
    """Sixteen digits are for people; trust compares the whole key."""
    private = signing.load_private(key)
    document = signing.sign(MANIFEST, private)
    other = signing.public_of(Ed25519PrivateKey.generate())
    with pytest.raises(BundleUnsigned):
        signing.verify(document, MANIFEST, {signing.public_of(private).id: other})


def test_a_signature_of_the_bare_bytes_is_none(key: Path) -> None:
    """What the same key signed for another purpose must not pass for a bundle's signature."""
    private = signing.load_private(key)
    document = {**signing.sign(MANIFEST, private), "signature": base64.b64encode(private.sign(MANIFEST)).decode()}
    with refused(BundleCorrupt, "does not fit"):
        signing.check_signature(document, MANIFEST)


def test_every_field_counts(key: Path) -> None:
    private = signing.load_private(key)
    good = signing.sign(MANIFEST, private)
    other = signing.sign(MANIFEST, Ed25519PrivateKey.generate())
    for field in good:
        for value in (None, 1, [], "", "x", good[field] + "=", good[field] + "\n", other[field] if other[field] != good[field] else "2"):
            with pytest.raises(BundleCorrupt):
                signing.check_signature({**good, field: value}, MANIFEST)
        with refused(BundleCorrupt, "fields"):
            signing.check_signature({k: v for k, v in good.items() if k != field}, MANIFEST)
    with refused(BundleCorrupt, "fields"):
        signing.check_signature({**good, "more": ""}, MANIFEST)


def test_bits_behind_the_end_of_base64_are_not_free(key: Path) -> None:
    """The last character before the padding has bits that decode to nothing: the same document must not have two spellings."""
    good = signing.sign(MANIFEST, signing.load_private(key))
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    for field in ("public_key", "signature"):
        bare = good[field].rstrip("=")
        spelt = bare[:-1] + alphabet[alphabet.index(bare[-1]) + 1] + "=" * (len(good[field]) - len(bare))
        assert base64.b64decode(spelt) == base64.b64decode(good[field])
        with refused(BundleCorrupt, "must have"):
            signing.check_signature({**good, field: spelt}, MANIFEST)


_PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(32))
_GOOD = signing.sign(MANIFEST, _PRIVATE)
values = (
    st.none()
    | st.integers()
    | st.text(max_size=90)
    | st.binary(max_size=70).map(lambda b: base64.b64encode(b).decode())
    | st.lists(st.text())
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*_GOOD, "extra"]), values, min_size=1), st.binary(max_size=40))
def test_nothing_but_the_signers_document_passes(changes: dict[str, Any], manifest: bytes) -> None:
    document = {**_GOOD, **changes}
    if document == _GOOD and manifest == MANIFEST:
        return
    with pytest.raises(BundleCorrupt):
        signing.check_signature(document, manifest)
