"""TLS scanners: testssl.sh, and sslyze with Mozilla's "intermediate" configuration."""

import json
import re
import shutil
import subprocess

import pytest


def needs(program: str, where: str):
    missing = shutil.which(program) is None
    return pytest.mark.skipif(missing, reason=f"{program} ({where}) is not installed")


@pytest.fixture
def port(request, service, certificates) -> int:
    """The port of a service with the certificate that the parameter names."""
    files = f"privateKey={certificates[f'{request.param}.key']}:certKey={certificates[f'{request.param}.pem']}"
    return service(f"--listen=ssl:0:interface=127.0.0.1:{files}").port


# Findings of testssl.sh that the listener does not cause, with the reason.
ACCEPTED = {
    "cert_revocation": "the tests' authority publishes neither a CRL nor an OCSP responder",
}
SEVERE = ("MEDIUM", "HIGH", "CRITICAL", "FATAL")


@needs("testssl", "Debian: testssl.sh")
@pytest.mark.timeout(400)  # a scan is hundreds of handshakes and takes a minute on an idle machine
@pytest.mark.parametrize("port", ["server"], indirect=True)
def test_testssl_reports_nothing_of_medium_or_higher_severity(port, certificates, tmp_path) -> None:
    report = tmp_path / "report.json"
    command = ["testssl", "--quiet", "--color", "0", "--warnings", "batch", "--nodns", "none"]
    command += ["--connect-timeout", "20", "--openssl-timeout", "20"]
    command += ["--add-ca", certificates["ca.pem"], "--jsonfile", str(report), f"localhost:{port}"]
    result = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=380)
    assert report.exists(), result.stdout.decode(errors="replace")[-2000:]
    entries = [{**entry, "id": entry["id"].partition(" ")[0]} for entry in json.loads(report.read_text())]
    assert [entry for entry in entries if entry["severity"] in SEVERE and entry["id"] not in ACCEPTED] == []
    findings = {entry["id"]: entry for entry in entries}
    # These findings show that the scan ran.
    for name in ("SSLv3", "TLS1", "TLS1_1"):
        assert findings[name]["finding"] == "not offered"
    for name in ("TLS1_2", "TLS1_3"):
        assert findings[name]["finding"].startswith("offered")
    for name in ("heartbleed", "CCS", "ROBOT", "secure_renego", "secure_client_renego", "CRIME_TLS"):
        assert findings[name]["severity"] == "OK", findings[name]
    for name in ("POODLE_SSL", "SWEET32", "FREAK", "DROWN", "LOGJAM", "BEAST", "LUCKY13", "RC4"):
        assert findings[name]["severity"] == "OK", findings[name]
    assert findings["cert_chain_of_trust"]["severity"] == "OK"
    # PFS_ before testssl.sh 3.2. Groups of finite fields would be DH_groups.
    (curves,) = (entry["finding"] for name, entry in findings.items() if name.endswith("FS_ECDHE_curves"))
    assert set(curves.split()) == {"prime256v1", "secp384r1", "X25519"}
    assert "DH_groups" not in findings


# Deviations that sslyze reports and the listener does not cause, by check.
DEVIATIONS = {
    "certificate_path_validation": "no public trust store contains the tests' authority",
}


@needs("sslyze", "PyPI: sslyze")
@pytest.mark.parametrize("port", ["server", "rsa"], indirect=True)
def test_sslyze_reports_mozillas_intermediate_configuration(port, tmp_path) -> None:
    command = ["sslyze", "--mozilla_config=intermediate", f"localhost:{port}"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100).stdout
    assert "COMPLIANCE AGAINST TLS CONFIGURATION" in output
    compliance = output.partition("COMPLIANCE AGAINST TLS CONFIGURATION")[2]
    found = dict(re.findall(r"^\s*\* (\w+): (.*)$", compliance, re.MULTILINE))
    assert {name: text for name, text in found.items() if name not in DEVIATIONS} == {}
    assert found or "Compliant" in compliance
    # Checks that are not part of the compliance report.
    for line in (
        "Not vulnerable to Heartbleed",
        "Client Renegotiation DoS Attack:   OK",
        "Not vulnerable to OpenSSL CCS",
    ):
        assert re.sub(r"\s+", " ", line) in re.sub(r"\s+", " ", output), line
