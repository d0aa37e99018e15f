// The library's functions: each call goes to the loops of the best instruction set. No dependency but threads.
//
// Every function returns OK, or an error code where an index is out of range; nothing is ever read out of bounds.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "abi.h"
#include "digest.h"
#include "tasks.h"

#define POCKETREC_LOOPS "loops.inl"
#define POCKETREC_VNNI_LOOPS "screen.inl"
#include "isa.h"

int pocketrec_level() { return pocketrec::level.load(); }

void pocketrec_limit(int most) { pocketrec::level.store(std::min<int>(most, pocketrec::detect())); }

uint64_t pocketrec_abi(const char *name) {
  for (const auto &known : pocketrec::DIGESTS)
    if (std::strcmp(known.name, name) == 0) return known.digest;
  return 0;
}

int pocketrec_spmm(const int64_t *indptr, const int32_t *indices, int64_t rows, int64_t columns, int64_t entries,
                   const void *x, int x_number, void *out, int out_number, const float *left, const float *right,
                   const int64_t *subset, const void *add, int64_t count, int64_t width, int threads) {
  const Propagation task{{indptr, indices, rows, columns, entries}, x, out, left, right, subset, add, count, width};
  POCKETREC_DISPATCH(spmm, task, x_number, out_number, threads)
}

int pocketrec_lookup(const Lookup *table, const int64_t *rows, const int32_t *fields, int64_t count, int64_t columns,
                     float *out, int threads) {
  const Lookup task = asked(*table, rows, fields, count, columns, out);
  POCKETREC_DISPATCH(lookup, task, threads)
}

int pocketrec_transform(const Transform *table, const int64_t *rows, const int32_t *fields, int64_t count,
                        int64_t columns, float *out, int threads) {
  const Transform task = asked(*table, rows, fields, count, columns, out);
  POCKETREC_DISPATCH(transform, task, threads)
}

int pocketrec_trellis(const Trellis *table, const int64_t *rows, const int32_t *fields, int64_t count, int64_t columns,
                      float *out, int threads) {
  const TrellisTask task{table, rows, fields, count, columns, out};
  POCKETREC_DISPATCH(trellis, task, threads)
}

int pocketrec_beam(const float *table, int64_t bits, int64_t span, int64_t memory, const float *rows,
                   const float *scales, const float *upper, const float *weights, int64_t count, int64_t width,
                   int64_t beams, uint8_t *codes) {
  const Beam task{table, bits, span, memory, rows, scales, upper, weights, count, width, beams, codes};
  POCKETREC_DISPATCH(beam, task)
}

int pocketrec_topk(const float *users, int64_t user_count, const float *items, int64_t item_count, int64_t width,
                   const int64_t *seen_indptr, const int32_t *seen_indices, int64_t seen_entries, int64_t k,
                   int32_t *ids, float *scores, int threads) {
  const Csr seen{seen_indptr, seen_indices, user_count, item_count, seen_entries};
  const TopK task{users, nullptr, user_count, item_count, width, k, seen, ids, scores};
#if POCKETREC_X86
  if (pocketrec::level.load(std::memory_order_relaxed) == pocketrec::VNNI) return vnni::topk(task, items, threads);
#endif
  POCKETREC_DISPATCH(topk, task, items, threads)
}

int pocketrec_tower(const float *users, const float *items, const float *user_counts, const float *item_counts,
                    const float *bias, int64_t user_count, int64_t item_count, int64_t width, const float *weights,
                    const int64_t *widths, int64_t layers, float *out, int threads) {
  const Tower task{users, items, user_counts, item_counts, bias, user_count, item_count, width, weights, widths,
                   layers, out};
  POCKETREC_DISPATCH(tower, task, threads)
}
