// Inner loops of PocketRec: packed look-up, graph propagation, top-k. Plain C ABI, no dependency but threads.
//
// The file includes itself once per instruction set: the first pass holds what all share and the exported functions,
// the inner passes (POCKETREC_ISA defined) compile the loops into one namespace each. The processor picks at run time.
// Every function returns OK, or an error code when an index is out of range; nothing is ever read out of bounds.

#ifndef POCKETREC_ISA

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define POCKETREC_X86 1
#include <immintrin.h>
#else
#define POCKETREC_X86 0
#endif

#if defined(_WIN32)
#define POCKETREC_EXPORT extern "C" __declspec(dllexport)
#else
#define POCKETREC_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

enum Status : int { OK = 0, BAD_INDEX = 1, NO_MEMORY = 2 };

enum Number : int { FP32 = 0, FP16 = 1, INT8 = 2, BF16 = 3 };

// Runs work(begin, end) over [0, count) in pieces of `grain`; the pieces do not depend on the number of threads.
template <class Work>
void parallel(int threads, int64_t count, int64_t grain, const Work &work) {
  std::atomic<int64_t> next{0};
  auto loop = [&] {
    for (int64_t begin; (begin = next.fetch_add(grain)) < count;) work(begin, std::min(begin + grain, count));
  };
  std::vector<std::thread> helpers;
  const int64_t wanted = std::min<int64_t>(threads, (count + grain - 1) / grain) - 1;
  try {
    for (int64_t i = 0; i < wanted; ++i) helpers.emplace_back(loop);
  } catch (const std::system_error &) {
    // Fewer threads than asked for: this one does the rest.
  }
  loop();
  for (auto &helper : helpers) helper.join();
}

// Compressed sparse rows without values: an adjacency, or the items that each user has seen.
struct Csr {
  const int64_t *indptr;
  const int32_t *indices;
  int64_t rows, columns, entries;

  bool row(int64_t i, int64_t *begin, int64_t *end) const {
    if (i < 0 || i >= rows) return false;
    *begin = indptr[i];
    *end = indptr[i + 1];
    return 0 <= *begin && *begin <= *end && *end <= entries;
  }
};

struct Propagation {
  Csr graph;
  const void *x;           // (columns, width)
  void *out;               // (count, width)
  const float *left;       // (rows), or null
  const float *right;      // (columns), or null
  const int64_t *subset;   // (count), or null for all rows
  int64_t count, width;
};

struct TopK {
  const float *users;      // (user_count, width)
  const float *panels;     // items, packed by pack_panels
  int64_t user_count, item_count, width, k;
  Csr seen;
  int32_t *ids;            // (user_count, k)
  float *scores;           // (user_count, k)
};

}  // namespace

#define POCKETREC_ISA portable
#define POCKETREC_LANES 4
#include "_kernel.cpp"
#undef POCKETREC_ISA
#undef POCKETREC_LANES

#if POCKETREC_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")
#endif
#define POCKETREC_ISA avx2
#define POCKETREC_LANES 8
#include "_kernel.cpp"
#undef POCKETREC_ISA
#undef POCKETREC_LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx2,fma,f16c,popcnt,bmi,bmi2")
#endif
#define POCKETREC_ISA avx512
#define POCKETREC_LANES 16
#include "_kernel.cpp"
#undef POCKETREC_ISA
#undef POCKETREC_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // POCKETREC_X86

namespace {

enum Level : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

Level detect() {
#if POCKETREC_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vpopcntdq"))
    return AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return AVX2;
#endif
  return PORTABLE;
}

std::atomic<int> level{detect()};

}  // namespace

#if POCKETREC_X86
#define POCKETREC_DISPATCH(function, ...)                                     \
  switch (level.load(std::memory_order_relaxed)) {                            \
    case AVX512: return avx512::function(__VA_ARGS__);                        \
    case AVX2: return avx2::function(__VA_ARGS__);                            \
    default: return portable::function(__VA_ARGS__);                          \
  }
