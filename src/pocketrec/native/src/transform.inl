// Look-up in tables of layout `transform`; compiled once per instruction set.
//
// The bits before a row in its group of 256 follow from population counts of the planes of class numbers: with
// r(c) the bits of class c, sum over rows of r(class) = sum over sets S of planes of w(S) |rows with all planes of S|,
// where w is the Moebius transform of r. A row is decoded in three passes over a chunk, each prefetching for the next.

constexpr int64_t GROUP_ROWS = 256;
constexpr int64_t PLANE_BYTES = GROUP_ROWS / 8;
constexpr int64_t SPARE_BYTES = 4;

// Counts, over all sets of planes, the rows before `inner`; planes lie `size` bytes apart.
inline int64_t bits_before(const Part &part, const uint8_t *planes, int64_t size, int64_t inner) {
  const int32_t *weights = part.weights;
  int64_t sum = inner * weights[0];
#if POCKETREC_LANES == 16
  const __mmask32 there = static_cast<__mmask32>(_bzhi_u64(~uint64_t{0}, static_cast<unsigned>(size)));
  const __m256i left = _mm256_sub_epi64(_mm256_set1_epi64x(inner), _mm256_setr_epi64x(0, 64, 128, 192));
  const __m256i kept = _mm256_min_epi64(_mm256_max_epi64(left, _mm256_setzero_si256()), _mm256_set1_epi64x(64));
  const __m256i below = _mm256_srlv_epi64(_mm256_set1_epi64x(-1), _mm256_sub_epi64(_mm256_set1_epi64x(64), kept));
  const auto weigh = [&](__m256i rows, int set) {
    return _mm256_mul_epi32(_mm256_popcnt_epi64(rows), _mm256_set1_epi64x(weights[set]));
  };
  const auto plane = [&](int64_t p) {
    return _mm256_and_si256(below, _mm256_maskz_loadu_epi8(there, planes + p * size));
  };
  const __m256i first = plane(0);
  __m256i total = weigh(first, 1);
  if (part.planes > 1) {
    const __m256i second = plane(1), both = _mm256_and_si256(first, second);
    total = _mm256_add_epi64(total, _mm256_add_epi64(weigh(second, 2), weigh(both, 3)));
    if (part.planes > 2) {
      const __m256i third = plane(2);
      total = _mm256_add_epi64(total, _mm256_add_epi64(weigh(third, 4), weigh(_mm256_and_si256(first, third), 5)));
      total = _mm256_add_epi64(total, _mm256_add_epi64(weigh(_mm256_and_si256(second, third), 6),
                                                       weigh(_mm256_and_si256(both, third), 7)));
    }
  }
  const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  return sum + _mm_cvtsi128_si64(half) + _mm_extract_epi64(half, 1);
#else
  for (int64_t byte = 0; 8 * byte < inner; byte += 8) {
    const int64_t bytes = std::min<int64_t>(8, size - byte), rows = inner - 8 * byte;
    const uint64_t below = rows >= 64 ? ~uint64_t{0} : (uint64_t{1} << rows) - 1;
    uint64_t words[8] = {below};
    for (int p = 0; p < part.planes; ++p) {
      uint64_t word = 0;
      std::memcpy(&word, planes + p * size + byte, bytes);
      for (int set = 0; set < 1 << p; ++set) {
        words[set | 1 << p] = words[set] & word;
        sum += weights[set | 1 << p] * static_cast<int64_t>(__builtin_popcountll(words[set | 1 << p]));
      }
    }
  }
  return sum;
#endif
}


// The first `count` of LANES floats; the others are zeros, or are left alone.
inline Floats load_some(const float *from, int64_t count) {
#if POCKETREC_LANES == 16
  const __m512 found = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << std::min<int64_t>(count, 16)) - 1u), from);
  return load<Floats>(&found);
#else
  if (count >= LANES) return load_floats(from);
  Floats values{};
  for (int64_t lane = 0; lane < count; ++lane) values[lane] = from[lane];
  return values;
#endif
}

