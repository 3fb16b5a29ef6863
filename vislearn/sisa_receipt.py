"""The receipt of a deletion: what was asked, which models were replaced by which, and a signature over it.

The signature is an HMAC-SHA256 of the receipt's content. It proves that somebody who holds the key wrote exactly this
content. It does not prove that the models were trained as the receipt says, that no copy of the row or of an old model
is left anywhere, or to anybody without the key that the receipt is genuine; who holds the key can sign anything.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vislearn.errors import UserError
from vislearn.folders import whole

VERSION = 1
SHORTEST_KEY = 16
PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,79}")
PROVES = "The signature proves that a holder of the key wrote this receipt and that it was not changed since."
NOT = (
    "It does not prove that the training took place as stated, nor that no copy of the rows or of the old models is "
    "left outside this service; whoever holds the key can sign any receipt, and without the key it cannot be checked. "
    "Whether the models are those stated can be tested: vislearn sisa verify --again trains them anew and compares "
    "every bit."
)
EXACT = (
    "The models after were trained without the rows, from files that were trained without them. This equals training "
    "the same shards without the rows, for requests that were chosen without looking at the models."
)


def ids_sha256(ids: Iterable[int]) -> str:
    """sha256 of the ids in rising order, in decimal, one a line; names a set, and does not hide a small one."""
    return hashlib.sha256("\n".join(map(str, sorted(set(ids)))).encode()).hexdigest()


def version(hashes: Sequence[str | None]) -> str:
    """sha256 of the models' hashes, shard by shard: names the ensemble that answers."""
    return hashlib.sha256("\n".join(h or "none" for h in hashes).encode()).hexdigest()


def now() -> str:
    """The time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def canonical(content: Mapping[str, Any]) -> bytes:
    """The one form of a receipt that is signed."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


def sign(content: Mapping[str, Any], key: bytes) -> dict[str, Any]:
    """The content with its signature."""
    value = hmac.new(key, canonical(content), hashlib.sha256).hexdigest()
    signature = {"algorithm": "HMAC-SHA256", "key": key_name(key), "value": value}
    return {**content, "signature": signature}


def fault(receipt: Mapping[str, Any], key: bytes) -> str:
    """What is wrong with a receipt's signature; empty when it is right."""
    signature = receipt.get("signature")
    if not isinstance(signature, Mapping):
        return "it has no signature"
    if signature.get("key") != key_name(key):
        return f"it was signed with the key {signature.get('key')}, and this is {key_name(key)}"
    content = {name: value for name, value in receipt.items() if name != "signature"}
    expected = hmac.new(key, canonical(content), hashlib.sha256).hexdigest()
    right = hmac.compare_digest(str(signature.get("value")).encode(), expected.encode())
    return "" if right else "its content is not what was signed"


def key_name(key: bytes) -> str:
    """Names a key without telling it."""
    return hashlib.sha256(b"vislearn sisa receipt key" + key).hexdigest()[:16]


def new_key(path: Path) -> None:
    """Write a random key that only its owner can read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(32))
        file.flush()
        os.fsync(file.fileno())


def read_key(path: Path) -> bytes:
    """The bytes of a key file."""
    try:
        key = path.read_bytes()
    except OSError as error:
        raise UserError(f"the key {path} cannot be read ({error.strerror}); give its file, --key=FILE") from None
    if len(key) < SHORTEST_KEY:
        raise UserError(f"the key {path} has {len(key)} bytes; take {SHORTEST_KEY} at least, for example: "
                        f"head -c 32 /dev/urandom > {path.name}")  # fmt: skip
    return key


def file_name(request: str) -> str:
    """The name of a request's receipt, without its ending."""
    return request if PLAIN.fullmatch(request) else f"id-{hashlib.sha256(request.encode()).hexdigest()[:24]}"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, bring it to the disk and rename it, so that nobody ever finds half of it."""
    with whole(path, durable=True) as beside:
        beside.write_bytes(content)


def page(receipt: Mapping[str, Any]) -> str:
    """The receipt as one HTML page without anything from elsewhere."""

    def cell(value: Any) -> str:
        return html.escape("none" if value is None else str(value))

    facts = {
        "request": receipt["request"], "asked by": receipt["by"] or "not given", "received": receipt["received"],
        "carried out": receipt["completed"], "rows": receipt["rows"], "sha256 of the row ids": receipt["ids_sha256"],
        "record of the log": f"{receipt['record']}, sha256 {receipt['record_sha256']}",
        "ensemble before": receipt["ensemble"]["before"], "ensemble after": receipt["ensemble"]["after"],
        "service": receipt["service"],
        "versions": ", ".join(f"{name} {number}" for name, number in receipt["versions"].items()),
        "signature": f"{receipt['signature']['algorithm']}, key {receipt['signature']['key']}: "
                     f"{receipt['signature']['value']}",
    }  # fmt: skip
    table = "".join(f"<tr><th scope=row>{cell(name)}</th><td>{cell(value)}</td></tr>" for name, value in facts.items())
    columns = ("shard", "first_slice", "rows_left", "before", "after")
    head = "".join(f"<th scope=col>{name.replace('_', ' ')}</th>" for name in columns)
    lines = ("".join(f"<td>{cell(shard[name])}</td>" for name in columns) for shard in receipt["shards"])
    rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Deletion receipt {cell(receipt["request"])}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }}
th, td {{ text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; vertical-align: top; overflow-wrap: anywhere; }}
td {{ font-family: ui-monospace, monospace; font-size: 0.85em; }}
</style></head><body>
<h1>Deletion receipt</h1>
<table>{table}</table>
<h2>Models replaced</h2>
<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>
<p>{cell(EXACT)}</p><p>{cell(PROVES)} {cell(NOT)}</p>
</body></html>
"""