#else
#define POCKETREC_DISPATCH(function, ...) return portable::function(__VA_ARGS__);
#endif

// Instruction set in use: 0 portable, 1 AVX2, 2 AVX-512. `pocketrec_limit` caps it (tests compare all of them).
POCKETREC_EXPORT int pocketrec_level() { return level.load(); }
POCKETREC_EXPORT void pocketrec_limit(int most) { level.store(std::min<int>(most, detect())); }

// out[i] = left[r] * sum over neighbours j of r of right[j] * x[j], with r = subset[i] (or i).
POCKETREC_EXPORT int pocketrec_spmm(const int64_t *indptr, const int32_t *indices, int64_t rows, int64_t columns,
                                    int64_t entries, const void *x, int x_number, void *out, int out_number,
                                    const float *left, const float *right, const int64_t *subset, int64_t count,
                                    int64_t width, int threads) {
  const Propagation task{{indptr, indices, rows, columns, entries}, x, out, left, right, subset, count, width};
  POCKETREC_DISPATCH(spmm, task, x_number, out_number, threads)
}

// The k best items per user by inner product, without the seen ones; ties go to the smaller id; -1 where none is left.
POCKETREC_EXPORT int pocketrec_topk(const float *users, int64_t user_count, const float *items, int64_t item_count,
                                    int64_t width, const int64_t *seen_indptr, const int32_t *seen_indices,
                                    int64_t seen_entries, int64_t k, int32_t *ids, float *scores, int threads) {
  const Csr seen{seen_indptr, seen_indices, user_count, item_count, seen_entries};
  const TopK task{users, nullptr, user_count, item_count, width, k, seen, ids, scores};
  POCKETREC_DISPATCH(topk, task, items, threads)
}

#else  // POCKETREC_ISA: one instruction set