inline void store_some(float *to, Floats values, int64_t count) {
#if POCKETREC_LANES == 16
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << std::min<int64_t>(count, 16)) - 1u), load<__m512>(&values));
#else
  if (count >= LANES) return store_floats(to, values);
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = values[lane];
#endif
}

inline float sum_lanes(Floats values) {
#if POCKETREC_LANES == 16
  return _mm512_reduce_add_ps(load<__m512>(&values));
#else
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += values[lane];
  return sum;
#endif
}

inline void copy_floats(const float *from, int64_t count, float *to) {
  for (int64_t c = 0; c < count; c += LANES) store_some(to + c, load_some(from + c, count - c), count - c);
}

// Entries of a table of eight.
inline Words select(const uint32_t *table, Words which) {
#if POCKETREC_LANES == 16
  const __m512i eight = _mm512_castsi256_si512(load<__m256i>(table));
  const __m512i found = _mm512_permutexvar_epi32(load<__m512i>(&which), eight);
  return load<Words>(&found);
#elif POCKETREC_LANES == 8
  const __m256i found = _mm256_permutevar8x32_epi32(load<__m256i>(table), load<__m256i>(&which));
  return load<Words>(&found);
#else
  Words found;
  for (int lane = 0; lane < LANES; ++lane) found[lane] = table[which[lane]];
  return found;
#endif
}

// The four bytes from each place on.
inline Words gather(const uint8_t *bytes, Words places) {
#if POCKETREC_LANES == 16
  const __m512i found = _mm512_i32gather_epi32(load<__m512i>(&places), bytes, 1);
  return load<Words>(&found);
#elif POCKETREC_LANES == 8
  const __m256i found = _mm256_i32gather_epi32(reinterpret_cast<const int *>(bytes), load<__m256i>(&places), 1);
  return load<Words>(&found);
#else
  Words found;
  for (int lane = 0; lane < LANES; ++lane) found[lane] = load<uint32_t>(bytes + places[lane]);
  return found;
#endif
}

// Entries of a table of 2 ** BITS.
template <int BITS>
inline Floats read_levels(const float *levels, Words places) {
#if POCKETREC_LANES == 16
  const __m512i wanted = load<__m512i>(&places);
  if constexpr (BITS == 5) {
    const __m512 found = _mm512_permutex2var_ps(_mm512_loadu_ps(levels), wanted, _mm512_loadu_ps(levels + 16));
    return load<Floats>(&found);
  } else {
    const Floats low = read_levels<BITS - 1>(levels, places), high = read_levels<BITS - 1>(levels + (1 << (BITS - 1)), places);
    const __mmask16 upper = _mm512_test_epi32_mask(wanted, _mm512_set1_epi32(1 << (BITS - 1)));
    const __m512 found = _mm512_mask_blend_ps(upper, load<__m512>(&low), load<__m512>(&high));
    return load<Floats>(&found);
  }
#else
  const Words found = gather(reinterpret_cast<const uint8_t *>(levels), places * 4);
  return load<Floats>(&found);
#endif
}

inline Floats read_levels(const float *levels, Words places, int bits) {
  if (bits <= 5) return read_levels<5>(levels, places);
  if (bits == 6) return read_levels<6>(levels, places);
  if (bits == 7) return read_levels<7>(levels, places);
  return read_levels<8>(levels, places);
}

// At most LANES rows of one part, a row in a lane.
struct TransformGroup {
  static constexpr int64_t TOGETHER = 4;           // rows that share a pass over the basis
  static constexpr int64_t MOST_DIRECTIONS = 256;  // rounded up
  static constexpr int WHOLE = 25;                 // bits that four bytes surely hold from any of the first eight on

  const Transform &task;
  const Part *part = nullptr;
  const float *base = nullptr;
  int64_t count = 0;
  uint32_t numbers[LANES], places[LANES];  // classes, and first bits in the section
  float *out[LANES];
  float values[MOST_DIRECTIONS * LANES];   // coefficients, by direction

  void add(int64_t number, int64_t place, float *to) {
    numbers[count] = static_cast<uint32_t>(number);
    places[count] = static_cast<uint32_t>(place);
    out[count++] = to;
  }

