// Look-up in tables of blocks of entries; compiled once per instruction set.

constexpr int64_t CHUNK = 64;         // rows in flight between two stages
constexpr int64_t RANK_ROWS = 1024;   // rows per entry of the rank directory
constexpr int64_t OFFSET_BYTES = 4;   // of a record, before its mask
constexpr int64_t OUTSIDE = -2;       // the block does not cover the row
constexpr int64_t MISSING = -1;       // it does, but stores nothing of it

// Bits set in the first `count` bytes.
inline int64_t count_bits(const uint8_t *bytes, int64_t count) {
#if POCKETREC_LANES == 16
  const auto piece = [&](int64_t i) {
    const int64_t left = std::min<int64_t>(std::max<int64_t>(count - i, 0), 64);
    const uint64_t lanes = _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(left));
    return _mm512_popcnt_epi64(_mm512_maskz_loadu_epi8(lanes, bytes + i));
  };
  __m512i sums = _mm512_add_epi64(piece(0), piece(64));
  for (int64_t i = 128; i < count; i += 64) sums = _mm512_add_epi64(sums, piece(i));
  return _mm512_reduce_add_epi64(sums);
#else
  int64_t sum = 0, i = 0;
  for (; i + 8 <= count; i += 8) sum += __builtin_popcountll(load<uint64_t>(bytes + i));
  uint64_t rest = 0;
  for (int64_t shift = 0; i < count; ++i, shift += 8) rest |= static_cast<uint64_t>(bytes[i]) << shift;
  return sum + __builtin_popcountll(rest);
#endif
}

inline int64_t mask_bytes(const Block &block) { return (block.width + 7) / 8; }

// Whether each row has a record, so that nothing is counted to find it.
inline bool has_records(const Block &block) { return block.masks != nullptr && block.offsets == nullptr; }

inline const uint8_t *record_of(const Block &block, int64_t row) {
  return block.masks + row * (OFFSET_BYTES + mask_bytes(block));
}

// The column mask of a present row; null where every present row is whole.
inline const uint8_t *mask_of(const Block &block, int64_t position) {
  if (has_records(block)) return record_of(block, position) + OFFSET_BYTES;
  return block.masks == nullptr ? nullptr : block.masks + position * mask_bytes(block);
}

// Columns [column, column + 16) of a row mask.
inline uint32_t mask_bits(const Block &block, const uint8_t *mask, int64_t column) {
  const int64_t left = block.width - column;
  const uint32_t all = left >= 16 ? 0xffffu : (1u << left) - 1u;
  if (mask == nullptr) return all;
  return all & (left > 8 ? load<uint16_t>(mask + column / 8) : mask[column / 8]);
}

inline int64_t count_kept(const Block &block, const uint8_t *mask) {
  int64_t count = 0;
  for (int64_t column = 0; column < block.width; column += 16)
    count += __builtin_popcount(mask_bits(block, mask, column));
  return count;
}

// Index of a row among the block's present rows, MISSING or OUTSIDE.
inline int64_t locate(const Block &block, int64_t row) {
  if (row < block.start || row >= block.stop) return OUTSIDE;
  const uint64_t local = row - block.start;
  if (has_records(block)) return count_kept(block, mask_of(block, local)) > 0 ? local : MISSING;
  if (block.presence == nullptr) return local;
  const uint32_t byte = block.presence[local / 8], bit = 1u << (local % 8);
  const uint64_t group = local / RANK_ROWS;
  const int64_t before = count_bits(block.presence + group * (RANK_ROWS / 8), local % RANK_ROWS / 8);
  const int64_t position = load<uint32_t>(block.rank + 4 * group) + before + __builtin_popcount(byte & (bit - 1));
  const bool present = ((byte & bit) != 0) & (position < block.present);
  return position | (static_cast<int64_t>(present) - 1);  // MISSING is all ones: no branch to mispredict
}

// A position that may be read: 0 for MISSING and OUTSIDE.
inline int64_t readable(int64_t position) { return position & ~(position >> 63); }

inline void prefetch_mask(const Block &block, int64_t position) {
  if (block.offsets == nullptr) return;
  const int64_t known = readable(position), group = known >> block.shift, bytes = mask_bytes(block);
  __builtin_prefetch(block.offsets + 4 * group);
  const uint8_t *masks = block.masks + (group << block.shift) * bytes;
  __builtin_prefetch(masks);
  __builtin_prefetch(masks + 64);
  __builtin_prefetch(block.masks + known * bytes);
}

