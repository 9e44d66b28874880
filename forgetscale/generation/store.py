"""The folder of a run: its description, journals of unfinished shards, sealed shards.

```text
run.json                                 what is generated; a hash over it is the run key
leases/shard-000012.epoch-0003           see leases.py
journals/shard-000012.epoch-0003.arrows  finished samples of an unfinished shard
shards/shard-000012.parquet              a finished shard: all its ids, sorted, never changed
workers/NAME.jsonl                       what each worker did when; nothing reads it but --status
dialogues/                               the result, an artefact
```

A journal is a sequence of frames: a mark, a length, a hash, and an Arrow IPC stream of a few
samples. Readers take the frames up to the first one that is torn or changed. A new owner of a
shard never appends to the journal of another one, so a worker that was thought dead cannot write
into it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from forgetscale.artifact import canonical_json, fsync_path, hash_bytes
from forgetscale.errors import ConfigError, DataError
from forgetscale.generation.leases import LeaseTable, create_whole, lease_name
from forgetscale.generation.records import Sample, from_rows, row_schema, to_table

RUN_FILE = "run.json"
RESULT = "dialogues"
_FORMAT = 1
_MAGIC = b"FSJOURN1"
_HEADER = struct.Struct("<8sQQ")
_SHARD = re.compile(r"^shard-(\d+)\.parquet$")


def run_key(description: Mapping[str, Any]) -> str:
    """Return the hash of a run's description."""
    return hash_bytes(canonical_json({"format": _FORMAT, **description}))


