// Look-up in tables of layout `trellis`, and beam search for trellis codes; included by _kernel.cpp once per
// instruction set.

constexpr int64_t GAIN_BITS = 4, SCALE_BITS = 2;
constexpr int64_t STEPS_AT_ONCE = 16;
constexpr int64_t LONGEST_RECORD = 32;  // bytes, and another one for each column

// Decodes rows one after the other; each thread has its own.
struct TrellisReader {
  const Trellis &table;
  std::vector<float> rest, shape;
  std::vector<uint8_t> nothing;  // the record of an item whose place lies outside (a damaged file)

  explicit TrellisReader(const Trellis &read)
      : table(read), rest(read.width + 64), shape(read.width + 64), nothing(LONGEST_RECORD + read.width + 64) {}

  static uint32_t bits(const uint8_t *stream, int64_t place, int64_t count) {
    return load<uint32_t>(stream + place / 8) >> (place % 8) & ((uint32_t{1} << count) - 1);
  }

  // The values of a code whose bits begin at `place` of a stream of `bytes` bytes.
  void read_code(const TrellisCode &code, const uint8_t *stream, int64_t bytes, int64_t place) {
    uint32_t rows[STEPS_AT_ONCE];
    float *out = rest.data();
    for (int64_t begin = 0; begin < code.steps; begin += STEPS_AT_ONCE) {
      const int64_t count = std::min(STEPS_AT_ONCE, code.steps - begin);
#if POCKETREC_LANES == 16
      const int32_t skipped = code.first[begin];
      const int64_t byte = (place + skipped) / 8, left = bytes - byte;
      const __mmask64 there = _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(std::min<int64_t>(left, 64)));
      const __m512i words = _mm512_maskz_loadu_epi8(there, stream + byte);
      const __m512i bit = _mm512_add_epi32(_mm512_loadu_si512(code.first + begin),
                                           _mm512_set1_epi32(static_cast<int32_t>((place + skipped) % 8) - skipped));
      const __m512i word = _mm512_mullo_epi32(_mm512_srli_epi32(bit, 4), _mm512_set1_epi32(0x10001));
      const __m512i pair = _mm512_permutexvar_epi16(_mm512_add_epi32(word, _mm512_set1_epi32(0x10000)), words);
      const __m512i window = _mm512_and_si512(_mm512_srlv_epi32(pair, _mm512_and_si512(bit, _mm512_set1_epi32(15))),
                                              _mm512_loadu_si512(code.mask + begin));
      const __m512i row = _mm512_sllv_epi32(window, _mm512_loadu_si512(code.shift + begin));
      if (code.span == 1) {
        const __mmask16 lanes = static_cast<__mmask16>(_bzhi_u32(0xffff, static_cast<unsigned>(count)));
        const __m512 zero = _mm512_setzero_ps();
        _mm512_storeu_ps(out + begin, _mm512_mask_i32gather_ps(zero, lanes, row, code.table, 4));
        continue;
      }
      _mm512_storeu_si512(rows, row);
#else
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = place + code.first[begin + i];
        rows[i] = (load<uint32_t>(stream + at / 8) >> (at % 8) & code.mask[begin + i]) << code.shift[begin + i];
      }
#endif
      for (int64_t i = 0; i < count; ++i) {
        const float *values = code.table + rows[i] * code.span;
        for (int64_t v = 0; v < code.span; ++v) out[(begin + i) * code.span + v] = values[v];
      }
    }
  }

  void read_centroid(const uint8_t *numbers) {
    float *out = shape.data();
    int64_t c = 0;
#if POCKETREC_LANES == 16
    const __m512 levels = _mm512_loadu_ps(table.levels);
    for (; c + 32 <= table.width; c += 32) {
      const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i *>(numbers + c / 2));
      const __m256i wide = _mm256_cvtepu8_epi16(pairs);
      const __m256i split = _mm256_or_si256(_mm256_and_si256(wide, _mm256_set1_epi16(15)), _mm256_slli_epi16(_mm256_srli_epi16(wide, 4), 8));
      const __m512i low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(split));
      const __m512i high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(split, 1));
      _mm512_storeu_ps(out + c, _mm512_permutexvar_ps(low, levels));
      _mm512_storeu_ps(out + c + 16, _mm512_permutexvar_ps(high, levels));
    }
