// Graph propagation: products with a sparse matrix; compiled once per instruction set.

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