  void write() {
    if (count == 0) return;
    read();
    multiply();
    count = 0;
  }

  // A level of `b` bits is the one of its code, or, for codes whose first bit is 0, that of the inverted code negated.
  void read() {
    std::fill(numbers + count, numbers + LANES, 0);
    std::fill(places + count, places + LANES, 0);
    const Words number = load<Words>(numbers);
    Words place = load<Words>(places), word{};
    const uint8_t *codes = part->codes + part->code_start / 8;
    int known = 0;
    for (int64_t j = 0; j < part->directions; ++j) {
      const int widest = part->widest[j];
      if (known < widest) {
        word = gather(codes, place >> 3) >> (place & 7);
        known = WHOLE;
      }
      known -= widest;
      const Words mask = select(part->mask + 8 * j, number), bits = select(part->bits + 8 * j, number);
      const Words scale = select(part->scale + 8 * j, number);
      const Words code = word & mask;
      word >>= bits;
      place += bits;
      const Words negative = (Words)(code <= mask >> 1);
      const Words signed_scale = scale ^ (negative & 0x80000000u);
      store_floats(values + j * LANES, load<Floats>(&signed_scale) * read_levels(task.levels, code ^ (mask & negative), widest));
    }
    store_floats(values + part->directions * LANES, Floats{});
  }

  void multiply() const {
    const int64_t width = task.width, directions = part->directions;
    int64_t column = 0;
    for (; column + 1 < width; column += LANES) {
      const Floats first = load_some(base + column, width - column);
      for (int64_t row = 0; row < count; row += TOGETHER) {
        Floats sums[TOGETHER][2];
        for (int64_t r = 0; r < TOGETHER; ++r) sums[r][0] = first, sums[r][1] = Floats{};
        const float *basis = part->basis + column, *value = values + row;
        for (int64_t j = 0; j < directions; j += 2)
          for (int64_t odd = 0; odd < 2; ++odd, basis += part->stride, value += LANES) {
            const Floats direction = load_floats(basis);
            for (int64_t r = 0; r < TOGETHER; ++r) sums[r][odd] += value[r] * direction;
          }
        for (int64_t r = 0; r < TOGETHER && row + r < count; ++r)
          store_some(out[row + r] + column, sums[r][0] + sums[r][1], width - column);
      }
    }
    if (column >= width) return;
    Floats alone = Floats{} + base[column];
    for (int64_t j = 0; j < directions; ++j) alone += load_floats(values + j * LANES) * part->last[j];
    for (int64_t row = 0; row < count; ++row) out[row][column] = alone[row];
  }
};

// Rows of one column of the samples, whose small tables so stay in cache. A row that several samples ask for is decoded
// once.
struct TransformChunk {
  static constexpr int64_t SLOTS = 256;

  const Transform task;
  int64_t begin = 0, count = 0, column = 0;
  int64_t distinct = 0, repeated = 0;
  uint8_t slots[SLOTS] = {};                  // the last sample that asked for a row of this remainder, perhaps of another one
  uint8_t origins[CHUNK];                     // the first sample that asked for the same row
  uint8_t chosen[CHUNK], copies[CHUNK];       // samples to decode, and samples to copy
  int64_t rows[CHUNK];
  const Part *parts[CHUNK];                   // of chosen samples, from here on
  int64_t inner[CHUNK], sizes[CHUNK], numbers[CHUNK], places[CHUNK];
  const uint8_t *planes[CHUNK];
  TransformGroup group{task};

  float *out(int64_t sample) const { return task.out + ((begin + sample) * task.columns + column) * task.width; }