#endif
    for (; c < table.width; ++c) out[c] = table.levels[numbers[c / 2] >> (c % 2 * 4) & 15];
  }

  // The vector of an item without its gain, in `shape`; the gain.
  float read_item(int64_t item) {
    const Part &index = *table.index;
    const int64_t group = item / GROUP_ROWS, inner = item % GROUP_ROWS;
    int64_t number = 0, place = item * index.record[0];
    if (index.planes > 0) {
      const int64_t size = std::min<int64_t>(PLANE_BYTES, (table.items - group * GROUP_ROWS + 7) / 8);
      const uint8_t *planes = index.class_planes + group * index.planes * PLANE_BYTES;
      for (int p = 0; p < index.planes; ++p) number |= (planes[p * size + inner / 8] >> inner % 8 & 1) << p;
      place = load<uint32_t>(index.offsets + 4 * group) + bits_before(index, planes, size, inner);
    }
    const uint8_t *stream = table.stream;
    int64_t bytes = table.code_bytes;
    if (place < 0 || place + index.record[number] > 8 * (bytes - SPARE_BYTES)) {
      stream = nothing.data();
      bytes = static_cast<int64_t>(nothing.size());
      place = 0;
    }
    const float gain = table.gains[bits(stream, place, GAIN_BITS)];
    place += GAIN_BITS;
    read_centroid(table.centroids + bits(stream, place, table.shapes) * table.centroid_bytes);
    const TrellisCode &code = table.codes[number];
    if (code.steps == 0) return gain;
    place += table.shapes;
    const float scale = table.item_scales[bits(stream, place, SCALE_BITS)];
    read_code(code, stream, bytes, place + SCALE_BITS);
    for (int64_t c = 0; c < table.width; ++c) shape[c] += scale * rest[c];
    return gain;
  }

  void read_user(int64_t user, float *out) {
    int64_t place = table.user_start + user * table.user_bits;
    std::fill_n(out, table.width, 0.0f);
    for (int64_t k = 0; k < table.atoms; ++k, place += table.places) {
      if (table.candidate_count == 0) continue;
      const int64_t number = bits(table.stream, place, table.places);
      read_item(table.candidates[std::min(number, table.candidate_count - 1)]);
      Floats squares{};  // zeros stand behind the last column
      for (int64_t c = 0; c < table.width; c += LANES) {
        const Floats part = load_floats(shape.data() + c);
        squares += part * part;
      }
      float square = 0;
      for (int lane = 0; lane < LANES; ++lane) square += squares[lane];
      const float factor = table.coefficients[k] / std::max(std::sqrt(square), 1e-20f);
      for (int64_t c = 0; c < table.width; ++c) out[c] += factor * shape[c];
    }
    const TrellisCode &code = table.codes[8];
    if (code.steps == 0) return;
    const float scale = table.user_scales[bits(table.stream, place, SCALE_BITS)];
    read_code(code, table.stream, table.code_bytes, place + SCALE_BITS);
    for (int64_t c = 0; c < table.width; ++c) out[c] += scale * rest[c];
  }

  void read(int64_t row, int32_t field, float *out) {
    const int64_t local = row - table.first;
    if (local < 0 || local >= table.users + table.items) {
      std::memcpy(out, table.absent + field * table.width, table.width * sizeof(float));
    } else if (local < table.users) {
      read_user(local, out);
    } else {
      const float gain = read_item(local - table.users);
      for (int64_t c = 0; c < table.width; ++c) out[c] = gain * shape[c];
    }
  }
};

int trellis(const TrellisTask &task, int threads) {
  const Trellis &table = *task.table;
  for (int64_t c = 0; c < task.columns; ++c)
    if (task.fields[c] < 0 || task.fields[c] >= table.field_count) return BAD_INDEX;
  std::atomic<int> status{OK};
  parallel(threads, task.count, CHUNK, [&](int64_t begin, int64_t end) {
    try {
      TrellisReader reader(table);
      for (int64_t i = begin; i < end; ++i)
        reader.read(task.rows[i], task.fields[i % task.columns], task.out + i * table.width);
    } catch (const std::bad_alloc &) {
      status.store(NO_MEMORY);
    }
  });
  return status.load();
}

constexpr int64_t WIDEST_SPAN = 8;

// What the search holds of one row: beams, candidates, and where each beam came from.
struct BeamSearch {
  struct Candidate {
    float cost;
    int32_t number;  // beam * choices + code
  };

  const Beam &task;
  const int64_t steps, choices, low_states;
  std::vector<float> values;  // (low_states, choices, span): the table, codes of one past together
  std::vector<float> pulls, costs;
  std::vector<int32_t> states, origins;
  std::vector<Candidate> candidates;

