// Look-up in tables of layout `trellis`; compiled once per instruction set.

constexpr int64_t GAIN_BITS = 4, SCALE_BITS = 2;
constexpr int64_t STEPS_AT_ONCE = 16;
constexpr int64_t WINDOWS = 32;         // bytes that hold as many windows of any code
constexpr int64_t LONGEST_RECORD = 32;  // bytes, and another one for each column

// What rows are sums of, ROWS of them at a time, in passes that each ask for what the next one reads.
struct TrellisChunk {
  static constexpr int64_t ROWS = 64;
  static constexpr int64_t CODES = 9;  // of the items' classes, and of users

  // An item's vector, or what a user has beside items.
  struct Piece {
    int64_t item, number, place;
    const uint8_t *stream, *centroid;
    int64_t bytes;
    float gain, scale;
  };

  const TrellisTask &task;
  const Trellis &table;
  const int64_t stride, most;      // floats of a piece, and pieces of a row
  std::unique_ptr<Piece[]> pieces;
  std::unique_ptr<float[]> values;
  std::vector<uint8_t> nothing;    // the record of an item whose place lies outside (a damaged file)
  std::unique_ptr<int32_t[]> order; // pieces of each code, (CODES, ROWS * most)
  int64_t coded[CODES];            // how many
  int64_t first[ROWS + 1];         // of each row's pieces

  explicit TrellisChunk(const TrellisTask &asked)
      : task(asked), table(*asked.table), stride((table.width + 31) / 16 * 16),
        most((table.candidate_count > 0 ? table.atoms : 0) + 1), pieces(new Piece[ROWS * most]),
        values(new float[ROWS * most * stride]), order(new int32_t[CODES * ROWS * most]) {}

  // Remembers a code that is to be read; no branch depends on whether it is empty.
  void plan(const Piece *piece, int64_t number) {
    order[number * ROWS * most + coded[number]] = static_cast<int32_t>(piece - pieces.get());
    coded[number] += table.codes[number].steps > 0;
  }

  static uint32_t bits(const uint8_t *stream, int64_t place, int64_t count) {
    return load<uint32_t>(stream + place / 8) >> (place % 8) & ((uint32_t{1} << count) - 1);
  }

  int64_t user_place(int64_t user) const { return table.user_start + user * table.user_bits; }

  const uint8_t *planes_of(int64_t item) const {
    return table.index->class_planes + item / GROUP_ROWS * table.index->planes * PLANE_BYTES;
  }

