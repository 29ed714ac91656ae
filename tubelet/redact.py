"""Secrets do not belong in messages, logs and saved settings: how they are recognised and blotted out.

`TubeletError` blots its text itself, so no error of any room shows the token of a URL. Log lines that hold a URL or the
text of another library's exception call `redact`. Recognised are user names and passwords in URLs, signing parameters of
a query, Authorization headers, values beside a name that speaks of secrets, and the published shapes of access tokens.
A secret of free form in free text cannot be recognised; nothing here is a reason to put one there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

_WORDS = r"(?:secret|passw|pwd|token|credential|signature|authorization|cookie|api[-_]?key|access[-_]?key|account[-_]?key" \
         r"|private[-_]?key|connection[-_]?string|x-amz-|x-goog-|sas)"
_SIGNING = re.compile(rf"(?i){_WORDS}|^(?:sig|key|auth|policy|expires|key-pair-id|awsaccesskeyid|googleaccessid)$")
_NAME = re.compile(rf"(?i){_WORDS}|(?:^|_)(?:key|auth|sig)$")
_PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"([A-Za-z][\w+.-]*://)[^/\s'\"]*@"), r"\1***@"),
    (re.compile(r"(?i)(authorization['\"]?\s*[:=]\s*['\"]?)(?:(?:bearer|basic|token|negotiate)\s+)?[^\s'\",}]+"), r"\1***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/_.=-]{8,}"), r"\1 ***"),
    (re.compile(rf"(?i)(['\"](?:[\w.-]*(?:{_WORDS}|_key|_auth)[\w.-]*|key|auth|sig)['\"]\s*[:=]\s*)"
                r"(?:'[^']*'|\"[^\"]*\"|(?!(?:[\d.]+|None|True|False|null|true|false)[\s,}\]])[^\s,}]+)"), r"\1***"),
    (re.compile(r"(?i)\b((?:aws_)?(?:secret_access_key|session_token|access_key_id|secret_key|access_key|secret|password"
                r"|passwd|access_token|hf_token|api_key|account_key|sas_token)\s*[:=]\s*)[^\s'\",}]+"), r"\1***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\b(?:AKIA|ASIA)[0-9A-Z]{12,}|\bya29\.[\w-]+"
                r"|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"), "***"),
)
_PARAMETER = re.compile(r"([?&;])([\w.%-]+)=([^&;\s'\"<>)]*)")


def redact(text: object) -> str:
    """`text` with everything that looks like a secret replaced by `***`."""
    found = str(text)
    found = _PARAMETER.sub(lambda m: f"{m[1]}{m[2]}=***" if _SIGNING.search(m[2]) else m[0], found)
    for pattern, instead in _PATTERNS:
        found = pattern.sub(instead, found)
    return found


def redacted(value: Any) -> Any:
    """Nested mappings and lists with every string in them redacted."""
    if isinstance(value, Mapping):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def identity(url: str) -> str:
    """A URL without what is allowed to change from job to job: user name, password and signing parameters."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2] if parts.scheme in ("http", "https") else parts.netloc
    kept = [piece for piece in parts.query.split("&") if piece and not _SIGNING.search(piece.partition("=")[0])]
    return urlunsplit((parts.scheme, host, parts.path, "&".join(kept), ""))


def secrets_in(options: Mapping[str, Any], inside: str = "") -> list[str]:
    """Dotted names of the options that hold a secret, in mappings and lists inside too."""
    found: list[str] = []
    for name, value in options.items():
        dotted = f"{inside}{name}"
        if isinstance(value, Mapping):
            found += secrets_in(value, f"{dotted}.")
        elif isinstance(value, (list, tuple)):
            found += secrets_in({str(number): item for number, item in enumerate(value)}, f"{dotted}.")
        elif isinstance(value, str) and value:
            if _NAME.search(str(name)) and not _harmless(value) or redact(value) != value:
                found.append(dotted)
    return found


def _harmless(value: str) -> bool:
    """Ways to say where credentials are: gcsfs's kinds of token, or the path of a file with them."""
    return value in ("anon", "google_default", "cloud", "cache") or value.endswith((".json", ".pem", ".crt"))