// Reads one block. GROUPS is the number of 16-column groups where it is known, else 0.
template <class Value, int GROUPS>
struct Reader {
  const Block block;

  int64_t groups() const { return GROUPS > 0 ? GROUPS : (block.width + 15) / 16; }

  // Index of the row's first value, MISSING if the file's directory points outside the values.
  int64_t first_value(int64_t position) const {
    int64_t first = position * block.width;
    if (has_records(block)) {
      first = load<uint32_t>(record_of(block, position));
    } else if (block.masks != nullptr) {
      const int64_t group = position >> block.shift, begin = group << block.shift, bytes = mask_bytes(block);
      first = load<uint32_t>(block.offsets + 4 * group) +
              count_bits(block.masks + begin * bytes, (position - begin) * bytes);
    }
    return first + count_kept(block, mask_of(block, position)) <= block.values_count ? first : MISSING;
  }

  void prefetch(int64_t first) const {
    const uint8_t *values = block.values + first * sizeof(Value);
    __builtin_prefetch(values);
    __builtin_prefetch(values + std::min(block.width, 16) * sizeof(Value));
  }

  // out[c] = the c-th kept value where the mask has a bit, else base[c]; nothing is kept of a MISSING row.
  void expand(int64_t position, int64_t first, const float *base, int64_t field, float *out) const {
    const uint32_t kept = ~static_cast<uint32_t>(position >> 63);
    const uint8_t *values = block.values + first * sizeof(Value), *row_mask = mask_of(block, readable(position));
    const float *scale = reinterpret_cast<const float *>(block.scale) + field * block.width;
    for (int64_t g = 0; g < groups(); ++g) {
      const int64_t column = 16 * g, columns = std::min<int64_t>(block.width - column, 16);
      const uint32_t bits = kept & mask_bits(block, row_mask, column);
      expand_columns(values, bits, columns, base + column, scale + column, out + column);
      values += __builtin_popcount(bits) * sizeof(Value);
    }
  }

#if POCKETREC_LANES == 16
  static __m512 load_values(const uint8_t *values, uint32_t lanes) {
    const __mmask16 mask = static_cast<__mmask16>(lanes);
    if constexpr (sizeof(Value) == 4) return _mm512_maskz_loadu_ps(mask, values);
    if constexpr (sizeof(Value) == 2) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, values));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, values)));
  }

  static void expand_columns(const uint8_t *values, uint32_t bits, int64_t columns, const float *base,
                             const float *scale, float *out) {
    const __mmask16 all = static_cast<__mmask16>((1u << columns) - 1u), kept = static_cast<__mmask16>(bits);
    const __m512 found = load_values(values, (1u << __builtin_popcount(bits)) - 1u);
    const __m512 under = _mm512_maskz_loadu_ps(all, base);
    __m512 result;
    if constexpr (sizeof(Value) == 1)
      result = _mm512_mask_mul_ps(under, kept, _mm512_maskz_expand_ps(kept, found), _mm512_maskz_loadu_ps(all, scale));
    else
      result = _mm512_mask_expand_ps(under, kept, found);
    _mm512_mask_storeu_ps(out, all, result);
  }
#else
  static float value(const uint8_t *from, const float *scale) {
    if constexpr (sizeof(Value) == 4) return load<float>(from);
    if constexpr (sizeof(Value) == 1) return static_cast<float>(load<int8_t>(from)) * *scale;
    const uint32_t half = load<uint16_t>(from);
    const uint32_t shifted = (half & 0x7fffu) << 13, rebias = 0x77800000u;  // 2 ^ 112
    const float magnitude = load<float>(&shifted) * load<float>(&rebias);
    const uint32_t infinite = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    const uint32_t bits = load<uint32_t>(&magnitude) | infinite | (half & 0x8000u) << 16;
    return load<float>(&bits);
  }

  static void expand_columns(const uint8_t *values, uint32_t bits, int64_t columns, const float *base,
                             const float *scale, float *out) {
    if (bits == (1u << columns) - 1u) {
      for (int64_t c = 0; c < columns; ++c) out[c] = value(values + c * sizeof(Value), scale + c);
      return;
    }
    std::memcpy(out, base, columns * sizeof(float));
    for (; bits != 0; bits &= bits - 1, values += sizeof(Value)) {
      const int c = __builtin_ctz(bits);
      out[c] = value(values, scale + c);
    }
  }
#endif
};

