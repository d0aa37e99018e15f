// Inner loops of PocketRec: packed look-up, graph propagation, top-k, perceptrons over pairs. Plain C ABI, no dependency but threads.
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
  const void *add;         // (count, width) of out's type, or null
  int64_t count, width;
};

// One block of a packed table; a null pointer is an array that the layout leaves out.
struct Block {
  int64_t start, stop, present, values_count;
  int32_t left, width, number;
  int32_t shift;           // an offset every 2 ** shift present rows
  const uint8_t *presence;
  const uint8_t *rank;     // uint32, perhaps unaligned in the file
  const uint8_t *masks;    // without offsets: a record for each row, its uint32 offset and then its mask
  const uint8_t *offsets;  // uint32
  const uint8_t *values;
  const uint8_t *scale;    // float (fields, width)
};

struct Lookup {
  const Block *blocks;
  int64_t block_count;
  const float *fill, *absent;  // (field_count, width)
  int64_t field_count, width;
  const int64_t *rows;         // (count), column after column of one sample, then the next sample
  const int32_t *fields;       // (columns)
  int64_t count, columns;
  float *out;                  // (count, width)
};

// The rows of one field in a table of layout `transform`; its small tables are padded to an even number of directions.
struct Part {
  int64_t first, rows;            // file rows
  int64_t code_start, code_bytes; // first bit of its codes, and bytes of all codes
  int64_t stride;                 // entries of a direction of the basis: a multiple of 16
  int64_t directions;             // one past the last one with a code
  int32_t planes, classes;
  const uint8_t *class_planes;
  const uint8_t *offsets;         // uint32
  const uint8_t *codes;
  const int32_t *weights;         // (8): of sets of planes
  const int32_t *record;          // (8): bits of a row
  const int32_t *widest;          // (padded): bits of a direction's longest code
  const uint32_t *bits;           // (padded, 8): of a code, by direction and class
  const uint32_t *mask;           // (padded, 8)
  const uint32_t *scale;          // (padded, 8): a float
  const float *basis;             // (padded, stride)
  const float *last;              // (padded): its last column
};

struct Transform {
  const Part *parts;              // by rising rows
  int64_t part_count;
  const float *levels;
  const float *fill, *absent;     // (field_count, width)
  int64_t field_count, width;
  const int64_t *rows;            // (count)
  const int32_t *fields;          // (columns)
  int64_t count, columns;
  float *out;                     // (count, width)
};

// One trellis code, its windows step by step; `padded` entries each.
struct TrellisCode {
  const float *table;             // (2 ** memory, 1, 2 or 4), the first `span` of which count
  const int32_t *first;           // (padded): first bit of the window
  const int32_t *mask, *shift;    // (padded): window -> row of the table
  int64_t steps, span;            // no steps: nothing is coded
};

// A table of layout `trellis`.
struct Trellis {
  int64_t first, users, items;    // file rows from `first` on
  int64_t user_start, user_bits;  // first bit of the users' records, and bits of one
  int64_t code_bytes, candidate_count, centroid_bytes, shapes, places, atoms;
  const Part *index;              // planes, offsets and record sizes of items
  const TrellisCode *codes;       // (9): of each class, and of users
  const uint8_t *stream, *centroids;
  const uint32_t *candidates;     // (candidate_count)
  const float *levels;            // (16): values of a centroid's numbers
  const float *gains, *item_scales, *user_scales, *coefficients;
  const float *fill, *absent;     // (field_count, width)
  int64_t field_count, width;
};

struct TrellisTask {
  const Trellis *table;
  const int64_t *rows;            // (count)
  const int32_t *fields;          // (columns)
  int64_t count, columns;
  float *out;                     // (count, width)
};

// Rows to code by a trellis code, see beam.py.
struct Beam {
  const float *table;             // (2 ** memory, span)
  int64_t bits, span, memory;
  const float *rows;              // (count, width)
  const float *scales;            // (count)
  const float *upper;             // (count, width, width): unit upper triangular
  const float *weights;           // (count, width)
  int64_t count, width, beams;
  uint8_t *codes;                 // (count, steps)
};

struct TopK {
  const float *users;      // (user_count, width)
  const float *panels;     // items, packed by pack_panels
  int64_t user_count, item_count, width, k;
  Csr seen;
  int32_t *ids;            // (user_count, k)
  float *scores;           // (user_count, k)
};

