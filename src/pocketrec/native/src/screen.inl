// Exact top-k by screening with eight-bit integers, for processors with VNNI; compiled once, behind the loops of
// AVX-512, some of which it calls.
//
// A user x = s c + e and an item y = t b + f, with c and b vectors of eight-bit codes, satisfy
//     |x . y - s t (c . b)| <= |s c| |f| + |e| |y|,
// and c . b costs a quarter of x . y. Only pairs whose upper bound beats the user's k-th best score so far are scored in
// fp32, in the order of sums of the other instruction sets: the lists are the same, bit for bit.

namespace vnni {

using avx512::Best;

constexpr int64_t ITEMS = 16;        // items in a register, one lane each
constexpr int64_t CODES = 4;         // codes of an item that one instruction multiplies
constexpr int64_t LINE = ITEMS * CODES;
constexpr int64_t USERS = 128;       // users that share one pass over the items
constexpr int64_t GROUP = 8;         // users in registers
constexpr int64_t TILE = 256 << 10;  // bytes of item codes that stay in cache
constexpr int64_t MAX_WIDTH = 1 << 15;

// Vectors as codes: x = scale * code + e with |e| <= error; |x| and |scale * code| are at most norm.
struct Coded {
  std::unique_ptr<uint8_t[]> codes;
  std::unique_ptr<float[]> scale, error, norm;

  bool allocate(int64_t count, int64_t bytes) {
    codes.reset(new (std::nothrow) uint8_t[bytes]());
    for (auto *values : {&scale, &error, &norm}) values->reset(new (std::nothrow) float[count]());
    return codes != nullptr && scale != nullptr && error != nullptr && norm != nullptr;
  }

  // False where the bounds would leave the range of floats: not finite, huge or tiny.
  bool encode(const float *x, int64_t width, int64_t i, int8_t *out) {
    float top = 0;
    bool sound = true;
    for (int64_t c = 0; c < width; ++c) {
      sound = sound && std::fabs(x[c]) < 1e15f;
      top = std::max(top, std::fabs(x[c]));
    }
    if (!sound || (top > 0 && top < 1e-15f)) return false;
    const float step = top / 127, inverse = top > 0 ? 127 / top : 0;
    double missed = 0, exact = 0, coded = 0;
    for (int64_t c = 0; c < width; ++c) {
      out[c] = static_cast<int8_t>(std::nearbyint(x[c] * inverse));
      const double back = static_cast<double>(step) * out[c];
      missed += (x[c] - back) * (x[c] - back);
      exact += static_cast<double>(x[c]) * x[c];
      coded += back * back;
    }
    scale[i] = step;
    error[i] = static_cast<float>(std::sqrt(missed) * 1.0001);
    norm[i] = static_cast<float>(std::sqrt(std::max(exact, coded)) * 1.0001);
    return true;
  }
};

struct Screen {
  const TopK &task;
  const float *item_vectors;
  int64_t chunks;  // instructions per item
  Coded users;     // (user_count, chunks * CODES), signed
  Coded items;     // (groups, chunks, ITEMS, CODES), unsigned: code + 128

  int64_t groups() const { return (task.item_count + 2 * ITEMS - 1) / (2 * ITEMS) * 2; }

  int8_t *user_codes(int64_t u) { return reinterpret_cast<int8_t *>(users.codes.get()) + u * chunks * CODES; }

  bool allocate() {
    return users.allocate(task.user_count, task.user_count * chunks * CODES) &&
           items.allocate(groups() * ITEMS, groups() * chunks * LINE);
  }

  bool encode() {
    for (int64_t u = 0; u < task.user_count; ++u)
      if (!users.encode(task.users + u * task.width, task.width, u, user_codes(u))) return false;
    int8_t codes[MAX_WIDTH] = {};
    for (int64_t i = 0; i < task.item_count; ++i) {
      if (!items.encode(item_vectors + i * task.width, task.width, i, codes)) return false;
      uint8_t *lane = items.codes.get() + i / ITEMS * chunks * LINE + i % ITEMS * CODES;
      for (int64_t c = 0; c < chunks * CODES; ++c) lane[c / CODES * LINE + c % CODES] = static_cast<uint8_t>(codes[c] + 128);
    }
    return true;
  }
};

// One user in a pass: the best items so far, the user's side of the bound, and candidates that wait for their scores.
struct Reader {
  Best best;
  const float *vector;
  const int32_t *codes;  // CODES of them in each
  float inverse, lift_error, lift_norm;
  int32_t shift;
  int waiting;
  int32_t candidates[ITEMS];

  float bar() const { return best.bound() * inverse; }

  void open(Screen &screen, int64_t u) {
    const int64_t width = screen.task.width;
    vector = screen.task.users + u * width;
    codes = reinterpret_cast<const int32_t *>(screen.user_codes(u));
    const float scale = screen.users.scale[u], norm = screen.users.norm[u];
    const float rounding = static_cast<float>(width + 16) * 1.2e-7f;
    inverse = scale > 0 ? 1 / scale : 1;
    lift_error = norm * inverse;
    lift_norm = (screen.users.error[u] + rounding * norm) * inverse;
    shift = 0;
    for (int64_t c = 0; c < width; ++c) shift += 128 * screen.user_codes(u)[c];
    waiting = 0;
  }

