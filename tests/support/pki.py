"""A throw-away certificate authority, made by the `openssl` command."""

import shutil
import subprocess
from pathlib import Path

import pytest

from kvrelay.config import TlsFiles

_SANS = "subjectAltName=IP:127.0.0.1,DNS:localhost"


class Authority:
    """Signs certificates whose common name is a role."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("needs the openssl command to make certificates")
        self._folder = folder
        self._openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
            " -keyout ca.key -out ca.pem -subj /CN=kvrelay-test-ca"
        )

    def issue(self, common_name: str) -> TlsFiles:
        """Files of a peer by that name, at 127.0.0.1."""
        files = {ext: self._folder / f"{common_name}.{ext}" for ext in ("key", "csr", "pem")}
        self._openssl(
            "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
            f" -keyout {files['key']} -out {files['csr']} -subj /CN={common_name}"
        )
        extensions = self._folder / "extensions"
        extensions.write_text(_SANS)
        self._openssl(
            f"x509 -req -in {files['csr']} -CA ca.pem -CAkey ca.key -CAcreateserial -days 2"
            f" -out {files['pem']} -extfile {extensions}"
        )
        return TlsFiles(cert=files["pem"], key=files["key"], ca=self._folder / "ca.pem")

    def _openssl(self, arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments.split()], cwd=self._folder, check=True, capture_output=True
        )