  explicit BeamSearch(const Beam &search)
      : task(search), steps((task.width + task.span - 1) / task.span), choices(int64_t{1} << task.bits),
        low_states(int64_t{1} << (task.memory - task.bits)), values(low_states * choices * task.span),
        pulls(2 * task.beams * task.width), costs(2 * task.beams), states(2 * task.beams), origins(steps * task.beams),
        candidates(task.beams * choices) {
    for (int64_t low = 0; low < low_states; ++low)
      for (int64_t code = 0; code < choices; ++code)
        for (int64_t v = 0; v < task.span; ++v)
          values[(low * choices + code) * task.span + v] = task.table[(low + code * low_states) * task.span + v];
  }

  // Costs of all codes after one beam.
  void extend(int64_t row, int64_t first, int64_t span, int64_t beam, float cost, int64_t state, const float *pull) {
    const float *target = task.rows + row * task.width + first, *weights = task.weights + row * task.width + first;
    const float *upper = task.upper + (row * task.width + first) * task.width + first;
    const float *value = values.data() + (state >> task.bits) * choices * task.span;
    const float scale = task.scales[row];
    Candidate *out = candidates.data() + beam * choices;
    if (task.span == 1) {
      const float wanted = target[0] + pull[first], weight = weights[0];
      for (int64_t code = 0; code < choices; ++code) {
        const float error = wanted - scale * value[code];
        out[code] = {cost + weight * error * error, static_cast<int32_t>(beam * choices + code)};
      }
      return;
    }
    for (int64_t code = 0; code < choices; ++code, value += task.span) {
      float errors[WIDEST_SPAN], total = cost;
      for (int64_t v = 0; v < span; ++v) {
        errors[v] = target[v] - scale * value[v];
        float felt = errors[v] + pull[first + v];
        for (int64_t w = 0; w < v; ++w) felt += upper[w * task.width + v] * errors[w];
        total += weights[v] * felt * felt;
      }
      out[code] = {total, static_cast<int32_t>(beam * choices + code)};
    }
  }

  // A candidate as beam `next`: its state, its cost, and what its errors do to later coordinates.
  void keep(int64_t row, int64_t first, int64_t span, const Candidate &chosen, int64_t from, int64_t next) {
    const int64_t parent = from + chosen.number / choices, code = chosen.number % choices;
    const int64_t low = states[parent] >> task.bits;
    states[next] = static_cast<int32_t>(low + code * low_states);
    costs[next] = chosen.cost;
    const float *value = values.data() + (low * choices + code) * task.span, *pull = pulls.data() + parent * task.width;
    const float *upper = task.upper + (row * task.width + first) * task.width;
    float *out = pulls.data() + next * task.width;
    const int64_t begin = first + span;
    std::memcpy(out + begin, pull + begin, (task.width - begin) * sizeof(float));
    for (int64_t v = 0; v < span; ++v, upper += task.width) {
      const float error = task.rows[row * task.width + first + v] - task.scales[row] * value[v];
      for (int64_t i = begin; i < task.width; ++i) out[i] += error * upper[i];
    }
  }

  void run(int64_t row) {
    int64_t from = 0, kept = 1;
    states[0] = 0;
    costs[0] = 0;
    std::fill_n(pulls.begin(), task.width, 0.0f);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t first = step * task.span, span = std::min(task.span, task.width - first), count = kept * choices;
      for (int64_t beam = 0; beam < kept; ++beam)
        extend(row, first, span, beam, costs[from + beam], states[from + beam], pulls.data() + (from + beam) * task.width);
      const int64_t wanted = step + 1 == steps ? 1 : std::min(task.beams, count);
      if (wanted < count)
        std::nth_element(candidates.begin(), candidates.begin() + wanted - 1, candidates.begin() + count,
                         [](const Candidate &a, const Candidate &b) { return a.cost < b.cost; });
      const int64_t next = task.beams - from;
      for (int64_t beam = 0; beam < wanted; ++beam) {
        origins[step * task.beams + beam] = candidates[beam].number;
        keep(row, first, span, candidates[beam], from, next + beam);
      }
      from = next;
      kept = wanted;
    }
    int64_t beam = 0;
    for (int64_t step = steps - 1; step >= 0; --step) {
      const int32_t origin = origins[step * task.beams + beam];
      task.codes[row * steps + step] = static_cast<uint8_t>(origin % choices);
      beam = origin / choices;
    }
  }
};

int beam(const Beam &task) {
  try {
    BeamSearch search(task);
    for (int64_t row = 0; row < task.count; ++row) search.run(row);
  } catch (const std::bad_alloc &) {
    return NO_MEMORY;
  }
  return OK;
}
