// Look-up in tables of layout `transform`; included by _kernel.cpp once per instruction set.
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

#if POCKETREC_LANES == 16

// Codes of the sixteen directions from entry `at` of the tables on, of a row whose codes begin at bit `place`.
inline __m512i read_codes(const Part &part, int64_t at, int64_t place) {
  const int32_t skipped = part.before[at];
  place += skipped;
  const int64_t left = part.code_bytes - place / 8;
  const __mmask64 there = _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(std::min<int64_t>(left, 64)));
  const __m512i bytes = _mm512_maskz_loadu_epi8(there, part.codes + place / 8);
  const __m512i bit = _mm512_add_epi32(_mm512_loadu_si512(part.before + at), _mm512_set1_epi32(static_cast<int32_t>(place % 8) - skipped));
  const __m512i word = _mm512_mullo_epi32(_mm512_srli_epi32(bit, 4), _mm512_set1_epi32(0x10001));
  const __m512i pair = _mm512_permutexvar_epi16(_mm512_add_epi32(word, _mm512_set1_epi32(0x10000)), bytes);
  const __m512i shifted = _mm512_srlv_epi32(pair, _mm512_and_si512(bit, _mm512_set1_epi32(15)));
  return _mm512_and_si512(shifted, _mm512_loadu_si512(part.mask + at));
}

// Levels by their place in the table; those of at most four bits are the first 31.
inline __m512 read_levels(const float *table, __m512i place, bool few) {
  if (few) return _mm512_permutex2var_ps(_mm512_loadu_ps(table), place, _mm512_loadu_ps(table + 16));
  return _mm512_i32gather_ps(place, table, 4);
}

inline void decode(const Transform &task, const Part &part, int64_t number, int64_t place, const float *base, float *out) {
  const int64_t row = number * part.padded, width = task.width;
  float values[16];
  for (int64_t first = 0; first < part.used[number]; first += 16) {
    const int64_t at = row + first;
    const __m512i codes = read_codes(part, at, place);
    const __m512i level = _mm512_add_epi32(codes, _mm512_loadu_si512(part.base + at));
    const __m512 found = read_levels(task.levels, level, part.widest[number] <= 4);
    _mm512_storeu_ps(values, _mm512_mul_ps(found, _mm512_loadu_ps(part.scale + at)));
    const int64_t count = std::min<int64_t>(16, part.used[number] - first);
    const float *basis = part.basis + first * part.stride;
    for (int64_t column = 0; column < width; column += 16, basis += 16) {
      if (column + 1 == width) {
        const __m512 products = _mm512_mul_ps(_mm512_loadu_ps(values), _mm512_loadu_ps(part.last + first));
        out[column] = (first == 0 ? base : out)[column] + _mm512_reduce_add_ps(products);
        break;
      }
      const __mmask16 lanes = static_cast<__mmask16>(_bzhi_u32(0xffff, static_cast<unsigned>(width - column)));
      const auto add = [&](int64_t j, __m512 sum) {
        return _mm512_fmadd_ps(_mm512_set1_ps(values[j]), _mm512_loadu_ps(basis + j * part.stride), sum);
      };
      __m512 sums[4] = {_mm512_maskz_loadu_ps(lanes, (first == 0 ? base : out) + column)};
      for (int64_t j = 0; j < count; j += 4)
        for (int64_t i = 0; i < 4; ++i) sums[i] = add(j + i, sums[i]);
      const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
      _mm512_mask_storeu_ps(out + column, lanes, sum);
    }
  }
}

#else

inline void decode(const Transform &task, const Part &part, int64_t number, int64_t place, const float *base, float *out) {
  const int64_t row = number * part.padded, width = task.width;
  std::memcpy(out, base, width * sizeof(float));
  for (int64_t j = 0; j < part.used[number]; ++j) {
    const int64_t bit = place + part.before[row + j];
    const uint32_t code = load<uint32_t>(part.codes + bit / 8) >> (bit % 8) & part.mask[row + j];
    const float value = task.levels[part.base[row + j] + code] * part.scale[row + j];
    const float *basis = part.basis + j * part.stride;
    for (int64_t c = 0; c < width; ++c) out[c] += value * basis[c];
  }
}

#endif

// Rows of one column of the samples, whose small tables so stay in cache.
struct TransformChunk {
  const Transform task;
  int64_t begin = 0, count = 0, column = 0;
  const Part *parts[CHUNK];
  int64_t inner[CHUNK], sizes[CHUNK], numbers[CHUNK], places[CHUNK];
  const uint8_t *planes[CHUNK];

  int64_t at(int64_t i) const { return (begin + i) * task.columns + column; }

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

  void find() {
    const Part *likely = nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = task.rows[at(i)];
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
    for (int64_t i = 0; i < count; ++i) {
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
    for (int64_t i = 0; i < count; ++i) {
      float *out = task.out + at(i) * task.width;
      const bool stored = parts[i] != nullptr && numbers[i] != MISSING;
      const float *base = (stored ? task.fill : task.absent) + shift;
      if (stored && numbers[i] >= 0 && parts[i]->used[numbers[i]] > 0)
        decode(task, *parts[i], numbers[i], places[i], base, out);
      else
        std::memcpy(out, base, task.width * sizeof(float));
    }
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
    for (; chunk.column < task.columns; ++chunk.column) {
      chunk.find();
      chunk.locate_codes();
      chunk.write();
    }
  });
  return OK;
}
