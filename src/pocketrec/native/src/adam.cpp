// Lazy row Adam: the functions. A source of its own, since its loops may ignore floating-point traps.

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-trapping-math", "no-math-errno")
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "abi.h"

#define POCKETREC_LOOPS "adam.inl"
#include "isa.h"

int64_t pocketrec_adam_distinct(const int64_t *ids, int64_t count, int32_t *mark, int64_t limit,
                                int64_t *rows, int32_t *place) {
  int64_t found = 0;
  bool inside = true;
  for (int64_t i = 0; i < count && inside; ++i) {
    inside = ids[i] >= 0 && ids[i] < limit;
    if (!inside) break;
    int32_t &seen = mark[ids[i]];
    if (seen < 0) {
      rows[found] = ids[i];
      seen = static_cast<int32_t>(found++);
    }
    place[i] = seen;
  }
  for (int64_t i = 0; i < found; ++i) mark[rows[i]] = -1;
  return inside ? found : -1;
}

void pocketrec_adam_catch_up(const pocketrec::Rows *table, const pocketrec::Rule *rule, const pocketrec::Curves *curves,
                             const int64_t *rows, int64_t count, int64_t step) {
  POCKETREC_DISPATCH(catch_up, table, rule, curves, rows, count, step)
}

void pocketrec_adam_update(const pocketrec::Rows *table, const pocketrec::Rule *rule, const int64_t *rows,
                           int64_t count, const int32_t *place, int64_t places, const float *gradients, float *sums,
                           int64_t step) {
  POCKETREC_DISPATCH(update, table, rule, rows, count, place, places, gradients, sums, step)
}