namespace {
namespace POCKETREC_ISA {

constexpr int LANES = POCKETREC_LANES;
typedef float Floats __attribute__((vector_size(4 * POCKETREC_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * POCKETREC_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * POCKETREC_LANES)));

template <class T>
inline T load(const void *from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

inline Floats load_floats(const float *from) { return load<Floats>(from); }

inline Floats load_floats(const uint16_t *from) {
  const Words wide = __builtin_convertvector(load<Halves>(from), Words) << 16;
  return load<Floats>(&wide);
}

inline float load_float(const float *from) { return *from; }

inline float load_float(const uint16_t *from) {
  const uint32_t wide = static_cast<uint32_t>(*from) << 16;
  return load<float>(&wide);
}

inline void store_float(float *to, float value) { *to = value; }

// Nearest bfloat16, ties to even; NaN stays NaN.
inline void store_float(uint16_t *to, float value) {
  const uint32_t bits = load<uint32_t>(&value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  *to = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void store_floats(float *to, Floats values) { std::memcpy(to, &values, sizeof(values)); }

inline void store_floats(uint16_t *to, Floats values) {
  for (int lane = 0; lane < LANES; ++lane) store_float(to + lane, values[lane]);
}

// ---- propagation ----------------------------------------------------------------------------------------------------

constexpr int64_t AHEAD = 12;  // edges between a prefetch and its use

// Sums VECTORS * LANES columns, starting at `column`, over the edges [begin, end).
template <int VECTORS, class In, class Out>
inline void sum_columns(const Propagation &task, int64_t begin, int64_t end, int64_t column, float scale, Out *out) {
  const In *x = static_cast<const In *>(task.x) + column;
  const int32_t *indices = task.graph.indices;
  Floats sums[VECTORS] = {};
  for (int64_t e = begin; e < end; ++e) {
    if (e + AHEAD < task.graph.entries) {
      const uint32_t next = static_cast<uint32_t>(indices[e + AHEAD]);
      const char *line = reinterpret_cast<const char *>(x + static_cast<int64_t>(next) * task.width);
      for (int64_t byte = 0; byte < static_cast<int64_t>(VECTORS * LANES * sizeof(In)); byte += 64)
        __builtin_prefetch(line + byte);
    }
    const int64_t j = indices[e];
    const In *from = x + j * task.width;
    if (task.right == nullptr) {
      for (int v = 0; v < VECTORS; ++v) sums[v] += load_floats(from + v * LANES);
    } else {
      for (int v = 0; v < VECTORS; ++v) sums[v] += load_floats(from + v * LANES) * task.right[j];
    }
  }
  for (int v = 0; v < VECTORS; ++v) store_floats(out + column + v * LANES, sums[v] * scale);
}

template <class In, class Out>
inline void sum_column(const Propagation &task, int64_t begin, int64_t end, int64_t column, float scale, Out *out) {
  float sum = 0;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t j = task.graph.indices[e];
    const float value = load_float(static_cast<const In *>(task.x) + j * task.width + column);
    sum += task.right == nullptr ? value : value * task.right[j];
  }
  store_float(out + column, sum * scale);
}

template <class In, class Out>
bool sum_row(const Propagation &task, int64_t i) {
  const int64_t r = task.subset == nullptr ? i : task.subset[i];
  int64_t begin, end;
  if (!task.graph.row(r, &begin, &end)) return false;
  for (int64_t e = begin; e < end; ++e) {
    const int32_t j = task.graph.indices[e];
    if (j < 0 || j >= task.graph.columns) return false;
  }
  const float scale = task.left == nullptr ? 1.0f : task.left[r];
  Out *out = static_cast<Out *>(task.out) + i * task.width;
  constexpr int TILE = 64 / LANES;
  int64_t column = 0;
  for (; column + TILE * LANES <= task.width; column += TILE * LANES)
    sum_columns<TILE, In>(task, begin, end, column, scale, out);
  for (; column + LANES <= task.width; column += LANES) sum_columns<1, In>(task, begin, end, column, scale, out);
  for (; column < task.width; ++column) sum_column<In>(task, begin, end, column, scale, out);
  return true;
}

template <class In, class Out>
int spmm_rows(const Propagation &task, int threads) {
  std::atomic<int> status{OK};
  parallel(threads, task.count, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!sum_row<In, Out>(task, i)) status.store(BAD_INDEX);
  });
  return status.load();
}

int spmm(const Propagation &task, int x_number, int out_number, int threads) {
  if (x_number == BF16) {
    if (out_number == BF16) return spmm_rows<uint16_t, uint16_t>(task, threads);
    return spmm_rows<uint16_t, float>(task, threads);
  }
  if (out_number == BF16) return spmm_rows<float, uint16_t>(task, threads);
  return spmm_rows<float, float>(task, threads);
}

// ---- top-k ----------------------------------------------------------------------------------------------------------

constexpr int64_t USERS = 64;             // users that share one pass over the items
constexpr int GROUP = LANES == 16 ? 8 : 4;  // users in registers
constexpr int PANEL = 2 * LANES;          // items in registers

// Items (item_count, width) -> (panels, width, PANEL), zeros behind the last item.
inline void pack_panels(const float *items, int64_t item_count, int64_t width, float *panels) {
  const int64_t count = (item_count + PANEL - 1) / PANEL;
  for (int64_t p = 0; p < count; ++p)
    for (int64_t c = 0; c < width; ++c)
      for (int lane = 0; lane < PANEL; ++lane) {
        const int64_t item = p * PANEL + lane;
        *panels++ = item < item_count ? items[item * width + c] : 0.0f;
      }
}

// Bit i: values[i] > bound.
inline uint32_t above(Floats values, float bound) {
#if POCKETREC_LANES == 16
  return _mm512_cmp_ps_mask(load<__m512>(&values), _mm512_set1_ps(bound), _CMP_GT_OQ);
#elif POCKETREC_LANES == 8
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(load<__m256>(&values), _mm256_set1_ps(bound), _CMP_GT_OQ)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < LANES; ++lane) bits |= static_cast<uint32_t>(values[lane] > bound) << lane;
  return bits;
#endif
}

// One user's best items so far, best first; equal scores keep the order of arrival, which is the order of ids.
struct Best {
  float *scores;
  int32_t *ids;
  int64_t k, count;
  const int32_t *seen_begin, *seen_end;