  const Part *part_of(int64_t row, const Part *likely) const {
    const auto holds = [row](const Part *p) { return row >= p->first && row < p->first + p->rows; };
    if (likely != nullptr && holds(likely)) return likely;
    int64_t low = 0, high = task.part_count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (task.parts[middle].first + task.parts[middle].rows <= row) low = middle + 1;
      else high = middle;
    }
    return low < task.part_count && holds(task.parts + low) ? task.parts + low : nullptr;
  }

  void choose() {
    distinct = repeated = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows[i] = task.rows[(begin + i) * task.columns + column];
      uint8_t &slot = slots[row & (SLOTS - 1)];
      const uint8_t sample = static_cast<uint8_t>(i), last = slot;
      const uint8_t known = (last < sample) & (rows[last] == row);
      origins[i] = static_cast<uint8_t>(sample ^ ((sample ^ origins[last]) & -known));  // no branch to mispredict
      chosen[distinct] = copies[repeated] = slot = sample;
      distinct += 1 - known;
      repeated += known;
    }
  }

  void find() {
    const Part *likely = nullptr;
    for (int64_t i = 0; i < distinct; ++i) {
      const int64_t row = rows[chosen[i]];
      const Part *part = parts[i] = part_of(row, likely);
      if (part == nullptr) continue;
      likely = part;
      const int64_t local = row - part->first, group = local / GROUP_ROWS;
      inner[i] = local % GROUP_ROWS;
      places[i] = local;
      sizes[i] = std::min<int64_t>(PLANE_BYTES, (part->rows - group * GROUP_ROWS + 7) / 8);
      planes[i] = part->class_planes + group * part->planes * PLANE_BYTES;
      if (part->planes > 0) {
        __builtin_prefetch(part->offsets + 4 * group);
        __builtin_prefetch(planes[i]);
        __builtin_prefetch(planes[i] + part->planes * sizes[i] - 1);
      }
    }
  }

  void locate_codes() {
    for (int64_t i = 0; i < distinct; ++i) {
      const Part *part = parts[i];
      if (part == nullptr) continue;
      const int64_t local = places[i];
      int64_t number = 0, place = local * part->record[0];
      if (part->planes > 0) {
        const uint8_t *byte = planes[i] + inner[i] / 8;
        for (int p = 0; p < part->planes; ++p) number |= (byte[p * sizes[i]] >> inner[i] % 8 & 1) << p;
        place = load<uint32_t>(part->offsets + 4 * (local / GROUP_ROWS)) +
                bits_before(*part, planes[i], sizes[i], inner[i]);
      }
      place += part->code_start;
      if (number >= part->classes) {
        number = MISSING;
      } else if (place < 0 || place + part->record[number] > 8 * (part->code_bytes - SPARE_BYTES)) {
        number = OUTSIDE;
      } else {
        __builtin_prefetch(part->codes + place / 8);
        __builtin_prefetch(part->codes + (place + part->record[number]) / 8);
      }
      numbers[i] = number;
      places[i] = place;
    }
  }

  void write() {
    const int64_t shift = task.fields[column] * task.width;
    group.base = task.fill + shift;
    for (int64_t i = 0; i < distinct; ++i) {
      float *to = out(chosen[i]);
      if (parts[i] == nullptr || numbers[i] < 0) {
        copy_floats(parts[i] != nullptr && numbers[i] == OUTSIDE ? group.base : task.absent + shift, task.width, to);
        continue;
      }
      if (parts[i] != group.part || group.count == LANES) group.write();
      group.part = parts[i];
      group.add(numbers[i], places[i] - parts[i]->code_start, to);
    }
    group.write();
    for (int64_t i = 0; i < repeated; ++i) copy_floats(out(origins[copies[i]]), task.width, out(copies[i]));
  }
};

int transform(const Transform &task, int threads) {
  for (int64_t c = 0; c < task.columns; ++c)
    if (task.fields[c] < 0 || task.fields[c] >= task.field_count) return BAD_INDEX;
  const int64_t samples = task.columns > 0 ? task.count / task.columns : 0;
  parallel(threads, samples, CHUNK, [&](int64_t begin, int64_t end) {
    TransformChunk chunk{task};
    chunk.begin = begin;
    chunk.count = end - begin;
    for (int64_t i = begin * task.columns; i < end * task.columns; i += 8) __builtin_prefetch(task.rows + i);
    for (; chunk.column < task.columns; ++chunk.column) {
      chunk.choose();
      chunk.find();
      chunk.locate_codes();
      chunk.write();
    }
  });
  return OK;
}