struct Tower {
  const float *users, *items;              // (user_count, width), (item_count, width): their parts of the first layer
  const float *user_counts, *item_counts;  // what the first layer's sum is divided by, or null
  const float *bias;                       // (width)
  int64_t user_count, item_count, width;
  const float *weights;                    // of each further layer its weight (outputs, inputs), then its bias
  const int64_t *widths;                   // (layers + 1); the last is 1
  int64_t layers;
  float *out;                              // (user_count, item_count)
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx512vnni,avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq,avx512vnni,avx2,fma,f16c,popcnt,bmi,bmi2")
#endif
#include "_screen.cpp"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // POCKETREC_X86

namespace {

enum Level : int { PORTABLE = 0, AVX2 = 1, AVX512 = 2, VNNI = 3 };

Level detect() {
#if POCKETREC_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vpopcntdq"))
    return __builtin_cpu_supports("avx512vnni") ? VNNI : AVX512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return AVX2;
#endif
  return PORTABLE;
}

std::atomic<int> level{detect()};

template <class Task>
Task asked(Task task, const int64_t *rows, const int32_t *fields, int64_t count, int64_t columns, float *out) {
  task.rows = rows;
  task.fields = fields;
  task.count = count;
  task.columns = columns;
  task.out = out;
  return task;
}

}  // namespace

#if POCKETREC_X86
#define POCKETREC_DISPATCH(function, ...)                                     \
  switch (level.load(std::memory_order_relaxed)) {                            \
    case VNNI:                                                                \
    case AVX512: return avx512::function(__VA_ARGS__);                        \
    case AVX2: return avx2::function(__VA_ARGS__);                            \
    default: return portable::function(__VA_ARGS__);                          \
  }
#else
#define POCKETREC_DISPATCH(function, ...) return portable::function(__VA_ARGS__);
#endif

// Instruction set in use: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with VNNI. `pocketrec_limit` caps it (for tests).
POCKETREC_EXPORT int pocketrec_level() { return level.load(); }
POCKETREC_EXPORT void pocketrec_limit(int most) { level.store(std::min<int>(most, detect())); }

// out[i] = add[i] + left[r] * sum over neighbours j of r of right[j] * x[j], with r = subset[i] (or i).
POCKETREC_EXPORT int pocketrec_spmm(const int64_t *indptr, const int32_t *indices, int64_t rows, int64_t columns,
                                    int64_t entries, const void *x, int x_number, void *out, int out_number,
                                    const float *left, const float *right, const int64_t *subset, const void *add,
                                    int64_t count, int64_t width, int threads) {
  const Propagation task{{indptr, indices, rows, columns, entries}, x, out, left, right, subset, add, count, width};
  POCKETREC_DISPATCH(spmm, task, x_number, out_number, threads)
}

// Look-ups write out (count, width); rows out of range are absent, a field out of range is an error. The tables' members
// that say what is asked for are not read.
POCKETREC_EXPORT int pocketrec_lookup(const Lookup *table, const int64_t *rows, const int32_t *fields, int64_t count,
                                      int64_t columns, float *out, int threads) {
  const Lookup task = asked(*table, rows, fields, count, columns, out);
  POCKETREC_DISPATCH(lookup, task, threads)
}

// In a table of layout `transform`.
POCKETREC_EXPORT int pocketrec_transform(const Transform *table, const int64_t *rows, const int32_t *fields,
                                         int64_t count, int64_t columns, float *out, int threads) {
  const Transform task = asked(*table, rows, fields, count, columns, out);
  POCKETREC_DISPATCH(transform, task, threads)
}

// In a table of layout `trellis`.
POCKETREC_EXPORT int pocketrec_trellis(const Trellis *table, const int64_t *rows, const int32_t *fields, int64_t count,
                                       int64_t columns, float *out, int threads) {
  const TrellisTask task{table, rows, fields, count, columns, out};
  POCKETREC_DISPATCH(trellis, task, threads)
}

// Codes (count, steps) of rows under quadratic losses, by beam search.
POCKETREC_EXPORT int pocketrec_beam(const float *table, int64_t bits, int64_t span, int64_t memory, const float *rows,
                                    const float *scales, const float *upper, const float *weights, int64_t count,
                                    int64_t width, int64_t beams, uint8_t *codes) {
  const Beam task{table, bits, span, memory, rows, scales, upper, weights, count, width, beams, codes};
  POCKETREC_DISPATCH(beam, task)
}

// The k best items per user by inner product, without the seen ones; ties go to the smaller id; -1 where none is left.
POCKETREC_EXPORT int pocketrec_topk(const float *users, int64_t user_count, const float *items, int64_t item_count,
                                    int64_t width, const int64_t *seen_indptr, const int32_t *seen_indices,
                                    int64_t seen_entries, int64_t k, int32_t *ids, float *scores, int threads) {
  const Csr seen{seen_indptr, seen_indices, user_count, item_count, seen_entries};
  const TopK task{users, nullptr, user_count, item_count, width, k, seen, ids, scores};
#if POCKETREC_X86
  if (level.load(std::memory_order_relaxed) == VNNI) return vnni::topk(task, items, threads);
#endif
  POCKETREC_DISPATCH(topk, task, items, threads)
}

// Perceptron scores (user_count, item_count) of all pairs, from the two parts of the first layer.
POCKETREC_EXPORT int pocketrec_tower(const float *users, const float *items, const float *user_counts,
                                     const float *item_counts, const float *bias, int64_t user_count,
                                     int64_t item_count, int64_t width, const float *weights, const int64_t *widths,
                                     int64_t layers, float *out, int threads) {
  const Tower task{users, items, user_counts, item_counts, bias, user_count, item_count, width, weights, widths,
                   layers, out};
  POCKETREC_DISPATCH(tower, task, threads)
}

#else  // POCKETREC_ISA: one instruction set

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // from inside the compiler's own intrinsics
#endif

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
#if POCKETREC_LANES == 16
  const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#elif POCKETREC_LANES == 8
  const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16);
