"""Content credentials: a signed statement in each picture that a model has edited it (C2PA)."""

import io
import json
from importlib.metadata import version
from pathlib import Path
from threading import Lock

import c2pa
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from PIL import Image

from varedit_runtime.errors import ConfigError, reason

_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
_KINDS = "http://cv.iptc.org/newscodes/digitalsourcetype"
_SETTINGS = {"builder": {"thumbnail": {"enabled": False}}}


class Provenance:
    """Signs pictures. Threads may share it."""

    def __init__(self, certificates: Path, key: Path) -> None:
        """Read a chain of certificates, the signer's own first, and its private key: files of PEM.

        Raises ConfigError if they cannot be read, or not be used to sign.
        """
        try:
            chain, secret = certificates.read_bytes(), key.read_bytes()
        except OSError as error:
            told = f"{error.filename} cannot be read: {error.strerror}"
            raise ConfigError(told) from error
        action = {
            "action": "c2pa.created",
            "digitalSourceType": f"{_KINDS}/compositeWithTrainedAlgorithmicMedia",
        }
        made = {"name": "varedit-serve", "version": version("varedit-export")}
        actions = {"label": "c2pa.actions.v2", "data": {"actions": [action]}}
        self._manifest = json.dumps({"claim_generator_info": [made], "assertions": [actions]})
        self._context, self._lock = c2pa.Context(c2pa.Settings.from_dict(_SETTINGS)), Lock()
        try:
            signs = c2pa.C2paSignerInfo(_algorithm(secret).encode(), chain, secret, None)
            self._signer = c2pa.Signer.from_info(signs)
            self._try()
        except (
            Exception
        ) as error:  # cryptography and c2pa have many; a key is in none of their texts
            told = f"{certificates} and {key} cannot sign pictures ({reason(error)})"
            raise ConfigError(
                f"{told}: give a chain of certificates and its key, in PEM"
            ) from error

    def sign(self, content: bytes, media_type: str) -> bytes:
        """Return a picture's file with the statement in it; its pixels stay as they are."""
        signed = io.BytesIO()
        with self._lock, c2pa.Builder(self._manifest, self._context) as builder:
            builder.sign(self._signer, media_type, io.BytesIO(content), signed)
        return signed.getvalue()

    def _try(self) -> None:
        """Sign a picture and read it, as a key that is not the certificate's signs too."""
        content = io.BytesIO()
        Image.new("RGB", (1, 1)).save(content, "PNG")
        signed = io.BytesIO(self.sign(content.getvalue(), "image/png"))
        with c2pa.Reader("image/png", signed) as reader:
            if reader.get_validation_state() == "Invalid":
                raise ValueError("the signature is not valid")


def _algorithm(secret: bytes) -> str:
    """Return the name that C2PA has for what a key signs with."""
    match load_pem_private_key(secret, None):
        case ec.EllipticCurvePrivateKey() as key if key.curve.name in _CURVES:
            return _CURVES[key.curve.name]
        case ed25519.Ed25519PrivateKey():
            return "ed25519"
        case rsa.RSAPrivateKey():
            return "ps256"
    raise ValueError("the key is neither RSA, Ed25519 nor of a NIST curve")