// Calls visit with a value of the block's stored type.
template <class Visit>
inline void with_value(const Block &block, const Visit &visit) {
  if (block.number == FP32) return visit(float{});
  if (block.number == FP16) return visit(uint16_t{});
  return visit(int8_t{});
}

template <class Value, class Visit>
inline void with_groups(const Block &block, const Visit &visit) {
  if (block.width <= 16) return visit(Reader<Value, 1>{block});
  return visit(Reader<Value, 0>{block});
}

template <class Visit>
inline void with_reader(const Block &block, const Visit &visit) {
  with_value(block, [&](auto value) { with_groups<decltype(value)>(block, visit); });
}

// One chunk of at most CHUNK rows in three passes, each prefetching what the next one reads.
struct Chunk {
  const Lookup task;
  int64_t begin = 0, count = 0;
  int64_t *positions, *firsts;  // (block_count, CHUNK)
  int32_t fields[CHUNK];
  int64_t covered[CHUNK];       // columns of the blocks that cover the row
  bool stored[CHUNK];           // in at least one block
  const float *base[CHUNK];     // the row that shows where nothing is kept

  Chunk(const Lookup &lookup, int64_t *memory)
      : task(lookup), positions(memory), firsts(memory + CHUNK * lookup.block_count) {}

  void find_rows() {
    for (int64_t i = 0; i < count; ++i) {
      covered[i] = 0;
      stored[i] = false;
    }
    for (int64_t b = 0; b < task.block_count; ++b) {
      const Block block = task.blocks[b];
      const int64_t *rows = task.rows + begin;
      int64_t *found = positions + b * CHUNK;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t position = locate(block, rows[i]);
        found[i] = position;
        stored[i] |= position >= 0;
        covered[i] += position == OUTSIDE ? 0 : block.width;
        prefetch_mask(block, position);
      }
    }
  }

  void choose_base() {
    int64_t column = begin % task.columns;
    for (int64_t i = 0; i < count; ++i) {
      fields[i] = task.fields[column];
      if (++column == task.columns) column = 0;
      base[i] = (stored[i] ? task.fill : task.absent) + fields[i] * task.width;
      if (covered[i] < task.width)
        std::memcpy(task.out + (begin + i) * task.width, base[i], task.width * sizeof(float));
    }
  }

  void find_values() {
    for (int64_t b = 0; b < task.block_count; ++b) {
      int64_t *found = positions + b * CHUNK, *first = firsts + b * CHUNK;
      if (task.blocks[b].present == 0) {
        std::fill(first, first + count, 0);
        continue;
      }
      with_reader(task.blocks[b], [found, first, rows = count](const auto reader) {
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t value = reader.first_value(readable(found[i]));
          first[i] = readable(value);
          found[i] |= value >> 63;
          reader.prefetch(first[i]);
        }
      });
    }
  }

  void write() {
    for (int64_t b = 0; b < task.block_count; ++b) {
      const int64_t *found = positions + b * CHUNK, *first = firsts + b * CHUNK;
      with_reader(task.blocks[b], [this, found, first](const auto reader) {
        float *out = task.out + begin * task.width + reader.block.left;
        const int64_t width = task.width, left = reader.block.left, rows = count;
        for (int64_t i = 0; i < rows; ++i, out += width)
          if (found[i] != OUTSIDE) reader.expand(found[i], first[i], base[i] + left, fields[i], out);
      });
    }
  }
};

// Blocks of at most 16 columns that tile the table side by side, each with a record for every row, or every row whole:
// one pass finds values and asks for them, a second one writes. No branch depends on a row.
struct Tiles {
  static constexpr int64_t MOST = 4;

  const Lookup task;
  int64_t begin = 0, count = 0;
  uint32_t kept[MOST][CHUNK];
  const uint8_t *values[MOST][CHUNK];
  uint32_t stored[CHUNK];
  int32_t fields[CHUNK];
  const float *base[CHUNK];

  static bool fit(const Lookup &task) {
    int64_t right = 0;
    for (int64_t b = 0; b < task.block_count; ++b) {
      const Block &block = task.blocks[b];
      const bool whole = block.masks == nullptr && block.presence == nullptr;
      if (block.left != right || block.width > 16 || block.start >= block.stop) return false;
      if (!whole && !has_records(block)) return false;
      if (block.start != task.blocks[0].start || block.stop != task.blocks[0].stop) return false;
      right += block.width;
    }
    return task.block_count <= MOST && right == task.width;
  }