  void find(const int64_t *rows, int64_t count) {
    int64_t next = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t local = rows[i] - table.first;
      first[i] = next;
      if (local < 0 || local >= table.users + table.items) continue;
      if (local >= table.users) {
        pieces[next++].item = local - table.users;
        continue;
      }
      next += most;
      const int64_t place = user_place(local);
      __builtin_prefetch(table.stream + place / 8);
      __builtin_prefetch(table.stream + (place + table.user_bits) / 8 + WINDOWS);
    }
    first[count] = next;
  }

  void read_users(const int64_t *rows, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t local = rows[i] - table.first;
      if (local < 0 || local >= table.users) continue;
      int64_t place = user_place(local);
      Piece *piece = pieces.get() + first[i];
      for (int64_t k = 0; k + 1 < most; ++k, place += table.places) {
        const int64_t number = bits(table.stream, place, table.places);
        (piece++)->item = table.candidates[std::min(number, table.candidate_count - 1)];
      }
      place = user_place(local) + table.atoms * table.places;
      const bool there = table.codes[CODES - 1].steps > 0;
      const float scale = there ? table.user_scales[bits(table.stream, place, SCALE_BITS)] : 0.0f;
      *piece = {MISSING, CODES - 1, place + SCALE_BITS, table.stream, nullptr, table.code_bytes, 1.0f, scale};
      plan(piece, CODES - 1);
    }
    for (Piece *piece = pieces.get(); piece < pieces.get() + first[count]; ++piece) {
      if (piece->item < 0) continue;
      __builtin_prefetch(table.index->offsets + 4 * (piece->item / GROUP_ROWS));
      __builtin_prefetch(planes_of(piece->item));
      __builtin_prefetch(planes_of(piece->item) + table.index->planes * PLANE_BYTES - 1);
    }
  }

  void locate(Piece *piece) {
    const Part &index = *table.index;
    const int64_t group = piece->item / GROUP_ROWS, inner = piece->item % GROUP_ROWS;
    int64_t number = 0, place = piece->item * index.record[0];
    if (index.planes > 0) {
      const int64_t size = std::min<int64_t>(PLANE_BYTES, (table.items - group * GROUP_ROWS + 7) / 8);
      const uint8_t *planes = planes_of(piece->item);
      for (int p = 0; p < index.planes; ++p) number |= (planes[p * size + inner / 8] >> inner % 8 & 1) << p;
      place = load<uint32_t>(index.offsets + 4 * group) + bits_before(index, planes, size, inner);
    }
    plan(piece, number);
    piece->number = number;
    piece->place = place;
    piece->stream = table.stream;
    piece->bytes = table.code_bytes;
    if (place < 0 || place + index.record[number] > 8 * (table.code_bytes - SPARE_BYTES)) {
      nothing.resize(LONGEST_RECORD + table.width + 64);
      piece->place = 0;
      piece->stream = nothing.data();
      piece->bytes = static_cast<int64_t>(nothing.size());
    }
    __builtin_prefetch(piece->stream + piece->place / 8);
    __builtin_prefetch(piece->stream + (piece->place + index.record[number]) / 8 + WINDOWS);
  }

  // The scale is zero where nothing is coded.
  void read_head(Piece *piece) const {
    piece->gain = table.gains[bits(piece->stream, piece->place, GAIN_BITS)];
    piece->place += GAIN_BITS;
    piece->centroid = table.centroids + bits(piece->stream, piece->place, table.shapes) * table.centroid_bytes;
    __builtin_prefetch(piece->centroid);
    piece->place += table.shapes;
    const float scale = table.item_scales[bits(piece->stream, piece->place, SCALE_BITS)];
    piece->scale = table.codes[piece->number].steps > 0 ? scale : 0.0f;
    piece->place += SCALE_BITS;
  }

  // Values of all pieces, one code after the other, so that the code's table stays in cache.
  void read_codes() {
    for (int64_t c = 0; c < CODES; ++c) {
      const TrellisCode &code = table.codes[c];
      for (int64_t i = 0; i < coded[c]; ++i) {
        const Piece &piece = pieces[order[c * ROWS * most + i]];
        float *out = values.get() + order[c * ROWS * most + i] * stride;
        if (code.span == 1) read_code<1>(code, piece, out);
        else if (code.span == 2) read_code<2>(code, piece, out);
        else read_code<4>(code, piece, out);
      }
    }
  }

  // WIDE: columns of the code's table.
  template <int WIDE>
  static void read_code(const TrellisCode &code, const Piece &piece, float *out) {
    alignas(64) int32_t rows[STEPS_AT_ONCE];
    for (int64_t begin = 0; begin < code.steps; begin += STEPS_AT_ONCE) {
      const int64_t count = std::min(STEPS_AT_ONCE, code.steps - begin);
#if POCKETREC_LANES == 16
      const int64_t place = piece.place + code.first[begin], byte = place >> 3, left = piece.bytes - byte;
      const __mmask32 there = _bzhi_u32(~uint32_t{0}, static_cast<unsigned>(std::min(left, WINDOWS)));
      const __m512i words = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(there, piece.stream + byte));
      const __m512i bit = _mm512_add_epi32(_mm512_loadu_si512(code.first + begin),
                                           _mm512_set1_epi32(static_cast<int32_t>(place & 7) - code.first[begin]));
      const __m512i word = _mm512_mullo_epi32(_mm512_srli_epi32(bit, 4), _mm512_set1_epi32(0x10001));
      const __m512i pair = _mm512_permutexvar_epi16(_mm512_add_epi32(word, _mm512_set1_epi32(0x10000)), words);
      const __m512i window = _mm512_and_si512(_mm512_srlv_epi32(pair, _mm512_and_si512(bit, _mm512_set1_epi32(15))),
                                              _mm512_loadu_si512(code.mask + begin));
      _mm512_store_si512(rows, _mm512_sllv_epi32(window, _mm512_loadu_si512(code.shift + begin)));
#else
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = piece.place + code.first[begin + i];
        rows[i] = (load<uint32_t>(piece.stream + (at >> 3)) >> (at & 7) & code.mask[begin + i]) << code.shift[begin + i];
      }