class RunStore:
    """One run's folder, as any number of workers use it.

    Args:
        directory: The folder.
        key: Hash of what is generated.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self.directory = Path(directory)
        self.key = key
        self.schema = row_schema(key)
        self._counts: dict[int, Counter[str]] = {}

    @classmethod
    def open(cls, directory: Path, description: Mapping[str, Any]) -> RunStore:
        """Open the folder, or make it; the first worker describes the run, others must agree.

        Args:
            directory: The folder.
            description: What is generated; JSON values.

        Raises:
            ConfigError: The folder belongs to another recipe; the message names what differs.
        """
        directory = Path(directory)
        for name in ("leases", "journals", "shards", "workers"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        path = directory / RUN_FILE
        whole = {"format": _FORMAT, **description}
        if not path.exists():
            if any((directory / "shards").iterdir()):
                raise ConfigError(
                    f"{directory} holds shards but no {RUN_FILE}, so nobody knows what they are;"
                    " name another generate.output_dir."
                )
            data = json.dumps(whole, indent=1, ensure_ascii=False).encode()
            if create_whole(path, data):
                fsync_path(directory)
        found = read_description(directory)
        if found != json.loads(canonical_json(whole)):
            names = ", ".join(sorted(_differences(found, whole))[:6])
            raise ConfigError(
                f"{directory} holds another generation ({names} differ); name another"
                " generate.output_dir, or use the recipe and model it was started with."
            )
        return cls(directory, hash_bytes(canonical_json(found)))

    def leases(self, worker: str, lease_seconds: float) -> LeaseTable:
        """Return the leases as worker ``worker`` sees them."""
        return LeaseTable(self.directory / "leases", worker, lease_seconds)

    def shard_path(self, shard: int) -> Path:
        """Return the name of a sealed shard."""
        return self.directory / "shards" / f"shard-{shard:06d}.parquet"

    def sealed(self) -> set[int]:
        """Return the numbers of sealed shards."""
        names = os.listdir(self.directory / "shards")
        return {int(match[1]) for name in names if (match := _SHARD.match(name))}

    def read_shard(self, shard: int) -> list[Sample]:
        """Return the samples of a sealed shard, by id.

        Raises:
            DataError: It is damaged or of another run.
        """
        return from_rows(self._read_table(shard).to_pylist())

    def _read_table(self, shard: int, columns: Sequence[str] | None = None) -> pa.Table:
        path = self.shard_path(shard)
        try:
            table = pq.read_table(path, columns=columns, partitioning=None)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path} cannot be read ({' '.join(str(error).split())[:120]}); remove it and start"
                " workers again: its ids are generated again."
            ) from error
        found = (table.schema.metadata or {}).get(b"run_key", b"").decode()
        if found != self.key:
            raise DataError(f"{path} belongs to another run (key {found[:12]}...); remove it.")
        return table

    def counts(self, shard: int) -> Counter[str]:
        """Return how many samples of a sealed shard are in each state, or rejected for a reason.

        Keys: the states, and ``rejected/REASON`` or ``failed/REASON``.
        """
        if shard not in self._counts:
            table = self._read_table(shard, ["state", "reason"])
            found: Counter[str] = Counter()
            for row in table.to_pylist():
                found[row["state"]] += 1
                if row["reason"]:
                    found[f"{row['state']}/{row['reason']}"] += 1
            self._counts[shard] = found
        return self._counts[shard]

    def journal_path(self, shard: int, epoch: int) -> Path:
        """Return the journal that the owner of an epoch writes."""
        return self.directory / "journals" / f"{lease_name(shard, epoch)}.arrows"

    def journals(self, shard: int) -> list[Path]:
        """Return the journals of a shard, first epoch first."""
        return sorted((self.directory / "journals").glob(f"shard-{shard:06d}.epoch-*.arrows"))

    def recover(self, shard: int) -> dict[int, Sample]:
        """Return what earlier owners of a shard finished; of an id written twice, the first."""
        found: dict[int, Sample] = {}
        for path in self.journals(shard):
            for sample in read_journal(path, self.schema):
                found.setdefault(sample.sample_id, sample)
        return found

    def seal(self, shard: int, samples: Sequence[Sample]) -> bool:
        """Write a finished shard, unless it is sealed already.

        Args:
            shard: Its number.
            samples: All samples of the shard, in any order.

        Returns:
            False if another worker was first.
        """
        path = self.shard_path(shard)
        table = to_table(sorted(samples, key=lambda sample: sample.sample_id), self.schema)
        temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(6)}")
        try:
            pq.write_table(table, temporary, compression="zstd")
            fsync_path(temporary)
            os.link(temporary, path)
        except FileExistsError:
            return False
        except FileNotFoundError:
            # Whoever sealed the shard has cleared away what others had half-written.
            if not path.exists():
                raise
            return False
        finally:
            temporary.unlink(missing_ok=True)
        fsync_path(path.parent)
        return True

    def clean(self, shard: int, leases: LeaseTable) -> None:
        """Remove what a sealed shard leaves behind: journals, leases, half-written files."""
        for path in self.journals(shard):
            path.unlink(missing_ok=True)
        for path in (self.directory / "shards").glob(f".shard-{shard:06d}.parquet.tmp-*"):
            path.unlink(missing_ok=True)
        leases.remove(shard)


class Journal:
    """The journal of a shard that this worker owns.

    Args:
        path: New file.
        schema: Schema of rows.
        rows: Samples kept in memory before they are written, >= 1.
    """

    def __init__(self, path: Path, schema: pa.Schema, rows: int) -> None:
        self._schema = schema
        self._rows = rows
        self._waiting: list[Sample] = []
        self._file = path.open("xb")

    def add(self, sample: Sample) -> None:
        """Keep a sample; write once enough are waiting."""
        self._waiting.append(sample)
        if len(self._waiting) >= self._rows:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting and push it to the disk."""
        if not self._waiting:
            return
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._schema) as writer:
            writer.write_table(to_table(self._waiting, self._schema))
        data = sink.getvalue().to_pybytes()
        self._file.write(_HEADER.pack(_MAGIC, len(data), xxhash.xxh3_64_intdigest(data)) + data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._waiting = []

    def close(self) -> None:
        """Close the file without writing what is waiting."""
        self._file.close()


def read_journal(path: Path, schema: pa.Schema) -> list[Sample]:
    """Return the samples of a journal up to its first torn or changed frame.

    A frame is decoded only once its hash has been found right: Arrow may end the process on
    damaged bytes.

    Args:
        path: The journal.
        schema: Schema of the run's rows; frames with another one hold nothing.
    """
    found: list[Sample] = []
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return found
    place = 0
    while len(data) - place >= _HEADER.size:
        magic, size, digest = _HEADER.unpack_from(data, place)
        frame = data[place + _HEADER.size : place + _HEADER.size + size]
        if magic != _MAGIC or len(frame) < size or xxhash.xxh3_64_intdigest(frame) != digest:
            break
        table = pa.ipc.open_stream(frame).read_all()
        if not table.schema.equals(schema, check_metadata=True):
            break
        found += from_rows(table.to_pylist())
        place += _HEADER.size + size
    return found


def read_description(directory: Path) -> dict[str, Any]:
    """Return what a run's folder says about itself.

    Raises:
        ConfigError: It says nothing.
    """
    path = Path(directory) / RUN_FILE
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read, so {directory} is no folder of forgetscale generate; check the"
            " path."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not what forgetscale generate writes; check the path.")
    return value


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], path: str = "") -> set[str]:
    found: set[str] = set()
    for name in {*one, *other}:
        here, there = one.get(name), other.get(name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            found |= _differences(here, there, f"{path}{name}.")
        elif here != there:
            found.add(path + name)
    return found
