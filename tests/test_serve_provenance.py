"""Pictures that say, signed, that a model has edited them."""

import asyncio
import io
import json
from base64 import b64decode
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import c2pa
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from PIL import Image
from serving import served

from varedit_runtime.errors import ConfigError
from varedit_serve.answering.provenance import Provenance
from varedit_serve.fields import MEDIA_TYPES

PEM = serialization.Encoding.PEM
USES = "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
USES += "key_cert_sign crl_sign encipher_only decipher_only"


def certified(key: Any, name: str, issuer: Any, issuer_key: Any) -> x509.Certificate:
    """Return a certificate for a key, of an authority if it has no issuer."""
    own = "key_cert_sign" if issuer is None else "digital_signature"
    named = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, name)])
    uses = x509.KeyUsage(**{use: use == own for use in USES.split()})
    now, public = datetime.now(UTC), issuer_key.public_key()
    builder = x509.CertificateBuilder(
        issuer_name=named if issuer is None else issuer.subject,
        subject_name=named,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(days=1),
        not_valid_after=now + timedelta(days=1),
    )
    extensions = [
        (x509.BasicConstraints(ca=issuer is None, path_length=None), True),
        (uses, True),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(public), False),
    ]
    if issuer is not None:
        extensions.append((x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False))
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer_key, hashes.SHA256())


class Files:
    """A chain of certificates and its key, in files. trusted: the authority's certificate."""

    def __init__(self, folder: Path, key: Any) -> None:
        self.chain, self.key = folder / "chain.pem", folder / "key.pem"
        above = ec.generate_private_key(ec.SECP256R1())
        authority = certified(above, "authority", None, above)
        own = certified(key, "own", authority, above)
        self.trusted = authority.public_bytes(PEM)
        self.chain.write_bytes(own.public_bytes(PEM) + self.trusted)
        self.key.write_bytes(pem(key))

    def said(self, content: bytes, kind: str) -> dict[str, Any]:
        """Return what a picture's file says of itself; it must be signed by who is trusted."""
        settings = c2pa.Settings.from_dict({"trust": {"trust_anchors": self.trusted.decode()}})
        with c2pa.Reader(kind, io.BytesIO(content), context=c2pa.Context(settings)) as reader:
            assert reader.get_validation_state() == "Trusted"
            told = json.loads(reader.json())
        return told["manifests"][told["active_manifest"]]


def pem(key: Any) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, plain)


def pixels(content: bytes) -> bytes:
    return Image.open(io.BytesIO(content)).convert("RGB").tobytes()


def test_results_and_previews_say_that_a_model_edited_them(tmp_path: Path) -> None:
    files = Files(tmp_path, ec.generate_private_key(ec.SECP256R1()))

    async def test() -> None:
        sign = Provenance(files.chain, files.key).sign
        async with served(sign=sign) as server, served() as plain:
            for written_as, kind in MEDIA_TYPES.items():
                asked = ("output_format", written_as), ("seed", "3")
                content, unsigned = [
                    b64decode((await one.edit(*asked)).json["data"][0]["b64_json"])
                    for one in (server, plain)
                ]
                (actions,) = files.said(content, kind)["assertions"]
                source = actions["data"]["actions"][0]["digitalSourceType"]
                assert source.endswith("/compositeWithTrainedAlgorithmicMedia")
                assert pixels(content) == pixels(unsigned)
                assert len(content) - len(unsigned) < 20_000
            stream = await server.edit(("stream", "true"), ("partial_images", "1"))
            for event in stream.events:
                assert files.said(b64decode(event["b64_json"]), "image/png")

    asyncio.run(test())


def test_what_cannot_sign_is_refused_when_the_server_starts(tmp_path: Path) -> None:
    files = Files(tmp_path, ed25519.Ed25519PrivateKey.generate())
    Provenance(files.chain, files.key)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Provenance(files.chain, tmp_path / "missing")
    others = pem(ed25519.Ed25519PrivateKey.generate())
    for wrong in (b"no key", others, pem(ec.generate_private_key(ec.SECP256K1()))):
        files.key.write_bytes(wrong)
        with pytest.raises(ConfigError, match="cannot sign pictures") as refused:
            Provenance(files.chain, files.key)
        assert "PRIVATE" not in str(refused.value)