  float bound() const { return count < k ? -std::numeric_limits<float>::infinity() : scores[k - 1]; }

  void offer(float score, int32_t id) {
    if (!(score > bound()) || std::binary_search(seen_begin, seen_end, id)) return;
    int64_t place = count < k ? count++ : k - 1;
    for (; place > 0 && score > scores[place - 1]; --place) {
      scores[place] = scores[place - 1];
      ids[place] = ids[place - 1];
    }
    scores[place] = score;
    ids[place] = id;
  }
};

inline void score_panel(const TopK &task, const float *const *users, const float *panel, Floats (&sums)[GROUP][2]) {
  for (int g = 0; g < GROUP; ++g) sums[g][0] = sums[g][1] = Floats{};
  for (int64_t c = 0; c < task.width; ++c) {
    const Floats low = load_floats(panel + c * PANEL), high = load_floats(panel + c * PANEL + LANES);
    for (int g = 0; g < GROUP; ++g) {
      sums[g][0] += users[g][c] * low;
      sums[g][1] += users[g][c] * high;
    }
  }
}

inline void offer_all(const TopK &task, int64_t first, Floats sums, Best *best) {
  for (uint32_t bits = above(sums, best->bound()); bits != 0; bits &= bits - 1) {
    const int lane = __builtin_ctz(bits);
    if (first + lane < task.item_count) best->offer(sums[lane], static_cast<int32_t>(first + lane));
  }
}

// Best items of users [begin, end), at most USERS of them.
inline bool topk_block(const TopK &task, int64_t begin, int64_t end) {
  Best best[USERS];
  for (int64_t u = begin; u < end; ++u) {
    int64_t from = 0, to = 0;
    if (task.seen.indptr != nullptr && !task.seen.row(u, &from, &to)) return false;
    const int32_t *seen = task.seen.indices;
    best[u - begin] = {task.scores + u * task.k, task.ids + u * task.k, task.k, 0, seen + from, seen + to};
  }
  const int64_t panels = (task.item_count + PANEL - 1) / PANEL;
  for (int64_t p = 0; p < panels; ++p) {
    const float *panel = task.panels + p * task.width * PANEL;
    for (int64_t g = begin; g < end; g += GROUP) {
      const float *users[GROUP];
      for (int i = 0; i < GROUP; ++i) users[i] = task.users + std::min(g + i, end - 1) * task.width;
      Floats sums[GROUP][2];
      score_panel(task, users, panel, sums);
      for (int i = 0; i < GROUP && g + i < end; ++i)
        for (int half = 0; half < 2; ++half)
          offer_all(task, p * PANEL + half * LANES, sums[i][half], &best[g + i - begin]);
    }
  }
  for (Best *b = best; b < best + (end - begin); ++b)
    for (int64_t place = b->count; place < task.k; ++place) {
      b->scores[place] = -std::numeric_limits<float>::infinity();
      b->ids[place] = -1;
    }
  return true;
}

int topk(const TopK &unpacked, const float *items, int threads) {
  TopK task = unpacked;
  const int64_t panels = (task.item_count + PANEL - 1) / PANEL;
  std::unique_ptr<float[]> packed(new (std::nothrow) float[panels * PANEL * task.width + 1]);
  if (packed == nullptr) return NO_MEMORY;
  pack_panels(items, task.item_count, task.width, packed.get());
  task.panels = packed.get();
  std::atomic<int> status{OK};
  parallel(threads, task.user_count, USERS, [&](int64_t begin, int64_t end) {
    if (!topk_block(task, begin, end)) status.store(BAD_INDEX);
  });
  return status.load();
}

}  // namespace POCKETREC_ISA
}  // namespace

#endif  // POCKETREC_ISA
