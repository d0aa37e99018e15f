"""Layouts of a PocketRec file, from ``docs/format.md`` alone: sections 5, 6.2 and 8. Nothing of the package is used.

Slow and plain on purpose: a decoder reads one row after the other.
"""

from __future__ import annotations

import numpy as np

SIZES = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2"), "int8": np.dtype("i1")}
TRELLIS = {
    1: (1, 4, 10), 2: (1, 2, 10), 3: (2, 3, 10), 4: (1, 1, 10), 5: (3, 2, 10),
    6: (2, 1, 10), 7: (3, 1, 10), 8: (4, 1, 12), 9: (6, 1, 6), 10: (8, 1, 8),
}  # fmt: skip
"""Bits, span and memory of each code (5.9)."""


def require(condition, section, text):
    """Refuse the file."""
    if not condition:
        raise ValueError(f"{section}: {text}")


def whole(value, low=1, high=1 << 40):
    """Whether a value is an integer in ``[low, high)``."""
    return type(value) is int and low <= value < high


def ceil_div(a, b):
    return -(-a // b)


def bits_at(content, place, count):
    """The number of ``count`` bits at bit ``place`` of bytes."""
    first, last = place >> 3, (place + count + 7) >> 3
    return (int.from_bytes(content[first:last], "little") >> (place & 7)) & ((1 << count) - 1)


def set_bits(content, count):
    """The first bits of bytes, as booleans."""
    return np.unpackbits(np.frombuffer(content, np.uint8), count=count, bitorder="little").astype(bool)


class Block:
    """A block: which rows it stores, and what they read."""

    def __init__(self, document, arrays, fields, constants):
        self.start, self.stop = document["start"], document["stop"]
        self.left, self.right = document["left"], document["right"]
        self.rows, self.width = self.stop - self.start, self.right - self.left
        self.document, self.arrays, self.fields, self.constants = document, arrays, fields, constants
        self.set_up()

    def set_up(self):
        """Check the arrays, and count what rows need."""

    def array(self, name, dtype, shape):
        """An array of a certain type and shape."""
        require(name in self.arrays, "9.10", f"no array {name}")
        found = self.arrays[name]
        require(found.dtype == np.dtype(dtype), "9.10", f"{name} is {found.dtype}")
        require(shape is None or found.shape == shape, "9.10", f"{name} is {found.shape}, not {shape}")
        return found

    def storage(self):
        """Type of the stored values."""
        require(self.document.get("storage") in SIZES, "9.10", "unknown storage")
        return SIZES[self.document["storage"]]

    def read(self, row, field, fill):
        """Entries of a row of the block ``(width,)``, or ``None`` if it does not store it."""
        raise NotImplementedError


class Entries(Block):
    """5.1 dense, bitmap, direct."""

    def set_up(self):
        layout, width = self.document["layout"], self.width
        require(self.document.get("stride") in (64, 128, 256), "9.10", "stride")
        self.mask_bytes = ceil_div(width, 8)
        dtype, per_row = self.storage(), ceil_div(width, 8)
        self.values = self.array("values", dtype, None)
        require(self.values.ndim == 1, "9.10", "values")
        self.scale = self.array("scale", "<f4", (self.fields, width)) if dtype == SIZES["int8"] else None
        everything = self.values.size == self.rows * width
        self.records = self.masks = None
        self.present = np.ones(self.rows, bool)
        if layout == "dense":
            require(everything, "9.10", "values")
        elif layout == "direct":
            if "records" in self.arrays or not everything:
                self.records = self.array("records", "u1", (self.rows * (4 + per_row),)).tobytes()
        else:
            self.set_up_bitmap(per_row)
        self.position = np.cumsum(self.present) - self.present

    def set_up_bitmap(self, per_row):
        width = self.width
        if "presence" in self.arrays:
            presence = self.array("presence", "u1", (ceil_div(self.rows, 8),))
            self.array("rank", "<u4", (ceil_div(self.rows, 1024),))
            self.present = set_bits(presence.tobytes(), self.rows)
        count = int(self.present.sum())
        if "masks" in self.arrays:
            self.masks = self.array("masks", "u1", (count * per_row,)).reshape(-1, per_row)
            self.array("offsets", "<u4", (ceil_div(count, self.document["stride"]),))
            kept = np.bitwise_count(self.masks).sum(axis=1, dtype=np.int64)
            self.before = np.cumsum(kept) - kept
        else:
            require(self.values.size == count * width, "9.10", "values")

    def read(self, row, field, fill):
        if not self.present[row]:
            return None
        place = int(self.position[row])
        kept, first = np.ones(self.width, bool), place * self.width
        if self.records is not None:
            size = 4 + self.mask_bytes
            record = self.records[row * size : (row + 1) * size]
            if not any(record[4:]):
                return None
            kept, first = set_bits(record[4:], self.width), int.from_bytes(record[:4], "little")
        elif self.masks is not None:
            kept, first = set_bits(self.masks[place].tobytes(), self.width), int(self.before[place])
        out, count = fill.copy(), int(kept.sum())
        if first + count <= self.values.size:
            values = self.values[first : first + count].astype(np.float64)
            out[kept] = values if self.scale is None else values * self.scale[field][kept]
        return out


class Computed(Block):
    """5.2: the vector of a slot."""

    def set_up(self):
        self.settings = self.document["settings"]
        require(isinstance(self.settings, dict), "9.10", "settings")
        self.dtype = self.storage()
        self.check()
        slots = self.settings["slots"]
        self.slots = self.array("slots", "<u4", (self.rows,)) if "slots" in self.arrays else None
        require(self.slots is not None or self.rows <= slots, "9.10", "more rows than slots")

    def check(self):
        """Check settings and arrays."""
        raise NotImplementedError

    def vector(self, slot):
        """``(width,)``."""
        raise NotImplementedError

    def read(self, row, field, fill):
        slot = row if self.slots is None else int(self.slots[row])
        require(slot < self.settings["slots"], "5.2", "a slot that is none")
        return self.vector(slot)

    def setting(self, name, low=1, high=1 << 40):
        require(whole(self.settings.get(name), low, high), "9.10", f"setting {name}")
        return self.settings[name]

    def numbers(self, name):
        found = self.settings.get(name)
        require(isinstance(found, list) and all(whole(n, 1, 1 << 31) for n in found), "9.10", f"setting {name}")
        return found

    def matrix(self, name, shape):
        """A stored matrix as numbers."""
        stored = self.array(name, self.dtype, shape).astype(np.float64)
        if self.dtype != SIZES["int8"]:
            return stored
        scale = self.array(f"{name}_scale", "<f4", (min(shape),)).astype(np.float64)
        return stored * scale if shape[1] <= shape[0] else stored * scale[:, None]


class Product(Computed):
    """5.3."""

    def check(self):
        slots, self.divisor = self.setting("slots"), self.setting("divisor")
        self.operation = self.settings.get("operation")
        require(self.operation in ("mult", "add", "concat"), "9.10", "operation")
        require(self.operation != "concat" or self.width % 2 == 0, "9.10", "an odd width")
        width = self.width // 2 if self.operation == "concat" else self.width
        self.remainder = self.matrix("remainder", (self.divisor, width))
        self.quotient = self.matrix("quotient", (ceil_div(slots, self.divisor), width))

    def vector(self, slot):
        a, b = self.remainder[slot % self.divisor], self.quotient[slot // self.divisor]
        if self.operation == "concat":
            return np.concatenate([a, b])
        return a * b if self.operation == "mult" else a + b


class TensorTrain(Computed):
    """5.4."""

    def check(self):
        slots, self.n, self.d = self.setting("slots"), self.numbers("rows"), self.numbers("widths")
        ranks, cached = self.numbers("ranks"), self.setting("cached", 0, slots + 1)
        require(2 <= len(self.n) == len(self.d) == len(ranks) + 1, "9.10", "cores")
        product = np.prod(np.array(self.n, object))
        require(product >= slots and np.prod(np.array(self.d, object)) == self.width, "9.10", "cores")
        r = [1, *ranks, 1]
        self.cores = []
        for k, (n, d) in enumerate(zip(self.n, self.d, strict=True)):
            core = self.matrix(f"core{k}", (n, r[k] * d * r[k + 1]))
            self.cores.append(core.reshape(n, r[k], d, r[k + 1]))
        self.cached = {}
        if cached:
            rows, own = self.matrix("cache", (cached, self.width)), self.array("cached_slots", "<u4", (cached,))
            self.cached = dict(zip(own.tolist(), rows, strict=True))

    def vector(self, slot):
        if slot in self.cached:
            return self.cached[slot]
        digits = []
        for n in reversed(self.n):
            slot, digit = divmod(slot, n)
            digits.insert(0, digit)
        found = np.ones((1, 1))
        for core, digit in zip(self.cores, digits, strict=True):
            found = np.einsum("cr,rds->cds", found, core[digit]).reshape(-1, core.shape[3])
        return found[:, 0]


class HashMlp(Computed):
    """5.5."""

    MASK = (1 << 64) - 1

    def check(self):
        k, self.m, salt = self.setting("functions"), self.setting("buckets", 2, 10**7 + 1), self.setting("salt")
        self.setting("slots", 1, (1 << 53) // (17 * self.m) - 1)
        hidden, self.end = self.numbers("hidden"), self.settings.get("end")
        require(self.end in ("linear", "mish", "mish_affine"), "9.10", "end")
        self.code = self.settings.get("code")
        require(self.code == "uniform" or (self.code == "gaussian" and k % 2 == 0), "9.10", "code")
        widths = [k, *hidden, self.width]
        self.layers = [
            (self.matrix(f"weight{i}", (widths[i], widths[i + 1])), self.array(f"bias{i}", "<f4", (widths[i + 1],)))
            for i in range(len(widths) - 1)
        ]
        if self.end == "mish_affine":
            self.gain, self.shift = (self.array(n, "<f4", (self.width,)) for n in ("gain", "shift"))
        self.functions = self.hash_functions(k, salt)

    def mix(self, z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & self.MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & self.MASK
        return z ^ (z >> 31)

    def hash_functions(self, k, salt):
        golden = 0x9E3779B97F4A7C15
        start = self.mix((salt + golden) & self.MASK)
        words = [self.mix((start + t * golden) & self.MASK) for t in range(1, 3 * k + 1)]
        low, high = 16 * self.m + 1, 17 * self.m
        prime = np.ones(high - low, bool)
        for divisor in range(2, int(high**0.5) + 2):
            multiple = max(2 * divisor, ceil_div(low, divisor) * divisor)
            prime[multiple - low :: divisor] = False
        primes = (np.flatnonzero(prime) + low).tolist()
        return [
            (words[j] % (10**9 - 1) + 1, words[k + j] % 10**9, primes[words[2 * k + j] % len(primes)]) for j in range(k)
        ]

    def vector(self, slot):
        h = np.array([((a * (slot + 1) + b) % p) % self.m for a, b, p in self.functions], np.float64)
        if self.code == "uniform":
            x = 2 * h / (self.m - 1) - 1
        else:
            u, v = (h[::2] + 1) / self.m, (h[1::2] + 1) / self.m
            radius = np.sqrt(-2 * np.log(u))
            x = np.stack([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)], axis=1).reshape(-1)
        for i, (weight, bias) in enumerate(self.layers):
            x = x @ weight + bias
            if i + 1 < len(self.layers) or self.end != "linear":
                x = x * np.tanh(np.logaddexp(0, x))
        return x * self.gain + self.shift if self.end == "mish_affine" else x


class PrunedSum(Computed):
    """5.6."""

    def check(self):
        slots = self.setting("slots")
        self.bucket = self.setting("bucket", 1, slots + 1)
        self.operation = self.settings.get("operation", "add")
        require(self.operation in ("add", "concat"), "9.10", "operation")
        require(self.operation == "add" or self.width % 2 == 0, "9.10", "an odd width")
        width = self.width if self.operation == "add" else self.width // 2
        self.c = ceil_div(slots, self.bucket)
        rows = self.bucket + ceil_div(slots, self.c)
        kept = self.setting("kept", 0, rows * width + 1)
        payload = rows * ceil_div(width, 8) + kept * self.dtype.itemsize
        stride = next((s for s in (64, 128) if 1024 * ceil_div(rows, s) <= payload), 256)
        document = {"start": 0, "stop": rows, "left": 0, "right": width, "layout": "bitmap", "stride": stride}
        document["storage"] = self.document["storage"]
        self.array("values", self.dtype, (kept,))
        arrays = {name: a for name, a in self.arrays.items() if name != "slots"}
        self.books, self.part = Entries(document, arrays, 2, self.constants), width

    def vector(self, slot):
        zeros = np.zeros(self.part)
        a = self.books.read(slot % self.bucket, 0, zeros)
        b = self.books.read(self.bucket + slot // self.c, 1, zeros)
        return a + b if self.operation == "add" else np.concatenate([a, b])


class Quantised(Block):
    """5.7."""

    def set_up(self):
        self.bits = self.document["bits"]
        require(whole(self.bits, 2, 9), "9.10", "bits")
        self.codes = self.array("codes", "u1", (self.rows, ceil_div(self.width * self.bits, 8)))
        self.low, self.step = (self.array(n, "<f4", (self.fields, self.width)) for n in ("low", "step"))

    def read(self, row, field, fill):
        record = self.codes[row].tobytes()
        codes = np.array([bits_at(record, c * self.bits, self.bits) for c in range(self.width)], np.float64)
        return self.low[field] + codes * self.step[field]


def class_numbers(planes, content, rows):
    """Class numbers of rows (5.8), and the bytes that they take."""
    numbers, place = np.zeros(rows, np.int64), 0
    for first in range(0, rows, 256):
        count = min(256, rows - first)
        for plane in range(planes):
            size = ceil_div(count, 8)
            part = content[place : place + size]
            require(len(part) == size, "9.10", "planes are too short")
            numbers[first : first + count] |= set_bits(part, count).astype(np.int64) << plane
            place += size
    return numbers, place


class Transform(Block):
    """5.8."""

    def set_up(self):
        starts = self.array("starts", "<u4", None).astype(np.int64)
        require(starts.ndim == 1 and len(starts) > 0 and starts[0] == 0 and starts[-1] == self.rows, "9.10", "starts")
        require((np.diff(starts) >= 0).all(), "9.10", "starts")
        shapes = self.array("shapes", "u1", (len(starts) - 1, 3)).astype(np.int64)
        require(all(p <= 3 and k <= 1 << p for p, k, _ in shapes), "9.10", "shapes")
        coders = self.array("coders", "<u2", (int((shapes[:, 1] * shapes[:, 2]).sum()),)).astype(np.int64)
        require((coders % 16 <= 8).all(), "9.10", "bits")
        basis = self.array("basis", "i1", (int(shapes[:, 2].sum()) * self.width,)).astype(np.float64)
        planes, self.codes = self.array("planes", "u1", None).tobytes(), self.array("codes", "u1", None).tobytes()
        self.records, plane_place, place, groups = [None] * self.rows, 0, 0, 0
        for first, last, (p, classes, k) in zip(starts, starts[1:], shapes.tolist(), strict=False):
            own, coders = coders[: classes * k].reshape(classes, k), coders[classes * k :]
            directions, basis = basis[: k * self.width].reshape(k, self.width), basis[k * self.width :]
            numbers, size = class_numbers(p, planes[plane_place:], last - first)
            plane_place += size
            groups += ceil_div(int(last - first), 256) if p else 0
            for row, number in zip(range(first, last), numbers.tolist(), strict=True):
                if number < classes:
                    self.records[row] = (place, own[number], directions)
                    place += int((own[number] % 16).sum())
            place = ceil_div(place, 8) * 8
        require(plane_place == len(planes), "9.10", "planes")
        self.array("offsets", "<u4", (groups,))
        require(place // 8 + 4 == len(self.codes), "9.10", "codes")

    def read(self, row, field, fill):
        if self.records[row] is None:
            return None
        place, coders, basis = self.records[row]
        out = fill.copy()
        for coder, direction in zip(coders.tolist(), basis, strict=True):
            bits, h = coder % 16, coder // 16
            level = self.constants.levels(bits)[bits_at(self.codes, place, bits)]
            out += 2.0 ** ((h - 3072) / 128) * level * direction
            place += bits
        return out


class Trellis(Block):
    """5.9."""

    def set_up(self):
        shape = self.document["shape"]
        names = ("users", "items", "shapes", "first", "places", "atoms", "rest")
        require(isinstance(shape, dict) and all(whole(shape.get(n), 0) for n in names), "9.10", "shape")
        self.users, self.items, self.row_bits, first, self.places, self.atoms, self.rest = (shape[n] for n in names)
        rates = shape.get("rates")
        require(isinstance(rates, list) and len(rates) in (1, 2, 4, 8), "9.10", "rates")
        require(all(whole(r, 0, 11) for r in [*rates, self.rest]), "9.10", "rates")
        require(self.users + self.items == self.rows and first < len(rates), "9.10", "shape")
        require(self.row_bits <= 12 and self.places <= 24 and self.atoms <= 4, "9.10", "shape")
        self.codes = self.array("codes", "u1", None).tobytes()
        self.centroids = self.array("centroids", "u1", (1 << self.row_bits, ceil_div(self.width, 2)))
        self.scales = self.array("scales", "<f4", (7 + self.atoms,))
        require(np.isfinite(self.scales).all(), "9.10", "scales")
        self.array("offsets", "<u4", (ceil_div(self.items, 256),))
        planes = self.array("planes", "u1", None).tobytes()
        numbers, size = class_numbers(len(rates).bit_length() - 1, planes, self.items)
        require(size == len(planes), "9.10", "planes")
        self.rates = [rates[n] for n in numbers.tolist()]
        sizes = [4 + self.row_bits + self.rate_bits(rate) for rate in self.rates]
        self.item_places = np.cumsum([0, *sizes]).tolist()
        self.user_start = ceil_div(self.item_places[-1], 8) * 8
        self.user_bits = self.atoms * self.places + self.rate_bits(self.rest)
        end = self.user_start // 8 + ceil_div(self.users * self.user_bits, 8) + 4
        require(end == len(self.codes), "9.10", "codes")
        self.candidates = np.flatnonzero(numbers >= first).tolist()

    def rate_bits(self, rate):
        if not rate:
            return 0
        bits, span, _ = TRELLIS[rate]
        return 2 + bits * ceil_div(self.width, span)

    def geometric(self, which, number):
        """Gain (0), item's scale (1) or user's scale (2)."""
        least, ratio = self.scales[2 * which : 2 * which + 2].astype(np.float64)
        return np.float32(least * ratio**number)

    def coded_rest(self, rate, place, which):
        """``scale q`` of the code whose scale is at ``place``."""
        scale = self.geometric(which, bits_at(self.codes, place, 2))
        bits, span, memory = TRELLIS[rate]
        table, first, found = self.constants.trellis(rate), place + 2, []
        for step in range(ceil_div(self.width, span)):
            end = bits * (step + 1)
            known = min(end, memory)
            row = bits_at(self.codes, first + end - known, known) << (memory - known)
            found.extend(table[row].tolist())
        return scale * np.array(found[: self.width])

    def item(self, item):
        """Gain and shape."""
        place, rate = self.item_places[item], self.rates[item]
        gain = self.geometric(0, bits_at(self.codes, place, 4))
        row = self.centroids[bits_at(self.codes, place + 4, self.row_bits)].tobytes()
        numbers = np.array([bits_at(row, 4 * c, 4) for c in range(self.width)])
        found = (numbers - 7.5) * float(self.scales[6])
        if rate:
            found = found + self.coded_rest(rate, place + 4 + self.row_bits, 1)
        return gain, found

    def read(self, row, field, fill):
        if row >= self.users:
            gain, shape = self.item(row - self.users)
            return gain * shape
        place, found = self.user_start + row * self.user_bits, np.zeros(self.width)
        for coefficient in self.scales[7:].tolist():
            number = bits_at(self.codes, place, self.places)
            place += self.places
            if self.candidates:
                _, shape = self.item(self.candidates[min(number, len(self.candidates) - 1)])
                found = found + coefficient * shape / max(np.sqrt((shape**2).sum()), 1e-20)
        return found + self.coded_rest(self.rest, place, 2) if self.rest else found


LAYOUTS = {
    "dense": Entries, "bitmap": Entries, "direct": Entries, "product": Product, "tensor_train": TensorTrain,
    "hash_mlp": HashMlp, "pruned_sum": PrunedSum, "quantised": Quantised, "transform": Transform, "trellis": Trellis,
}  # fmt: skip