  // MASK: bytes of a mask, 0 where every row is whole.
  template <int MASK, int SIZE>
  void find(int64_t b) {
    const Block block = task.blocks[b];
    const uint64_t first_row = block.start, rows = block.stop - block.start;
    const uint32_t all = (1u << block.width) - 1u;
    const int64_t *found = task.rows + begin;
    const int64_t ahead = begin + count + CHUNK <= task.count ? CHUNK : 0;
    for (int64_t i = 0, end = count; i < end; ++i) {
      const uint64_t local = static_cast<uint64_t>(found[i]) - first_row;
      const bool inside = local < rows;
      const uint64_t known = inside ? local : 0;
      uint64_t first = known * block.width;
      uint32_t bits = all;
      if constexpr (MASK > 0) {
        const uint64_t next = static_cast<uint64_t>(found[i + ahead]) - first_row;
        __builtin_prefetch(block.masks + (next < rows ? next : 0) * (OFFSET_BYTES + MASK));
        const uint8_t *record = block.masks + known * (OFFSET_BYTES + MASK);
        first = load<uint32_t>(record);
        bits &= MASK == 1 ? record[OFFSET_BYTES] : load<uint16_t>(record + OFFSET_BYTES);
      }
      const bool readable = inside & (first + __builtin_popcount(bits) <= static_cast<uint64_t>(block.values_count));
      const uint64_t lanes = -static_cast<uint64_t>(readable);
      stored[i] |= bits & -static_cast<uint32_t>(inside);
      const uint8_t *from = block.values + (first & lanes) * SIZE;
      __builtin_prefetch(from);
      __builtin_prefetch(from + 16 * SIZE - 1);
      kept[b][i] = bits & lanes;
      values[b][i] = from;
    }
  }

  void find_values() {
    std::fill(stored, stored + count, 0);
    for (int64_t b = 0; b < task.block_count; ++b) {
      const Block &block = task.blocks[b];
      with_value(block, [this, b, &block](auto value) {
        if (block.masks == nullptr) return find<0, sizeof(value)>(b);
        if (block.width <= 8) return find<1, sizeof(value)>(b);
        return find<2, sizeof(value)>(b);
      });
    }
  }

  void choose_base() {
    const float *const shown[2] = {task.absent, task.fill};
    const int64_t rows = count, columns = task.columns, width = task.width;
    int64_t column = begin % columns;
    for (int64_t i = 0; i < rows; ++i) {
      fields[i] = task.fields[column];
      column = column + 1 == columns ? 0 : column + 1;
      base[i] = shown[stored[i] != 0] + fields[i] * width;
    }
  }

  void write() {
    for (int64_t b = 0; b < task.block_count; ++b) {
      const Block &block = task.blocks[b];
      with_value(block, [this, b, &block](auto value) {
        const float *scale = reinterpret_cast<const float *>(block.scale);
        const int64_t width = block.width, left = block.left;
        float *out = task.out + begin * task.width + left;
        const int64_t step = task.width, rows = count;
        for (int64_t i = 0; i < rows; ++i, out += step)
          Reader<decltype(value), 1>::expand_columns(values[b][i], kept[b][i], width, base[i] + left,
                                                     scale + fields[i] * width, out);
      });
    }
  }
};

void lookup_tiles(const Lookup &task, int64_t begin, int64_t end) {
  Tiles tiles{task};
  for (int64_t i = begin; i < end; i += CHUNK) {
    tiles.begin = i;
    tiles.count = std::min(CHUNK, end - i);
    tiles.find_values();
    tiles.choose_base();
    tiles.write();
  }
}

int lookup(const Lookup &task, int threads) {
  for (int64_t c = 0; c < task.columns; ++c)
    if (task.fields[c] < 0 || task.fields[c] >= task.field_count) return BAD_INDEX;
  if (Tiles::fit(task)) {
    parallel(threads, task.count, 64 * CHUNK, [&](int64_t begin, int64_t end) { lookup_tiles(task, begin, end); });
    return OK;
  }
  std::atomic<int> status{OK};
  parallel(threads, task.count, 64 * CHUNK, [&](int64_t begin, int64_t end) {
    std::unique_ptr<int64_t[]> found(new (std::nothrow) int64_t[2 * CHUNK * task.block_count + 1]);
    if (found == nullptr) return status.store(NO_MEMORY);
    Chunk chunk(task, found.get());
    for (int64_t i = begin; i < end; i += CHUNK) {
      chunk.begin = i;
      chunk.count = std::min(CHUNK, end - i);
      chunk.find_rows();
      chunk.choose_base();
      chunk.find_values();
      chunk.write();
    }
  });
  return status.load();
}
