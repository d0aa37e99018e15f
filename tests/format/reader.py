"""A reader of PocketRec files, written from ``docs/format.md`` alone: it imports nothing of the package.

It refuses a file with a :class:`ValueError` that names the section of the page. Numbers are float64 where the page says
float32 or finer.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from reader_layouts import LAYOUTS, bits_at, ceil_div, require, whole

TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip
NEWEST = 2
"""Version (10)."""
CHUNK = 1 << 20
LEAD = rb'{"__metadata__":{"pocketrec":"{\"checks\":{\"file\":\"'
BETWEEN = rb"\",\"header\":\""
DOCUMENT = {
    "checks": dict, "chunks": str, "format": int, "head": list, "info": dict, "kind": str, "schema": dict,
    "table": dict, "vocabulary": dict,
}  # fmt: skip
FIELD = {"name", "size", "offset", "keys", "first", "oov"}
CONSTANTS = "90c7767aecbb12fc60df50066a13c695cf26ce6ee83045a10b32041318f892e5"


def parse(text):
    """JSON without repeated keys and without numbers that are not finite (1.2)."""

    def pairs(items):
        require(len(dict(items)) == len(items), "9.2", "a key is repeated")
        return dict(items)

    def number(text):
        require(np.isfinite(float(text)), "9.2", "a number is not finite")
        return float(text)

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_float=number, parse_constant=number)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"9.2: {error}") from error


def exact(value, keys, section):
    """An object with exactly these keys."""
    require(isinstance(value, dict) and set(value) == set(keys), section, f"expected the keys {sorted(keys)}")
    return value


def container(content):
    """1.1 and 1.2: document, places of the arrays ``{name: (dtype, shape, start, stop)}`` and start of the payload."""
    require(len(content) >= 8, "9.1", "no header")
    length = int.from_bytes(content[:8], "little")
    require(length <= 4_194_304 and 8 + length <= len(content), "9.1", "header reaches beyond the file")
    payload = 8 + length
    header = parse(content[8:payload])
    require(isinstance(header, dict) and "__metadata__" in header, "9.2", "no metadata")
    text = exact(header.pop("__metadata__"), {"pocketrec"}, "9.2")["pocketrec"]
    require(isinstance(text, str), "9.2", "no document")
    places, end = {}, 0
    for name, entry in header.items():
        places[name] = extent(exact(entry, {"dtype", "shape", "data_offsets"}, "9.3"))
    for _, _, start, stop in sorted(places.values(), key=lambda place: place[2:]):
        require(start == end, "9.4", "arrays overlap, or leave a gap")
        end = stop
    require(payload + end == len(content), "9.4", "arrays do not end where the file ends")
    return parse(text.encode("utf-8")), places, payload


def extent(entry):
    """1.2: one array."""
    shape, offsets = entry["shape"], entry["data_offsets"]
    require(isinstance(shape, list) and len(shape) <= 8, "9.3", "shape")
    require(isinstance(offsets, list) and len(offsets) == 2, "9.3", "offsets")
    require(all(whole(n, 0, 1 << 60) for n in shape + offsets), "9.3", "sizes")
    require(isinstance(entry["dtype"], str) and entry["dtype"] in TYPES, "9.3", "type")
    dtype, count = np.dtype(TYPES[entry["dtype"]]), 1
    for size in shape:
        count *= size
    require(offsets[1] - offsets[0] == count * dtype.itemsize, "9.3", "bytes that the shape does not fill")
    return dtype, tuple(shape), offsets[0], offsets[1]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Constants:
    """8: the file of levels and tables."""

    def __init__(self, content):
        require(sha256(content) == CONSTANTS, "8", "not the constants of this format")
        document, places, payload = container(content)
        require(document == {"constants": 1}, "8", "document")
        self.arrays = {
            name: np.frombuffer(content[payload + start : payload + stop], dtype).reshape(shape).astype(np.float64)
            for name, (dtype, shape, start, stop) in places.items()
        }

    def levels(self, bits):
        return self.arrays["levels"][(1 << bits) - 1 : (2 << bits) - 1]

    def trellis(self, code):
        return self.arrays[f"trellis.{code}"]


class Reader:
    """A file: ``content`` is its bytes, ``constants`` those of ``constants.bin``."""

    def __init__(self, content, constants):
        self.content, self.constants, self.known = content, Constants(constants), {}
        self.document, self.places, self.payload = container(content)
        self.check_document()
        self.kind, self.info = self.document["kind"], self.document["info"]
        self.fields = self.read_schema()
        self.read_vocabulary()
        self.read_table()
        self.read_head()

    def check_document(self):
        """1.3 and 1.4."""
        document, content = self.document, self.content
        require(isinstance(document, dict), "9.5", "not a file of this format")
        version = document.get("format")
        require(whole(version, 1), "9.5", "not a file of this format")
        require(version <= NEWEST, "9.5", f"version {version} is newer than this reader")
        header = content[: self.payload]
        require(header[8:62] + header[126:142] == LEAD + BETWEEN, "9.6", "digests are not in their place")
        require(sha256(self.unsigned()).encode() == header[142:206], "9.6", "digest of the header")
        exact(document, DOCUMENT, "9.8")
        require(all(isinstance(document[key], kind) for key, kind in DOCUMENT.items()), "9.8", "types")
        require(document["kind"] in ("ctr", "baked", "ego"), "9.8", "kind")
        task = "ctr" if document["kind"] == "ctr" else "cf"
        require(document["schema"].get("task") == task, "9.8", "task")
        parts = {name.split(".")[0] for name in self.places}
        require(parts <= {"table", "vocabulary", "head"}, "9.8", "names of arrays")
        chunks = [document["chunks"][i : i + 64] for i in range(0, len(document["chunks"]), 64)]
        found = [sha256(content[i : i + CHUNK]) for i in range(self.payload, len(content), CHUNK)]
        require(len(chunks) == len(found), "9.8", "chunks")
        require(chunks == found, "9.7", "a chunk is damaged")

    def unsigned(self):
        """The header with zeros for its digests."""
        header = self.content[: self.payload]
        return header[:62] + b"0" * 64 + header[126:142] + b"0" * 64 + header[206:]

    def verify(self):
        """The digest of the whole file (1.4)."""
        found = sha256(self.unsigned() + self.content[self.payload :])
        require(found == self.document["checks"]["file"], "1.4", "digest of the file")

    def array(self, name, section):
        require(name in self.places, section, f"no array {name}")
        dtype, shape, start, stop = self.places[name]
        return np.frombuffer(self.content[self.payload + start : self.payload + stop], dtype).reshape(shape)

    def read_schema(self):
        """2."""
        schema = exact(self.document["schema"], {"task", "fields"}, "9.9")
        fields, offset = schema["fields"], 0
        require(isinstance(fields, list), "9.9", "fields")
        for field in fields:
            exact(field, FIELD, "9.9")
            numbers = all(whole(field[key], -(1 << 62), 1 << 62) for key in ("size", "offset", "first"))
            require(numbers and isinstance(field["name"], str) and type(field["oov"]) is bool, "9.9", "field")
            require(field["keys"] in ("dense", "hashed"), "9.9", "keys")
            require(field["size"] >= 1 and field["offset"] == offset, "9.9", "size or offset")
            offset += field["size"]
        require(len({f["name"] for f in fields}) == len(fields) and offset < 1 << 48, "9.9", "fields")
        require(schema["task"] == "ctr" or len(fields) == 2, "9.9", "fields")
        return fields

    def read_vocabulary(self):
        """3: keys of each field, and where its rows, buckets and remainders begin."""
        document = exact(self.document["vocabulary"], {"attempt", "keys"}, "9.9")
        self.keys, self.attempt = document["keys"], document["attempt"]
        require(whole(self.attempt, 0, 64), "9.9", "attempt")
        require(isinstance(self.keys, list) and len(self.keys) == len(self.fields), "9.9", "keys")
        self.first_row, self.first_bucket, self.first_key, self.bits = [], [], [], []
        rows = buckets = keys = 0
        for count, field in zip(self.keys, self.fields, strict=True):
            named = field["size"] - field["oov"]
            require(whole(count, 0, named + 1), "9.9", "keys")
            require(field["keys"] == "hashed" or count == named, "9.9", "keys")
            bits = 0
            while 1 << bits < ceil_div(count, 8):
                bits += 1
            self.first_row.append(rows)
            self.first_bucket.append(buckets)
            self.first_key.append(keys)
            self.bits.append(bits)
            rows += count
            if field["keys"] == "hashed":
                buckets, keys = buckets + (1 << bits), keys + count
        self.rows = rows
        if any(f["keys"] == "hashed" for f in self.fields):
            remainders = self.array("vocabulary.remainders", "9.9")
            directory = self.array("vocabulary.directory", "9.9")
            require(remainders.dtype == directory.dtype == np.dtype("<u4"), "9.9", "types")
            require(remainders.shape == (keys,) and directory.shape == (buckets + 1,), "9.9", "shapes")
            self.remainders, self.directory = remainders.tolist(), directory.tolist()
            require(self.directory[0] == 0 and self.directory[-1] == keys, "9.9", "directory")
            require(self.directory == sorted(self.directory), "9.9", "directory")

    def row_of(self, field, value):
        """3: the file row of a raw value, or -1."""
        if self.fields[field]["keys"] == "dense":
            return self.dense_row(field, value)
        text = "" if value is None else str(value)
        h = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        z = h * pow(0x9E3779B97F4A7C15, self.attempt + 1, 1 << 64) % (1 << 64)
        bits = self.bits[field]
        bucket = self.first_bucket[field] + (z >> (64 - bits))
        wanted = (z << bits) % (1 << 64) >> 32
        for place in range(self.directory[bucket], self.directory[bucket + 1]):
            if self.remainders[place] == wanted:
                return self.first_row[field] + place - self.first_key[field]
        return -1

    def dense_row(self, field, value):
        if isinstance(value, str):
            digits = value[1:] if value[:1] in ("+", "-") else value
            if not (digits.isascii() and digits.isdigit() and len(digits) <= 20):
                return -1
            value = int(value)
        if value is None:
            return -1
        local = int(value) - self.fields[field]["first"]
        return self.first_row[field] + local if 0 <= local < self.keys[field] else -1

    def read_table(self):
        """4: fill and absent rows, and the blocks."""
        table = self.document["table"]
        require(isinstance(table.get("blocks"), list) and table.get("rows") == self.rows, "9.11", "rows")
        fill = self.array("table.fill", "9.11")
        require(fill.dtype in (np.dtype("<f4"), np.dtype("<f2")) and fill.ndim == 2, "9.11", "fill")
        require(len(fill) == len(self.fields), "9.11", "fill")
        self.width, self.fill = fill.shape[1], fill.astype(np.float64)
        self.absent = self.fill.copy()
        if "table.absent" in self.places:
            rows, own = self.array("table.absent", "9.11"), self.array("table.absent_fields", "9.11")
            require(own.dtype == np.dtype("<i4") and own.ndim == 1 and own.size > 0, "9.11", "absent_fields")
            require(rows.dtype == fill.dtype and rows.shape == (own.size, self.width), "9.11", "absent")
            require(((own >= 0) & (own < len(fill))).all(), "9.11", "absent_fields")
            self.absent[own] = rows
        self.blocks = [self.read_block(document) for document in table["blocks"]]

    def read_block(self, document):
        """4.1."""
        require(isinstance(document, dict) and isinstance(document.get("name"), str), "9.10", "block")
        require(document.get("layout") in LAYOUTS, "9.10", f"unknown layout {document.get('layout')!r}")
        numbers = [document.get(key) for key in ("start", "stop", "left", "right")]
        require(all(whole(n, 0) for n in numbers), "9.10", "block")
        start, stop, left, right = numbers
        require(start <= stop <= self.rows and left < right <= self.width, "9.10", "a block outside the table")
        names = document.get("arrays")
        require(isinstance(names, list) and all(isinstance(n, str) for n in names), "9.10", "arrays")
        arrays = {name: self.array(f"table.{document['name']}.{name}", "9.10") for name in names}
        try:
            return LAYOUTS[document["layout"]](document, arrays, len(self.fields), self.constants)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"9.10: {error!r} in block {document['name']!r}") from error

    def vector(self, row, field):
        """4.3: what a file row of a field reads, ``(D,)``; each is read once."""
        if (row, field) not in self.known:
            self.known[row, field] = self.decoded(row, field)
        return self.known[row, field]

    def decoded(self, row, field):
        out, stored = self.fill[field].copy(), False
        for block in self.blocks:
            if block.start <= row < block.stop:
                found = block.read(row - block.start, field, out[block.left : block.right])
                if found is not None:
                    out[block.left : block.right], stored = found, True
        return out if stored else self.absent[field]

    def read_head(self):
        """6: ops and their tensors."""
        self.ops, known = [], {"vectors"}
        for i, op in enumerate(self.document["head"]):
            require(isinstance(op, dict), "9.12", "op")
            exact(
                {k: v for k, v in op.items() if k != "codes"},
                {"kind", "inputs", "output", "attributes", "tensors"},
                "9.12",
            )
            require(op["kind"] in OPS, "9.12", f"unknown op {op['kind']!r}")
            require(set(op["inputs"]) <= known, "9.12", "an input that no op has written")
            codes = op.get("codes", {})
            tensors = {
                name: self.coded(f"head.{i}.{name}", codes[name]) if name in codes else self.tensor(f"head.{i}.{name}")
                for name in op["tensors"]
            }
            attributes = self.attributes(op["attributes"])
            require(not attributes.keys() & tensors.keys(), "9.12", f"op {i} has a number twice")
            self.ops.append((OPS[op["kind"]], op["inputs"], op["output"], attributes, tensors))
            known.add(op["output"])
        try:
            result = self.run(np.zeros((len(self.fields), self.width)))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"9.12: the head cannot run: {error!r}") from error
        require(np.shape(result) == (), "9.12", "the head makes no single number")

    def attributes(self, document):
        """6.1: integers, and in version 1 the bias."""
        require(isinstance(document, dict), "9.12", "attributes")
        for name, value in document.items():
            kinds = (int, float) if name == "bias" else (int,)
            require(type(value) in kinds, "9.12", f"attribute {name}")
        return document

    def tensor(self, name):
        found = self.array(name, "9.12")
        require(found.dtype in (np.dtype("<f4"), np.dtype("<f2")), "9.12", f"{name} is {found.dtype}")
        return found.astype(np.float64)

    def coded(self, name, shape):
        """6.2."""
        bits, scale, codes = (self.array(f"{name}.{part}", "9.12") for part in ("bits", "scale", "codes"))
        require(bits.dtype == codes.dtype == np.uint8 and scale.dtype == np.dtype("<f2"), "9.12", name)
        require((bits <= 8).all() and scale.shape == (np.count_nonzero(bits),), "9.12", name)
        width, rows, place, scales = shape[-1], [], 0, iter(scale.tolist())
        content = codes.tobytes()
        for b in bits.tolist():
            step = next(scales) if b else 0.0
            levels = self.constants.levels(b)
            rows.append([step * levels[bits_at(content, 8 * place + c * b, b)] for c in range(width)])
            place += ceil_div(width * b, 8)
        require(place == len(content), "9.12", name)
        return np.array(rows).reshape(shape)

    def run(self, vectors):
        """6.1: the result of the head for ``vectors (F, D)``."""
        values = {"vectors": vectors}
        for kind, inputs, output, attributes, tensors in self.ops:
            values[output] = kind(*(values[name] for name in inputs), **attributes, **tensors)
        return values[self.ops[-1][2]]

    def logit(self, rows):
        """The result of the head for file rows ``(F,)``, -1 for absent ones."""
        require(self.kind != "ego", "7.3", "vectors have still to be propagated")
        return float(self.run(np.stack([self.vector(row, field) for field, row in enumerate(rows)])))

    def score(self, values):
        """7: a probability or a score, of a raw value for each field."""
        result = self.logit([self.row_of(field, value) for field, value in enumerate(values)])
        return 1 / (1 + np.exp(-result)) if self.kind == "ctr" else result

    def recommend(self, user, count, exclude=()):
        """7.2: items and scores, best first."""
        require(self.kind == "baked", "7.2", "not a ranking")
        row, first = self.row_of(0, user), self.first_row[1]
        left_out = {self.row_of(1, item) for item in exclude}
        rows = [r for r in range(first, first + self.keys[1]) if r not in left_out]
        scores = np.array([self.logit([row, r]) for r in rows], np.float32)
        best = np.lexsort((rows, -scores))[:count]
        return [(self.fields[1]["first"] + rows[i] - first, float(scores[i])) for i in best.tolist()]


def dot(x, bias=0.0, weight=1.0):
    return (weight * x[0] * x[1]).sum() + bias


def mixture(x0, x, down, core, up, gate, bias):
    experts, rank, _ = core.shape
    inner = np.tanh(down @ x).reshape(experts, rank)
    gates = gate @ x
    outer = [g * np.tanh(c @ y) for g, c, y in zip(gates, core, inner, strict=True)]
    return x + x0 * (up @ np.concatenate(outer) + gates.sum() * bias)


OPS = {
    "columns": lambda x, start, stop: x[:, start:stop],
    "flatten": lambda x: x.reshape(-1),
    "linear": lambda x, weight, bias: weight @ x + bias,
    "relu": lambda x: np.maximum(x, 0),
    "fm": lambda x: 0.5 * (x.sum(axis=0) ** 2 - (x**2).sum(axis=0)).sum(),
    "sum": lambda x, bias=0.0: x.sum() + bias,
    "add": lambda *xs: sum(xs),
    "dot": dot,
    "nonzero_mean": lambda x: x / max(1, np.count_nonzero(x)),
    "cross": lambda x0, x, weight, bias: x0 * (weight @ x + bias) + x,
    "mixture": mixture,
}
"""6.3."""
