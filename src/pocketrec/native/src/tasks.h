// What one call works on, and how threads share it: the same for all instruction sets.

#ifndef POCKETREC_TASKS_H
#define POCKETREC_TASKS_H

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "abi.h"

namespace pocketrec {

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

// What is asked of a table of layout `trellis`.
struct TrellisTask {
  const Trellis *table;
  const int64_t *rows;            // (count)
  const int32_t *fields;          // (columns)
  int64_t count, columns;
  float *out;                     // (count, width)
};

// Rows to code by a trellis code, see beam.inl.
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

template <class Task>
Task asked(Task task, const int64_t *rows, const int32_t *fields, int64_t count, int64_t columns, float *out) {
  task.rows = rows;
  task.fields = fields;
  task.count = count;
  task.columns = columns;
  task.out = out;
  return task;
}

}  // namespace pocketrec

#endif  // POCKETREC_TASKS_H