#else
  const Words wide = __builtin_convertvector(load<Halves>(from), Words) << 16;
#endif
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
#if POCKETREC_LANES == 16
  const Words bits = load<Words>(&values);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words narrow = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
  const __m256i halves = _mm512_cvtepi32_epi16(load<__m512i>(&narrow));
  std::memcpy(to, &halves, sizeof(halves));
#else
  for (int lane = 0; lane < LANES; ++lane) store_float(to + lane, values[lane]);
#endif
}

// ---- packed look-up -------------------------------------------------------------------------------------------------

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

// ---- propagation ----------------------------------------------------------------------------------------------------

constexpr int64_t AHEAD = 12;  // edges between a prefetch and its use

// Sums VECTORS * LANES columns, starting at `column`, over the edges [begin, end).
template <int VECTORS, class In, class Out>
inline void sum_columns(const Propagation &task, int64_t begin, int64_t end, int64_t column, float scale,
                        const Out *add, Out *out) {
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
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t at = column + v * LANES;
    store_floats(out + at, add == nullptr ? sums[v] * scale : sums[v] * scale + load_floats(add + at));
  }
}

template <class In, class Out>
inline void sum_column(const Propagation &task, int64_t begin, int64_t end, int64_t column, float scale,
                       const Out *add, Out *out) {
  float sum = 0;
  for (int64_t e = begin; e < end; ++e) {
    const int64_t j = task.graph.indices[e];
    const float value = load_float(static_cast<const In *>(task.x) + j * task.width + column);
    sum += task.right == nullptr ? value : value * task.right[j];
  }
  store_float(out + column, add == nullptr ? sum * scale : sum * scale + load_float(add + column));
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
  const Out *add = task.add == nullptr ? nullptr : static_cast<const Out *>(task.add) + i * task.width;
  constexpr int TILE = 64 / LANES;
  int64_t column = 0;
  for (; column + TILE * LANES <= task.width; column += TILE * LANES)
    sum_columns<TILE, In>(task, begin, end, column, scale, add, out);
  for (; column + LANES <= task.width; column += LANES) sum_columns<1, In>(task, begin, end, column, scale, add, out);
  for (; column < task.width; ++column) sum_column<In>(task, begin, end, column, scale, add, out);
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

// Empty lists of users [begin, end).
inline bool open_lists(const TopK &task, int64_t begin, int64_t end, Best *best) {
  for (int64_t u = begin; u < end; ++u) {
    int64_t from = 0, to = 0;
    if (task.seen.indptr != nullptr && !task.seen.row(u, &from, &to)) return false;
    const int32_t *seen = task.seen.indices;
    best[u - begin] = {task.scores + u * task.k, task.ids + u * task.k, task.k, 0, seen + from, seen + to};
  }
  return true;
}

// Places that no item was left for.
inline void close_lists(Best *best, int64_t count) {
  for (Best *b = best; b < best + count; ++b)
    for (int64_t place = b->count; place < b->k; ++place) {
      b->scores[place] = -std::numeric_limits<float>::infinity();
      b->ids[place] = -1;
    }
}

// Best items of users [begin, end), at most USERS of them.
inline bool topk_block(const TopK &task, int64_t begin, int64_t end) {
  Best best[USERS];
  if (!open_lists(task, begin, end, best)) return false;
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
  close_lists(best, end - begin);
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

#include "_tower.cpp"
#include "_transform.cpp"
#include "_trellis.cpp"

}  // namespace POCKETREC_ISA
}  // namespace

#endif  // POCKETREC_ISA