#endif
      for (int64_t i = 0; i < count; ++i, out += code.span)
        std::memcpy(out, code.table + rows[i] * WIDE, WIDE * sizeof(float));
    }
  }

  Floats shared(const uint8_t *numbers, int64_t column) const {
#if POCKETREC_LANES == 16
    const __mmask16 there = static_cast<__mmask16>((1u << std::min<int64_t>(table.centroid_bytes - column / 2, 8)) - 1u);
    const __m512i pairs = _mm512_castsi128_si512(_mm_maskz_loadu_epi8(there, numbers + column / 2));
    const __m512i both = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), pairs);
    const __m512i turn = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __mmask16 lanes = static_cast<__mmask16>((1u << std::min<int64_t>(table.width - column, 16)) - 1u);
    const __m512 found = _mm512_maskz_permutexvar_ps(lanes, _mm512_srlv_epi32(both, turn), _mm512_loadu_ps(table.levels));
    return load<Floats>(&found);
#else
    Floats found{};
    for (int64_t c = column; c < std::min(column + LANES, table.width); ++c)
      found[c - column] = table.levels[numbers[c / 2] >> (c % 2 * 4) & 15];
    return found;
#endif
  }

  // A piece's vector, without the gain, over its code's values; its squared length.
  float finish(const Piece &piece, float *own) const {
    Floats squares{};
    const Floats none{};
    for (int64_t c = 0; c < table.width; c += LANES) {
      Floats part = piece.scale != 0 ? piece.scale * load_some(own + c, table.width - c) : none;
      if (piece.centroid != nullptr) part += shared(piece.centroid, c);
      store_floats(own + c, part);
      squares += part * part;
    }
    return sum_lanes(squares);
  }

  void write(int64_t begin, int64_t end, int32_t field, float *out) {
    if (begin == end) return copy_floats(table.absent + field * table.width, table.width, out);
    const bool user = pieces[end - 1].item < 0;
    for (int64_t p = begin; p < end; ++p) {
      const float square = finish(pieces[p], values.get() + p * stride);
      if (user && p + 1 < end) pieces[p].gain = table.coefficients[p - begin] / std::max(std::sqrt(square), 1e-20f);
    }
    for (int64_t c = 0; c < table.width; c += LANES) {
      Floats sum{};
      for (int64_t p = begin; p < end; ++p) sum += pieces[p].gain * load_floats(values.get() + p * stride + c);
      store_some(out + c, sum, table.width - c);
    }
  }

  void read(int64_t begin, int64_t count) {
    const int64_t *rows = task.rows + begin;
    std::fill(coded, coded + CODES, 0);
    find(rows, count);
    read_users(rows, count);
    Piece *const end = pieces.get() + first[count];
    for (Piece *piece = pieces.get(); piece < end; ++piece)
      if (piece->item >= 0) locate(piece);
    for (Piece *piece = pieces.get(); piece < end; ++piece)
      if (piece->item >= 0) read_head(piece);
    read_codes();
    for (int64_t i = 0; i < count; ++i)
      write(first[i], first[i + 1], task.fields[(begin + i) % task.columns], task.out + (begin + i) * table.width);
  }
};

int trellis(const TrellisTask &task, int threads) {
  const Trellis &table = *task.table;
  for (int64_t c = 0; c < task.columns; ++c)
    if (task.fields[c] < 0 || task.fields[c] >= table.field_count) return BAD_INDEX;
  std::atomic<int> status{OK};
  parallel(threads, task.count, CHUNK, [&](int64_t begin, int64_t end) {
    try {
      TrellisChunk chunk(task);
      for (int64_t i = begin; i < end; i += TrellisChunk::ROWS) chunk.read(i, std::min(TrellisChunk::ROWS, end - i));
    } catch (const std::bad_alloc &) {
      status.store(NO_MEMORY);
    }
  });
  return status.load();
}
