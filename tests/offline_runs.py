"""Reads the file of an offline W&B run: LevelDB's log format with W&B's own messages in it.

The package ships the messages (`wandb.proto`) and no reader for the file around them.
"""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(file: Path) -> list[Any]:
    """The messages of a run in order, every check sum verified."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = file.read_bytes()
    assert content[:4] == b":W&B", "no file of W&B"
    at, found, part = HEADER, [], b""  # the header of the file is as long as that of a record
    while at < len(content):
        left = BLOCK - at % BLOCK
        if left < HEADER:  # padding at the end of a block
            at += left
            continue
        check, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        data = content[at + HEADER : at + HEADER + length]
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) & 0xFFFFFFFF == check, "damaged"
        at += HEADER + length
        part = data if kind in (WHOLE, FIRST) else part + data
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(part)
            found.append(record)
    return found


def summary_of(file: Path) -> dict[str, Any]:
    """What a run holds: id, project, exit code, config and how often each key came, axes, history, artifacts."""
    out: dict[str, Any] = {"config": {}, "times": {}, "axes": {}, "history": [], "artifacts": [], "exit": None}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            out["id"], out["project"], out["sweep"] = record.run.run_id, record.run.project, record.run.sweep_id
        if kind in ("run", "config"):
            updates = record.run.config.update if kind == "run" else record.config.update
            for item in updates:
                key = item.key or ".".join(item.nested_key)
                out["config"][key] = json.loads(item.value_json)
                out["times"][key] = out["times"].get(key, 0) + 1
        if kind == "metric":
            out["axes"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        if kind == "history":
            out["history"].append(
                {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            )
        if kind == "artifact":
            out["artifacts"].append((record.artifact.type, record.artifact.name))
        if kind == "exit":
            out["exit"] = record.exit.exit_code
    return out