  void add(const Screen &screen, int32_t item) {
    candidates[waiting++] = item;
    if (waiting == ITEMS) score(screen);
  }

  void score(const Screen &screen) {
    if (waiting == 0) return;
    const int64_t width = screen.task.width;
    const float *rows[ITEMS];
    float sums[ITEMS] = {};
    for (int i = 0; i < ITEMS; ++i) rows[i] = screen.item_vectors + candidates[i < waiting ? i : 0] * width;
    for (int64_t c = 0; c < width; ++c)
      for (int i = 0; i < ITEMS; ++i) sums[i] = __builtin_fmaf(vector[c], rows[i][c], sums[i]);
    for (int i = 0; i < waiting; ++i) best.offer(sums[i], candidates[i]);
    waiting = 0;
  }
};

// c . b + 128 sum(c) - shift for GROUP users and two registers of items.
inline void multiply(const Reader *readers, const uint8_t *lines, int64_t chunks, __m512i (&sums)[GROUP][2]) {
  for (int u = 0; u < GROUP; ++u) sums[u][0] = sums[u][1] = _mm512_set1_epi32(-readers[u].shift);
  for (int64_t c = 0; c < chunks; ++c) {
    const __m512i low = _mm512_loadu_si512(lines + c * LINE), high = _mm512_loadu_si512(lines + (chunks + c) * LINE);
    for (int u = 0; u < GROUP; ++u) {
      const __m512i codes = _mm512_set1_epi32(readers[u].codes[c]);
      sums[u][0] = _mm512_dpbusd_epi32(sums[u][0], low, codes);
      sums[u][1] = _mm512_dpbusd_epi32(sums[u][1], high, codes);
    }
  }
}

// Items [first, first + ITEMS) that may beat the user's bar.
inline uint32_t promising(const Screen &screen, const Reader &reader, int64_t first, __m512i sums) {
  const __m512 scale = _mm512_loadu_ps(&screen.items.scale[first]);
  const __m512 error = _mm512_loadu_ps(&screen.items.error[first]);
  const __m512 norm = _mm512_loadu_ps(&screen.items.norm[first]);
  __m512 most = _mm512_mul_ps(_mm512_set1_ps(reader.lift_norm), norm);
  most = _mm512_fmadd_ps(_mm512_set1_ps(reader.lift_error), error, most);
  most = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), scale, most);
  return _mm512_cmp_ps_mask(most, _mm512_set1_ps(reader.bar()), _CMP_GT_OQ);
}

inline void screen_group(const Screen &screen, Reader *readers, int64_t count, int64_t from, int64_t to) {
  for (int64_t g = from; g < to; g += 2) {
    __m512i sums[GROUP][2];
    multiply(readers, screen.items.codes.get() + g * screen.chunks * LINE, screen.chunks, sums);
    for (int64_t u = 0; u < count; ++u)
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t first = (g + half) * ITEMS;
        for (uint32_t bits = promising(screen, readers[u], first, sums[u][half]); bits != 0; bits &= bits - 1) {
          const int64_t item = first + __builtin_ctz(bits);
          if (item < screen.task.item_count) readers[u].add(screen, static_cast<int32_t>(item));
        }
      }
  }
}

bool screen_block(Screen &screen, int64_t begin, int64_t end) {
  Best best[USERS];
  Reader readers[USERS + GROUP] = {};
  if (!avx512::open_lists(screen.task, begin, end, best)) return false;
  for (int64_t u = begin; u < end; ++u) {
    readers[u - begin].open(screen, u);
    readers[u - begin].best = best[u - begin];
  }
  for (int64_t u = end - begin; u < USERS + GROUP; ++u) readers[u].codes = readers[0].codes;
  const int64_t tile = std::max<int64_t>(1, TILE / (2 * screen.chunks * LINE)) * 2;
  for (int64_t from = 0; from < screen.groups(); from += tile)
    for (int64_t u = 0; u < end - begin; u += GROUP)
      screen_group(screen, readers + u, std::min(GROUP, end - begin - u), from, std::min(from + tile, screen.groups()));
  for (int64_t u = 0; u < end - begin; ++u) {
    readers[u].score(screen);
    best[u] = readers[u].best;
  }
  avx512::close_lists(best, end - begin);
  return true;
}

int topk(const TopK &task, const float *items, int threads) {
  if (task.width < 1 || task.width > MAX_WIDTH) return avx512::topk(task, items, threads);
  Screen screen{task, items, (task.width + CODES - 1) / CODES, {}, {}};
  if (!screen.allocate()) return NO_MEMORY;
  if (!screen.encode()) return avx512::topk(task, items, threads);
  std::atomic<int> status{OK};
  parallel(threads, task.user_count, USERS, [&](int64_t begin, int64_t end) {
    if (!screen_block(screen, begin, end)) status.store(BAD_INDEX);
  });
  return status.load();
}

}  // namespace vnni
